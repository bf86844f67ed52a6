"""The common part of sparse extents: grain directories and grain tables into the table of an address space.

All three kinds have a directory of offsets of grain tables, and tables of offsets of grains. They differ in the width
of entries and in the special entries: see hosted.py and esx.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vmconv.plugin import (
    Column,
    Extents,
    File,
    ImageError,
    Kind,
    Kinds,
    Metadata,
    Source,
    Structure,
    damaged,
    refuse_overlaps,
    table_slices,
)
from vmconv_vmdk import structs

# Grain tables are read in slices of this many bytes.
SLICE = 2 << 20

RawEntries = npt.NDArray[np.unsignedinteger[Any]]
Slice = tuple[Kinds, int, Column]


class Grains(NamedTuple):
    """Parsed grain table entries: a mask of grains, their offsets, and a mask of unknown entries."""

    there: npt.NDArray[np.bool_]
    offset: Column
    unknown: npt.NDArray[np.bool_]


def parse(head: Structure) -> Any:
    """Returns a structure of the file. Raises `ImageError` if the file ends before it, or it is another one."""
    if not head.is_inside:
        raise head.refused(f"{head.length} bytes in a file of {head.file.size:#x}")
    return head.parse()


class Extent(ABC):
    """One sparse extent, its header checked: `grain` and `size` are bytes."""

    file: File
    grain: int
    size: int
    entries: int
    """Entries of a grain table."""
    width: int
    """Bytes of an entry."""

    directories: Sequence[tuple[str, int]]
    """Name and offset of each grain directory; the first one is used."""

    @abstractmethod
    def table(self) -> Extents:
        """Returns the table of the extent; a HOLE shows the parent."""

    @abstractmethod
    def _slice(self, raw: RawEntries, first: int) -> Slice:
        """Returns the columns of grain table entries, from grain number `first` on."""

    @abstractmethod
    def places_of_tables(self, directory: int) -> Column:
        """Returns the offsets of the grain tables in the directory at this offset, 0 for missing ones."""

    @abstractmethod
    def decode(self, raw: RawEntries) -> Grains:
        """Returns the parsed grain table entries."""

    def more_metadata(self) -> Iterator[tuple[str, int, int]]:
        """Yields name, offset and length of other metadata than header, directory and tables."""
        yield from ()

    @property
    def headers_end(self) -> int:
        """The end of the header."""
        return structs.SECTOR

    @property
    def tables_needed(self) -> int:
        return -(-self.size // (self.grain * self.entries))

    def _mapped(self, tables: Column, source: Source) -> Extents:
        table = Extents.from_units(self.grain, self.size, self._slices(tables), [source])
        refuse_overlaps(table, self.file, self.metadata(tables))
        return table

    def _slices(self, tables: Column) -> Iterator[Slice | int]:
        for first, count, raw in self.entries_of(tables):
            yield count if raw is None else self._slice(raw, first)

    def entries_of(self, tables: Column) -> Iterator[tuple[int, int, RawEntries | None]]:
        """Yields `(first grain, count, their entries)`, None for missing tables."""
        length = self.entries * self.width
        grains = -(-self.size // self.grain)
        for first, count, data in table_slices(self.file, tables, length, SLICE):
            # Entries past the end of the disk do not count.
            wanted = min(count * self.entries, grains - first * self.entries)
            raw = None if data is None else np.frombuffer(data, dtype=f"<u{self.width}")[:wanted]
            yield first * self.entries, wanted, raw

    def metadata(self, tables: Column) -> Iterator[Metadata]:
        """Yields the ranges of header, directory and tables."""
        yield Metadata("header", [0], self.headers_end)
        for name, offset, length in self.more_metadata():
            yield Metadata(name, [offset], length)
        yield Metadata("grain directory", [self.directories[0][1]], self.tables_needed * self.width)
        yield Metadata("grain table", tables[tables != 0], self.entries * self.width)

    def _read_directory(self, offset: int, count: int, dtype: str) -> npt.NDArray[np.uint64]:
        length = count * np.dtype(dtype).itemsize
        if count > structs.MAX_DIRECTORY:
            raise ImageError(
                f"{self.file.name}: grain directory of {count} entries for {self.size} bytes, "
                f"{structs.MAX_DIRECTORY} at most"
            )
        if offset <= 0 or offset + length > self.file.size:
            problem = f"{length} bytes do not lie inside the file ({self.file.size:#x})"
            raise damaged(self.file, "grain directory", offset, problem)
        return np.frombuffer(self.file.read(offset, length), dtype=dtype).astype(np.uint64)

    def _check_tables(self, tables: Column, directory: int) -> None:
        """Raises `ImageError` unless the tables lie inside the file, each used once."""
        length = self.entries * self.width
        bad = (tables != 0) & (tables > self.file.size - length)
        if bad.any():
            entry = int(np.flatnonzero(bad)[0])
            problem = f"table at {tables[entry]:#x} lies past the end of the file ({self.file.size:#x})"
            raise self._bad_entry(directory, entry, problem)
        used = np.sort(tables[tables != 0])
        twice = used[1:][used[1:] == used[:-1]]
        if len(twice):
            entry = int(np.flatnonzero(tables == twice[0])[1])
            raise self._bad_entry(directory, entry, f"table at {twice[0]:#x} is used twice")

    def _bad_entry(self, directory: int, entry: int, problem: str) -> ImageError:
        return damaged(self.file, f"grain directory entry {entry}", directory + entry * self.width, problem)

    def _refuse(self, entry: int, first: int, problem: str) -> None:
        grain = first + entry
        table, place = divmod(grain, self.entries)
        raise ImageError(
            f"{self.file.name}: grain table {table} entry {place} (address {grain * self.grain:#x}): {problem}"
        )

    def _check_places(self, offset: Column, data: npt.NDArray[np.bool_] | None, first: int) -> None:
        """Raises `ImageError` unless the chosen offsets (None: all) begin inside the file, behind the header."""
        bad = offset >= self.file.size
        bad |= offset < structs.SECTOR
        if data is not None:
            bad &= data
        if bad.any():
            entry = int(np.flatnonzero(bad)[0])
            self._refuse(
                entry, first, f"grain at {offset[entry]:#x} lies past the end of the file ({self.file.size:#x})"
            )

    def _columns(self, raw: RawEntries, zero: npt.NDArray[np.bool_] | None, first: int) -> Slice:
        """Returns the columns of entries that are sectors, 0 for missing grains; `zero` is a mask of zeroed ones."""
        offset = raw.astype(np.int64)
        offset *= structs.SECTOR
        if int(raw.min()) > structs.ZEROED:
            kind = np.full(len(raw), Kind.DATA, dtype=np.uint8)
            self._check_places(offset, None, first)
            return kind, 0, offset
        kind = np.where(offset != 0, Kind.DATA, Kind.HOLE).astype(np.uint8)
        if zero is not None:
            kind[zero] = Kind.ZERO
        self._check_places(offset, kind == Kind.DATA, first)
        return kind, 0, offset
