"""Payload that stays where it lies: what writers of block-allocating formats need to convert a disk in place.

The file that holds the payload becomes the output. A block of the target can stay when all its payload lies in one
piece at a place that an entry of the target can name, and when what else it covers reads as zero: a hole of the file.
Whether that is so depends on the size of the blocks.
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
"""Payload that may move out of the way of a header, bytes: one block, of the largest cluster that qcow2 has."""
_SMALL_BLOCKS = 65536
"""So much of it when blocks are small."""


class Pinned(NamedTuple):
    """A disk in blocks of `unit` bytes that stay: `table` in whole blocks, `runs` of blocks with payload and their
    `offset`s in the file. What is made anew goes behind `end`.
    """

    unit: int
    table: Extents
    runs: blocks.Runs
    offset: Column
    end: int

    def cleared(self, head: int) -> Pinned:
        """Returns the disk with the blocks that touch the first `head` bytes of the file moved behind its end.

        Raises `PlanError` when that is more than a block of the usual size.
        """
        pinned, moved = self, 0
        while len(blocking := np.flatnonzero(pinned.offset < head)):
            pinned, moved = pinned._moved(int(blocking[0])), moved + self.unit
            most = min(max(self.unit, _SMALL_BLOCKS), MOST_MOVED)
            if moved > most:
                raise PlanError(f"in place, more than {most} bytes of payload would have to move out of the way")
        return pinned

    def _moved(self, run: int) -> Pinned:
        """Returns the disk with the first block of a run behind the end."""
        rest = self.runs.take(np.array([run]))
        rest = rest._replace(first=rest.first + 1, blocks=rest.blocks - 1)
        there = rest.blocks > 0
        rest_offset = (self.offset[[run]] + self.unit)[there]
        first, offset = self.runs.blocks.copy(), self.offset.copy()
        first[run], offset[run] = 1, self.end
        runs = self.runs._replace(blocks=first).joined(rest.take(there))
        return self._replace(runs=runs, offset=np.concatenate([offset, rest_offset]), end=self.end + self.unit)


def pin(table: Extents, carrier: File, units: Sequence[int], align: int | None = None) -> Pinned:
    """Returns the disk in the largest of these blocks, powers of two, in which all its payload can stay in `carrier`.

    `align`, at most the size of a block and by default just that, divides the place of each block in the file. Raises
    `PlanError`, with what is in the way of the smallest blocks, when there are none.
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
    _, offset = blocks.preferred(whole, runs, unit)
    length = runs.blocks * unit
    problem = _misplaced(runs, offset, unit, align) or _torn(whole, runs, offset, carrier, unit, table.size)
    problem = problem or _twice(offset, length)
    if problem:
        return None, problem
    end = int((offset + length).max()) if len(offset) else 0
    return Pinned(unit, whole, runs, offset, max(end, carrier.size)), ""


def _misplaced(runs: blocks.Runs, offset: Column, unit: int, align: int) -> str | None:
    bad = (offset % align != 0) | (offset < 0)
    if not bad.any():
        return None
    run = int(np.flatnonzero(bad)[0])
    return (
        f"guest address {int(runs.first[run]) * unit:#x} lies at {int(offset[run]):#x}, which is no multiple of {align}"
    )


def _partly_zero(runs: blocks.Runs, unit: int) -> str | None:
    """Returns where zeros and what the parent says meet in a block: it would take a copy of what the parent says."""
    mixed = runs.first[runs.mixed & (runs.kind == Kind.ZERO)] * unit
    if not len(mixed):
        return None
    return f"a block of {unit} bytes at guest address {int(mixed[0]):#x} is zero in part and its parent's in part"


def _torn(table: Extents, runs: blocks.Runs, offset: Column, carrier: File, unit: int, size: int) -> str | None:
    """Returns where a block is not in one piece, or covers bytes of the file that are something else."""
    mixed = runs.mixed
    if not mixed.any():
        return None
    address = runs.first[mixed] * unit
    length = np.full(len(address), unit)
    rows, row_length = cut(table, address, length, offset[mixed])
    guest = gather(table, address, length, address).start
    data = rows.kind == Kind.DATA
    apart = data & (rows.offset != rows.start)
    # What lies past the end of the disk is nobody's business.
    gap = ~data & (guest < size)
    left = gap & (rows.kind == Kind.HOLE)
    covered = np.zeros(len(gap), dtype=bool)
    covered[gap] = _holds_data(carrier, rows.start[gap], np.minimum(row_length, size - guest)[gap])
    bad = apart | left | covered
    if not bad.any():
        return None
    row = int(np.flatnonzero(bad)[0])
    where = f"a block of {unit} bytes around guest address {int(guest[row]):#x}"
    return f"{where} is not in one piece" if apart[row] or left[row] else f"{where} covers bytes that are not zero"


def _holds_data(file: File, start: Column, length: Column) -> npt.NDArray[np.bool_]:
    """Returns which ranges of a file have data on storage; what lies past its end has none."""
    found = np.zeros(len(start), dtype=bool)
    inside = np.clip(file.size - start, 0, length)
    chosen = np.flatnonzero(inside > 0)
    if len(chosen):
        storage = on_storage(file)
        rows: Columns
        rows, row_length = cut(storage, start[chosen], inside[chosen], np.zeros(len(chosen), dtype=np.int64))
        del row_length
        # Rows of one window begin with one that is moved to address 0.
        window = np.cumsum(rows.start == 0) - 1
        found[chosen] = np.bincount(window[rows.kind == Kind.DATA], minlength=len(chosen)) > 0
    return found


def _twice(offset: Column, length: Column) -> str | None:
    order = np.argsort(offset, kind="stable")
    begin, end = offset[order], (offset + length)[order]
    over = begin[1:] < end[:-1]
    return f"bytes at {int(begin[1:][over][0]):#x} belong to two blocks" if over.any() else None
