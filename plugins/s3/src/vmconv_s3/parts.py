"""The parts of an upload: which ranges of an object the store copies, and which are sent.

The limits are those of Amazon S3 (User Guide, "Amazon S3 multipart upload limits"): at most 10,000 parts of at most
5 GiB, and of at least 5 MiB except the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vmconv.plugin import Action, PlanError

if TYPE_CHECKING:
    from vmconv.plugin import Column, FilePlan

SMALLEST = 5 << 20
"""Bytes of a part that is not the last, at least. The store copies ranges of objects with more bytes only."""
MOST_PARTS = 10_000
_LARGEST_COPY = 5 << 30
_LARGEST_SENT = 1 << 30
"""Bytes of a part that is sent, at most: it is in memory."""
_FEW_PARTS = 1000
"""What servers may allow less than 10,000 to, such as Swift's s3api by default."""
_FEW_SENT = 64 << 20
_COPY, _SENT = 512 << 20, 16 << 20
"""Bytes of a part where the number of parts does not matter."""


class Part(NamedTuple):
    """A range of the object. `source` indexes the sources of its plan, -1 if it is sent; `at` is its offset there."""

    offset: int
    length: int
    source: int = -1
    at: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def is_copied(self) -> bool:
        return self.source >= 0


class _Sizes(NamedTuple):
    """Bytes of the smallest range that is copied, and of the largest parts."""

    least: int
    copy: int
    sent: int


class _Runs(NamedTuple):
    """Ranges that the store could copy, as parallel columns in bytes."""

    offset: Column
    length: Column
    source: Column
    at: Column


def parts_of(file: FilePlan, copyable: Sequence[bool]) -> list[Part]:
    """Returns the parts of an object in order, without gaps. `copyable` tells which sources the store can copy from.

    Raises `PlanError` if no division is within the limits.
    """
    if not file.size:
        raise PlanError(f"{file.name}: would be an empty object")
    runs = _runs(file, copyable)
    for sizes, most in _choices(file.size):
        parts = list(islice(_divided(runs, file.size, sizes), most + 1))
        if len(parts) <= most:
            return parts
    raise PlanError(f"{file.name}: {file.size} bytes are too many for {MOST_PARTS} parts")


def rows_copied(file: FilePlan, parts: Sequence[Part]) -> Column:
    """Returns how many bytes of each step of the plan are in parts that the store copies."""
    copied = [part for part in parts if part.is_copied]
    if not copied:
        return np.zeros(len(file.steps.offset), dtype=np.int64)
    begin, length = (np.array(column, dtype=np.int64) for column in list(zip(*copied, strict=True))[:2])
    before = np.cumsum(length) - length

    def below(address: Column) -> Column:
        """Returns the copied bytes below each address."""
        number = np.maximum(np.searchsorted(begin, address, side="right") - 1, 0)
        inside: Column = np.clip(address - begin[number], 0, length[number])
        return before[number] + inside

    return below(file.steps.offset + file.steps.length) - below(file.steps.offset)


def _runs(file: FilePlan, copyable: Sequence[bool]) -> _Runs:
    """Returns the copied rows of these sources, neighbours joined, without those that are smaller than a part."""
    may = np.array([*copyable, False])
    steps = file.steps.take((file.steps.action == Action.COPY) & may[file.steps.source])
    offset, length, source, at = steps.offset, steps.length, steps.source, steps.source_offset
    end = offset + length
    joins = (offset[1:] == end[:-1]) & (source[1:] == source[:-1]) & (at[1:] == at[:-1] + length[:-1])
    first = np.flatnonzero(np.append(True, ~joins)) if len(offset) else np.zeros(0, dtype=np.int64)
    last = np.append(first[1:], len(offset)) - 1 if len(first) else first
    whole = end[last] - offset[first]
    large = whole >= SMALLEST
    first = first[large]
    return _Runs(offset[first], whole[large], source[first].astype(np.int64), at[first])


def _choices(size: int) -> Iterator[tuple[_Sizes, int]]:
    """Yields sizes to try, and the number of parts with which they do."""
    steps = [step for step in range(8) if _SENT << step <= _LARGEST_SENT]
    units = [(min(_LARGEST_COPY, _COPY << step), _SENT << step) for step in steps]
    for copy, sent in units:
        if sent <= _FEW_SENT:
            yield _Sizes(SMALLEST, copy, sent), _FEW_PARTS
    least = SMALLEST
    while least < 2 * size:
        for copy, sent in units:
            yield _Sizes(least, copy, sent), MOST_PARTS
        least *= 2


def _divided(runs: _Runs, size: int, sizes: _Sizes) -> Iterator[Part]:
    at = 0
    for offset, length, source, source_offset in zip(*(column.tolist() for column in runs), strict=True):
        end = offset + length
        # A part that is sent takes what it lacks from the range behind it.
        start = max(offset, at + SMALLEST) if offset > at else offset
        if end - start < sizes.least:
            continue
        yield from _split(Part(at, start - at), sizes.sent)
        yield from _split(Part(start, end - start, source, source_offset + start - offset), sizes.copy)
        at = end
    yield from _split(Part(at, size - at), sizes.sent)


def _split(part: Part, most: int) -> Iterator[Part]:
    """Yields a part in nearly equal parts of at most `most` bytes; nothing of an empty one."""
    count = -(-part.length // most)
    for number in range(count):
        begin, end = (part.length * each // count for each in (number, number + 1))
        yield Part(part.offset + begin, end - begin, part.source, part.at + begin if part.is_copied else 0)
