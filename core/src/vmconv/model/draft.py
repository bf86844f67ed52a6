"""A file as it will be after an edit of its metadata: readable before anything is written."""

from __future__ import annotations

import numpy as np

from vmconv.errors import ImageError, PlanError
from vmconv.model.extents import Columns, Extents, Kind
from vmconv.model.sources import Blob, File, Stamp

_SECTOR = 512
_MOST = 96 << 20
"""Bytes that an edit may write. A journal holds 64 MiB of old bytes."""


class Draft(File):
    """The edited bytes of `file` over its present ones; a format's own reader and check work on it.

    Writing the present bytes changes nothing. `size` is the size of the file afterwards.
    """

    def __init__(self, file: File) -> None:
        self.file = file
        self.path = file.path
        self.name = file.name
        self.descriptor = file.descriptor
        self.size = file.size
        self.is_device = file.is_device
        self.settled = True
        # Unique, because files are compared by device and inode.
        self.stamp = Stamp(0, id(self), file.size, 0, 0)
        self._sectors: dict[int, bytearray] = {}
        self._freed: list[tuple[int, int]] = []

    # -- edits

    def write(self, offset: int, data: bytes) -> None:
        """Overwrites bytes, or appends them: the file grows to hold them."""
        self.size = max(self.size, offset + len(data))
        self.on_storage = None
        first, last = offset // _SECTOR, -(-(offset + len(data)) // _SECTOR)
        if (len(self._sectors) + last - first) * _SECTOR > _MOST:
            raise PlanError(f"{self.name}: more than {_MOST} bytes of metadata would be written, in place")
        for number in range(first, last):
            if number not in self._sectors:
                self._sectors[number] = bytearray(self._old(number * _SECTOR, _SECTOR))
            sector, at = self._sectors[number], number * _SECTOR - offset
            low, high = max(0, at), min(len(data), at + _SECTOR)
            sector[low - at : high - at] = data[low:high]

    def truncate(self, size: int) -> None:
        """Gives the file another size, as its last edit."""
        self.size = size
        self.on_storage = None

    def free(self, offset: int, length: int) -> None:
        """Returns a range that nothing uses any more to the filesystem: it reads as zero. Ranges come in order."""
        self._freed.append((offset, length))

    # -- as a file

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > self.size:
            raise ImageError(f"{self.name}: ends at {self.size:#x} where {length} bytes from {offset:#x} were expected")
        data = bytearray(self._old(offset, length))
        for number in self._touched(offset, length):
            at = number * _SECTOR - offset
            low, high = max(0, at), min(length, at + _SECTOR)
            data[low:high] = self._sectors[number][low - at : high - at]
        return bytes(data)

    def _touched(self, offset: int, length: int) -> list[int]:
        numbers = range(offset // _SECTOR, -(-(offset + length) // _SECTOR))
        if len(numbers) > len(self._sectors):
            return [number for number in self._sectors if number in numbers]
        return [number for number in numbers if number in self._sectors]

    def _old(self, offset: int, length: int) -> bytes:
        there = max(0, min(length, self.file.size - offset))
        return (self.file.read(offset, there) if there else b"").ljust(length, b"\0")

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.read(offset, len(buffer))

    def sync(self) -> None:
        pass

    def data_ranges(self, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
        limit = self.size if end is None else min(end, self.size)
        old = self.file.data_ranges(start, min(limit, self.file.size)) if start < self.file.size else []
        touched = [(number * _SECTOR, (number + 1) * _SECTOR) for number in self._sectors]
        inside = [(max(start, low), min(limit, high)) for low, high in (*old, *touched)]
        found: list[tuple[int, int]] = []
        for low, high in sorted(piece for piece in inside if piece[0] < piece[1]):
            if found and low <= found[-1][1]:
                found[-1] = found[-1][0], max(high, found[-1][1])
            else:
                found.append((low, high))
        return found

    def changed(self) -> bool:
        return False

    def close(self) -> None:
        pass

    # -- as an output

    @property
    def is_changed(self) -> bool:
        """True if the file will be another one."""
        return self.size != self.file.size or bool(self._freed or self._changed())

    def table(self) -> Extents:
        """Returns the table of the file afterwards: bytes that change, freed blocks, and the file itself elsewhere."""
        table = Extents.whole(self.file).window(0, self.size, Kind.ZERO)
        freed = [(offset, min(length, self.size - offset)) for offset, length in self._freed if offset < self.size]
        table = _painted(table, freed, None)
        changed = self._changed()
        blob = Blob("metadata", b"".join(bytes(self._sectors[number]) for number in changed))
        places = [(number * _SECTOR, min(_SECTOR, self.size - number * _SECTOR)) for number in changed]
        return _painted(table, places, blob)

    def _changed(self) -> list[int]:
        return sorted(
            number
            for number, sector in self._sectors.items()
            if number * _SECTOR < self.size
            and (number * _SECTOR >= self.file.size or bytes(sector) != self._old(number * _SECTOR, _SECTOR))
        )


def _painted(table: Extents, ranges: list[tuple[int, int]], blob: Blob | None) -> Extents:
    """Returns the table with sorted ranges replaced by the sectors of the blob, in its order, or by ZERO."""
    if not ranges:
        return table
    start, length = np.array(ranges, dtype=np.int64).T
    kind = np.full(len(start), Kind.ZERO if blob is None else Kind.DATA, dtype=np.uint8)
    source = np.full(len(start), -1 if blob is None else 0, dtype=np.int32)
    offset = np.arange(len(start), dtype=np.int64) * (0 if blob is None else _SECTOR)
    rows = Columns(start, kind, source, offset)
    return table.replaced(Extents.placed(table.size, rows, length, [blob] if blob else []), start, length)
