"""Pinned payload: block-allocating writers in place.

The file with the payload, the carrier, becomes the output. A block can stay in place if its payload is contiguous in
the carrier, at an offset that the target's tables can express, and if the rest of the block is a hole of the carrier.
Whether that holds depends on the size of the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vmconv.errors import PlanError
from vmconv.model.extents import Column, Columns, Extents, Kind, cut, gather, on_storage
from vmconv.model.sources import File
from vmconv.placing import blocks

MOST_MOVED = 2 << 20
"""Limit of payload that moves to make room for a header, bytes: the largest cluster of qcow2."""
_MOST_READ = 1 << 20
"""Limit of data that is read to see whether it is zero, bytes: the rest of one block behind the old end of a disk."""
_SMALL_BLOCKS = 65536
"""The limit for blocks up to this size, bytes."""


class Pinned(NamedTuple):
    """A disk in blocks of `unit` bytes: its `table` in whole blocks, the `runs` of blocks with payload, and their
    `offset`s in the carrier. New data goes behind `end`.
    """

    unit: int
    table: Extents
    runs: blocks.Runs
    offset: Column
    end: int

    def cleared(self, head: int) -> Pinned:
        """Returns the disk with blocks in the first `head` bytes of the file moved behind its end.

        Raises `PlanError` if they exceed the limit above.
        """
        pinned, moved = self, 0
        while len(blocking := np.flatnonzero(pinned.offset < head)):
            pinned, moved = pinned._moved(int(blocking[0])), moved + self.unit
            most = min(max(self.unit, _SMALL_BLOCKS), MOST_MOVED)
            if moved > most:
                raise PlanError(f"in place, more than {most} bytes of payload would have to move to clear the header")
        return pinned

    def _moved(self, run: int) -> Pinned:
        """Returns the disk with the first block of a run moved behind the end."""
        rest = self.runs.take(np.array([run]))
        rest = rest._replace(first=rest.first + 1, blocks=rest.blocks - 1)
        there = rest.blocks > 0
        rest_offset = (self.offset[[run]] + self.unit)[there]
        first, offset = self.runs.blocks.copy(), self.offset.copy()
        first[run], offset[run] = 1, self.end
        runs = self.runs._replace(blocks=first).joined(rest.take(there))
        return self._replace(runs=runs, offset=np.concatenate([offset, rest_offset]), end=self.end + self.unit)


def pin(table: Extents, carrier: File, units: Sequence[int], align: int | None = None) -> Pinned:
    """Returns the disk in the largest of the block sizes `units` (powers of two) that keep all payload in place.

    Offsets in `carrier` are multiples of `align` bytes, by default the block size and at most that. Blocks with payload
    of another file, as when an image is brought up to date, are placed behind the end. Raises `PlanError` if no size
    fits, with the reason for the smallest.
    """
    problem = "no block is small enough"
    for unit in sorted(units, reverse=True):
        found, problem = _settled(table, carrier, unit, align or unit)
        if found:
            return found._replace(end=-(-found.end // unit) * unit)
    raise PlanError(f"in place, payload cannot stay where it lies: {problem}")


def _settled(table: Extents, carrier: File, unit: int, align: int) -> tuple[Pinned | None, str]:
    whole = blocks.padded(table, unit)
    runs = blocks.whole_blocks(whole, unit)
    if problem := _partly_zero(runs, unit):
        return None, problem
    runs = runs.take(runs.kind == Kind.DATA)
    added = _elsewhere(whole, runs, carrier, unit)
    new, runs = runs.take(added), runs.take(~added)
    _, offset = blocks.preferred(whole, runs.first * unit)
    length = runs.blocks * unit
    problem = _misplaced(runs, offset, unit, align) or _torn(whole, runs, offset, carrier, unit, table.size)
    problem = problem or _twice(offset, length)
    if problem:
        return None, problem
    end = max(int((offset + length).max()) if len(offset) else 0, carrier.size)
    if len(new.first):
        start, size = -(-end // unit) * unit, new.blocks * unit
        offset = np.concatenate([offset, start + np.cumsum(size) - size])
        runs, end = runs.joined(new), start + int(size.sum())
    return Pinned(unit, whole, runs, offset, end), ""


def _elsewhere(table: Extents, runs: blocks.Runs, carrier: File, unit: int) -> npt.NDArray[np.bool_]:
    """Returns a mask of the runs with payload of another source than `carrier`."""
    own = [index for index, source in enumerate(table.sources) if source is carrier]
    foreign = (table.kind == Kind.DATA) & ~np.isin(table.source, own)
    # Rows that begin inside a run, and the row that it begins in.
    before = np.append(0, np.cumsum(foreign))
    first = table.row_at(runs.first * unit)
    last = table.row_at((runs.first + runs.blocks) * unit - 1)
    found: npt.NDArray[np.bool_] = before[last + 1] > before[first]
    return found


def _misplaced(runs: blocks.Runs, offset: Column, unit: int, align: int) -> str | None:
    bad = (offset % align != 0) | (offset < 0)
    if not bad.any():
        return None
    run = int(np.flatnonzero(bad)[0])
    return f"guest address {int(runs.first[run]) * unit:#x} is at {int(offset[run]):#x}, not a multiple of {align}"


def _partly_zero(runs: blocks.Runs, unit: int) -> str | None:
    """Returns the error for a block of ZERO and HOLE: it would need a copy of the parent's bytes."""
    mixed = runs.first[runs.mixed & (runs.kind == Kind.ZERO)] * unit
    if not len(mixed):
        return None
    return f"a block of {unit} bytes at guest address {int(mixed[0]):#x} is partly zero and partly the parent's"


def _torn(table: Extents, runs: blocks.Runs, offset: Column, carrier: File, unit: int, size: int) -> str | None:
    """Returns the error for a block that is not contiguous in the carrier, or covers other data of it."""
    mixed = runs.mixed
    if not mixed.any():
        return None
    address = runs.first[mixed] * unit
    length = np.full(len(address), unit)
    rows, row_length = cut(table, address, length, offset[mixed])
    guest = gather(table, address, length, address).start
    data = rows.kind == Kind.DATA
    apart = data & (rows.offset != rows.start)
    # Bytes past the end of the disk may be anything.
    gap = ~data & (guest < size)
    left = gap & (rows.kind == Kind.HOLE)
    covered = np.zeros(len(gap), dtype=bool)
    covered[gap] = _holds_data(carrier, rows.start[gap], np.minimum(row_length, size - guest)[gap])
    bad = apart | left | covered
    if not bad.any():
        return None
    row = int(np.flatnonzero(bad)[0])
    where = f"a block of {unit} bytes around guest address {int(guest[row]):#x}"
    return f"{where} is not contiguous" if apart[row] or left[row] else f"{where} covers bytes that are not zero"


def _holds_data(file: File, start: Column, length: Column) -> npt.NDArray[np.bool_]:
    """Returns a mask of the ranges that have data on storage. Past the end of the file no range has.

    A few bytes that are stored as zeros do not count.
    """
    found = np.zeros(len(start), dtype=bool)
    inside = np.clip(file.size - start, 0, length)
    chosen = np.flatnonzero(inside > 0)
    if len(chosen):
        storage = on_storage(file)
        rows: Columns
        rows, row_length = cut(storage, start[chosen], inside[chosen], np.zeros(len(chosen), dtype=np.int64))
        del row_length
        # All windows were moved to address 0, so a row at 0 begins the next window.
        window = np.cumsum(rows.start == 0) - 1
        found[chosen] = np.bincount(window[rows.kind == Kind.DATA], minlength=len(chosen)) > 0
    if inside[found].sum() <= _MOST_READ:
        for index in np.flatnonzero(found).tolist():
            found[index] = any(file.read(int(start[index]), int(inside[index])))
    return found


def _twice(offset: Column, length: Column) -> str | None:
    order = np.argsort(offset, kind="stable")
    begin, end = offset[order], (offset + length)[order]
    over = begin[1:] < end[:-1]
    return f"bytes at {int(begin[1:][over][0]):#x} belong to two blocks" if over.any() else None
