"""Finds chunks of zeros by their compressed bytes, so that a disk that is mostly empty stays so.

EWF has no holes. But a writer compresses each chunk of zeros to the same few bytes. One such chunk is decoded for each
length; all others of that length are compared with it, and read as zeros only if they are equal.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from vmconv.plugin import Column, File

_WINDOW = 1 << 20
_MOST_RUNS = 100_000
"""Runs of short chunks that are looked at: each is a read. The chunks of others are data."""
_MOST_TRIES = 16
"""Chunks of one length that are decoded in search of zeros."""


class Zeros:
    """What is known of the compressed zeros of one image, with chunks of `unit` bytes."""

    def __init__(self, unit: int) -> None:
        self._unit = unit
        # zlib packs zeros 220 to 1 at its fastest, 1000 to 1 at its best.
        self._longest = unit // 128 + 64
        self._known: dict[int, npt.NDArray[np.uint8]] = {}
        self._tries: dict[int, int] = {}
        self._runs = 0

    def among(self, file: File, offset: Column, length: Column, packed: Column) -> npt.NDArray[np.bool_]:
        """Returns a mask of the chunks that are zeros; reads the short ones."""
        found = np.zeros(len(offset), dtype=bool)
        # The length of a table's last chunk is not known: what follows it may be padding.
        short = np.flatnonzero((packed[:-1] == 1) & (length[:-1] <= self._longest))
        if not len(short):
            return found
        same = (np.diff(short) == 1) & (length[short[1:]] == length[short[:-1]])
        begins = np.flatnonzero(np.concatenate([[True], ~same]))
        ends = np.append(begins[1:], len(short))
        for begin, end in zip(short[begins].tolist(), (short[ends - 1] + 1).tolist(), strict=True):
            self._runs += 1
            if self._runs > _MOST_RUNS:
                break
            size = int(length[begin])
            step = max(1, _WINDOW // size)
            for first in range(begin, end, step):
                last = min(end, first + step)
                data = np.frombuffer(file.read(int(offset[first]), (last - first) * size), dtype=np.uint8)
                found[first:last] = self._equal(data.reshape(-1, size))
        return found

    def _equal(self, chunks: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Returns a mask of the rows that are compressed zeros."""
        size = chunks.shape[1]
        if size not in self._known and not self._learn(chunks):
            return np.zeros(len(chunks), dtype=bool)
        equal: npt.NDArray[np.bool_] = (chunks == self._known[size]).all(axis=1)
        return equal

    def _learn(self, chunks: npt.NDArray[np.uint8]) -> bool:
        """Looks for zeros among the first rows; returns whether there are any."""
        size = chunks.shape[1]
        for row in chunks[: _MOST_TRIES - self._tries.get(size, 0)]:
            self._tries[size] = self._tries.get(size, 0) + 1
            stream = zlib.decompressobj()
            try:
                data = stream.decompress(row.tobytes(), self._unit + 1)
            except zlib.error:
                continue
            if stream.eof and len(data) == self._unit and not any(data):
                self._known[size] = row
                return True
        return False
