"""An output file that does not exist yet, readable like a file on storage."""

from __future__ import annotations

import os

import numpy as np

from vmconv.errors import ImageError
from vmconv.model.extents import Extents, Kind
from vmconv.model.sources import File, Stamp


class PlannedFile(File):
    """The bytes of an output file by its table, computed or read from the sources on demand."""

    def __init__(self, path: str, table: Extents) -> None:
        self.path = path
        self.name = os.path.basename(path)
        self.descriptor = -1
        self.size = table.size
        self.is_device = False
        # Unique, because files are compared by device and inode.
        self.stamp = Stamp(0, id(self), table.size, 0, 0)
        self._table = table

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > self.size:
            raise ImageError(f"{self.name}: ends at {self.size:#x} where {length} bytes from {offset:#x} were expected")
        return self._table.read(offset, length)

    def sync(self) -> None:
        pass

    def data_ranges(self, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
        limit = self.size if end is None else min(end, self.size)
        table = self._table.window(0, limit)
        data = table.kind == Kind.DATA
        begins = np.flatnonzero(data & ~np.append(False, data[:-1]))
        ends = np.flatnonzero(data & ~np.append(data[1:], False))
        ranges = zip(table.start[begins].tolist(), table.end[ends].tolist(), strict=True)
        return [(max(low, start), high) for low, high in ranges if high > start]

    def changed(self) -> bool:
        return False

    def close(self) -> None:
        pass
