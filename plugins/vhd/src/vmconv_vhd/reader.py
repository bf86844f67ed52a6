"""Reads VHD images: the block allocation table, and the sector bitmaps of differencing disks, in bounded slices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from uuid import UUID

import numpy as np
import numpy.typing as npt

from vmconv.plugin import (
    Column,
    Columns,
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
    Usage,
    clip_to_sources,
    damaged,
)
from vmconv_vhd import structs
from vmconv_vhd.header import Header, read_header
from vmconv_vhd.options import Options

SLICE = 1 << 18
"""Entries of the allocation table in one slice; parsing needs about 50 bytes for each."""
# Bytes of sector bitmaps in one slice; parsing needs about 20 bytes for each bit.
_BITMAPS = 128 << 10


def read(file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
    """Returns the image in `file`."""
    if snapshot is not None:
        raise ImageError(f"{file.name}: VHD images have no snapshots, {snapshot!r} was asked for")
    header = read_header(file)
    differencing = header.kind == structs.DIFFERENCING
    if differencing and not header.parents:
        raise damaged(file, "parent_unicode_name", 512, "a differencing disk that names no parent")

    def load_guest() -> Extents:
        if header.kind == structs.FIXED:
            return Extents.of([(0, Kind.DATA, file, 0)] if header.size else [], header.size)
        return _Mapper(header).table()

    return Image(
        "vhd",
        file,
        header.size,
        load_guest,
        # Without a parent, QEMU's maps call zeros present.
        load_places=None if differencing else lambda: load_guest().without_holes(),
        shows_holes=lambda _: header.kind == structs.FIXED,
        load_parent=(lambda: _load_parent(header, opener)) if differencing else None,
        parent_reference=header.parents[0] if differencing else None,
        parent_format="vhd" if differencing else None,
        facts=_facts(header),
        losses=("saved state of a virtual machine",) if header.saved_state else (),
        warnings=header.warnings,
        details=lambda: _details(header),
    )


def options_of(image: Image) -> Options:
    """Returns the options with which the writer makes an image like this one."""
    header = read_header(image.file)
    if header.kind != structs.FIXED and header.block_size != structs.BLOCK_SIZE:
        raise PlanError(f"{image.file.name}: blocks of {header.block_size} bytes, which vmconv does not write")
    fixed, (cylinders, heads, sectors) = header.kind == structs.FIXED, header.geometry
    identity = image.facts.identity
    azure = fixed and header.size % (1 << 20) == 0
    return Options(
        subformat="fixed" if fixed else "dynamic",
        azure=azure,
        # A size of whole cylinders was rounded up, or needs no rounding.
        force_size=azure or cylinders * heads * sectors * structs.SECTOR != header.size,
        identity=identity.bytes if identity else None,
    )


def qemu_incompatibility(image: Image) -> str | None:
    """Returns why QEMU reads another disk in this image; None if it reads the same."""
    header = read_header(image.file)
    if header.kind == structs.DIFFERENCING:
        return "QEMU reads a differencing VHD as if it had no parent"
    cylinders, heads, sectors = header.geometry
    size = cylinders * heads * sectors * structs.SECTOR
    known = structs.creator_code(header.creator) in structs.SIZED_BY_FOOTER
    if known or header.geometry == structs.MAX_GEOMETRY or size == header.size:
        return None
    return f"QEMU takes the geometry of {size} bytes for the size of a VHD by {header.creator!r}, it has {header.size}"


def _facts(header: Header) -> DiskFacts:
    return DiskFacts(
        identity=UUID(bytes=header.unique_id) if any(header.unique_id) else None,
        geometry=Geometry(*header.geometry) if all(header.geometry) else None,
        creator=header.creator or None,
    )


def _details(header: Header) -> Mapping[str, Any]:
    facts: dict[str, Any] = {"subformat": structs.DISK_TYPES[header.kind], "original-size": header.original_size}
    if header.kind != structs.FIXED:
        facts["block-size"] = header.block_size
    if header.parents:
        facts["parent-id"] = str(UUID(bytes=header.parent_id))
        facts["parent-names"] = list(header.parents)
    details: dict[str, Any] = {"format-specific": {"type": "vhd", "data": facts}}
    return details if header.kind == structs.FIXED else {"cluster-size": header.block_size, **details}


def _load_parent(header: Header, opener: Opener) -> Image:
    """Returns the parent. Raises `ImageError` if what its names lead to is another disk."""
    wanted = UUID(bytes=header.parent_id)

    def refusal(parent: Image) -> ImageError | None:
        found = parent.facts.identity or UUID(int=0)
        if found == wanted:
            return None
        return ImageError(
            f"{header.file.name}: parent {parent.file.name} has the unique id {found}, {wanted} is expected",
            hint="the parent was replaced or recreated: find the disk that this image was made on",
        )

    def search() -> str | None:
        # Without an id every disk without one would do.
        return opener.alike(header.file, "vhd", (".vhd", ".avhd", ".vpc"), refusal) if wanted.int else None

    return opener.parent_by_identity(header.file, header.parents, "vhd", refusal, search)


def add_metadata(usage: Usage, header: Header) -> None:
    """Adds the ranges of the structures, except for the footer."""
    usage.add("footer copy", [0], structs.FOOTER_LENGTH)
    usage.add("dynamic header", [header.header_offset], structs.DYNAMIC_HEADER_LENGTH)
    usage.add("BAT", [header.table_offset], header.entries * 4)
    for offset, length in header.locators:
        usage.add("parent locator", [offset], length)


def add_blocks(usage: Usage, header: Header, block: Column, place: Column) -> None:
    """Adds blocks with their bitmaps; the last block only up to the end of the disk."""
    whole = (block + 1) * header.block_size <= header.size
    usage.add("BAT entry", place[whole], header.bitmap_size + header.block_size, block[whole])
    usage.add_each("BAT entry", place[~whole], header.needed(block[~whole]), block[~whole])


class _Mapper:
    """Turns the allocation table of a dynamic or differencing disk into the table of the guest's address space."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.allocated = 0
        self.places: list[tuple[Column, Column]] = []
        self.usage = Usage()

    def table(self) -> Extents:
        header = self.header
        add_metadata(self.usage, header)
        blocks = Extents.from_units(header.block_size, header.size, self._slices(), [header.file])
        if found := self.usage.overlaps():
            raise ImageError(f"{header.file.name}: {found.text(0)}")
        if header.kind != structs.DIFFERENCING or not self.places:
            return blocks
        block, place = (np.concatenate(columns) for columns in zip(*self.places, strict=True))
        return _detailed(blocks, list(self._partial(block, place)), header)

    def _slices(self) -> Iterator[tuple[Kinds, int, Column]]:
        header = self.header
        needed = -(-header.size // header.block_size)
        for first in range(0, needed, SLICE):
            count = min(SLICE, needed - first)
            raw = np.frombuffer(header.file.read(header.table_offset + first * 4, count * 4), dtype=">u4")
            there = raw != structs.UNUSED
            place = raw.astype(np.int64) * structs.SECTOR
            self._check(place, there, first)
            if there.any():
                block, at = np.flatnonzero(there) + first, place[there]
                add_blocks(self.usage, header, block, at)
                if header.kind == structs.DIFFERENCING:
                    self.places.append((block, at))
            yield np.where(there, Kind.DATA, Kind.HOLE).astype(np.uint8), 0, place + header.bitmap_size

    def _check(self, place: Column, there: npt.NDArray[np.bool_], first: int) -> None:
        header = self.header
        needed = header.needed(np.arange(first, first + len(place), dtype=np.int64))
        bad = there & ((place < structs.FOOTER_LENGTH) | (place + needed > header.end))
        if bad.any():
            entry = int(np.flatnonzero(bad)[0])
            low, high = place[entry], place[entry] + needed[entry]
            raise damaged(
                header.file,
                f"BAT entry {first + entry}",
                header.table_offset + (first + entry) * 4,
                f"block {low:#x}..{high:#x} does not lie between the headers and the footer ({header.end:#x})",
            )
        self.allocated += int(there.sum())
        room = -(-header.file.size // header.block_size)
        if self.allocated > room:
            raise damaged(
                header.file,
                "BAT",
                header.table_offset,
                f"at least {self.allocated} blocks are allocated, the file has room for {room}",
            )

    def _partial(self, block: Column, place: Column) -> Iterator[tuple[Columns, Column]]:
        """Yields the rows of blocks with zeros in their bitmaps, in bounded slices, and the blocks' addresses."""
        header = self.header
        sectors = header.block_size // structs.SECTOR
        length = header.bitmap_size
        step = max(1, _BITMAPS // length)
        for first in range(0, len(block), step):
            some, at = block[first : first + step], place[first : first + step]
            # The bitmaps are not contiguous: one lies before each block.
            raw = b"".join(header.file.read(offset, length) for offset in at.tolist())
            packed = np.frombuffer(raw, dtype=np.uint8).reshape(len(some), length)[:, : -(-sectors // 8)]
            partial = (packed != 0xFF).any(axis=1)
            if not partial.any():
                continue
            address, at = some[partial] * header.block_size, at[partial]
            bits = np.unpackbits(packed[partial], axis=1)[:, :sectors]
            yield _bit_runs(bits, address, at + length), address


def _bit_runs(bits: npt.NDArray[np.uint8], address: Column, place: Column) -> Columns:
    """Returns a row for each run of equal bits: 1 is DATA at its offset in the file, 0 a HOLE; bits are sectors."""
    begins = np.ones(bits.shape, dtype=bool)
    begins[:, 1:] = bits[:, 1:] != bits[:, :-1]
    block, sector = np.nonzero(begins)
    inside = sector * structs.SECTOR
    kind = np.where(bits[block, sector] == 1, Kind.DATA, Kind.HOLE).astype(np.uint8)
    return Columns(address[block] + inside, kind, np.zeros(len(block), dtype=np.int32), place[block] + inside)


def _detailed(blocks: Extents, parts: list[tuple[Columns, Column]], header: Header) -> Extents:
    """Returns the table of blocks, with the given rows for some blocks."""
    if not parts:
        return blocks
    rows = Columns.join([rows for rows, _ in parts])
    start = np.concatenate([address for _, address in parts])
    end = np.minimum(start + header.block_size, header.size)
    # A part past the end of the file was never written.
    rows.kind[(rows.kind == Kind.DATA) & (rows.offset >= header.file.size)] = Kind.ZERO
    # A HOLE between those blocks; rows of a block that begins there replace it.
    apart = np.append(0, end)
    holes = Columns(apart, np.zeros(len(apart), np.uint8), np.full(len(apart), -1, np.int32), np.zeros_like(apart))
    both = Columns.join([rows, holes])
    both = both.take(np.argsort(both.start, kind="stable"))
    both = both.take(np.append(True, both.start[1:] != both.start[:-1]) & (both.start < header.size))
    detailed = Extents(header.size, clip_to_sources(both, header.size, [header.file]), [header.file])
    return blocks.replaced(detailed, start, end - start)
