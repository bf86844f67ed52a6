"""Physical addresses: tables composed with the filesystem's extent maps, to show and prove sharing."""

from __future__ import annotations

import numpy as np

from vmconv.errors import ReadError, os_errors
from vmconv.model.extents import MAX_SIZE, Column, Columns, Extents, Kind
from vmconv.model.sources import File, Source
from vmconv.system import linux

Ranges = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class BlockSpace(Source):
    """The physical address space of one filesystem. Only addresses are compared; bytes are never read."""

    def __init__(self, identity: bytes) -> None:
        self.name = "storage"
        self.size = MAX_SIZE
        self.identity = identity

    def read(self, offset: int, length: int) -> bytes:
        raise NotImplementedError("physical addresses are compared, not read")


class Encoded(BlockSpace):
    """The encoded (compressed) extents of one filesystem of which files have `length` bytes.

    An address is the extent's address, scaled so that decoded extents do not overlap, plus the offset in the extent. A
    file may have a part of an extent, and FIEMAP does not tell which. So equal addresses of parts of equal length
    probably mean equal bytes, but only those of whole extents are certain.
    """

    LONGEST = 128 << 10
    """Largest decoded extent of Btrfs, bytes."""
    BLOCK = 4096
    """Alignment of extents, bytes."""

    def __init__(self, identity: bytes, length: int) -> None:
        super().__init__(identity)
        self.length = length

    @classmethod
    def spread(cls, physical: Column) -> Column:
        """Returns addresses of extents with gaps between them, so that neighbours are not merged into one row."""
        return physical * (2 * cls.LONGEST // cls.BLOCK)

    @classmethod
    def extent(cls, address: int) -> int:
        """Returns the physical start of the extent of an address."""
        return address // (2 * cls.LONGEST) * cls.BLOCK


class PhysicalMap:
    """Composes tables with physical addresses, with one `BlockSpace` per filesystem.

    With `encoded`, encoded extents become windows onto `Encoded`. Those are for display: equal addresses do not prove
    equal bytes.
    """

    def __init__(self, *, encoded: bool = False) -> None:
        self._encoded = encoded
        self._spaces: dict[tuple[bytes, int], BlockSpace] = {}

    def apply(self, table: Extents) -> Extents:
        """Returns the table with windows onto files replaced by windows onto their filesystem's address space.

        Ranges without a certain physical address (inline, compressed, on a device) keep their window onto the file.
        """
        for source in table.sources:
            if isinstance(source, File):
                table = table.through(source, self._of_file(source))
        return table

    def _of_file(self, file: File) -> Extents:
        if file.is_device or file.descriptor < 0:
            return Extents.whole(file)
        with os_errors("extent map cannot be read", ReadError, where=file.name):
            try:
                identity = linux.filesystem_id(file.descriptor)
                places = [(self._space(identity), linux.physical_ranges(file.descriptor))]
                if self._encoded:
                    places += self._encoded_places(identity, linux.encoded_ranges(file.descriptor))
            except OSError as exc:
                if linux.not_told(exc):
                    # Without extent maps, nothing counts as shared.
                    return Extents.whole(file)
                raise
        return _table(file, places)

    def _space(self, identity: bytes, length: int = 0) -> BlockSpace:
        """Returns the address space of a filesystem, or of its encoded extents of a length."""
        key = identity, length
        if key not in self._spaces:
            self._spaces[key] = Encoded(identity, length) if length else BlockSpace(identity)
        return self._spaces[key]

    def _encoded_places(self, identity: bytes, ranges: Ranges) -> list[tuple[BlockSpace, Ranges]]:
        """Returns the encoded extents by length, without extents that FIEMAP has merged or that are not aligned."""
        ranges = ranges[(ranges[:, 1] <= Encoded.LONGEST) & (ranges[:, 2] % Encoded.BLOCK == 0)]
        found = []
        for length in np.unique(ranges[:, 1]).tolist():
            rows = ranges[ranges[:, 1] == length]
            found.append((self._space(identity, length), np.column_stack([rows[:, :2], Encoded.spread(rows[:, 2])])))
        return found


def _table(file: File, places: list[tuple[BlockSpace, Ranges]]) -> Extents:
    """Returns the table of a file with ranges `(logical, length, address)` in address spaces, else in itself."""
    ranges = np.concatenate([rows for _, rows in places])
    number = np.repeat(np.arange(1, len(places) + 1), [len(rows) for _, rows in places])
    order = np.argsort(ranges[:, 0], kind="stable")
    ranges, number = ranges[order], number[order]
    inside = ranges[:, 0] < file.size
    ranges, number = ranges[inside], number[inside]
    logical, length = ranges[:, 0], np.minimum(ranges[:, 1], file.size - ranges[:, 0])
    # Edges alternate: the file itself, a range, the file itself, ...
    edges = np.concatenate([[0], np.stack([logical, logical + length], axis=1).reshape(-1)])
    source = np.zeros(len(edges), dtype=np.int32)
    source[1::2] = number
    offset = edges.copy()
    offset[1::2] = ranges[:, 2]
    there = np.diff(edges, append=file.size) > 0
    kind = np.full(len(edges), Kind.DATA, dtype=np.uint8)
    rows = Columns(edges, kind, source, offset).take(there)
    return Extents(file.size, rows, [file, *(space for space, _ in places)])
