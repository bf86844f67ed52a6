"""Bounded reading of structures and tables of images, for readers and checks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from vmconv.model.extents import Column, Kind, on_storage
from vmconv.model.sources import File


def table_slices(file: File, tables: Column, length: int, most: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Yields `(first table, count, bytes of the tables)` for the offsets of tables of `length` bytes each.

    None stands for tables that are not there (offset 0) or lie in a hole of the file. Tables that lie together are read
    together, `most` bytes at a time (at least one table), and holes of the file are not read at all.
    """
    tables = np.where(_in_hole(file, tables, length), 0, tables)
    at_once = max(1, most // length)
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
    """Returns which of the tables lie in holes of the file, all at once: there may be millions."""
    storage = on_storage(file)
    if not len(storage) or not len(tables):
        return np.zeros(len(tables), dtype=bool)
    first, last = storage.row_at(tables), storage.row_at(tables + (length - 1))
    hole: npt.NDArray[np.bool_] = (first == last) & (storage.kind[first] != Kind.DATA)
    return hole
