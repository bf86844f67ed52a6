"""Encoded payload of a result, such as compressed clusters: proved by the places of its bytes, without decoding any.

It is what the source has at that address if its bytes are those of the source's own encoded unit, or those that the
writer has encoded for that address.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vmconv.model.extents import Column, Extents, Kind, spread
from vmconv.model.sources import Decoded, Encoded, File


def as_encoded(table: Extents, layouts: Mapping[int, Extents], wanted: Extents) -> Extents:
    """Returns a result's table with the windows of `wanted` for units whose encoded bytes are known.

    `layouts` are the tables of the result's files, by the id of the file object. Both tables are of one size.
    """
    for index, result in enumerate(table.sources):
        if not isinstance(result, Decoded) or not result.encoding or id(result.file) not in layouts:
            continue
        address, unit = _units(table, index, result.unit)
        if len(address):
            address = address[_same(result, unit, layouts[id(result.file)], wanted, address)]
            length = np.minimum(result.unit, table.size - address)
            table = table.replaced(wanted, address, length) if len(address) else table
    return table


def _units(table: Extents, index: int, size: int) -> tuple[Column, Column]:
    """Returns address and number of each whole unit of a source in the table."""
    rows = (table.kind == Kind.DATA) & (table.source == index) & (table.offset % size == 0)
    start, offset = table.start[rows], table.offset[rows]
    row, place = spread(-(-(table.end[rows] - start) // size))
    return start[row] + place * size, offset[row] // size + place


def _same(result: Decoded, unit: Column, layout: Extents, wanted: Extents, address: Column) -> Column:
    """Returns the indices of the units that lie in the result as in the source of `wanted` at their addresses, or are
    those that the writer encoded for these addresses.
    """
    at, room = result.encoded(unit)
    row = layout.row_at(at)
    place, left = layout.offset[row] + at - layout.start[row], layout.end[row] - at
    room = np.minimum(room, left)
    found = []
    for index, source in enumerate(layout.sources):
        some = np.flatnonzero((layout.kind[row] == Kind.DATA) & (layout.source[row] == index))
        if not len(some):
            continue
        if isinstance(source, Encoded) and source.encoding == result.encoding:
            meant, length = source.units_at(place[some])
            found.append(some[(meant == address[some]) & (length <= room[some])])
        elif isinstance(source, File):
            stated, length = _places(wanted, address[some], source, result.encoding)
            found.append(some[(stated == place[some]) & (length <= room[some])])
    return np.sort(np.concatenate(found)) if found else np.empty(0, dtype=np.int64)


def _places(wanted: Extents, address: Column, file: File, encoding: str | None) -> tuple[Column, Column]:
    """Returns offset in the file and length of the encoded units at these addresses of the source; -1 for others."""
    place, length = np.full(len(address), -1, dtype=np.int64), np.zeros(len(address), dtype=np.int64)
    row = wanted.row_at(address)
    offset = wanted.offset[row] + address - wanted.start[row]
    for index, source in enumerate(wanted.sources):
        if isinstance(source, Decoded) and source.encoding == encoding and source.file is file:
            mine = (wanted.kind[row] == Kind.DATA) & (wanted.source[row] == index) & (offset % source.unit == 0)
            place[mine], length[mine] = source.encoded(offset[mine] // source.unit)
    return place, length
