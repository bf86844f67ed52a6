"""Persistent bitmaps of a new image, in an area of whole clusters.

bitmap directory | table of a bitmap | its clusters with any bit set | table of the next bitmap | ...
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

import numpy as np

from vmconv.plugin import Blob, Column, DirtyBitmap, PlanError
from vmconv_qcow2 import structs, tables

_ENTRY = struct.Struct(">QIIBBHI")


class BitmapArea:
    """The bitmaps of a disk of `size` bytes; `length` is that of the area in bytes."""

    def __init__(self, bitmaps: Sequence[DirtyBitmap], size: int, cluster: int) -> None:
        self.bitmaps = bitmaps
        self._cluster = cluster
        self._bits = [bitmap.bits(size) for bitmap in bitmaps]
        self._parts = [tables.touched(first, end - first, cluster * 8) for first, end in self._bits]
        self._counts = [self._clusters(bitmap, size) for bitmap in bitmaps]
        entries = (_ENTRY.size + len(os.fsencode(bitmap.name)) for bitmap in bitmaps)
        self.directory_size = sum(entry + -entry % 8 for entry in entries)
        # Offsets in the area of each table and of the bitmap behind it.
        self._places: list[tuple[int, int]] = []
        at = self._whole(self.directory_size)
        for count, parts in zip(self._counts, self._parts, strict=True):
            self._places.append((at, at + self._whole(count * 8)))
            at = self._places[-1][1] + len(parts) * cluster
        self.length = at

    def _whole(self, length: int) -> int:
        return -(-length // self._cluster) * self._cluster

    def _clusters(self, bitmap: DirtyBitmap, size: int) -> int:
        clusters = -(-size // (bitmap.granularity * 8 * self._cluster))
        if clusters * self._cluster > structs.MAX_BITMAP_BYTES:
            length = clusters * self._cluster
            raise PlanError(f"bitmap {bitmap.name!r} needs {length} bytes, {structs.MAX_BITMAP_BYTES} at most")
        return clusters

    def extension(self, at: int) -> bytes:
        """Returns the content of the header extension for an area at this offset of the file."""
        fields = {"nb_bitmaps": len(self.bitmaps), "directory_size": self.directory_size, "directory_offset": at}
        return bytes(structs.Bitmaps.build(fields))

    def blobs(self, at: int) -> list[tuple[int, Blob]]:
        """Returns the parts of an area at this offset, with their offsets."""
        found, directory = [], b""
        for number, bitmap in enumerate(self.bitmaps):
            table, data = (at + place for place in self._places[number])
            entries = np.zeros(self._counts[number], dtype=">u8")
            entries[self._parts[number]] = data + np.arange(len(self._parts[number]), dtype=np.int64) * self._cluster
            found += [(table, Blob("bitmap table", entries.tobytes())), (data, self._data(number))]
            directory += self._entry(number, bitmap, table)
        return [(at, Blob("bitmap directory", directory)), *found]

    def _entry(self, number: int, bitmap: DirtyBitmap, table: int) -> bytes:
        name, bits = os.fsencode(bitmap.name), bitmap.granularity.bit_length() - 1
        flags = structs.BITMAP_AUTO if bitmap.enabled else 0
        entry = _ENTRY.pack(table, self._counts[number], flags, structs.DIRTY_BITMAP, bits, len(name), 0) + name
        return entry + bytes(-len(entry) % 8)

    def _data(self, number: int) -> Blob:
        """Returns the concatenated clusters of a bitmap with any bit set."""
        parts, (first, end) = self._parts[number], self._bits[number]

        def compute(begin: int, count: int) -> bytes:
            return _packed(first, end, begin, count)

        read = tables.by_words(tables.concatenated(parts, self._cluster, self._cluster * 8, compute))
        return Blob("bitmap", read, len(parts) * self._cluster)


def _packed(first: Column, end: Column, begin: int, count: int) -> bytes:
    """Returns `count` bits from bit `begin` on, of which the given runs are set."""
    low, high = np.searchsorted(end, begin, side="right"), np.searchsorted(first, begin + count)
    steps = np.zeros(count + 1, dtype=np.int8)
    np.add.at(steps, np.clip(first[low:high] - begin, 0, count), 1)
    np.add.at(steps, np.clip(end[low:high] - begin, 0, count), -1)
    return np.packbits(np.cumsum(steps[:-1], dtype=np.int8).view(bool), bitorder="little").tobytes()
