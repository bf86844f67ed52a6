"""Persistent bitmaps: which ranges of a disk were written."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vmconv.model.extents import Column


class DirtyBitmap(NamedTuple):
    """A persistent bitmap: the ranges `(start, length)` of a disk that were written while it was enabled, bytes.

    They are sorted, and may touch.
    """

    name: str
    granularity: int
    enabled: bool
    start: Column
    length: Column

    def bits(self, size: int) -> tuple[Column, Column]:
        """Returns first and end of each run of set bits, for a disk of `size` bytes."""
        end = -(-np.minimum(self.start + self.length, size) // self.granularity)
        first = self.start // self.granularity
        first, end = first[first < end], end[first < end]
        reach = np.maximum.accumulate(end)
        begins = np.ones(len(first), dtype=bool)
        begins[1:] = first[1:] > reach[:-1]
        last = np.append(np.flatnonzero(begins)[1:], len(first)) - 1 if len(first) else np.flatnonzero(begins)
        return first[begins], reach[last]
