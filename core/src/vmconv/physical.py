"""Where bytes lie on storage: tables composed with the filesystem's own map, so that sharing can be seen and proved."""

from __future__ import annotations

import numpy as np

from vmconv import linux
from vmconv.errors import ReadError, os_errors
from vmconv.extents import MAX_SIZE, Columns, Extents, Kind
from vmconv.sources import File, Source


class Storage(Source):
    """The address space of one filesystem's blocks; its bytes are never read, only their addresses compared."""

    def __init__(self, identity: bytes) -> None:
        self.name = "storage"
        self.size = MAX_SIZE
        self.identity = identity

    def read(self, offset: int, length: int) -> bytes:
        raise NotImplementedError("physical addresses are compared, not read")


class PhysicalMap:
    """Composes tables with the physical addresses of their files; one filesystem is one `Storage` for all of them."""

    def __init__(self) -> None:
        self._storages: dict[bytes, Storage] = {}

    def apply(self, table: Extents) -> Extents:
        """Returns the table with windows onto files replaced by windows onto their filesystem's storage.

        What has no certain physical address (inline, compressed, on a device) keeps its window onto the file.
        """
        for source in table.sources:
            if isinstance(source, File):
                table = table.through(source, self._of_file(source))
        return table

    def _of_file(self, file: File) -> Extents:
        if file.is_device or file.descriptor < 0:
            return Extents.whole(file)
        with os_errors("cannot be asked where it lies on storage", ReadError):
            try:
                identity = linux.filesystem_id(file.descriptor)
                ranges = linux.physical_ranges(file.descriptor)
            except OSError as exc:
                if linux.not_told(exc):
                    # Nothing is known, so nothing is claimed.
                    return Extents.whole(file)
                raise
        storage = self._storages.setdefault(identity, Storage(identity))
        return _table(file, storage, ranges)


def _table(file: File, storage: Storage, ranges: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Extents:
    ranges = ranges[ranges[:, 0] < file.size]
    logical, length, place = ranges[:, 0], np.minimum(ranges[:, 1], file.size - ranges[:, 0]), ranges[:, 2]
    edges = np.concatenate([[0], np.stack([logical, logical + length], axis=1).reshape(-1)])
    known = np.zeros(len(edges), dtype=bool)
    known[1::2] = True
    offset = edges.copy()
    offset[1::2] = place
    there = np.diff(edges, append=file.size) > 0
    kind = np.full(len(edges), Kind.DATA, dtype=np.uint8)
    rows = Columns(edges, kind, known.astype(np.int32), offset).take(there)
    return Extents(file.size, rows, [file, storage])
