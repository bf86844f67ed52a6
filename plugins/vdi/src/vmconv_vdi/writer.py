"""Writes VDI images: a pure function from the guest's table to the table of the output file.

    header | block map | slack | blocks, 1 MiB each

Blocks may come in any order but follow each other without a gap, since VirtualBox and QEMU put the next new block right
after as many as there are. So all of them have one phase modulo the filesystem's block; the beginning of the data area,
which may be at any sector, is chosen to give them the phase that most of the payload has in its source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from vmconv import blocks
from vmconv.errors import PlanError
from vmconv.extents import Column, Columns, Extents, Kind, cut
from vmconv.image import Image
from vmconv.layout import Layout, OutFile, Placement
from vmconv.sources import Blob, File
from vmconv_vdi import structs
from vmconv_vdi.options import Options

BLOCK = 1 << 20
"""Bytes of a block: the only size that QEMU reads."""

MAP_OFFSET = 512
MAX_BLOCKS = ((1 << 32) - BLOCK - MAP_OFFSET) // 4
"""Blocks whose map leaves the data area a place that 32 bits can say."""


def write(image: Image, options: Options, placement: Placement) -> Layout:
    """Returns the layout of a VDI image; raises `PlanError` when the disk has more blocks than the format can hold."""
    size = -(-image.size // structs.SECTOR) * structs.SECTOR
    count = -(-size // BLOCK)
    if count > MAX_BLOCKS:
        raise PlanError(
            f"vdi cannot hold {size} bytes: {count} blocks of {BLOCK} bytes, {MAX_BLOCKS} at most",
            hint=f"the largest disk has {MAX_BLOCKS * BLOCK} bytes",
        )
    guest = blocks.padded(image.flat, BLOCK)
    runs, place = _arrange(guest, options)
    used = int(runs.blocks.sum())
    data = -(-(MAP_OFFSET + count * 4) // BLOCK) * BLOCK + _phase(guest, min(placement.modulus, BLOCK))
    # The file ends with the disk when the disk's last block is the file's last: nobody asks for what is missing of it,
    # and the end of a source can be shared as the end of the target.
    end = data + used * BLOCK
    if used and _is_last_block_last(runs, place, count, used):
        end -= count * BLOCK - size
    block_map = _block_map(guest.size, runs, place, used)
    header = _header(image, options, size, count, used, data, _fingerprint(size, runs, place))
    rows, length = cut(guest, runs.first * BLOCK, runs.blocks * BLOCK, data + place)
    length = np.minimum(length, end - rows.start)
    inside = length > 0
    table = blocks.output_table(
        [(0, Blob("header", header)), (MAP_OFFSET, block_map)], guest, rows.take(inside), length[inside], end
    )
    return Layout((OutFile(table),))


def _arrange(guest: Extents, options: Options) -> tuple[blocks.Runs, Column]:
    """Returns the runs of blocks that get a place, and their places in the data area, bytes."""
    if options.static:
        count = guest.size // BLOCK
        one = min(count, 1)
        whole = np.zeros(one, dtype=np.int64)
        kind = np.full(one, Kind.DATA, dtype=np.uint8)
        return blocks.Runs(whole, np.full(one, count, dtype=np.int64), kind, np.ones(one, dtype=bool)), whole
    runs = blocks.whole_blocks(guest, BLOCK)
    payload = runs.take(runs.kind == Kind.DATA)
    placed = blocks.place(guest, payload, BLOCK, 0, 1)
    return payload.take(placed.run), placed.offset


def _phase(guest: Extents, modulus: int) -> int:
    """Returns the offset modulo `modulus` at which the data area begins when most payload can be referenced."""
    is_file = np.array([isinstance(source, File) for source in guest.sources] + [False])
    phase = (guest.offset - guest.start) % modulus
    chosen = (guest.kind == Kind.DATA) & is_file[guest.source] & (phase % structs.SECTOR == 0)
    if not chosen.any():
        return 0
    weight = np.bincount(phase[chosen] // structs.SECTOR, weights=guest.length[chosen])
    return int(np.argmax(weight)) * structs.SECTOR


def _is_last_block_last(runs: blocks.Runs, place: Column, count: int, used: int) -> bool:
    last = int(np.argmax(place))
    in_guest = int(runs.first[last] + runs.blocks[last]) == count
    return in_guest and int(place[last]) + int(runs.blocks[last]) * BLOCK == used * BLOCK


def _block_map(size: int, runs: blocks.Runs, place: Column, used: int) -> Blob:
    """Returns the block map of a disk of `size` bytes, computed when it is read."""
    order = np.argsort(runs.first, kind="stable")
    n = len(order)
    rows = Columns(
        (runs.first * BLOCK)[order],
        np.full(n, Kind.DATA, dtype=np.uint8),
        np.zeros(n, dtype=np.int32),
        place[order],
    )
    host = Extents.placed(size, rows, (runs.blocks * BLOCK)[order], [blocks.Output(used * BLOCK)])

    def compute(offset: int, length: int) -> bytes:
        first, last = offset // 4, -(-(offset + length) // 4)
        kind, _, where = host.units(BLOCK, first, last - first)
        entry = np.where(kind == Kind.DATA, where // BLOCK, structs.UNALLOCATED).astype("<u4").tobytes()
        return entry[offset - first * 4 :][:length]

    return Blob("block map", compute, size // BLOCK * 4)


def _fingerprint(size: int, runs: blocks.Runs, place: Column) -> bytes:
    """Returns bytes that stand for the disk's size and layout, for identities of disks that have none.

    A writer has neither clock nor chance: the same disk gets the same identity each time it is converted.
    """
    found = hashlib.sha256(b"vmconv vdi %d" % size)
    for column in (runs.first, runs.blocks, place):
        found.update(column.astype("<i8").tobytes())
    return found.digest()


def _made_uuid(seed: bytes) -> bytes:
    """Returns a UUID of version 8 (RFC 9562: made of what the maker likes), as the format stores it."""
    found = bytearray(hashlib.sha256(seed).digest()[:16])
    # Stored with its third field little-endian: the version is in the second of its bytes.
    found[7] = found[7] & 0x0F | 0x80
    found[8] = found[8] & 0x3F | 0x80
    return bytes(found)


def _header(image: Image, options: Options, size: int, count: int, used: int, data: int, fingerprint: bytes) -> bytes:
    identity = image.metadata.get("identity")
    uuid = structs.uuid_bytes(identity) if identity is not None else _made_uuid(fingerprint)
    fields: dict[str, Any] = {
        "cbHeader": structs.LONG_HEADER_LENGTH,
        "u32Type": structs.FIXED if options.static else structs.NORMAL,
        "fFlags": 0,
        "szComment": bytes(256),
        "offBlocks": MAP_OFFSET,
        "offData": data,
        "LegacyGeometry": _geometry(None),
        "u32Dummy": 0,
        "cbDisk": size,
        "cbBlock": BLOCK,
        "cbBlockExtra": 0,
        "cBlocks": count,
        "cBlocksAllocated": used,
        "uuidCreate": uuid,
        "uuidModify": _made_uuid(uuid + fingerprint),
        "uuidLinkage": structs.NIL_UUID,
        "uuidParentModify": structs.NIL_UUID,
    }
    text = b"<<< vmconv Virtual Disk Image >>>\n".ljust(64, b"\0")
    return b"".join(
        [
            structs.PreHeader.build({"szFileInfo": text, "u32Version": structs.VERSION}),
            structs.Header.build(fields),
            structs.Geometry.build(_geometry(image.metadata.get("geometry"))),
        ]
    )


def _geometry(geometry: Any) -> dict[str, int]:
    """Returns the fields of a geometry, all 0 when there is none; VirtualBox and QEMU want the sector size anyway."""
    fields = {"cCylinders": 0, "cHeads": 0, "cSectors": 0, "cbSector": structs.SECTOR}
    if geometry is not None:
        # Readers may state it as a model or as its fields.
        values = geometry if isinstance(geometry, Mapping) else vars(geometry)
        fields |= {"cCylinders": values["cylinders"], "cHeads": values["heads"], "cSectors": values["sectors"]}
    return fields
