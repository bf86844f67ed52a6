"""Lays out a stream-optimized extent, which compresses every grain.

    header | descriptor | 512 times { grain marker, grain }, grain table | ... | grain directory | footer | end

The offset of a grain depends on the compressed sizes of those before it. So everything is compressed twice: for the
sizes, while the layout is made, and again on writing. Between the two only two numbers per grain are kept, not the
compressed disk. Both times, several grains are compressed in parallel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vmconv.plugin import (
    AccessError,
    Blob,
    Column,
    Columns,
    Decoded,
    Extents,
    File,
    Kind,
    PlanError,
    blocks,
    in_order,
    spread,
)
from vmconv_vmdk import structs
from vmconv_vmdk.grains import GRAIN, GRAIN_SECTORS, MAX_FILE, TABLE, directory_bytes

# Grains that are read together.
_TOGETHER = 32
_ZEROS = bytes(GRAIN)
# Of isal's levels, the best compression that is still several times faster than zlib's fastest.
_LEVEL = 2
_OVERHEAD = 128
_TABLE_RECORD = structs.SECTOR + TABLE
_VERSION = 3

_Numbers = npt.NDArray[np.uint32]


def stream(guest: Extents, file: File, size: int, descriptor: bytes) -> Extents:
    """Returns the table of the output file; reads all payload of `guest`, a table in whole grains.

    `file` is the image's file, the origin of its compressed payload.
    """
    numbers, sectors = _measured(guest)
    places = _Places.of(numbers, sectors, size)
    return _Stream(guest, file, size, descriptor, numbers, sectors, places).table()


def _measured(guest: Extents) -> tuple[_Numbers, _Numbers]:
    """Returns the numbers of the nonzero grains, in order, and the sectors of each."""
    numbers: list[_Numbers] = []
    sectors: list[_Numbers] = []

    def measure(piece: tuple[int, int]) -> tuple[_Numbers, _Numbers]:
        first, count = piece
        data = guest.read(first * GRAIN, count * GRAIN)
        lengths = np.array([len(_packed(data, place)) for place in range(count)], dtype=np.int64)
        there = np.flatnonzero(lengths)
        their = -(-(lengths[there] + structs.GRAIN_MARKER_LENGTH) // structs.SECTOR)
        return (first + there).astype(np.uint32), their.astype(np.uint32)

    for some, their in in_order(measure, _pieces(guest)):
        numbers.append(some)
        sectors.append(their)
    if not numbers:
        return np.empty(0, dtype=np.uint32), np.empty(0, dtype=np.uint32)
    return np.concatenate(numbers), np.concatenate(sectors)


def _pieces(guest: Extents) -> Iterator[tuple[int, int]]:
    """Yields number and count of runs of grains with payload."""
    runs = blocks.whole_blocks(guest, GRAIN)
    runs = runs.take(runs.kind == Kind.DATA)
    run, piece = spread(-(-runs.blocks // _TOGETHER))
    first = runs.first[run] + piece * _TOGETHER
    count = np.minimum(_TOGETHER, runs.first[run] + runs.blocks[run] - first)
    for begin, length in zip(first, count, strict=True):
        yield int(begin), int(length)


def _packed(data: bytes, place: int) -> bytes:
    """Returns the compressed data of one grain of `data`, empty if it is all zeros."""
    from isal import isal_zlib

    grain = data[place * GRAIN : (place + 1) * GRAIN]
    packed: bytes = b"" if grain == _ZEROS else isal_zlib.compress(grain, level=_LEVEL)
    return packed


class _Places(NamedTuple):
    """Offsets of all parts, bytes. Grains and tables are in groups: the grains of a grain table, then the table."""

    tables: Column
    """Number of each grain table with grains."""
    group_first: Column
    """Index of the first grain of each group."""
    group_stream: Column
    """Offset of each group in the stream of compressed grains, and the end of the last one."""
    group_offset: Column
    """Offset of each group in the file."""
    directory: int
    table_count: int
    end: int

    @classmethod
    def of(cls, numbers: _Numbers, sectors: _Numbers, size: int) -> _Places:
        table = numbers // structs.ENTRIES
        first = np.flatnonzero(np.append(True, table[1:] != table[:-1])) if len(table) else np.empty(0, dtype=np.int64)
        total = np.add.reduceat(sectors.astype(np.int64), first) if len(first) else np.empty(0, dtype=np.int64)
        stream_at = np.concatenate([[0], np.cumsum(total)]) * structs.SECTOR
        rank = np.arange(len(first), dtype=np.int64)
        offset = _OVERHEAD * structs.SECTOR + stream_at[:-1] + rank * _TABLE_RECORD
        count = -(-size // (GRAIN * structs.ENTRIES))
        marker = _OVERHEAD * structs.SECTOR + int(stream_at[-1]) + len(first) * _TABLE_RECORD
        end = marker + structs.SECTOR + directory_bytes(count) + 3 * structs.SECTOR
        if end > MAX_FILE:
            raise PlanError(f"streamOptimized cannot hold {end} compressed bytes, {MAX_FILE} at most")
        return cls(table[first].astype(np.int64), first, stream_at, offset, marker + structs.SECTOR, count, end)


class _Stream(Decoded):
    """The concatenated compressed grains, each behind its marker and padded to sectors; computed on reading."""

    # A grain across the edge of two pieces is compressed twice.
    step = 4 << 20

    def __init__(
        self,
        guest: Extents,
        file: File,
        size: int,
        descriptor: bytes,
        numbers: _Numbers,
        sectors: _Numbers,
        places: _Places,
    ) -> None:
        super().__init__(
            f"{file.name} (deflate)",
            file,
            unit=structs.SECTOR,
            count=int(places.group_stream[-1]) // structs.SECTOR,
            reason="streamOptimized compresses every grain",
        )
        self.guest = guest
        self.capacity = size
        self.descriptor = descriptor
        self.numbers = numbers
        self.places = places
        # The offset of each grain in the stream, in sectors.
        self.begins = (np.cumsum(sectors, dtype=np.int64) - sectors).astype(np.uint32)

    def units(self, offset: int, length: int) -> list[bytes]:
        if not length:
            return []
        sector, last = offset // structs.SECTOR, (offset + length - 1) // structs.SECTOR
        low = int(np.searchsorted(self.begins, sector, side="right")) - 1
        high = int(np.searchsorted(self.begins, last, side="right"))
        data = b"".join(self._marked(low, high))
        skip = offset - int(self.begins[low]) * structs.SECTOR
        return [data[skip : skip + length]]

    def _marked(self, low: int, high: int) -> Iterator[bytes]:
        """Yields the grains from index `low` to `high` as they are written."""
        while low < high:
            numbers = self.numbers[low : min(high, low + _TOGETHER)].astype(np.int64)
            gaps = np.flatnonzero(np.diff(numbers) != 1)
            count = int(gaps[0]) + 1 if len(gaps) else len(numbers)
            first = int(numbers[0])
            data = self.guest.read(first * GRAIN, count * GRAIN)
            for place in range(count):
                yield self._record(low + place, first + place, _packed(data, place))
            low += count

    def _record(self, index: int, number: int, packed: bytes) -> bytes:
        record = structs.GrainMarker.pack(number * GRAIN_SECTORS, len(packed)) + packed
        record += bytes(-len(record) % structs.SECTOR)
        following = int(self.begins[index + 1]) if index + 1 < len(self.begins) else self.size // structs.SECTOR
        if not packed or len(record) != (following - int(self.begins[index])) * structs.SECTOR:
            raise AccessError(f"{self.file.name}: changed while it was being converted, at {number * GRAIN:#x}")
        return record

    # -- the file

    def table(self) -> Extents:
        """Returns the table of the file."""
        places = self.places
        groups = len(places.tables)
        records = Blob("grain tables", self._table_records, groups * _TABLE_RECORD)
        head = Blob("header", self._header(structs.GD_AT_END) + self.descriptor)
        tail = Blob("grain directory", self._tail())
        stream_length = np.diff(places.group_stream)
        record_at = np.arange(groups, dtype=np.int64) * _TABLE_RECORD
        start = np.concatenate(
            [[0, places.directory - structs.SECTOR], places.group_offset, places.group_offset + stream_length]
        )
        length = np.concatenate([[head.size, tail.size], stream_length, np.full(groups, _TABLE_RECORD)])
        source = np.concatenate([[0, 1], np.full(groups, 2), np.full(groups, 3)])
        offset = np.concatenate([[0, 0], places.group_stream[:-1], record_at])
        rows = Columns(
            start.astype(np.int64),
            np.full(len(start), Kind.DATA, dtype=np.uint8),
            source.astype(np.int32),
            offset.astype(np.int64),
        )
        return Extents.placed(places.end, rows, length.astype(np.int64), [head, tail, self, records])

    def _table_records(self, offset: int, length: int) -> bytes:
        """Returns a piece of the concatenated grain tables, each behind its marker."""
        low, high = offset // _TABLE_RECORD, -(-(offset + length) // _TABLE_RECORD)
        data = b"".join(self._table_record(group) for group in range(low, high))
        return data[offset - low * _TABLE_RECORD : offset - low * _TABLE_RECORD + length]

    def _table_record(self, group: int) -> bytes:
        places = self.places
        first = int(places.group_first[group])
        last = int(places.group_first[group + 1]) if group + 1 < len(places.tables) else len(self.numbers)
        # From offsets in the stream to offsets in the file: groups are moved as a whole.
        moved = (int(places.group_offset[group]) - int(places.group_stream[group])) // structs.SECTOR
        entries = np.zeros(structs.ENTRIES, dtype="<u4")
        entries[self.numbers[first:last] % structs.ENTRIES] = self.begins[first:last].astype(np.int64) + moved
        return _marker(TABLE, structs.GRAIN_TABLE) + entries.tobytes()

    def _tail(self) -> bytes:
        """Returns the grain directory behind its marker, the footer and the end of the stream."""
        places = self.places
        length = directory_bytes(places.table_count)
        entries = np.zeros(length // 4, dtype="<u4")
        tables = places.group_offset + np.diff(places.group_stream) + structs.SECTOR
        entries[places.tables] = tables // structs.SECTOR
        footer = _marker(structs.SECTOR, structs.FOOTER) + self._header(places.directory // structs.SECTOR)
        return _marker(length, structs.GRAIN_DIRECTORY) + entries.tobytes() + footer + _marker(0, 0)

    def _header(self, directory: int) -> bytes:
        return bytes(
            structs.SparseExtentHeader.build(
                {
                    "version": _VERSION,
                    "flags": structs.NEWLINE_TEST | structs.COMPRESSED | structs.MARKERS,
                    "capacity": self.capacity // structs.SECTOR,
                    "grainSize": GRAIN_SECTORS,
                    "descriptorOffset": 1,
                    "descriptorSize": len(self.descriptor) // structs.SECTOR,
                    "numGTEsPerGT": structs.ENTRIES,
                    "rgdOffset": 0,
                    "gdOffset": directory,
                    "overHead": _OVERHEAD,
                    "uncleanShutdown": 0,
                    "newlines": structs.NEWLINES,
                    "compressAlgorithm": structs.DEFLATE,
                }
            )
        )


def _marker(length: int, kind: int) -> bytes:
    return bytes(structs.Marker.build({"val": length // structs.SECTOR, "size": 0, "type": kind}))
