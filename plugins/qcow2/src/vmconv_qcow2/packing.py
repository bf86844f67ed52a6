"""Compressed clusters of a new image: which they are, how long, and where they lie behind each other.

    compressed clusters, byte by byte behind each other | runs taken over from the source, each at its source's phase

A cluster that the source has compressed in the same way is taken over as it is: its encoded bytes are payload, and are
shared where storage allows it. All others are read and compressed, several at once. Clusters of zeros are dropped. A
cluster that does not become shorter is not compressed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vmconv.plugin import (
    AccessError,
    Column,
    Columns,
    Decoded,
    Encoded,
    Extents,
    File,
    Kind,
    Scratch,
    Source,
    blocks,
    in_order,
    spread,
)
from vmconv_qcow2.compression import SECTOR, compressor, encoding

# Bytes that are read, and compressed by one thread, at once: they stay in its cache.
_TOGETHER = 512 << 10

_Pair = tuple[Column, Column]


class Packing(NamedTuple):
    """Compressed clusters by their guest cluster `number`, sorted; `at` is relative to where the first one begins.

    `rows` and `row_length` put their bytes there; `rows.source` indexes `sources`. `zero` are the numbers of
    the clusters of zeros.
    """

    number: Column
    at: Column
    length: Column
    end: int
    sources: tuple[Source, ...]
    rows: Columns
    row_length: Column
    zero: Column

    @property
    def sectors_end(self) -> Column:
        """The end of the last sector of each cluster, which is what an entry can say."""
        return -(-(self.at + self.length) // SECTOR) * SECTOR

    def counts(self, cluster: int) -> Column:
        """Returns the number of compressed clusters that touch each cluster of the file, from the first on."""
        low, high = self.at // cluster, (self.sectors_end - 1) // cluster
        run, place = spread(high - low + 1)
        return np.bincount(low[run] + place, minlength=-(-self.end // cluster)).astype(np.int64)


class Compression(NamedTuple):
    """How clusters are compressed: the size of a cluster, the type, and the level, None for the default one."""

    cluster: int
    type: str
    level: int | None

    @property
    def reason(self) -> str:
        return f"clusters are compressed ({self.type})"


def pack(
    table: Extents, how: Compression, modulus: int, file: File, scratch: Scratch | None, *, zeros: bool
) -> Packing:
    """Returns the compressed clusters of a guest's table in whole clusters; reads what must be compressed.

    With `zeros`, clusters of zeros are dropped. `file` is that of the source, for messages.
    """
    taken = list(_taken(table, how))
    known = np.concatenate([number for _, number, _, _ in taken] or [np.empty(0, dtype=np.int64)])
    made = _compressed(_without(table, known, how.cluster), how, scratch, zeros=zeros)
    stream = _Stream(table, how, file, made, scratch)
    # A row of no bytes is none.
    sources: list[Source] = [stream] if stream.size else []
    starts, lengths = [np.zeros(len(sources), dtype=np.int64)], [np.full(len(sources), stream.size, dtype=np.int64)]
    owners, offsets = [np.zeros(len(sources), dtype=np.int32)], [np.zeros(len(sources), dtype=np.int64)]
    places, end = [stream.begins], stream.size
    phases = max(modulus, SECTOR)
    for source, _, at, length in taken:
        run, begin, until = _runs(at, length)
        phase = begin % phases
        span = -(-(phase + until - begin) // phases) * phases
        base = -(-end // phases) * phases + np.cumsum(span) - span + phase
        places.append(base[run] + at - begin[run])
        starts.append(base)
        lengths.append(until - begin)
        owners.append(np.full(len(begin), len(sources), dtype=np.int32))
        offsets.append(begin)
        sources.append(source)
        end = int(base[-1] + until[-1] - begin[-1])
    number = np.concatenate([made.number, known])
    order = np.argsort(number, kind="stable")
    start = np.concatenate(starts)
    rows = Columns(
        start, np.full(len(start), Kind.DATA, dtype=np.uint8), np.concatenate(owners), np.concatenate(offsets)
    )
    length = np.concatenate([made.length, *(length for _, _, _, length in taken)])
    return Packing(
        number[order],
        np.concatenate(places)[order],
        length[order],
        end,
        tuple(sources),
        rows,
        np.concatenate(lengths),
        made.zero,
    )


# -- clusters that are taken over


def source_cluster(table: Extents, kind: str) -> int | None:
    """Returns the size of the clusters that most of the disk is compressed in; None if nothing can be taken over."""
    found = {
        source.unit: int(table.length[table.source == index].sum())
        for index, source in enumerate(table.sources)
        if isinstance(source, Decoded) and source.encoding == encoding(kind, source.unit)
    }
    best = max(found, key=lambda unit: found[unit], default=None)
    return best if best and found[best] else None


def _taken(table: Extents, how: Compression) -> Iterator[tuple[File, Column, Column, Column]]:
    """Yields file, numbers, offsets and lengths of the clusters that a source has compressed in the same way."""
    cluster = how.cluster
    for index, source in enumerate(table.sources):
        if not isinstance(source, Decoded) or source.encoding != encoding(how.type, cluster):
            continue
        rows = (table.kind == Kind.DATA) & (table.source == index)
        rows &= (table.offset - table.start) % cluster == 0
        start, shift = table.start[rows], (table.offset[rows] - table.start[rows]) // cluster
        first = -(-start // cluster)
        row, place = spread(np.maximum(table.end[rows] // cluster - first, 0))
        number = first[row] + place
        if len(number):
            yield source.file, number, *source.encoded(number + shift[row])


def _runs(at: Column, length: Column) -> tuple[Column, Column, Column]:
    """Returns the run of each range, and begin and end of each run of ranges that touch or overlap."""
    order = np.argsort(at, kind="stable")
    begin, reach = at[order], np.maximum.accumulate((at + length)[order])
    first = np.ones(len(at), dtype=bool)
    first[1:] = begin[1:] > reach[:-1]
    run = np.empty(len(at), dtype=np.int64)
    run[order] = np.cumsum(first) - 1
    return run, begin[first], reach[np.append(np.flatnonzero(first)[1:], len(at)) - 1]


def ranges_of(number: Column, cluster: int) -> _Pair:
    """Returns start and length of the ranges of a disk that these clusters make; the numbers may be in any order."""
    number = np.sort(number)
    first = np.ones(len(number), dtype=bool)
    first[1:] = np.diff(number) > 1
    begins = np.flatnonzero(first)
    return number[begins] * cluster, np.diff(begins, append=len(number)) * cluster


def _without(table: Extents, number: Column, cluster: int) -> Extents:
    return table.replaced(Extents.filled(table.size), *ranges_of(number, cluster)) if len(number) else table


# -- clusters that are compressed


class _Made(NamedTuple):
    """Numbers and lengths of the clusters that were compressed, in order, and the numbers of those of zeros.

    `kept_at` is the offset of the first one in the scratch.
    """

    number: Column
    length: Column
    zero: Column
    kept_at: int


def _compressed(table: Extents, how: Compression, scratch: Scratch | None, *, zeros: bool) -> _Made:
    numbers, lengths, empty, kept_at = [], [], [], -1

    def work(piece: tuple[int, int]) -> tuple[Column, Column, bytes]:
        first, count = piece
        packed = _packed(table, how, first, count, zeros=zeros)
        length = np.array([len(each) for each in packed], dtype=np.int64)
        number = np.arange(first, first + count, dtype=np.int64)
        return number, length, b"".join(each for each in packed if len(each) < how.cluster) if scratch else b""

    for number, length, data in in_order(work, _pieces(table, how.cluster)):
        shorter = (length > 0) & (length < how.cluster)
        numbers.append(number[shorter])
        lengths.append(length[shorter])
        empty.append(number[length == 0])
        if scratch and data:
            at = scratch.append(data)
            kept_at = at if kept_at < 0 else kept_at
    nothing = np.empty(0, dtype=np.int64)
    made, length, zero = (np.concatenate(each or [nothing]) for each in (numbers, lengths, empty))
    return _Made(made, length, zero, kept_at)


def _pieces(table: Extents, cluster: int) -> Iterator[tuple[int, int]]:
    """Returns number and count of runs of clusters with payload."""
    runs = blocks.whole_blocks(table, cluster)
    return blocks.pieces(runs.take(runs.kind == Kind.DATA), max(1, _TOGETHER // cluster))


def _packed(table: Extents, how: Compression, first: int, count: int, *, zeros: bool) -> list[bytes]:
    """Returns the compressed bytes of clusters: none for one of zeros, a whole cluster for one not shorter."""
    size = how.cluster
    data = memoryview(table.read(first * size, count * size))
    words = np.frombuffer(data, dtype=np.uint64).reshape(count, -1)
    filled = (words != 0).any(axis=1).tolist() if zeros else [True] * count
    compress = compressor(how.type, how.level)
    clusters = (data[at * size : (at + 1) * size] for at in range(count))
    return [compress(one)[:size] if there else b"" for one, there in zip(clusters, filled, strict=True)]


class _Stream(Encoded):
    """The clusters that were compressed, behind each other; kept since then, or else compressed again on reading."""

    def __init__(self, guest: Extents, how: Compression, file: File, made: _Made, scratch: Scratch | None) -> None:
        self.begins = np.cumsum(made.length) - made.length
        super().__init__(
            f"{file.name} ({how.type})",
            file,
            size=int(made.length.sum()),
            encoding=encoding(how.type, how.cluster),
            reason=how.reason,
        )
        self._guest = guest
        self._how = how
        self._made = made
        self._scratch = scratch

    def units_at(self, offset: Column) -> _Pair:
        index = np.searchsorted(self.begins, offset)
        index[index == len(self.begins)] = 0
        there = self.begins[index] == offset
        return np.where(there, self._made.number[index] * self._how.cluster, -1), self._made.length[index]

    def units(self, offset: int, length: int) -> list[bytes]:
        if not length:
            return []
        if self._scratch:
            return [self._scratch.read(self._made.kept_at + offset, length)]
        low = int(np.searchsorted(self.begins, offset, side="right")) - 1
        high = int(np.searchsorted(self.begins, offset + length, side="left"))
        data = b"".join(self._again(low, high))
        skip = offset - int(self.begins[low])
        return [data[skip : skip + length]]

    def _again(self, low: int, high: int) -> Iterator[bytes]:
        for number, length in zip(self._made.number[low:high].tolist(), self._made.length[low:high], strict=True):
            (packed,) = _packed(self._guest, self._how, number, 1, zeros=False)
            if len(packed) != length:
                at = number * self._how.cluster
                raise AccessError(f"{self.file.name}: changed while it was being converted, at {at:#x}")
            yield packed
