"""Writes VDI images: a pure function from the guest's table to the table of the output file.

    header | block map | slack | blocks, 1 MiB each

Blocks may be in any order, but without gaps, because VirtualBox and QEMU compute the offset of a new block from the
number of blocks. So all blocks have one phase modulo the filesystem's block. The data area may begin at any sector: the
writer chooses the phase of most of the payload in its source.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vmconv.plugin import (
    Backing,
    Blob,
    Column,
    Columns,
    Extents,
    Geometry,
    Image,
    Kind,
    Layout,
    OutFile,
    Placeholder,
    Placement,
    PlanError,
    blocks,
    cut,
    derived,
)
from vmconv_vdi import structs
from vmconv_vdi.options import Options

BLOCK = 1 << 20
"""Bytes of a block: the only size that QEMU reads."""

MAP_OFFSET = 512
MAX_BLOCKS = ((1 << 32) - BLOCK - MAP_OFFSET) // 4
"""Limit of blocks: the data area must begin at an offset of 32 bits."""


class _Parent(NamedTuple):
    """The parent: its table, and its identity as the format stores it."""

    disk: Extents
    identity: bytes
    modified: bytes


class _Blocks(NamedTuple):
    """The blocks of the disk in contiguous runs; those `there` have an offset `place` in the data area, bytes."""

    runs: blocks.Runs
    there: npt.NDArray[np.bool_]
    place: Column

    @property
    def used(self) -> int:
        return int(self.runs.blocks[self.there].sum())


def write(image: Image, options: Options, placement: Placement, *, backing: Backing | None = None) -> Layout:
    """Returns the layout of a VDI image; raises `PlanError` if VDI cannot hold the disk or its parent."""
    size = -(-image.size // structs.SECTOR) * structs.SECTOR
    count = -(-size // BLOCK)
    if count > MAX_BLOCKS:
        raise PlanError(
            f"vdi cannot hold {size} bytes: {count} blocks of {BLOCK} bytes, {MAX_BLOCKS} at most",
            hint=f"the largest disk has {MAX_BLOCKS * BLOCK} bytes",
        )
    parent = _parent(image, size, options, backing) if backing else None
    guest = blocks.padded(blocks.grown(image, size, on_parent=parent is not None), BLOCK)
    if parent:
        guest = blocks.fill_partial_holes(guest, parent.disk.window(0, guest.size), BLOCK)
    found = _arrange(guest, options)
    data = -(-(MAP_OFFSET + count * 4) // BLOCK) * BLOCK + _phase(guest, min(placement.modulus, BLOCK))
    # The last block is whole even if the disk ends inside it, as in VirtualBox's own images: the disk may grow.
    end = data + found.used * BLOCK
    numbers = {"offData": data, "cbDisk": size, "cBlocks": count, "cBlocksAllocated": found.used}
    header = _header(image, options, parent, numbers, placement)
    block_map = _block_map(guest.size, found, hides=parent is not None)
    payload = found.runs.take(found.there)
    rows, length = cut(guest, payload.first * BLOCK, payload.blocks * BLOCK, data + found.place[found.there])
    table = blocks.output_table([(0, Blob("header", header)), (MAP_OFFSET, block_map)], guest, rows, length, end)
    return Layout((OutFile(table),))


def _parent(image: Image, size: int, options: Options, backing: Backing) -> _Parent:
    if options.static:
        raise PlanError("a static VDI cannot have a parent", hint="omit -o static=on")
    below = image.parent
    facts = below.details.get("format-specific", {}) if below else {}
    identity = below.facts.identity if below else None
    if below is None or facts.get("type") != "vdi" or identity is None:
        raise PlanError(
            f"the parent of a VDI must be a VDI with a UUID, {backing.reference} is not",
            hint="convert the parent to vdi first, or flatten the chain",
        )
    backing.refuse_other_size("VDI", size, below)
    modified = structs.uuid_bytes(facts["data"]["modification-uuid"])
    return _Parent(below.flat, structs.uuid_bytes(identity), modified)


def _arrange(guest: Extents, options: Options) -> _Blocks:
    if options.static:
        count = guest.size // BLOCK
        one = min(count, 1)
        whole = np.zeros(one, dtype=np.int64)
        there = np.ones(one, dtype=bool)
        kind = np.full(one, Kind.DATA, dtype=np.uint8)
        return _Blocks(blocks.Runs(whole, np.full(one, count, dtype=np.int64), kind, there), there, whole)
    runs = blocks.whole_blocks(guest, BLOCK)
    there = runs.kind == Kind.DATA
    placed = blocks.place(guest, runs.take(there), BLOCK, 0, 1)
    place = np.zeros(len(runs.first), dtype=np.int64)
    place[np.flatnonzero(there)[placed.run]] = placed.offset
    return _Blocks(runs, there, place)


def _phase(guest: Extents, modulus: int) -> int:
    """Returns the offset of the data area modulo `modulus` for which most payload can be referenced."""
    phase = (guest.offset - guest.start) % modulus
    chosen = guest.in_files() & (phase % structs.SECTOR == 0)
    if not chosen.any():
        return 0
    weight = np.bincount(phase[chosen] // structs.SECTOR, weights=guest.length[chosen])
    return int(np.argmax(weight)) * structs.SECTOR


def _block_map(size: int, found: _Blocks, *, hides: bool) -> Blob:
    """Returns the block map of a disk of `size` bytes, computed on reading; `hides`: zeros must hide the parent."""
    kind = np.where(found.there, np.uint8(Kind.DATA), found.runs.kind)
    rows = Columns(found.runs.first * BLOCK, kind, np.zeros(len(kind), dtype=np.int32), found.place)
    host = Extents(size, rows, [Placeholder("output", found.used * BLOCK)])

    def compute(offset: int, length: int) -> bytes:
        first, last = offset // 4, -(-(offset + length) // 4)
        kind, _, where = host.units(BLOCK, first, last - first)
        entry = np.where(kind == Kind.DATA, where // BLOCK, structs.UNALLOCATED)
        if hides:
            entry[kind == Kind.ZERO] = structs.DISCARDED
        return entry.astype("<u4").tobytes()[offset - first * 4 :][:length]

    return Blob("block map", compute, size // BLOCK * 4)


def _header(
    image: Image, options: Options, parent: _Parent | None, numbers: Mapping[str, int], placement: Placement
) -> bytes:
    fields: dict[str, Any] = {
        "cbHeader": structs.LONG_HEADER_LENGTH,
        "u32Type": structs.FIXED if options.static else structs.DIFFERENCING if parent else structs.NORMAL,
        "fFlags": 0,
        "szComment": bytes(256),
        "offBlocks": MAP_OFFSET,
        "LegacyGeometry": _geometry(None),
        "u32Dummy": 0,
        "cbBlock": BLOCK,
        "cbBlockExtra": 0,
        "uuidCreate": structs.uuid_bytes(placement.identity.hex()),
        "uuidModify": structs.uuid_bytes(derived(placement.content_identity, "vdi modification").hex()),
        "uuidLinkage": parent.identity if parent else structs.NIL_UUID,
        "uuidParentModify": parent.modified if parent else structs.NIL_UUID,
        **numbers,
    }
    text = b"<<< vmconv Virtual Disk Image >>>\n".ljust(64, b"\0")
    return b"".join(
        [
            structs.PreHeader.build({"szFileInfo": text, "u32Version": structs.VERSION}),
            structs.Header.build(fields),
            structs.Geometry.build(_geometry(image.facts.geometry)),
        ]
    )


def _geometry(geometry: Geometry | None) -> dict[str, int]:
    """Returns the fields of a geometry, all 0 if there is none, except for the sector size: VirtualBox and QEMU need
    it.
    """
    fields = {"cCylinders": 0, "cHeads": 0, "cSectors": 0, "cbSector": structs.SECTOR}
    if geometry is not None:
        fields |= {"cCylinders": geometry.cylinders, "cHeads": geometry.heads, "cSectors": geometry.sectors}
    return fields
