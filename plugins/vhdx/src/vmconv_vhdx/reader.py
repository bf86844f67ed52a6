"""Reads VHDX images: the BAT, and the sector bitmaps of differencing disks, in bounded slices."""

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
    Image,
    ImageError,
    Kind,
    Kinds,
    Opener,
    Placeholder,
    Source,
    Usage,
    clip_to_sources,
    damaged,
    distinct,
    from_windows,
    named_by,
)
from vmconv_vhdx import structs
from vmconv_vhdx.header import Header, is_hole, read_header
from vmconv_vhdx.options import Options

# Entries of the BAT in one slice; parsing needs about 60 bytes for each.
_SLICE = 1 << 18
# Bytes of sector bitmaps in one slice; parsing needs about 20 bytes for each bit.
_BITMAPS = 128 << 10
_MAX_CREATOR = 64


def read(file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
    """Returns the image in `file`. An unreplayed log is replayed in memory."""
    if snapshot is not None:
        raise ImageError(f"{file.name}: VHDX images have no snapshots, {snapshot!r} was asked for")
    header = read_header(file)
    names = tuple(_parents(header.locator))
    if header.has_parent and not names:
        raise ImageError(f"{file.name}: parent locator: a differencing disk that names no parent")
    warnings = (f"{file.name}: was not closed cleanly; its log was replayed in memory",) if header.replayed else ()
    return Image(
        "vhdx",
        file,
        header.size,
        lambda: _Mapper(header).table(),
        # Without a parent, QEMU's maps call zeros present.
        load_places=None if header.has_parent else lambda: _Mapper(header).table().without_holes(),
        shows_holes=lambda _: header.fixed,
        load_parent=(lambda: _load_parent(header, names, opener)) if header.has_parent else None,
        parent_reference=names[0] if header.has_parent else None,
        parent_format="vhdx" if header.has_parent else None,
        facts=_facts(header),
        warnings=warnings,
        details=lambda: _details(header, names),
    )


def options_of(image: Image) -> Options:
    """Returns the options with which the writer makes an image like this one."""
    header = read_header(image.file)
    return Options(
        subformat="fixed" if header.fixed else "dynamic",
        block_size=header.block_size,
        log_size=header.log.length,
        logical_sector_size=header.logical_sector_size,
        physical_sector_size=header.physical_sector_size or 0,
        identity=header.identity.bytes if header.identity else None,
    )


def _facts(header: Header) -> DiskFacts:
    # 512 is the default.
    return DiskFacts(
        logical_sector_size=header.logical_sector_size if header.logical_sector_size != 512 else None,
        physical_sector_size=header.physical_sector_size if header.physical_sector_size != 512 else None,
        identity=header.identity,
        creator=header.creator[:_MAX_CREATOR] or None,
    )


def _details(header: Header, names: tuple[str, ...]) -> Mapping[str, Any]:
    facts: dict[str, Any] = {
        "subformat": "differencing" if header.has_parent else "fixed" if header.fixed else "dynamic",
        "block-size": header.block_size,
        "data-write-guid": str(header.data_write_guid),
        "file-write-guid": str(header.file_write_guid),
    }
    if header.has_parent:
        facts["parent-linkage"] = header.locator.get("parent_linkage")
        facts["parent-names"] = list(names)
    return {
        "cluster-size": header.block_size,
        "dirty-flag": header.replayed,
        "format-specific": {"type": "vhdx", "data": facts},
    }


# -- the parent


def _parents(locator: Mapping[str, str]) -> Iterator[str]:
    """Yields the parent's names as paths of this system, in the order that [MS-VHDX] 2.6.2.6.3 gives.

    The caller verifies the parent's GUID.
    """
    keys = ("relative_path", "volume_path", "absolute_win32_path")
    yield from dict.fromkeys(filter(None, (named_by(from_windows(locator.get(key, ""))) for key in keys)))


def _load_parent(header: Header, names: tuple[str, ...], opener: Opener) -> Image:
    """Returns the parent. Raises `ImageError` if what its names lead to is another disk."""
    wanted = {_guid(header.locator.get(key, "")) for key in ("parent_linkage", "parent_linkage2")} - {None}

    def refusal(parent: Image) -> ImageError | None:
        found = _guid(str(parent.details.get("format-specific", {}).get("data", {}).get("data-write-guid", "")))
        if found is not None and found in wanted:
            return None
        return ImageError(
            f"{header.file.name}: parent {parent.file.name} has the data write GUID {found}, "
            f"{' or '.join(sorted(str(guid) for guid in wanted)) or 'none'} is expected",
            hint="the parent was written to since this image was made on it, or it is another disk",
        )

    def search() -> str | None:
        return opener.alike(header.file, "vhdx", (".vhdx", ".avhdx"), refusal)

    return opener.parent_by_identity(header.file, names, "vhdx", refusal, search)


def _guid(text: str) -> UUID | None:
    try:
        return UUID(text.strip("{}"))
    except ValueError:
        return None


# -- the guest's address space


_Entries = npt.NDArray[np.uint64]


def chunks(header: Header) -> Iterator[tuple[int, _Entries, _Entries]]:
    """Yields `(first block, its entries of the BAT and those that follow, entries of their sector bitmaps)`.

    The entry of a sector bitmap follows those of its chunk. Entries in holes of the file are skipped.
    """
    ratio, blocks = header.chunk_ratio, header.blocks
    together = max(1, _SLICE // (ratio + 1))
    for first in range(0, blocks, together * ratio):
        at = header.bat.offset + first // ratio * (ratio + 1) * 8
        length = min(together * (ratio + 1) * 8, header.bat.offset + header.bat.length - at)
        count = min(together * ratio, blocks - first)
        if length <= 0 or is_hole(header, at, length):
            continue
        raw = np.zeros(together * (ratio + 1), dtype=np.uint64)
        raw[: length // 8] = np.frombuffer(header.view.read(at, length), dtype="<u8")
        entries = raw.reshape(-1, ratio + 1)
        yield first, entries[:, :-1].reshape(-1)[:count], entries[: -(-count // ratio), -1]


def missing_room(header: Header) -> str | None:
    """Returns the error of a BAT with too few entries for the disk; None if it has enough."""
    ratio, blocks = header.chunk_ratio, header.blocks
    last = -(-blocks // ratio) * (ratio + 1) if header.has_parent else blocks + (blocks - 1) // ratio
    if not blocks or last * 8 <= header.bat.length:
        return None
    disk = f"a disk of {header.size} bytes in blocks of {header.block_size}"
    return f"{header.bat.length} bytes, {disk} needs {last * 8}"


def add_metadata(usage: Usage, header: Header) -> None:
    """Adds the ranges of headers, log, BAT and metadata."""
    usage.add("header section", [0], structs.HEADER_SECTION)
    for name, region in (("log", header.log), ("BAT", header.bat), ("metadata region", header.metadata)):
        usage.add(name, [region.offset], region.length)


def add_blocks(usage: Usage, header: Header, block: Column, place: Column) -> None:
    """Adds payload blocks; the last one only up to the end of the disk."""
    whole = (block + 1) * header.block_size <= header.size
    usage.add("payload block", place[whole], header.block_size, block[whole])
    usage.add_each("payload block", place[~whole], header.needed(block[~whole]), block[~whole])


class _Mapper:
    """Turns the BAT into the table of the guest's address space."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.source: Source = header.file
        if header.replayed:
            # Offsets of the replayed file; `table` composes them with its view.
            self.source = Placeholder(header.file.name, header.view.size)
        self.blocks = header.blocks
        self.allocated = 0
        self.partial: list[tuple[Column, Column, Column]] = []
        self.usage = Usage()

    def table(self) -> Extents:
        header = self.header
        if short := missing_room(header):
            raise damaged(header.file, "BAT", header.bat.offset, short)
        table = Extents.from_units(header.block_size, header.size, self._slices(), [self.source])
        add_metadata(self.usage, header)
        self.usage.add_windows(table, self.source)
        if found := self.usage.overlaps():
            raise ImageError(f"{header.file.name}: {found.text(0)}")
        if self.partial:
            block, place, bitmap = (np.concatenate(columns) for columns in zip(*self.partial, strict=True))
            table = self._detailed(table, list(self._bits(block, place, bitmap)))
        return table.through(self.source, header.view) if header.replayed else table

    def _slices(self) -> Iterator[tuple[Kinds, int, Column] | int]:
        """Yields the columns of payload entries, or the number of blocks without entries."""
        at = 0
        for first, raw, bitmaps in chunks(self.header):
            if first > at:
                yield first - at
            yield self._columns(raw, bitmaps, first)
            at = first + len(raw)
        if at < self.blocks:
            yield self.blocks - at

    def _columns(
        self, raw: npt.NDArray[np.uint64], bitmaps: npt.NDArray[np.uint64], first: int
    ) -> tuple[Kinds, int, Column]:
        state = (raw & np.uint64(structs.STATE_MASK)).astype(np.uint8)
        # Offsets of more than 63 bits are past the end of any file.
        place = np.minimum(raw & np.uint64(structs.OFFSET_MASK), np.uint64(1 << 62)).astype(np.int64)
        kind = KINDS[state]
        if (kind == UNKNOWN).any():
            entry = int(np.flatnonzero(kind == UNKNOWN)[0])
            self._refuse(first + entry, f"state {state[entry]} is not known")
        partial = state == structs.PARTIALLY_PRESENT
        if partial.any():
            self._add_partial(partial, place, bitmaps, first)
        self._check(place, kind == Kind.DATA, first)
        return kind, 0, place

    def _check(self, place: Column, there: npt.NDArray[np.bool_], first: int) -> None:
        """Raises `ImageError` unless every payload lies inside the file, up to the end of the disk."""
        header = self.header
        end = place + header.needed(np.arange(first, first + len(place), dtype=np.int64))
        bad = there & ((place < structs.HEADER_SECTION) | (end > header.view.size))
        if bad.any():
            entry = int(np.flatnonzero(bad)[0])
            problem = f"payload at {place[entry]:#x} lies past the end of the file ({header.view.size:#x})"
            if place[entry] < structs.HEADER_SECTION:
                problem = f"payload at {place[entry]:#x} lies where the headers are"
            self._refuse(first + entry, problem)
        self.allocated += int(there.sum())
        room = -(-header.view.size // header.block_size)
        if self.allocated > room:
            raise damaged(
                header.file,
                "BAT",
                header.bat.offset,
                f"at least {self.allocated} blocks are allocated, the file has room for {room}",
            )

    def _refuse(self, block: int, problem: str) -> None:
        header = self.header
        entry = block + block // header.chunk_ratio
        raise damaged(header.file, f"BAT entry {entry}", header.bat.offset + entry * 8, problem)

    # -- partially present blocks

    def _add_partial(
        self, partial: npt.NDArray[np.bool_], place: Column, bitmaps: npt.NDArray[np.uint64], first: int
    ) -> None:
        """Adds blocks, their offsets and those of their bits. Raises `ImageError` if their chunk has no bitmap."""
        header = self.header
        chosen = np.flatnonzero(partial)
        if not header.has_parent:
            self._refuse(first + int(chosen[0]), "partially present in a disk without a parent")
        chunk, inside = np.divmod(chosen, header.chunk_ratio)
        entry = bitmaps[chunk]
        at = np.minimum(entry & np.uint64(structs.OFFSET_MASK), np.uint64(1 << 62)).astype(np.int64)
        bad = (entry & np.uint64(structs.STATE_MASK)) != structs.BITMAP_PRESENT
        bad |= (at < structs.HEADER_SECTION) | (at + structs.BITMAP_BLOCK > header.view.size)
        if bad.any():
            index = int(np.flatnonzero(bad)[0])
            self._refuse(
                first + int(chosen[index]), f"partially present, but its sector bitmap at {at[index]:#x} is not"
            )
        self.usage.add("sector bitmap", distinct(at), structs.BITMAP_BLOCK)
        self.partial.append((chosen + first, place[chosen], at + inside * self._bitmap_size))

    @property
    def _bitmap_size(self) -> int:
        """Bytes of the sector bitmap for one block."""
        return self.header.block_size // self.header.logical_sector_size // 8

    def _bits(self, block: Column, place: Column, bitmap: Column) -> Iterator[tuple[Columns, Column]]:
        """Yields the rows of partially present blocks, in bounded slices, and the blocks' addresses."""
        size = self._bitmap_size
        step = max(1, _BITMAPS // size)
        for first in range(0, len(block), step):
            some = slice(first, first + step)
            # No search for contiguous bitmaps: those of such blocks are small and few.
            raw = b"".join(self.header.view.read(at, size) for at in bitmap[some].tolist())
            bits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8).reshape(-1, size), axis=1, bitorder="little")
            address = block[some] * self.header.block_size
            yield _bit_runs(bits, self.header.logical_sector_size, address, place[some]), address

    def _detailed(self, blocks: Extents, parts: list[tuple[Columns, Column]]) -> Extents:
        """Returns the table of blocks, with the given rows for some blocks."""
        size = self.header.size
        rows = Columns.join([rows for rows, _ in parts])
        start = np.concatenate([address for _, address in parts])
        end = np.minimum(start + self.header.block_size, size)
        # A HOLE between those blocks; rows of a block that begins there replace it.
        apart = np.append(0, end)
        holes = Columns(apart, np.zeros(len(apart), np.uint8), np.full(len(apart), -1, np.int32), np.zeros_like(apart))
        both = Columns.join([rows, holes])
        both = both.take(np.argsort(both.start, kind="stable"))
        both = both.take(np.append(True, both.start[1:] != both.start[:-1]) & (both.start < size))
        detailed = Extents(size, clip_to_sources(both, size, [self.source]), [self.source])
        return blocks.replaced(detailed, start, end - start)


def _bit_runs(bits: npt.NDArray[np.uint8], unit: int, address: Column, place: Column) -> Columns:
    """Returns a row for each run of equal bits: 1 is DATA at its offset in the file, 0 a HOLE; bits are sectors."""
    begins = np.ones(bits.shape, dtype=bool)
    begins[:, 1:] = bits[:, 1:] != bits[:, :-1]
    block, sector = np.nonzero(begins)
    inside = sector * unit
    kind = np.where(bits[block, sector] == 1, Kind.DATA, Kind.HOLE).astype(np.uint8)
    return Columns(address[block] + inside, kind, np.zeros(len(block), dtype=np.int32), place[block] + inside)


UNKNOWN = 255
# The content of a block by its state: undefined and unmapped blocks read as zero, as in QEMU, and never as in the
# parent.
KINDS = np.full(8, UNKNOWN, dtype=np.uint8)
KINDS[structs.NOT_PRESENT] = Kind.HOLE
KINDS[[structs.UNDEFINED, structs.ZERO, structs.UNMAPPED, structs.UNMAPPED_V095]] = Kind.ZERO
KINDS[[structs.FULLY_PRESENT, structs.PARTIALLY_PRESENT]] = Kind.DATA
