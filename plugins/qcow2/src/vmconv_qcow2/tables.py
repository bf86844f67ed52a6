"""Tables of a new image that are computed on writing, a slice at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vmconv.plugin import Column, Columns, Extents, Kind, Source, distinct, spread


def windows(
    start: Column, length: Column, offset: Column, source: Source, size: int, rest: Kind = Kind.ZERO
) -> Extents:
    """Returns a table with windows onto `source` and `rest` between them."""
    order = np.argsort(start, kind="stable")
    start, length, offset = start[order], length[order], offset[order]
    there = length > 0
    start, length, offset = start[there], length[there], offset[there]
    zero = np.zeros(len(start), dtype=np.int32)
    rows = Columns(start, np.full(len(start), Kind.DATA, dtype=np.uint8), zero, offset)
    table = Extents.placed(size, rows, length, [source])
    if rest == Kind.ZERO:
        return table
    kind = np.where(table.kind == Kind.ZERO, np.uint8(rest), table.kind)
    return Extents(size, table.columns._replace(kind=kind), [source])


def touched(first: Column, count: Column, entries: int) -> Column:
    """Returns the numbers of the tables that hold these runs of entries."""
    there = count > 0
    low, high = first[there] // entries, (first + count - 1)[there] // entries
    run, place = spread(high - low + 1)
    return distinct(low[run] + place)


def concatenated(
    numbers: Column, size: int, entries: int, compute: Callable[[int, int], bytes]
) -> Callable[[int, int], bytes]:
    """Returns a function that reads the concatenated tables of these numbers, `size` bytes each, by computing runs of
    entries.
    """

    def read(offset: int, length: int) -> bytes:
        parts = []
        end = offset + length
        while offset < end:
            table, skip = divmod(offset, size)
            # Neighbouring tables are computed together.
            together = _neighbours(numbers, table, -(-(skip + end - offset) // size))
            step = min(end - offset, together * size - skip)
            first = int(numbers[table]) * entries + skip * entries // size
            parts.append(compute(first, step * entries // size))
            offset += step
        return b"".join(parts)

    return read


def _neighbours(indices: Column, first: int, most: int) -> int:
    """Returns the length of the run of consecutive numbers from index `first` on, at most `most`."""
    some = indices[first : first + most]
    gaps = np.flatnonzero(np.diff(some) != 1)
    return int(gaps[0]) + 1 if len(gaps) else len(some)


def by_words(compute: Callable[[int, int], bytes], word: int = 8) -> Callable[[int, int], bytes]:
    """Returns a blob's function for ranges at any byte, from one for whole words."""

    def read(offset: int, length: int) -> bytes:
        low, high = offset // word * word, -(-(offset + length) // word) * word
        return compute(low, high - low)[offset - low :][:length]

    return read


def counts(found: Column, bits: int) -> bytes:
    """Returns reference counts of `bits` bits each."""
    if bits >= 8:
        return bytes(found.astype(f">u{bits // 8}"))
    single = (found[:, np.newaxis] >> np.arange(bits) & 1).astype(np.uint8)
    return bytes(np.packbits(single, bitorder="little"))
