"""Bounded reading of structures and tables of images, for readers and checks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from vmconv.model.extents import Column, Kind, on_storage
from vmconv.model.sources import File


def table_slices(file: File, tables: Column, length: int, most: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Yields `(index of the first table, count, bytes)` for tables of `length` bytes at the offsets `tables`.

    The bytes are None for tables that are not allocated (offset 0) or lie in a hole of the file. Contiguous tables are
    read at once, up to `most` bytes (at least one table).
    """
    tables = np.where(_in_hole(file, tables, length), 0, tables)
    at_once = max(1, most // length)
    # A run ends where allocation changes, or where the next table is not contiguous.
    breaks = np.flatnonzero(np.where(tables[1:] == 0, tables[:-1] != 0, tables[1:] - tables[:-1] != length)) + 1
    edges = [0, *breaks.tolist(), len(tables)] if len(tables) else []
    for begin, end in itertools.pairwise(edges):
        if not tables[begin]:
            yield begin, end - begin, None
            continue
        for first in range(begin, end, at_once):
            count = min(at_once, end - first)
            yield first, count, file.read(int(tables[first]), count * length)


def _in_hole(file: File, tables: Column, length: int) -> npt.NDArray[np.bool_]:
    """Returns a mask of the tables that lie in holes of the file; vectorised, because there may be millions."""
    storage = on_storage(file)
    if not len(storage) or not len(tables):
        return np.zeros(len(tables), dtype=bool)
    first, last = storage.row_at(tables), storage.row_at(tables + (length - 1))
    hole: npt.NDArray[np.bool_] = (first == last) & (storage.kind[first] != Kind.DATA)
    return hole
