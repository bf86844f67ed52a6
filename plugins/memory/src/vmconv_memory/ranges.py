"""Ranges of physical memory: from the headers of an image to its table, and from a table to the ranges to write."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vmconv.plugin import (
    MAX_SIZE,
    Column,
    Columns,
    Extents,
    File,
    Image,
    Kind,
    PlanError,
    Source,
    VmconvError,
    damaged,
)

PAGE = 4096

MAX_RANGES = 1 << 18
"""Ranges of one image. Machines have some ten, and an ordinary LiME file of a fragmented one some thousand."""

_PADDING = 1 << 20


class Ranges(NamedTuple):
    """Ranges of memory as columns: `address` and `length` of RAM, of which `stored` bytes lie at `offset` of a file.

    The rest reads as zero. `place` is the offset of the entry that states the range, for messages.
    """

    address: Column
    length: Column
    stored: Column
    offset: Column
    place: Column


class Entries:
    """Collects ranges and checks each against the file; `what` is the name of an entry, such as "program header"."""

    def __init__(self, file: File, what: str, source: Source | None = None) -> None:
        self.file = file
        self.what = what
        self.source = file if source is None else source
        self._rows: list[tuple[int, int, int, int, int]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, place: int, address: int, length: int, stored: int, offset: int) -> None:
        """Adds a range; raises `ImageError` if it reaches past the address space, or its bytes past their source."""
        number, most = len(self._rows), MAX_SIZE - 1
        if number >= MAX_RANGES:
            raise self.error(place, f"more than {MAX_RANGES} ranges")
        if address + length > most:
            raise self.error(place, f"range of {length:#x} bytes at {address:#x} ends past {most:#x}")
        if stored > length:
            raise self.error(place, f"{stored:#x} bytes are stored of {length:#x}")
        if offset + stored > self.source.size:
            raise self.error(
                place,
                f"{stored:#x} bytes at {offset:#x} end past {self.source.size:#x}, the end of {self.source.name}",
            )
        self._rows.append((address, length, stored, offset, place))

    def error(self, place: int, problem: str) -> VmconvError:
        return damaged(self.file, f"{self.what} {len(self._rows)}", place, problem)

    def table(self) -> Extents:
        """Returns the table of the memory. Raises `ImageError` if ranges overlap, in memory or in the file."""
        columns = np.array(self._rows, dtype=np.int64).reshape(-1, 5)
        ranges = Ranges(*columns[np.argsort(columns[:, 0], kind="stable")].T)
        ranges = self._without_repetitions(Ranges(*(column[ranges.length > 0] for column in ranges)))
        self._refuse_shared_bytes(ranges)
        return _table(ranges, self.source)

    def _without_repetitions(self, ranges: Ranges) -> Ranges:
        """Returns sorted ranges without those that repeat the one before: cores list RAM by virtual address, too."""
        address, length, stored, offset, place = ranges
        if not len(address):
            return ranges
        same = np.zeros(len(address), dtype=bool)
        same[1:] = (address[1:] == address[:-1]) & (length[1:] == length[:-1])
        same[1:] &= (stored[1:] == stored[:-1]) & (offset[1:] == offset[:-1])
        address, length, stored, offset, place = (column[~same] for column in ranges)
        overlap = np.flatnonzero(address[1:] < address[:-1] + length[:-1])
        if len(overlap):
            at, end = int(overlap[0]) + 1, int(address[overlap[0]] + length[overlap[0]])
            problem = f"range at {int(address[at]):#x} begins before {end:#x}, the end of another one"
            raise damaged(self.file, self.what, int(place[at]), problem)
        return Ranges(address, length, stored, offset, place)

    def _refuse_shared_bytes(self, ranges: Ranges) -> None:
        there = ranges.stored > 0
        begin, length, place = ranges.offset[there], ranges.stored[there], ranges.place[there]
        order = np.argsort(begin, kind="stable")
        begin, end, place = begin[order], (begin + length)[order], place[order]
        twice = np.flatnonzero(begin[1:] < end[:-1])
        if len(twice):
            at = int(twice[0]) + 1
            problem = f"its bytes at {int(begin[at]):#x} are those of another range, too"
            raise damaged(self.file, self.what, int(place[at]), problem)


def behind(file: File, at: int, header: int, magic: bytes) -> str | None:
    """Returns a warning if what follows the last range of a file is no header: too short for one, or padding."""
    left = file.size - at
    if left <= 0 or magic.startswith(file.read(at, min(left, len(magic)))) or not (left < header or _empty(file, at)):
        return None
    return f"{file.name}: {left} bytes at {at:#x} are behind the last range, and are not memory"


def _empty(file: File, at: int) -> bool:
    """True if a file has nothing but zeros from an offset on, of which at most `_PADDING` are stored."""
    stored = file.data_ranges(at, file.size)
    return sum(end - start for start, end in stored) <= _PADDING and not any(
        any(file.read(start, end - start)) for start, end in stored
    )


def _table(ranges: Ranges, source: Source) -> Extents:
    """Returns the table of sorted ranges that do not overlap, none of them empty; HOLE between them."""
    address, length, stored, offset, _ = ranges
    end = address + length
    size = int(end[-1]) if len(end) else 0
    data, rest = stored > 0, stored < length
    before = np.concatenate([[0], end[:-1]]).astype(np.int64) if len(end) else end
    gap = address > before
    start = np.concatenate([address[data], (address + stored)[rest], before[gap]])
    kinds = ((data, Kind.DATA), (rest, Kind.ZERO), (gap, Kind.HOLE))
    kind = np.concatenate([np.full(int(mask.sum()), value, dtype=np.uint8) for mask, value in kinds])
    index = np.where(kind == Kind.DATA, 0, -1).astype(np.int32)
    where = np.zeros(len(start), dtype=np.int64)
    where[: int(data.sum())] = offset[data]
    rows = Columns(start, kind, index, where)
    return Extents(size, rows.take(np.argsort(start, kind="stable")), [source])


class Segments(NamedTuple):
    """Ranges of RAM to write, as columns, sorted. Payload is shared if the bytes of a segment begin at an offset of the
    output that is `phase` modulo the placement's modulus; -1 if nothing of it can be shared.
    """

    start: Column
    length: Column
    phase: Column


def segments(image: Image, table: Extents, modulus: int, most: int, unit: int = 1) -> Segments:
    """Returns the RAM of a table as segments: ranges between holes, split where the phase of the payload changes.

    They are split at multiples of `unit` only, and not at all if that made more than `most`. Phases are multiples of
    `unit`, too. Raises `PlanError` if there are more ranges than that, or none.
    """
    ram = table.kind != Kind.HOLE
    first = ram & ~np.append(False, ram[:-1])
    # A page behind a header has no whole block to share: each of them would become a segment for nothing.
    whole = (table.offset + table.length) // modulus > -(-table.offset // modulus)
    shared = table.in_files() & (table.kind == Kind.DATA) & whole
    known = np.flatnonzero(shared & ((table.offset - table.start) % unit == 0))
    delta = (table.offset - table.start)[known] % modulus
    split = first.copy()
    if len(known):
        # A row splits its range if its phase differs from that of the payload before it in the same range.
        run = np.cumsum(first)[known]
        changes = (delta[1:] != delta[:-1]) & (run[1:] == run[:-1]) & (table.start[known[1:]] % unit == 0)
        split[known[1:][changes]] = True
    if int(split.sum()) > most:
        split = first
    if int(split.sum()) > most:
        raise PlanError(f"{image.file.name}: {int(split.sum())} ranges of RAM, the format has {most} at most")
    begin = np.flatnonzero(split)
    if not len(begin):
        raise PlanError(f"{image.file.name}: has no RAM")
    continues = np.append(ram[1:] & ~split[1:], False)
    end = table.end[ram & ~continues]
    phase = np.full(len(begin), -1, dtype=np.int64)
    if len(known):
        # Payload that changes within a unit follows the first of its segment; so does what is copied anyway.
        owner = np.searchsorted(begin, known, side="right") - 1
        leads = np.append(True, owner[1:] != owner[:-1])
        phase[owner[leads]] = (table.start[begin[owner[leads]]] + delta[leads]) % modulus
    return Segments(table.start[begin], end - table.start[begin], phase)


def placed(found: Segments, base: int, modulus: int) -> Column:
    """Returns offsets for segments, one after the other from `base` on, each with its phase."""
    base = -(-base // modulus) * modulus
    phase = np.maximum(found.phase, 0)
    span = -(-(phase + found.length) // modulus) * modulus
    offset: Column = base + np.cumsum(span) - span + phase
    return offset
