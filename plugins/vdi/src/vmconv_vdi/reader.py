"""Reads VDI images: the block map into the table of the guest's address space, in bounded slices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vmconv.plugin import (
    MAX_SIZE,
    Column,
    DiskFacts,
    Extents,
    File,
    Geometry,
    Image,
    ImageError,
    Kind,
    Kinds,
    Opener,
    PlanError,
    Structure,
    damaged,
)
from vmconv_vdi import structs
from vmconv_vdi.options import Options

if TYPE_CHECKING:
    from uuid import UUID

SLICE = 1 << 20
"""Entries of the block map in one slice."""

_QEMU_BLOCK = 1 << 20


@dataclass(frozen=True)
class Header:
    """A header, checked against the file and the format's limits; sizes are bytes."""

    file: File
    kind: int
    size: int
    block_size: int
    block_extra: int
    map_offset: int
    data_offset: int
    entries: int
    """Entries of the block map; some may lie past the end of the disk."""
    blocks_allocated: int
    geometry: tuple[int, int, int]
    comment: str
    uuid: bytes
    modified: bytes
    parent: bytes
    parent_modified: bytes

    @property
    def stride(self) -> int:
        """Distance of blocks in the data area, bytes."""
        return self.block_extra + self.block_size

    @property
    def blocks(self) -> int:
        """Blocks of the disk; the last one may reach past the disk's end."""
        return -(-self.size // self.block_size)

    @property
    def parent_reference(self) -> str | None:
        """The name to search for the parent; VirtualBox gives such names to differencing images."""
        return f"{{{structs.uuid_text(self.parent)}}}.vdi" if self.parent != structs.NIL_UUID else None


def read(file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
    """Returns the image in `file`. Snapshots of VirtualBox are separate images."""
    if snapshot is not None:
        raise ImageError(f"{file.name}: VDI images have no snapshots inside, {snapshot!r} was asked for")
    header = read_header(file)
    reference = header.parent_reference

    def load_guest() -> Extents:
        return Extents.from_units(header.block_size, header.size, _slices(header), [file])

    return Image(
        "vdi",
        file,
        header.size,
        load_guest,
        # Without a parent, QEMU's maps call zeros present.
        load_places=None if reference else lambda: load_guest().without_holes(),
        shows_holes=lambda _: header.kind == structs.FIXED,
        load_parent=(lambda: _parent(header, opener)) if reference else None,
        parent_reference=reference,
        parent_format="vdi" if reference else None,
        facts=_facts(header),
        losses=(f"comment {header.comment!r}",) if header.comment else (),
        details=lambda: _details(header),
    )


def options_of(image: Image) -> Options:
    """Returns the options with which the writer makes an image like this one."""
    header = read_header(image.file)
    if header.block_size != _QEMU_BLOCK or header.block_extra:
        raise PlanError(f"{image.file.name}: blocks of {header.stride} bytes, which vmconv does not write")
    identity = image.facts.identity
    return Options(static=header.kind == structs.FIXED, identity=identity.bytes if identity else None)


def head_of(file: File) -> Structure:
    """Returns the header's structure, for errors about its fields."""
    return Structure(file, structs.Header, structs.HEADER_OFFSET)


def read_header(file: File) -> Header:
    """Returns the header of the image in `file`. Raises `ImageError` with the invalid field."""
    _check_version(file)
    head = head_of(file)
    raw = head.parse()
    head.limit("cbHeader", raw.cbHeader, head.length, structs.MAX_HEADER)
    head.limit("u32Type", raw.u32Type, structs.NORMAL, structs.DIFFERENCING)
    head.limit_power("cbBlock", raw.cbBlock, structs.MIN_BLOCK, structs.MAX_BLOCK)
    head.limit("cbBlockExtra", raw.cbBlockExtra, 0, raw.cbBlock)
    # VirtualBox has made disks with a partial last sector; the missing part reads as zero.
    size = -(-raw.cbDisk // structs.SECTOR) * structs.SECTOR
    head.limit("cbDisk", size, 0, min(MAX_SIZE, raw.cbBlock * structs.MAX_BLOCKS))
    blocks = -(-size // raw.cbBlock)
    if raw.cBlocks < blocks:
        raise head.damaged("cBlocks", f"{raw.cBlocks} blocks, a disk of {size} bytes has {blocks}")
    end = raw.offBlocks + blocks * 4
    if raw.offBlocks < structs.HEADER_OFFSET + raw.cbHeader or end > file.size:
        raise head.damaged(
            "offBlocks", f"{raw.offBlocks:#x} is not a valid offset of {blocks * 4} bytes in a file of {file.size:#x}"
        )
    if raw.offData % structs.SECTOR or raw.offData < end:
        raise head.damaged("offData", f"{raw.offData:#x} is not a sector after the block map, which ends at {end:#x}")
    differencing = raw.u32Type in (structs.UNDO, structs.DIFFERENCING)
    if differencing and raw.uuidLinkage == structs.NIL_UUID:
        raise head.damaged("uuidLinkage", f"{structs.TYPES[raw.u32Type]} image that names no parent")
    return Header(
        file=file,
        kind=raw.u32Type,
        size=size,
        block_size=raw.cbBlock,
        block_extra=raw.cbBlockExtra,
        map_offset=raw.offBlocks,
        data_offset=raw.offData,
        entries=raw.cBlocks,
        blocks_allocated=raw.cBlocksAllocated,
        geometry=_geometry(file, raw),
        comment=raw.szComment.split(b"\0")[0].decode("utf-8", "replace"),
        uuid=raw.uuidCreate,
        modified=raw.uuidModify,
        parent=raw.uuidLinkage,
        parent_modified=raw.uuidParentModify,
    )


def _check_version(file: File) -> None:
    head, length = Structure(file, structs.PreHeader), structs.HEADER_OFFSET + structs.HEADER_LENGTH
    if file.size < length:
        raise head.refused(f"{length} bytes, the file has {file.size}")
    version = head.parse("no VDI signature", "u32Signature").u32Version
    if version != structs.VERSION:
        raise head.damaged(
            "u32Version", f"{version >> 16}.{version & 0xFFFF} is not {structs.VERSION >> 16}.1, the one known"
        )


def _geometry(file: File, raw: Any) -> tuple[int, int, int]:
    """Returns cylinders, heads and sectors, 0 if not stated. Older images state them in another field."""
    geometry = raw.LegacyGeometry
    at = structs.HEADER_OFFSET + structs.HEADER_LENGTH
    if raw.cbHeader >= structs.LONG_HEADER_LENGTH and file.size >= at + structs.Geometry.sizeof():
        newer = structs.Geometry.parse(file.read(at, structs.Geometry.sizeof()))
        geometry = newer if newer.cCylinders else geometry
    return geometry.cCylinders, geometry.cHeads, geometry.cSectors


def _facts(header: Header) -> DiskFacts:
    cylinders, heads, sectors = header.geometry
    # A geometry that no firmware accepts does not count.
    known = cylinders and 0 < heads < 1 << 16 and 0 < sectors < 1 << 16
    return DiskFacts(
        identity=_identity(header.uuid),
        geometry=Geometry(cylinders, heads, sectors) if known else None,
    )


def _identity(uuid: bytes) -> UUID | None:
    if uuid == structs.NIL_UUID:
        return None
    from uuid import UUID

    return UUID(bytes_le=uuid)


def _details(header: Header) -> Mapping[str, Any]:
    facts: dict[str, Any] = {
        "subformat": structs.TYPES[header.kind],
        "data-offset": header.data_offset,
        "modification-uuid": structs.uuid_text(header.modified),
    }
    if header.parent != structs.NIL_UUID:
        facts["parent-uuid"] = structs.uuid_text(header.parent)
    return {"cluster-size": header.block_size, "format-specific": {"type": "vdi", "data": facts}}


def qemu_incompatibility(image: Image) -> str | None:
    """Returns why QEMU does not read this image; None if it does."""
    header = read_header(image.file)
    if header.parent_reference:
        return "QEMU refuses differencing VDI images"
    if header.block_size != _QEMU_BLOCK or header.block_extra:
        return f"QEMU reads VDI images with blocks of {_QEMU_BLOCK} bytes, its blocks have {header.stride}"
    return None


def _parent(header: Header, opener: Opener) -> Image:
    """Returns the parent. Raises `ImageError` unless it is the unchanged parent of this image."""
    names = (header.parent_reference or "",)
    return opener.parent_by_identity(
        header.file,
        names,
        "vdi",
        lambda image: _refusal(header, image),
        lambda: _search(header, opener),
        stated=False,
    )


def _refusal(header: Header, parent: Image) -> ImageError | None:
    """Returns the error for a disk that is not the unchanged parent of an image; None for the parent."""
    found = read_header(parent.file)
    for name, wanted, is_there in (
        ("uuidLinkage", header.parent, found.uuid),
        ("uuidParentModify", header.parent_modified, found.modified),
    ):
        if wanted not in (structs.NIL_UUID, is_there):
            changed = "was changed after the image was made on it" if name == "uuidParentModify" else "is another disk"
            return head_of(header.file).damaged(
                name,
                f"{structs.uuid_text(wanted)} is required, {parent.file.name} has {structs.uuid_text(is_there)}",
                hint=f"{parent.file.name} {changed}",
            )
    return None


def _search(header: Header, opener: Opener) -> str:
    """Returns the only file with the parent's UUID. VirtualBox itself finds it in its registry."""
    file, reference = header.file, header.parent_reference or ""
    head = head_of(file)
    found: list[tuple[str, bytes]] = []
    for path, candidate in opener.search(file, ".vdi"):
        try:
            other = read_header(candidate)
        except ImageError:
            continue
        if other.uuid == header.parent:
            found.append((path, other.modified))
    # A file unchanged since this image was made is preferred.
    best = [path for path, modified in found if modified == header.parent_modified] or [path for path, _ in found]
    if len(best) == 1:
        return best[0]
    uuid = structs.uuid_text(header.parent)
    if best:
        names = " and ".join(best[:2])
        raise head.damaged(
            "uuidLinkage",
            f"{names} both have the UUID of the parent, {uuid}",
            hint=f"--parent names the right one; a link beside the image, {reference}, does so for good",
        )
    raise head.damaged(
        "uuidLinkage",
        f"the parent is named by its UUID {uuid} only, and there is no {reference} beside the image, nor "
        "another .vdi file with this UUID",
        hint="name it with --parent, put it beside the image, or name its directory with --allow-external",
    )


def _slices(header: Header) -> Iterator[tuple[Kinds, int, Column]]:
    """Yields the columns of the block map.

    Raises `ImageError` if two blocks of the disk have one block of the data area.
    """
    file = header.file
    room = min(max(0, -(-(file.size - header.data_offset) // header.stride)), structs.DISCARDED)
    taken: list[npt.NDArray[np.uint32]] = []
    for first in range(0, header.blocks, SLICE):
        raw = entries_of(header, first)
        allocated = raw < structs.DISCARDED
        blocks = raw[allocated]
        offset = header.data_offset + header.block_extra + blocks * header.stride
        bad = (blocks >= room) | (offset >= file.size)
        if bad.any():
            entry = int(np.flatnonzero(allocated)[np.flatnonzero(bad)[0]])
            where = int(offset[bad][0])
            raise _refuse(
                header, first + entry, f"payload at {where:#x} lies past the end of the file ({file.size:#x})"
            )
        _refuse_repeated(header, [blocks], first)
        taken.append(blocks.astype(np.uint32))
        kind = np.where(allocated, Kind.DATA, np.where(raw == structs.DISCARDED, Kind.ZERO, Kind.HOLE))
        place = np.zeros(len(raw), dtype=np.int64)
        place[allocated] = offset
        yield kind.astype(np.uint8), 0, place
    _refuse_repeated(header, taken)


def entries_of(header: Header, first: int) -> Column:
    """Returns a slice of the block map."""
    count = min(SLICE, header.blocks - first)
    raw = np.frombuffer(header.file.read(header.map_offset + first * 4, count * 4), dtype="<u4")
    return raw.astype(np.int64)


def _refuse_repeated(header: Header, slices: Sequence[npt.NDArray[np.integer[Any]]], first: int = 0) -> None:
    """Raises `ImageError` if a block of the file is repeated in slices of the block map, from entry `first` on.

    A slice has its allocated entries only.
    """
    blocks = np.concatenate(slices) if slices else np.zeros(0, dtype=np.uint32)
    # Mostly, blocks are in order.
    if (blocks[1:] > blocks[:-1]).all():
        return
    order = np.argsort(blocks, kind="stable")
    again = blocks[order][1:] == blocks[order][:-1]
    if not again.any():
        return
    index = int(order[1:][again].min())
    for part, one in enumerate(slices):
        if index < len(one):
            start = first + part * SLICE
            entry = start + int(np.flatnonzero(entries_of(header, start) < structs.DISCARDED)[index])
            raise _refuse(header, entry, f"block {one[index]} of the file is used twice")
        index -= len(one)


def _refuse(header: Header, block: int, problem: str) -> ImageError:
    place = header.map_offset + block * 4
    return damaged(header.file, f"block map entry {block}", place, problem, guest=block * header.block_size)
