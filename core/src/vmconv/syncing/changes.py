"""What changed between two states of a disk, and the evidence for it.

Every range that is not listed as changed is known to be equal; the evidence says why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vmconv.inspect.comparison import unproved
from vmconv.io.physical import PhysicalMap
from vmconv.model.extents import Column, Extents, Kind, cut, distinct, gather

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmconv.model.image import Image
    from vmconv.model.plan import Progress
    from vmconv.model.sources import File

GRAIN = 64 << 10
"""Bytes that are compared, and moved, as one."""
_PIECE = 4 << 20


class Changes(NamedTuple):
    """Changed ranges of a disk, bytes: sorted and apart. `compared` bytes of payload were read to find them."""

    start: Column
    length: Column
    evidence: str
    compared: int = 0
    certain: bool = True
    """False if the filesystem did not report all places, so that what is listed may be equal too."""

    @property
    def bytes(self) -> int:
        return int(self.length.sum())

    def widened(self, unit: int, size: int) -> Changes:
        """Returns the ranges rounded outward to whole units, and clipped to `size` bytes."""
        low = self.start // unit * unit
        high = np.minimum(-(-(self.start + self.length) // unit) * unit, size)
        there = high > low
        start, end = _united(low[there], high[there])
        return self._replace(start=start, length=end - start)


def _united(start: Column, end: Column) -> tuple[Column, Column]:
    """Returns ranges, sorted by their start, with touching and overlapping ones united."""
    if not len(start):
        return start, end
    reach = np.maximum.accumulate(end)
    first = np.append(True, start[1:] > reach[:-1])
    last = np.append(first[1:], True)
    return start[first], reach[last]


def merged(old: Extents, new: Extents, changes: Changes) -> Extents:
    """Returns the table of the disk `new` with the rows of `old` wherever nothing changed."""
    same = old.window(0, new.size, Kind.ZERO).without_holes()
    return same.replaced(new, changes.start, changes.length)


def allocated(old: Extents, new: Extents, changes: Changes) -> Extents:
    """Returns the table `old` with the rows of `new` in changed ranges where it has no payload.

    Its layout has all payload where the old image has it: only the bytes differ, see `overwritten`.
    """
    rows, length = cut(old, changes.start, changes.length, changes.start)
    free = rows.kind != Kind.DATA
    return old.replaced(new, rows.start[free], length[free])


def overwritten(old: Extents, new: Extents, changes: Changes, carrier: File) -> Extents:
    """Returns the table of the file `carrier` with the changed bytes of `new` where `old` has their place in it.

    Raises `ValueError` if two ranges of the disk have one place.
    """
    rows, length = cut(old, changes.start, changes.length, changes.start)
    mine = [index for index, source in enumerate(old.sources) if source is carrier]
    data = (rows.kind == Kind.DATA) & np.isin(rows.source, mine)
    order = np.argsort(rows.offset[data], kind="stable")
    guest, place, length = rows.start[data][order], rows.offset[data][order], length[data][order]
    moved, moved_length = cut(new, guest, length, place)
    other = Extents.placed(carrier.size, moved, moved_length, new.sources)
    return Extents.whole(carrier).replaced(other, place, length)


def by_address(new: Extents, old: Extents, evidence: str) -> Changes:
    """Returns the ranges of two disks that do not have the same physical blocks; reads no payload."""
    size = max(new.size, old.size)
    places = PhysicalMap()
    a, b = (places.apply(table.window(0, size, Kind.ZERO).without_holes()) for table in (new, old))
    start, length = unproved(a, b)
    start, end = _united(start, start + length)
    certain = not any(table.in_files().any() for table in (a, b))
    return Changes(start, end - start, evidence, certain=certain)


def by_layers(image: Image, base: Image, evidence: str) -> Changes:
    """Returns the ranges that the layers above `base` hold; reads no payload."""
    table = image.onto(base).guest
    changed = table.kind != Kind.HOLE
    start, end = _united(table.start[changed], table.end[changed])
    found = Changes(start, end - start, evidence)
    if base.size < image.size:
        # The rest reads as zero, and was not there before.
        tail = np.array([base.size]), np.array([image.size])
        low, high = np.append(start, tail[0]), np.append(end, tail[1])
        order = np.argsort(low, kind="stable")
        start, end = _united(low[order], high[order])
        found = found._replace(start=start, length=end - start)
    return found


def by_bitmap(new: Extents, old: Extents, written: tuple[Column, Column], evidence: str) -> Changes:
    """Returns the ranges that are marked as written, and those with payload on one side only; reads no payload.

    So a bitmap that lacks writes to unallocated parts, or a cut of the disk, does no harm.
    """
    size = max(new.size, old.size)
    a, b = (table.window(0, size, Kind.ZERO).without_holes() for table in (new, old))
    cuts = distinct(np.concatenate([a.start, b.start]))
    length = np.diff(cuts, append=size)
    differ = gather(a, cuts, length, cuts).kind != gather(b, cuts, length, cuts).kind
    start = np.concatenate([written[0], cuts[differ]])
    end = start + np.concatenate([written[1], length[differ]])
    order = np.argsort(start, kind="stable")
    start, end = _united(start[order], end[order])
    return Changes(start, end - start, evidence)


def nothing(evidence: str) -> Changes:
    """Returns no changes."""
    none = np.empty(0, dtype=np.int64)
    return Changes(none, none, evidence)


def everything(size: int, evidence: str) -> Changes:
    """Returns the whole disk as changed."""
    return Changes(np.zeros(min(size, 1), dtype=np.int64), np.full(min(size, 1), size, dtype=np.int64), evidence)


def by_reading(new: Extents, old: Extents, evidence: str, comparing: Progress | None) -> Changes:
    """Returns the grains of two disks that differ; reads both where each has payload."""
    size = max(new.size, old.size)
    a, b = (table.window(0, size, Kind.ZERO).without_holes() for table in (new, old))
    start, length = unproved(a, b)
    start, end = _united(start, start + length)
    low, high = start // GRAIN * GRAIN, np.minimum(-(-end // GRAIN) * GRAIN, size)
    low, high = _united(low, high)
    pieces = [
        (at, min(_PIECE, stop - at))
        for begin, stop in zip(low.tolist(), high.tolist(), strict=True)
        for at in range(begin, stop, _PIECE)
    ]
    cost = [_payload(a, at, count) + _payload(b, at, count) for at, count in pieces]
    total, done = sum(cost), 0
    if comparing:
        comparing(0, total)
    found: list[int] = []
    for (grains, _), step in zip(_read(a, b, pieces), cost, strict=True):
        found += grains
        done += step
        if comparing and step:
            comparing(done, total)
    begin = np.array(found, dtype=np.int64)
    begin, stop = _united(begin, np.minimum(begin + GRAIN, size))
    return Changes(begin, stop - begin, evidence, total)


def _payload(table: Extents, start: int, length: int) -> int:
    """Returns the bytes of a range that have to be read."""
    rows = gather(table, np.array([start]), np.array([length]), np.array([0]))
    lengths = np.diff(rows.start, append=length)
    return int(lengths[rows.kind == Kind.DATA].sum())


def _read(a: Extents, b: Extents, pieces: list[tuple[int, int]]) -> Iterator[tuple[list[int], int]]:
    """Yields the starts of different grains of each piece."""
    from vmconv.system.parallel import in_order

    def look(piece: tuple[int, int]) -> tuple[list[int], int]:
        at, count = piece
        one, other = a.read(at, count), b.read(at, count)
        if one == other:
            return [], count
        return [
            at + skip for skip in range(0, count, GRAIN) if one[skip : skip + GRAIN] != other[skip : skip + GRAIN]
        ], count

    yield from in_order(look, iter(pieces))
