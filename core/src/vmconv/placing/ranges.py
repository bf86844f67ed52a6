"""Ranges of a disk that lie in files as the guest sees them, for formats that refer to other files.

Unlike for reflink, offsets in the output do not matter. A range must only begin and end at a multiple of the unit, in
the disk and in its file.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vmconv.model.extents import Column, Columns, Extents, Kind, distinct, on_storage
from vmconv.model.sources import File


class Ranges(NamedTuple):
    """Sorted ranges of the disk: `length` bytes from `start` on lie at `offset` of the source with index `source`."""

    start: Column
    length: Column
    source: npt.NDArray[np.int32]
    offset: Column


def joined_over_holes(table: Extents) -> Extents:
    """Returns the table with ZERO rows merged into neighbouring windows whose file has a hole there.

    For a reference, a sparse file is one range, because its holes read as zero.
    """
    before, after = np.arange(-1, len(table) - 1), np.arange(1, len(table) + 1)
    length = table.length
    places = (before, table.offset[before] + length[before]), (after, table.offset[after % len(table)] - length)
    rows = Columns(table.start, table.kind.copy(), table.source.copy(), table.offset.copy())
    # First from the row before each ZERO row, then from the row after it.
    for neighbour, place in places if len(table) else ():
        _extend(table, rows, neighbour, place)
    return Extents(table.size, rows, table.sources)


def _extend(table: Extents, rows: Columns, neighbour: Column, place: Column) -> None:
    """Turns the remaining ZERO rows into windows onto the neighbour's file at `place`, if it has a hole there."""
    beside = neighbour % len(table)
    # False for a neighbour outside the table.
    there = (neighbour == beside) & (rows.kind == Kind.ZERO) & (table.kind[beside] == Kind.DATA)
    for index in distinct(table.source[beside[there]].astype(np.int64)).tolist():
        file = table.sources[index]
        if not isinstance(file, File):
            continue
        mine = np.flatnonzero(there & (table.source[beside] == index))
        mine = mine[_in_hole(file, place[mine], table.length[mine])]
        rows.kind[mine], rows.source[mine], rows.offset[mine] = Kind.DATA, index, place[mine]


def _in_hole(file: File, offset: Column, length: Column) -> npt.NDArray[np.bool_]:
    """Returns a mask of the ranges, not empty, that lie inside one hole of the file."""
    storage = on_storage(file)
    inside = (offset >= 0) & (offset + length <= file.size)
    # Ranges outside the file get row 0; `inside` leaves them out.
    first, last = (storage.row_at(np.where(inside, at, 0)) for at in (offset, offset + length - 1))
    hole: npt.NDArray[np.bool_] = inside & (first == last) & (storage.kind[first] == Kind.ZERO)
    return hole


def ranges_in_files(table: Extents, unit: int) -> Ranges:
    """Returns the ranges of a disk in files, clipped to whole units; `source` indexes the sources of the table."""
    start, end = -(-table.start // unit) * unit, table.end // unit * unit
    there = table.in_files() & (start < end)
    there &= (table.offset - table.start) % unit == 0
    offset = table.offset + start - table.start
    return Ranges(start[there], (end - start)[there], table.source[there], offset[there])
