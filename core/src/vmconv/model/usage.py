"""Usage of the ranges of a file, for readers and structural checks of all formats.

A block, cluster or grain that two guest addresses share, or that overlaps metadata, is corrupted for one user when the
other is written. Contiguous ranges of one user are stored as one run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vmconv.errors import ImageError
from vmconv.model.extents import Column, Extents, lengths
from vmconv.model.sources import File, Source

_LONG = 1 << 62
"""A unit that no range reaches, bytes: the number of a range's user does not grow inside it."""
_MANY = 1 << 20
"""From this many ranges on, counting replaces sorting. Also the units of one chunk."""
_MOST_UNITS = 1 << 26
"""Limit of `_overlap_of_many`, which takes two bytes of memory for each unit."""
_FAR = 1 << 61
"""Larger than any file, bytes; its double fits a signed 64-bit integer."""
GUEST = "guest address"
"""The name of the user of payload."""


class Overlaps(NamedTuple):
    """Ranges of a file with two users, sorted: bytes `[offset, offset + length)`; the run of `one` begins first."""

    offset: Column
    length: Column
    one: tuple[Column, Column]
    """For each range, its user as an index of `names`, and the number of the range of that user."""
    other: tuple[Column, Column]
    names: list[tuple[str, int]]

    def __bool__(self) -> bool:
        return len(self.offset) > 0

    def text(self, index: int) -> str:
        """Returns a phrase for the overlap at an index."""
        users = [self._user(*(int(column[index]) for column in user)) for user in (self.other, self.one)]
        return f"{users[0]} and {users[1]} both lie at {int(self.offset[index]):#x}"

    def between_payload(self) -> npt.NDArray[np.bool_]:
        """Returns a mask of the overlaps of payload with payload."""
        guest = np.array([name == GUEST for name, _ in self.names] or [False])
        both: npt.NDArray[np.bool_] = guest[self.one[0]] & guest[self.other[0]]
        return both

    def _user(self, owner: int, number: int) -> str:
        name, unit = self.names[owner]
        if not unit:
            return name
        return f"{name} {number:#x}" if name == GUEST else f"{name} {number}"


class Metadata(NamedTuple):
    """Ranges of metadata with one name, each of `length` bytes at its `offset`."""

    name: str
    offset: Column | list[int]
    length: int


class Usage:
    """The ranges of one file in use. Empty ranges are ignored."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, int], int] = {}
        self._parts: list[tuple[int, Column, Column, Column]] = []

    def add(self, name: str, offset: Column | list[int], length: int, number: Column | None = None) -> None:
        """Adds ranges of `length` bytes; `number` identifies each, such as the index of its table entry."""
        if isinstance(offset, list):
            # Header fields of a malformed image can be any number.
            offset = np.array([min(at, _FAR) for at in offset], dtype=np.int64)
        begin, length = offset, min(length, _FAR)
        if not len(begin) or length <= 0:
            return
        count = np.arange(len(begin), dtype=np.int64) if number is None else number
        first = np.ones(len(begin), dtype=bool)
        first[1:] = (begin[1:] - begin[:-1] != length) | (count[1:] - count[:-1] != 1)
        starts = np.flatnonzero(first)
        end = begin[starts] + lengths(starts, len(begin)) * length
        # Unit 0: ranges without numbers are described by their name alone.
        self._take(name, length if number is not None else 0, begin[starts], end, count[starts])

    def add_each(self, name: str, offset: Column, length: Column, number: Column) -> None:
        """Adds ranges of different lengths; `number` identifies each."""
        self._take(name, _LONG, offset, offset + length, number)

    def add_windows(self, table: Extents, source: Source) -> None:
        """Adds the windows of a guest's table onto `source`, identified by guest address."""
        # The extra last element is for index -1, rows without a source.
        rows = np.array([*(other is source for other in table.sources), False])[table.source]
        offset = table.offset[rows]
        self._take(GUEST, 1, offset, offset + table.length[rows], table.start[rows])

    def _take(self, name: str, unit: int, begin: Column, end: Column, number: Column) -> None:
        owner = self._names.setdefault((name, unit), len(self._names))
        self._parts.append((owner, begin, end, number))

    @property
    def end(self) -> int:
        """The first byte behind all used ranges."""
        return max((int(end.max()) for _, _, end, _ in self._parts if len(end)), default=0)

    def overlaps(self) -> Overlaps:
        """Returns the ranges with more than one user."""
        names = list(self._names)
        if not self._overlap():
            nothing = np.empty(0, dtype=np.int64)
            return Overlaps(nothing, nothing, (nothing, nothing), (nothing, nothing), names)
        owners, *columns = zip(*self._parts, strict=True)
        begin, end, number = (np.concatenate(column) for column in columns)
        owner = np.repeat(np.array(owners), [len(begin) for begin in columns[0]])
        order = np.argsort(begin, kind="stable")
        begin, end, number, owner = begin[order], end[order], number[order], owner[order]
        reach = np.maximum.accumulate(end)
        # For each range, the one up to it that ends last.
        holder = np.maximum.accumulate(np.where(end == reach, np.arange(len(end)), 0))
        index = np.flatnonzero(begin[1:] < reach[:-1]) + 1
        before, at = holder[index - 1], begin[index]
        # The run's unit at this offset.
        unit = np.array([max(1, unit) for _, unit in names], dtype=np.int64)
        number_before = number[before] + (at - begin[before]) // unit[owner[before]]
        length = np.minimum(reach[index - 1], end[index]) - at
        users = (owner[before], number_before), (owner[index], number[index])
        return Overlaps(at, length, *users, names)

    def _overlap(self) -> bool:
        """True if any two ranges overlap."""
        if not self._parts:
            return False
        begin = np.concatenate([begin for _, begin, _, _ in self._parts])
        end = np.concatenate([end for _, _, end, _ in self._parts])
        if len(begin) >= _MANY and (found := _overlap_of_many(begin, end)) is not None:
            return found
        # With starts and ends sorted separately, any overlap makes some start precede the previous end.
        begin.sort()
        end.sort()
        return bool((begin[1:] < end[:-1]).any())

    def unused(self, start: int, end: int) -> tuple[Column, Column]:
        """Returns `(begin, length)` of the unused ranges of `[start, end)`."""
        begins = np.concatenate([[start], *(begin for _, begin, _, _ in self._parts), [end]])
        ends = np.concatenate([[start], *(end for _, _, end, _ in self._parts), [end]])
        order = np.argsort(begins, kind="stable")
        begins = np.clip(begins[order], start, end)
        reach = np.clip(np.maximum.accumulate(ends[order]), start, end)
        gap = begins[1:] - reach[:-1]
        there = gap > 0
        return reach[:-1][there], gap[there]


def _overlap_of_many(begin: Column, end: Column) -> bool | None:
    """Returns whether any two of many ranges overlap, in linear time; None if the file has too many units.

    A unit divides all starts and ends. Starts and ends are counted per unit, in one byte each.
    """
    # The lowest set bit of all numbers is the largest power of two that divides them.
    bits = int(np.bitwise_or.reduce(begin) | np.bitwise_or.reduce(end))
    unit = bits & -bits
    count = int(end.max()) // unit + 1
    if count > _MOST_UNITS or int(begin.min()) < 0:
        return None
    begins, ends = np.zeros(count, dtype=np.int8), np.zeros(count, dtype=np.int8)
    begins[begin // unit] = 1
    ends[end // unit] = 1
    if np.count_nonzero(begins) < len(begin) or np.count_nonzero(ends) < len(end):
        return True
    begins -= ends
    level = 0
    for first in range(0, count, _MANY):
        # The number of open ranges at each unit.
        levels = np.cumsum(begins[first : first + _MANY], dtype=np.int64) + level
        if int(levels.max()) > 1:
            return True
        level = int(levels[-1])
    return False


def refuse_overlaps(
    table: Extents, file: File, metadata: Iterable[Metadata] = (), source: Source | None = None
) -> None:
    """Raises `ImageError` if payload in `file` overlaps other payload, or metadata.

    `source` is the source of the table's windows, by default the file itself.
    """
    found = overlaps(table, file if source is None else source, metadata)
    if found:
        raise ImageError(f"{file.name}: {found.text(0)}")


def overlaps(table: Extents, source: Source, metadata: Iterable[Metadata] = ()) -> Overlaps:
    """Returns the ranges of `source` where payload overlaps other payload, or metadata."""
    usage = Usage()
    for one in metadata:
        usage.add(one.name, one.offset, one.length)
    usage.add_windows(table, source)
    return usage.overlaps()
