"""Lays out a hosted sparse extent: grains at offsets that can be shared, and their tables.

    header | descriptor | redundant grain directory, grain tables | grain directory, grain tables | grains
    header | descriptor | grains, unmoved | the grain moved to clear the header | tables                 (in place)

A grain may begin at any sector, so each run of grains goes to an offset congruent to its source. In place it stays
where it is, if necessary in smaller grains. The grain tables are computed on writing, a slice at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmconv.plugin import (
    Blob,
    Column,
    Columns,
    Extents,
    File,
    Kind,
    Pinned,
    Placeholder,
    PlanError,
    Source,
    blocks,
    cut,
    distinct,
    spread,
)
from vmconv_vmdk import structs

GRAIN = 65536
GRAIN_SECTORS = GRAIN // structs.SECTOR
SMALLEST_GRAIN = 8192
"""The specification requires more than 4 KiB."""

TABLE = structs.ENTRIES * 4
"""Bytes of a grain table."""

MAX_FILE = structs.SECTOR << 32
"""Grain tables hold sectors in 32 bits."""


def directory_bytes(tables: int) -> int:
    """Returns the bytes of a grain directory, in whole sectors."""
    return -(-tables * 4 // structs.SECTOR) * structs.SECTOR


def directory(first_table: int, tables: int) -> bytes:
    """Returns the entries of a grain directory with contiguous tables."""
    places = (first_table + np.arange(tables, dtype=np.int64) * TABLE) // structs.SECTOR
    return places.astype("<u4").tobytes()


@dataclass(frozen=True)
class _Places:
    """Offsets of the metadata, bytes."""

    redundant_directory: int
    redundant_tables: int
    directory: int
    tables: int
    grains: int


class SparseExtent:
    """One extent: `guest` is its table, `size` its capacity in bytes, `carrier` the file that becomes it in place.

    In a `delta`, a HOLE shows the parent and zeros hide it: with `zeroed_grains` by an entry, else by a grain that is a
    hole in the file.
    """

    def __init__(
        self,
        guest: Extents,
        size: int,
        modulus: int,
        descriptor: bytes | None,
        carrier: File | None,
        *,
        delta: bool,
        zeroed_grains: bool,
    ) -> None:
        self.grain = GRAIN
        self.descriptor = descriptor or b""
        self.pinned = self._pin(guest, carrier) if carrier else None
        self.guest = blocks.padded(guest, self.grain)
        self.size = size
        self.modulus = modulus
        self.delta = delta
        self.zeroed_grains = zeroed_grains
        runs = blocks.whole_blocks(self.guest, self.grain)
        allocated = runs.kind == Kind.DATA
        zero = (runs.kind == Kind.ZERO) if delta else np.zeros_like(allocated)
        if not zeroed_grains:
            allocated, zero = allocated | zero, np.zeros_like(zero)
        self.zero = runs.take(zero)
        self.payload = runs.take(allocated)
        if self.pinned and (allocated != (runs.kind == Kind.DATA)).any():
            raise PlanError("in place, zeros that hide the parent need zeroed grains", hint="use -o zeroed_grain=on")
        self.table_count = -(-size // (self.grain * structs.ENTRIES))
        self.places = self._places()

    def _pin(self, guest: Extents, carrier: File) -> Pinned:
        """Chooses the largest grains, up to the default, in which payload can stay in place."""
        from vmconv.plugin import pin

        units = [1 << bits for bits in range(SMALLEST_GRAIN.bit_length() - 1, GRAIN.bit_length())]
        found = pin(guest, carrier, units, structs.SECTOR)
        self.grain = found.unit
        # QEMU reads the descriptor from the second sector and ignores the header's offset.
        return found.cleared(structs.SECTOR + len(self.descriptor))

    def _places(self) -> _Places:
        step = directory_bytes(self.table_count)
        first = self.pinned.end if self.pinned else structs.SECTOR + len(self.descriptor)
        second = first + step + self.table_count * TABLE
        end = second + step + self.table_count * TABLE
        if self.pinned:
            grains = int(self.pinned.offset.min()) if len(self.pinned.offset) else end
        else:
            align = max(self.grain, self.modulus)
            grains = -(-end // align) * align
        return _Places(first, first + step, second, second + step, grains)

    def file(self) -> Extents:
        """Returns the table of the file; raises `PlanError` if its grains lie past the largest offset of an entry."""
        runs, offset = (self.pinned.runs, self.pinned.offset) if self.pinned else self._placed()
        length = runs.blocks * self.grain
        end = int((offset + length).max(initial=self.places.tables + self._tables_size()))
        if end > MAX_FILE:
            raise PlanError(
                f"VMDK sparse extent cannot hold {int(self.payload.blocks.sum()) * self.grain} bytes of payload: "
                f"{MAX_FILE - self.places.grains} at most",
                hint=self._larger(),
            )
        rows, row_length = cut(self.guest, runs.first * self.grain, length, offset)
        if not self.pinned:
            rows, row_length = _whole_blocks(rows, row_length, self.guest.sources, self.places.grains, self.modulus)
        blobs, blob_rows, blob_length = self._metadata(self._host(runs, offset, end))
        both, both_length = Columns.join([blob_rows, rows]), np.concatenate([blob_length, row_length])
        # The last grain is whole even if the disk ends inside it: libvmdk cannot read a partial one.
        size = end if self.pinned else max(self.places.grains, int((both.start + both_length).max()))
        return Extents.placed(size, both, both_length, (*self.guest.sources, *blobs))

    def _larger(self) -> str:
        """Returns a hint for more payload: in place and on a parent there is only one file."""
        if self.pinned:
            return "convert to another file"
        if self.delta:
            return "flatten the chain, with -o subformat=twoGbMaxExtentSparse"
        return "use -o subformat=twoGbMaxExtentSparse or a flat subformat"

    def _placed(self) -> tuple[blocks.Runs, Column]:
        """Returns the grains with payload, and their offsets, which may be any sectors."""
        sectors = self.grain // structs.SECTOR
        by_sector = self.payload._replace(first=self.payload.first * sectors, blocks=self.payload.blocks * sectors)
        placed = blocks.place(self.guest, by_sector, structs.SECTOR, self.places.grains, self.modulus)
        return self.payload.take(placed.run), placed.offset

    def _host(self, runs: blocks.Runs, offset: Column, end: int) -> Extents:
        """Returns the table from the extent's grains to the file."""
        output = Placeholder("output", max(end, self.places.grains))
        start = np.concatenate([runs.first, self.zero.first]) * self.grain
        length = np.concatenate([runs.blocks, self.zero.blocks]) * self.grain
        place = np.concatenate([offset, np.zeros(len(self.zero.first), dtype=np.int64)])
        kind = np.full(len(start), Kind.DATA, dtype=np.uint8)
        kind[len(runs.first) :] = Kind.ZERO
        source = np.zeros(len(kind), dtype=np.int32)
        gaps = Extents.filled(self.guest.size, Kind.HOLE)
        if not len(start):
            return gaps
        order = np.argsort(start, kind="stable")
        start, length = start[order], length[order]
        rows = Columns(start, kind[order], source[order], place[order])
        table = Extents.placed(self.guest.size, rows, length, [output])
        # `placed` fills gaps between rows with ZERO; here they are HOLEs, entries of 0.
        return gaps.replaced(table, start, length)

    # -- metadata

    def _metadata(self, host: Extents) -> tuple[list[Blob], Columns, Column]:
        """Returns the blobs and their rows, with sources numbered after those of the guest."""
        places = self.places
        tables = Blob("grain tables", lambda offset, length: self._entries(host, offset, length), self._tables_size())
        blobs = [
            Blob("header", self._header() + self.descriptor),
            Blob("redundant grain directory", directory(places.redundant_tables, self.table_count)),
            Blob("grain directory", directory(places.tables, self.table_count)),
            tables,
        ]
        # Tables without an entry are left as holes in the file.
        first, count = self._used_tables()
        skip = first * TABLE
        single = np.array([0, places.redundant_directory, places.directory], dtype=np.int64)
        start = np.concatenate([single, places.redundant_tables + skip, places.tables + skip])
        length = np.concatenate([[blob.size for blob in blobs[:3]], count * TABLE, count * TABLE])
        index = np.concatenate([[0, 1, 2], np.full(2 * len(first), 3)]) + len(self.guest.sources)
        offset = np.concatenate([np.zeros(3, dtype=np.int64), skip, skip])
        rows = Columns(start, np.full(len(start), Kind.DATA, dtype=np.uint8), index.astype(np.int32), offset)
        return blobs, rows, length

    def _tables_size(self) -> int:
        return self.table_count * TABLE

    def _used_tables(self) -> tuple[Column, Column]:
        """Returns the runs of grain tables with entries: number of the first, and count."""
        first = np.concatenate([self.payload.first, self.zero.first])
        last = first + np.concatenate([self.payload.blocks, self.zero.blocks]) - 1
        low, high = first // structs.ENTRIES, last // structs.ENTRIES
        run, place = spread(high - low + 1)
        numbers = distinct(low[run] + place)
        if not len(numbers):
            return numbers, numbers
        begins = np.flatnonzero(np.append(True, np.diff(numbers) != 1))
        return numbers[begins], np.diff(begins, append=len(numbers))

    def _entries(self, host: Extents, offset: int, length: int) -> bytes:
        low, high = offset // 4, -(-(offset + length) // 4)
        data = _sectors(host, self.grain, low, high - low).tobytes()
        return data[offset - low * 4 : offset - low * 4 + length]

    def _header(self) -> bytes:
        flags = structs.NEWLINE_TEST | structs.REDUNDANT | (structs.ZEROED_GRAINS if self.zeroed_grains else 0)
        return bytes(
            structs.SparseExtentHeader.build(
                {
                    "version": 2 if self.zeroed_grains else 1,
                    "flags": flags,
                    "capacity": self.size // structs.SECTOR,
                    "grainSize": self.grain // structs.SECTOR,
                    "descriptorOffset": 1 if self.descriptor else 0,
                    "descriptorSize": len(self.descriptor) // structs.SECTOR,
                    "numGTEsPerGT": structs.ENTRIES,
                    "rgdOffset": self.places.redundant_directory // structs.SECTOR,
                    "gdOffset": self.places.directory // structs.SECTOR,
                    "overHead": self.places.grains // structs.SECTOR,
                    "uncleanShutdown": 0,
                    "newlines": structs.NEWLINES,
                    "compressAlgorithm": 0,
                }
            )
        )


def _whole_blocks(
    rows: Columns, length: Column, sources: Sequence[Source], base: int, modulus: int
) -> tuple[Columns, Column]:
    """Returns rows of payload, extended to whole blocks of `modulus` bytes if the space is free.

    No reader uses the space between grains. A row that begins in the middle of a block can be shared together with the
    rest of its first and last block, which have the bytes of the source's file.
    """
    order = np.argsort(rows.start, kind="stable")
    rows, length = rows.take(order), length[order]
    start, end = rows.start, rows.start + length
    size = np.array([source.size if isinstance(source, File) else -1 for source in sources] + [-1], dtype=np.int64)
    limit = size[rows.source]
    head, tail = start % modulus, -end % modulus
    can = (rows.kind == Kind.DATA) & (limit >= 0) & ((start - rows.offset) % modulus == 0)
    # The end of the row before, including zeros inside a grain, and the start of the next one.
    before = np.concatenate([[base], end[:-1]])
    after = np.append(start[1:], np.int64(MAX_FILE))
    head[~can | (start - head < before)] = 0
    tail[~can | (end + tail > after) | (rows.offset + length + tail > limit)] = 0
    return rows._replace(start=start - head, offset=rows.offset - head), length + head + tail


def _sectors(host: Extents, grain: int, first: int, count: int) -> npt.NDArray[np.uint32]:
    """Returns grain table entries: sectors, `ZEROED`, or 0 for missing grains.

    Computed in 32 bits, with harmless overflows: there are sixteen million entries per TiB.
    """
    entries = np.zeros(count, dtype="<u4")
    sectors = grain // structs.SECTOR
    inside = max(0, min(count, host.size // grain - first))
    if not inside:
        return entries
    low, high = int(host.row_at(first * grain)), int(host.row_at((first + inside) * grain - 1)) + 1
    begins = host.start[low:high] // grain - first
    # The offset of grain `first` if the row began there.
    base = (host.offset[low:high] // structs.SECTOR - begins * sectors).astype(np.uint32)
    begins[0] = 0
    counts = np.diff(begins, append=inside)
    there = entries[:inside]
    there[:] = np.arange(inside, dtype=np.uint32)
    there *= np.uint32(sectors)
    there += base[0] if high - low == 1 else np.repeat(base, counts)
    kind = host.kind[low:high]
    if int(kind.min()) != Kind.DATA:
        missing = np.repeat(kind != Kind.DATA, counts)
        there[missing] = np.repeat(np.where(kind == Kind.ZERO, structs.ZEROED, 0), counts)[missing]
    return entries
