"""Chunks of the disk: where the tables say they lie, and their bytes, verified by their checksums."""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vmconv.plugin import Column, Decoded, Extents, File, ImageError, Kind, damaged
from vmconv_ewf import structs
from vmconv_ewf.sections import Section

if TYPE_CHECKING:
    import numpy.typing as npt

    from vmconv.plugin import Kinds

_SLACK = 4096
_KEPT = 64
_WINDOW = 1 << 20
"""Bytes of chunks that are read at once."""


class Table(NamedTuple):
    """One table of chunks, with its header checked: `first` is the number of its first chunk in the disk."""

    section: Section
    sectors: Section | None
    """The section with the chunks, None if they are behind the table."""
    first: int
    chunks: int
    base: int

    @classmethod
    def of(cls, section: Section, sectors: Section | None, first: int) -> Table:
        head = section.read(structs.TABLE.size, "header")
        count, base, checksum = structs.TABLE.unpack(head)
        if zlib.adler32(head[:-4]) != checksum:
            raise section.damaged("the checksum of its header does not match")
        if count > structs.MAX_ENTRIES:
            raise section.damaged(f"{count} entries, {structs.MAX_ENTRIES} at most")
        return cls(section, sectors, first, count, base)

    @property
    def file(self) -> File:
        return self.section.file

    def places(self, chunk: int) -> tuple[Column, Column, Column]:
        """Returns offset, length and a flag "compressed" of each chunk; raises `ImageError` for an impossible entry."""
        length = 4 * self.chunks
        data = self.section.read(length + 4, "table", structs.TABLE.size)
        if zlib.adler32(data[:length]) != structs.CHECKSUM.unpack(data[length:])[0]:
            raise self.section.damaged("the checksum of its entries does not match")
        entries = np.frombuffer(data[:length], dtype="<u4").astype(np.int64)
        # The base may be any number of 64 bits; the file's size, and so a valid offset, is below 2**63.
        if self.base > self.file.size:
            raise self.section.damaged(f"base {self.base:#x} is past the end of the file")
        offset = (entries & (structs.COMPRESSED - 1)) + self.base
        low, high = self._room(length)
        size = np.diff(offset, append=np.int64(high))
        bad = (offset < low) | (size <= 0) | (size > 2 * chunk + _SLACK)
        if len(bad):
            # What is behind the last chunk in its section may be padding.
            bad[-1] = not low <= int(offset[-1]) < high
        if bad.any():
            entry = int(np.flatnonzero(bad)[0])
            problem = f"chunk of {int(size[entry])} bytes at {int(offset[entry]):#x}, outside {low:#x} to {high:#x}"
            raise self.section.damaged(f"entry {entry}: {problem}")
        return offset, np.minimum(size, 2 * chunk + _SLACK), (entries >> 31).astype(np.int64)

    def _room(self, length: int) -> tuple[int, int]:
        """Returns the range of the file in which the chunks lie."""
        if self.sectors:
            return self.sectors.body, self.sectors.end
        return self.section.body + structs.TABLE.size + length + 4, self.section.end


class Chunks(Decoded):
    """The disk, decoded chunk by chunk from the segment files."""

    def __init__(self, file: File, tables: Sequence[Table], chunk: int, size: int) -> None:
        super().__init__(
            f"{file.name} (EWF)",
            file,
            unit=chunk,
            count=-(-size // chunk),
            reason="EWF compresses chunks, or puts checksums between them",
        )
        self.tables = [table for table in tables if table.chunks]
        self._disk = size
        self._firsts = [table.first for table in self.tables]
        # Reading goes through the tables in order, so few are needed at a time.
        self._places = lru_cache(_KEPT)(lambda index: self.tables[index].places(chunk))

    def table(self) -> Extents:
        """Returns the table of the disk: DATA, and ZERO for chunks that are known to be zeros."""
        from vmconv_ewf.zeros import Zeros

        zeros = Zeros(self.unit)

        def slices() -> Iterator[tuple[Kinds, npt.NDArray[np.int32], Column]]:
            count = self.size // self.unit
            for index, table in enumerate(self.tables):
                there = min(table.chunks, count - table.first)
                if there <= 0:
                    return
                mask = zeros.among(table.file, *self._places(index))[:there]
                kind = np.where(mask, Kind.ZERO, Kind.DATA).astype(np.uint8)
                first = np.arange(table.first, table.first + there, dtype=np.int64)
                yield kind, np.where(mask, -1, 0).astype(np.int32), np.where(mask, 0, first * self.unit)

        return Extents.from_units(self.unit, self._disk, slices(), [self])

    def units(self, offset: int, length: int) -> list[bytes]:
        if not length:
            return []
        first, end = offset // self.unit, -(-(offset + length) // self.unit)
        units = [one for run in self._runs(first, end) for one in self._decoded(*run)]
        units[-1] = units[-1][: offset + length - (end - 1) * self.unit]
        units[0] = units[0][offset - first * self.unit :]
        return units

    def _runs(self, at: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yields `(table, first, end)` of runs of chunks in one table, short enough to be read at once."""
        most = max(1, _WINDOW // self.unit)
        while at < end:
            index = bisect_right(self._firsts, at) - 1
            table = self.tables[index]
            stop = min(end, table.first + table.chunks, at + most)
            yield index, at, stop
            at = stop

    def _decoded(self, index: int, first: int, end: int) -> Iterator[bytes]:
        table = self.tables[index]
        offsets, lengths, packed = (
            column[first - table.first : end - table.first].tolist() for column in self._places(index)
        )
        start = offsets[0]
        data = memoryview(table.file.read(start, offsets[-1] + lengths[-1] - start))
        for number, at, length, compressed in zip(range(first, end), offsets, lengths, packed, strict=True):
            part = data[at - start : at - start + length]
            unpacked = self._unpacked(part, number) if compressed else self._plain(part, number)
            if unpacked is None:
                kind = "compressed chunk" if compressed else "chunk"
                address = number * self.unit
                raise damaged(table.file, kind, at, "its checksum or length does not match", guest=address)
            yield unpacked.ljust(self.unit, b"\0")

    def _expected(self, number: int) -> tuple[int, ...]:
        """Returns the possible lengths of a chunk: some writers fill up the last one."""
        rest = self._disk - number * self.unit
        return (self.unit,) if rest >= self.unit else (rest, self.unit)

    def _unpacked(self, part: memoryview, number: int) -> bytes | None:
        """Returns the bytes of a compressed chunk, None if it is damaged; zlib verifies its checksum."""
        stream = zlib.decompressobj()
        try:
            # One byte more shows that a chunk is too long; a hostile one decompresses without limit.
            found = stream.decompress(part, self.unit + 1)
        except zlib.error:
            return None
        return found if stream.eof and len(found) in self._expected(number) else None

    def _plain(self, part: memoryview, number: int) -> bytes | None:
        """Returns the bytes of a stored chunk, None if its checksum does not match."""
        for length in self._expected(number):
            checksum = bytes(part[length : length + 4])
            if len(checksum) == 4 and zlib.adler32(part[:length]) == structs.CHECKSUM.unpack(checksum)[0]:
                return bytes(part[:length])
        return None


def tables_of(segments: Sequence[Sequence[Section]]) -> list[Table]:
    """Returns the tables of all segments in the order of the disk; their entries are read later."""
    tables: list[Table] = []
    first = 0
    for sections in segments:
        sectors: Section | None = None
        for section in sections:
            if section.kind == "sectors":
                sectors = section
            elif section.kind == "table":
                table = Table.of(section, sectors, first)
                tables.append(table)
                first += table.chunks
                sectors = None
    return tables


def refuse_missing(file: File, tables: Sequence[Table], needed: int) -> None:
    """Raises `ImageError` if the tables have fewer chunks than the disk."""
    found = sum(table.chunks for table in tables)
    if found < needed:
        raise ImageError(
            f"{file.name}: its tables have {found} chunks and the disk has {needed}: the acquisition is not complete"
        )
