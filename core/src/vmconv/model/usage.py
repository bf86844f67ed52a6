"""Which ranges of a file are used, and by what: what readers and structural checks of all formats share.

A block, cluster or grain that two guest addresses share, or that lies over metadata, has wrong bytes for one of its
users as soon as the other is written. Ranges are kept as runs: neighbours of one user that follow each other are one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vmconv.errors import ImageError
from vmconv.model.extents import Column, Extents
from vmconv.model.sources import File, Source

_LONG = 1 << 62
_MANY = 1 << 20
_MOST_UNITS = 1 << 26
_FAR = 1 << 61
"""No file is as long as this, bytes; twice it is still a signed 64-bit integer."""
GUEST = "guest address"
"""The user of payload in a table."""


class Overlaps(NamedTuple):
    """Ranges of a file that two use, in its order: bytes `[offset, offset + length)`; `one` is there before `other`."""

    offset: Column
    length: Column
    one: tuple[Column, Column]
    """The user of each range, as an index of `names`, and which of that name's ranges it is."""
    other: tuple[Column, Column]
    names: list[tuple[str, int]]

    def __bool__(self) -> bool:
        return len(self.offset) > 0

    def text(self, index: int) -> str:
        """Returns an overlap in words."""
        users = [self._user(*(int(column[index]) for column in user)) for user in (self.other, self.one)]
        return f"{users[0]} and {users[1]} both lie at {int(self.offset[index]):#x}"

    def between_payload(self) -> npt.NDArray[np.bool_]:
        """Returns which overlaps are of payload with payload."""
        guest = np.array([name == GUEST for name, _ in self.names] or [False])
        both: npt.NDArray[np.bool_] = guest[self.one[0]] & guest[self.other[0]]
        return both

    def _user(self, owner: int, number: int) -> str:
        name, unit = self.names[owner]
        if not unit:
            return name
        return f"{name} {number:#x}" if name == GUEST else f"{name} {number}"


class Metadata(NamedTuple):
    """Ranges of metadata with one name, bytes: `length` of each from `offset` on."""

    name: str
    offset: Column | list[int]
    length: int


class Usage:
    """The ranges of one file that are in use; ranges of no bytes are left out."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, int], int] = {}
        self._parts: list[tuple[int, Column, Column, Column]] = []

    def add(self, name: str, offset: Column | list[int], length: int, number: Column | None = None) -> None:
        """Adds ranges of `length` bytes; `number` says which each is, such as the number of its table entry."""
        if isinstance(offset, list):
            # Numbers of a header may be any.
            offset = np.array([min(at, _FAR) for at in offset], dtype=np.int64)
        begin, length = offset, min(length, _FAR)
        if not len(begin) or length <= 0:
            return
        count = np.arange(len(begin), dtype=np.int64) if number is None else number
        first = np.ones(len(begin), dtype=bool)
        first[1:] = (np.diff(begin) != length) | (np.diff(count) != 1)
        starts = np.flatnonzero(first)
        end = begin[starts] + np.diff(starts, append=len(begin)) * length
        self._take(name, length if number is not None else 0, begin[starts], end, count[starts])

    def add_each(self, name: str, offset: Column, length: Column, number: Column) -> None:
        """Adds ranges of different lengths; `number` says which each is."""
        # One byte is as good as any number that no range is long enough to reach.
        self._take(name, _LONG, offset, offset + length, number)

    def add_windows(self, table: Extents, source: Source) -> None:
        """Adds what a table of the guest's disk has in `source`, by guest addresses."""
        # The extra last element answers for -1, the index of rows that have no source.
        rows = np.array([*(other is source for other in table.sources), False])[table.source]
        offset = table.offset[rows]
        self._take(GUEST, 1, offset, offset + table.length[rows], table.start[rows])

    def _take(self, name: str, unit: int, begin: Column, end: Column, number: Column) -> None:
        owner = self._names.setdefault((name, unit), len(self._names))
        self._parts.append((owner, begin, end, number))

    @property
    def end(self) -> int:
        """The first byte behind everything that is used."""
        return max((int(end.max()) for _, _, end, _ in self._parts if len(end)), default=0)

    def overlaps(self) -> Overlaps:
        """Returns the ranges that are used by more than one."""
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
        # The range that reaches furthest of all up to each one.
        holder = np.maximum.accumulate(np.where(end == reach, np.arange(len(end)), 0))
        index = np.flatnonzero(begin[1:] < reach[:-1]) + 1
        before, at = holder[index - 1], begin[index]
        # Which unit of its run lies there.
        unit = np.array([max(1, unit) for _, unit in names], dtype=np.int64)
        number_before = number[before] + (at - begin[before]) // unit[owner[before]]
        length = np.minimum(reach[index - 1], end[index]) - at
        users = (owner[before], number_before), (owner[index], number[index])
        return Overlaps(at, length, *users, names)

    def _overlap(self) -> bool:
        """True when any two ranges overlap: sorted apart, some range begins before the one before it ends."""
        if not self._parts:
            return False
        begin = np.concatenate([begin for _, begin, _, _ in self._parts])
        end = np.concatenate([end for _, _, end, _ in self._parts])
        if len(begin) >= _MANY and (found := _overlap_of_many(begin, end)) is not None:
            return found
        begin.sort()
        end.sort()
        return bool((begin[1:] < end[:-1]).any())

    def unused(self, start: int, end: int) -> tuple[Column, Column]:
        """Returns `(begin, length)` of the ranges of `[start, end)` that nothing uses."""
        begins = np.concatenate([[start], *(begin for _, begin, _, _ in self._parts), [end]])
        ends = np.concatenate([[start], *(end for _, _, end, _ in self._parts), [end]])
        order = np.argsort(begins, kind="stable")
        begins = np.clip(begins[order], start, end)
        reach = np.clip(np.maximum.accumulate(ends[order]), start, end)
        gap = begins[1:] - reach[:-1]
        there = gap > 0
        return reach[:-1][there], gap[there]


def _overlap_of_many(begin: Column, end: Column) -> bool | None:
    """Returns whether any two ranges overlap, without sorting millions of them; None where the file is too long for it.

    Everything begins and ends at multiples of some unit, of which the file has so many that one byte for each will do.
    """
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
        # How many ranges have begun and not ended.
        levels = np.cumsum(begins[first : first + _MANY], dtype=np.int64) + level
        if int(levels.max()) > 1:
            return True
        level = int(levels[-1])
    return False


def refuse_overlaps(
    table: Extents, file: File, metadata: Iterable[Metadata] = (), source: Source | None = None
) -> None:
    """Raises `ImageError` where payload that a reader found in `file` overlaps other payload, or metadata.

    `source` is what the table's windows are onto, by default the file itself.
    """
    found = overlaps(table, file if source is None else source, metadata)
    if found:
        raise ImageError(f"{file.name}: {found.text(0)}")


def overlaps(table: Extents, source: Source, metadata: Iterable[Metadata] = ()) -> Overlaps:
    """Returns the ranges of `source` that payload shares with other payload, or with metadata."""
    usage = Usage()
    for one in metadata:
        usage.add(one.name, one.offset, one.length)
    usage.add_windows(table, source)
    return usage.overlaps()
