"""The central table of vmconv: a sorted, gapless map of an address space.

A row maps an address range to a HOLE (not allocated in this layer), ZERO (reads as zero and hides the parent), or DATA
(a window onto a source of bytes). Tables are immutable, canonical (neighbours that could be one row are merged) and
valid by construction. So two tables are equal if and only if they map the same bytes to the same places.

Operations work on whole numpy columns; nothing here loops over rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vmconv.errors import ReadError, os_errors
from vmconv.model.sources import File, Source
from vmconv.system import linux

Column = npt.NDArray[np.int64]
Kinds = npt.NDArray[np.uint8]

MAX_SIZE = 1 << 62
"""Largest address space, bytes: the sum of two addresses must fit a signed 64-bit integer."""


class Kind(IntEnum):
    """The kind of a row. The order matters: the maximum of kinds decides for a block in which rows meet."""

    HOLE = 0
    ZERO = 1
    DATA = 2


class Row(NamedTuple):
    """One row, for messages and short loops: bytes `[start, start + length)`, and the window of a DATA row."""

    start: int
    length: int
    kind: Kind
    source: Source | None = None
    offset: int = 0

    @property
    def end(self) -> int:
        return self.start + self.length


class Columns(NamedTuple):
    """Unchecked rows as parallel columns: start, kind, index into the sources (-1: none), offset in bytes."""

    start: Column
    kind: Kinds
    source: npt.NDArray[np.int32]
    offset: Column

    def take(self, index: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> Columns:
        return Columns(self.start[index], self.kind[index], self.source[index], self.offset[index])

    @staticmethod
    def join(parts: Sequence[Columns]) -> Columns:
        if not parts:
            return _columns([], [], [], [])
        return Columns(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _columns(start: object, kind: object, source: object, offset: object) -> Columns:
    return Columns(
        np.asarray(start, dtype=np.int64),
        np.asarray(kind, dtype=np.uint8),
        np.asarray(source, dtype=np.int32),
        np.asarray(offset, dtype=np.int64),
    )


def _coalesce(rows: Columns) -> Columns:
    """Merges neighbours that continue each other; clears source and offset of rows that are not DATA."""
    n = len(rows.start)
    if n == 0:
        return rows
    start, kind, source, offset = rows
    data = kind == Kind.DATA
    if n == 1 and data[0]:
        return rows
    if not data.all():
        source = np.where(data, source, np.int32(-1))
        offset = np.where(data, offset, 0)
    first = np.empty(n, dtype=bool)
    first[0] = True
    # DATA continues if its window does. HOLE and ZERO have no window, and always continue.
    run_on = np.where(data[1:], offset[1:] - offset[:-1] == start[1:] - start[:-1], True)
    np.logical_not(run_on & (kind[1:] == kind[:-1]) & (source[1:] == source[:-1]), out=first[1:])
    rows = Columns(start, kind, source, offset)
    return rows if first.all() else rows.take(first)


def _is_one_run(kind: Kinds, offset: Column, unit: int) -> bool:
    """True for the common case of contiguous DATA, detected in one pass over each column."""
    return len(kind) > 0 and int(kind.min()) == Kind.DATA and bool((offset[1:] - offset[:-1] == unit).all())


def spread(counts: Column) -> tuple[Column, Column]:
    """Returns, for groups of the given sizes laid end to end, the group of each element and its place in the group."""
    group = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    place = np.arange(len(group), dtype=np.int64)
    place -= np.repeat(np.cumsum(counts) - counts, counts)
    return group, place


def lengths(start: Column, end: int) -> Column:
    """Returns the lengths of ranges that follow each other up to `end`; five times faster than `numpy.diff` for few."""
    found = np.empty_like(start)
    np.subtract(start[1:], start[:-1], out=found[:-1])
    np.subtract(end, start[-1:], out=found[-1:])
    return found


def distinct(values: Column) -> Column:
    """Returns the distinct values, sorted."""
    # numpy.unique imports as many modules as all the rest of a conversion.
    values = np.sort(values)
    return values[np.append(True, values[1:] != values[:-1])] if len(values) else values


class Extents:
    """An address space of `size` bytes as parallel columns: `start`, `kind`, `source`, `offset`.

    `source` indexes `sources`, and `offset` is the byte offset of the window in its source; -1 and 0 where the row is
    not DATA. Raises `ValueError` if the rows are not sorted and gapless from 0, or a window lies outside its source.
    """

    __slots__ = ("kind", "offset", "size", "source", "sources", "start")

    size: int
    start: Column
    kind: Kinds
    source: npt.NDArray[np.int32]
    offset: Column
    sources: tuple[Source, ...]

    def __init__(self, size: int, rows: Columns, sources: Sequence[Source] = ()) -> None:
        if not 0 <= size <= MAX_SIZE:
            raise ValueError(f"size {size} is not in 0..{MAX_SIZE}")
        self.size = size
        self.sources = tuple(sources)
        rows = self._checked(_coalesce(rows))
        # Tables share columns with each other.
        for column in rows:
            column.flags.writeable = False
        self.start, self.kind, self.source, self.offset = rows

    def _checked(self, rows: Columns) -> Columns:
        start, kind, source, offset = rows
        if len(start) == 0:
            if self.size:
                raise ValueError(f"no rows for {self.size} bytes")
            return rows
        if start[0] != 0 or (start[1:] <= start[:-1]).any() or start[-1] >= self.size:
            raise ValueError("rows are not sorted and gapless from 0 to the size")
        if kind.max() > Kind.DATA:
            raise ValueError(f"unknown kind {kind.max()}")
        data = kind == Kind.DATA
        if data.any():
            named = source[data]
            if named.min() < 0 or named.max() >= len(self.sources):
                raise ValueError("a DATA row names no source")
            # Rows that are not DATA get the limit of the last source (index -1); `bad` leaves them out.
            limits = np.array([s.size for s in self.sources], dtype=np.int64)[source]
            end = offset + lengths(start, self.size)
            bad = data & ((offset < 0) | (end > limits))
            if bad.any():
                row = int(np.flatnonzero(bad)[0])
                raise ValueError(
                    f"row at {start[row]}: window {offset[row]}..{end[row]} lies outside "
                    f"{self.sources[source[row]].name} ({limits[row]} bytes)"
                )
        return rows

    # -- constructors

    @classmethod
    def of(cls, rows: Iterable[tuple[int, Kind, Source | None, int]], size: int) -> Extents:
        """Returns the table of `(start, kind, source, offset)` rows; for many rows, use columns."""
        sources: list[Source] = []
        index: dict[int, int] = {}
        listed = list(rows)
        for _, _, source, _ in listed:
            if source is not None and id(source) not in index:
                index[id(source)] = len(sources)
                sources.append(source)
        columns = _columns(
            [r[0] for r in listed],
            [r[1] for r in listed],
            [-1 if r[2] is None else index[id(r[2])] for r in listed],
            [r[3] for r in listed],
        )
        return cls(size, columns, sources)

    @classmethod
    def whole(cls, source: Source) -> Extents:
        """Returns the table of one source, from its first byte to its last."""
        return cls.of([(0, Kind.DATA, source, 0)] if source.size else [], source.size)

    @classmethod
    def filled(cls, size: int, kind: Kind = Kind.ZERO) -> Extents:
        """Returns a table of one row that is not DATA."""
        return cls.of([(0, kind, None, 0)] if size else [], size)

    @classmethod
    def placed(cls, size: int, rows: Columns, length: Column, sources: Sequence[Source]) -> Extents:
        """Returns the table of an output file: the given rows, and ZERO everywhere else.

        Rows may come in any order; HOLE rows become ZERO. Raises `ValueError` if two overlap.
        """
        order = np.argsort(rows.start, kind="stable")
        rows, length = rows.take(order), length[order]
        end = rows.start + length
        if (end[:-1] > rows.start[1:]).any() or (len(end) and end[-1] > size):
            raise ValueError("rows overlap or reach past the end")
        # A gap may begin at 0 and at the end of each row. It is one unless the next row begins there.
        gap = np.concatenate([[0], end])
        gap = gap[np.append(rows.start, size) > gap]
        zero = np.full(len(gap), Kind.ZERO, dtype=np.uint8)
        nothing = np.full(len(gap), -1, dtype=np.int32)
        both = Columns.join([rows, Columns(gap, zero, nothing, np.zeros(len(gap), dtype=np.int64))])
        both = both._replace(kind=np.maximum(both.kind, np.uint8(Kind.ZERO)))
        return cls(size, both.take(np.argsort(both.start, kind="stable")), sources)

    @classmethod
    def from_units(
        cls,
        unit: int,
        size: int,
        slices: Iterable[tuple[Kinds, npt.NDArray[np.int32] | int, Column] | int],
        sources: Sequence[Source],
    ) -> Extents:
        """Returns the table of a format's allocation table, with one entry for each `unit` bytes.

        `slices` yields `(kind, source, offset)` columns of consecutive entries; a number stands for that many HOLEs.
        Each slice is coalesced before the next is requested, so memory is bounded by the slice. The last unit may reach
        past `size` and past the end of its source; missing bytes read as zero. The caller refuses entries that begin
        past the end of their source.
        """
        parts: list[Columns] = []
        at = 0
        for piece in slices:
            if isinstance(piece, int):
                parts.append(_columns([at * unit], [Kind.HOLE], [-1], [0]))
                at += piece
                continue
            kind, source, offset = piece
            n = len(kind)
            if isinstance(source, int) and _is_one_run(kind, offset, unit):
                # A number instead of a view, which would keep the whole slice in memory.
                parts.append(_columns([at * unit], [Kind.DATA], [source], [int(offset[0])]))
                at += n
                continue
            start = np.arange(at * unit, (at + n) * unit, unit, dtype=np.int64)
            column = np.full(n, source, dtype=np.int32) if isinstance(source, int) else source
            parts.append(_coalesce(Columns(start, kind, column, offset)))
            at += n
        if at * unit < size:
            raise ValueError(f"{at} units of {unit} bytes do not cover {size} bytes")
        rows = Columns.join(parts)
        # An allocation table may have more entries than the disk has units.
        rows = rows.take(rows.start < size)
        return cls(size, clip_to_sources(_coalesce(rows), size, sources), sources)

    # -- queries

    def __len__(self) -> int:
        return len(self.start)

    @property
    def columns(self) -> Columns:
        return Columns(self.start, self.kind, self.source, self.offset)

    @property
    def length(self) -> Column:
        """Bytes of each row."""
        return lengths(self.start, self.size)

    @property
    def end(self) -> Column:
        """The first address after each row."""
        return np.append(self.start[1:], np.int64(self.size)) if len(self.start) else self.start

    def __iter__(self) -> Iterator[Row]:
        rows = zip(
            self.start.tolist(),
            self.length.tolist(),
            self.kind.tolist(),
            self.source.tolist(),
            self.offset.tolist(),
            strict=True,
        )
        for start, length, kind, source, offset in rows:
            yield Row(start, length, Kind(kind), self.sources[source] if source >= 0 else None, offset)

    def __repr__(self) -> str:
        shown = [f"{r.start:#x}+{r.length:#x} {r.kind.name}" for r, _ in zip(self, range(8), strict=False)]
        return f"<Extents {self.size} bytes, {len(self)} rows: {', '.join(shown)}{'...' if len(self) > 8 else ''}>"

    def total(self, kind: Kind) -> int:
        """Returns the number of bytes of this kind."""
        return int(self.length[self.kind == kind].sum())

    def in_files(self) -> npt.NDArray[np.bool_]:
        """Returns a mask of the rows that are windows onto a `File`."""
        # The extra last element is for index -1, rows without a source.
        is_file = np.array([isinstance(source, File) for source in self.sources] + [False])
        return is_file[self.source]

    def row_at(self, address: int | Column) -> Column:
        """Returns the index of the row of each address."""
        return np.searchsorted(self.start, address, side="right") - 1

    def __eq__(self, other: object) -> bool:
        """True if both have the same rows: equal kinds, and equal windows onto identical sources."""
        if not isinstance(other, Extents):
            return NotImplemented
        if self.size != other.size or len(self) != len(other):
            return False
        if not (np.array_equal(self.start, other.start) and np.array_equal(self.kind, other.kind)):
            return False
        sources, (mine, theirs) = merge_sources(self, other)
        del sources
        return np.array_equal(mine.source, theirs.source) and np.array_equal(self.offset, other.offset)

    __hash__ = None  # type: ignore[assignment]

    # -- algebra

    def window(self, start: int, length: int, beyond: Kind = Kind.HOLE) -> Extents:
        """Returns an address range as a table of its own; past the end it is `beyond`, a kind other than DATA."""
        inside = max(0, min(length, self.size - start))
        rows = _columns([], [], [], [])
        if inside:
            rows = self._rows(start, start + inside)
        if inside < length:
            rows = Columns.join([rows, _columns([inside], [beyond], [-1], [0])])
        return Extents(length, rows, self.sources)

    def _rows(self, start: int, end: int) -> Columns:
        """Returns copies of the rows of a range that is not empty, moved to 0; faster than `gather` for one range."""
        part = slice(int(self.start.searchsorted(start, "right")) - 1, int(self.start.searchsorted(end, "left")))
        begin, offset = self.start[part] - start, self.offset[part].copy()
        if self.kind[part.start] == Kind.DATA:
            offset[0] -= begin[0]
        begin[0] = 0
        return Columns(begin, self.kind[part].copy(), self.source[part].copy(), offset)

    def over(self, parent: Extents) -> Extents:
        """Returns this layer on top of `parent`: each HOLE is replaced by the parent's rows.

        Past the end of the parent a HOLE becomes ZERO, because a guest reads zeros there, whatever lies below.
        """
        hole = self.kind == Kind.HOLE
        if not hole.any():
            return self
        below = parent if parent.size == self.size else parent.window(0, self.size, Kind.ZERO)
        sources, (mine, theirs) = merge_sources(self, below)
        filled = gather(theirs, self.start[hole], self.length[hole], self.start[hole])
        rows = Columns.join([mine.columns.take(~hole), filled])
        return Extents(self.size, rows.take(np.argsort(rows.start, kind="stable")), sources)

    def through(self, source: Source, inner: Extents) -> Extents:
        """Returns this table with each window onto `source` replaced by the rows of `inner` at that place.

        `inner` is a table of the address space of `source`. This is composition: guest -> file -> parts of the file.
        """
        if not any((self.source == i).any() for i, s in enumerate(self.sources) if s is source):
            return self
        sources, (mine, below) = merge_sources(self, inner)
        index = next(i for i, s in enumerate(sources) if s is source)
        seen = mine.source == index
        replaced = gather(below, mine.offset[seen], mine.length[seen], mine.start[seen])
        rows = Columns.join([mine.columns.take(~seen), replaced])
        return Extents(self.size, rows.take(np.argsort(rows.start, kind="stable")), sources)

    def replaced(self, other: Extents, start: Column, length: Column) -> Extents:
        """Returns this table with the rows of `other`, of equal size, in the given ranges: sorted, without overlaps."""
        sources, (mine, theirs) = merge_sources(self, other)
        keep = np.concatenate([[0], start + length])
        keep_length = np.append(start, self.size) - keep
        keep, keep_length = keep[keep_length > 0], keep_length[keep_length > 0]
        rows = Columns.join([gather(mine, keep, keep_length, keep), gather(theirs, start, length, start)])
        return Extents(self.size, rows.take(np.argsort(rows.start, kind="stable")), sources)

    def without_holes(self) -> Extents:
        """Returns the table of a disk without a parent: each HOLE becomes ZERO."""
        if not (self.kind == Kind.HOLE).any():
            return self
        kind = np.maximum(self.kind, np.uint8(Kind.ZERO))
        return Extents(self.size, self.columns._replace(kind=kind), self.sources)

    def units(self, unit: int, first: int, count: int) -> tuple[Kinds, npt.NDArray[np.int32], Column]:
        """Returns an allocation table: `(kind, source, offset)` columns of `count` units from unit number `first`.

        Raises `ValueError` if a row boundary falls inside a unit. The last unit may reach past the size; units beyond
        it are HOLEs.
        """
        inside = max(0, min(count, -(-self.size // unit) - first))
        low = int(self.row_at(first * unit)) if inside else 0
        if inside == count > 0 and int(self.end[low]) >= (first + count) * unit and self.kind[low] == Kind.DATA:
            # The common case, a slice inside one row.
            begin = int(self.offset[low]) + first * unit - int(self.start[low])
            return (
                np.full(count, Kind.DATA, dtype=np.uint8),
                np.full(count, self.source[low], dtype=np.int32),
                np.arange(begin, begin + count * unit, unit, dtype=np.int64),
            )
        kind = np.zeros(count, dtype=np.uint8)
        source = np.full(count, -1, dtype=np.int32)
        offset = np.zeros(count, dtype=np.int64)
        if not inside:
            return kind, source, offset
        high = int(self.row_at(min((first + inside) * unit, self.size) - 1)) + 1
        begins = self.start[low:high] - first * unit
        begins[0] = 0
        if (begins % unit).any():
            raise ValueError(f"a row boundary falls inside a unit of {unit} bytes")
        counts = np.diff(begins // unit, append=inside)
        kind[:inside] = np.repeat(self.kind[low:high], counts)
        source[:inside] = np.repeat(self.source[low:high], counts)
        base = self.offset[low:high] - (self.start[low:high] - first * unit)
        step = np.where(self.kind[low:high] == Kind.DATA, unit, 0)
        base = np.where(self.kind[low:high] == Kind.DATA, base, 0)
        ramp = np.arange(inside, dtype=np.int64)
        offset[:inside] = ramp * np.repeat(step, counts) + np.repeat(base, counts)
        return kind, source, offset

    def rows_of(self, address: int, length: int) -> Iterator[Row]:
        """Yields the rows of an address range, clipped to it; faster than `window` for reads of bytes."""
        if address < 0 or length < 0 or address + length > self.size:
            raise ValueError(f"{address}+{length} lies outside {self.size} bytes")
        if not length:
            return
        low = int(self.start.searchsorted(address, "right")) - 1
        high = int(self.start.searchsorted(address + length, "left"))
        # As lists: loops over numpy scalars are slow.
        part = slice(low, high)
        starts = self.start[part].tolist()
        ends = [*starts[1:], address + length]
        columns = (self.kind[part].tolist(), self.source[part].tolist(), self.offset[part].tolist())
        for start, end, kind, source, offset in zip(starts, ends, *columns, strict=True):
            begin = max(start, address)
            if kind == Kind.DATA:
                yield Row(begin, end - begin, Kind.DATA, self.sources[source], offset + begin - start)
            else:
                yield Row(begin, end - begin, Kind(kind))

    def read(self, address: int, length: int) -> bytes:
        """Returns the bytes of an address range; HOLE and ZERO read as zero."""
        parts = [
            bytes(row.length) if row.source is None else row.source.read(row.offset, row.length)
            for row in self.rows_of(address, length)
        ]
        # Most reads are inside one row, and need no copy.
        return parts[0] if len(parts) == 1 else b"".join(parts)


def cut(table: Extents, low: Column, length: Column, to: Column) -> tuple[Columns, Column]:
    """Returns the rows of `table` in each window `[low, low + length)`, moved to address `to`, and each row's length.

    The primitive of slicing, stacking and composition. Rows come in the order of the windows. Windows must lie inside
    the table and not be empty.
    """
    first = table.row_at(low)
    last = np.searchsorted(table.start, low + length, side="left") - 1
    window, place = spread(last - first + 1)
    row = first[window] + place
    begin = np.maximum(low[window], table.start[row])
    end = np.minimum((low + length)[window], table.end[row])
    offset = np.where(table.kind[row] == Kind.DATA, table.offset[row] + begin - table.start[row], 0)
    return Columns(to[window] + begin - low[window], table.kind[row], table.source[row], offset), end - begin


def gather(table: Extents, low: Column, length: Column, to: Column) -> Columns:
    """Returns the rows of `cut` without their lengths."""
    return cut(table, low, length, to)[0]


def merge_sources(*tables: Extents) -> tuple[tuple[Source, ...], list[Extents]]:
    """Returns one tuple of sources and the tables re-indexed to it; sources are compared by identity."""
    # The common case: tables of the same sources.
    if all(len(t.sources) == len(tables[0].sources) for t in tables) and all(
        a is b for t in tables[1:] for a, b in zip(t.sources, tables[0].sources, strict=True)
    ):
        return tables[0].sources, list(tables)
    merged: list[Source] = []
    index: dict[int, int] = {}
    result = []
    for table in tables:
        for source in table.sources:
            if id(source) not in index:
                index[id(source)] = len(merged)
                merged.append(source)
        # The extra last element is for index -1, rows without a source.
        renumber = np.array([index[id(s)] for s in table.sources] + [-1], dtype=np.int32)
        result.append((table, renumber[table.source]))
    return tuple(merged), [Extents(t.size, t.columns._replace(source=source), merged) for t, source in result]


def clip_to_sources(rows: Columns, size: int, sources: Sequence[Source]) -> Columns:
    """Splits windows that reach past the end of their source; the missing part becomes ZERO."""
    if not sources or not len(rows.start):
        return rows
    limits = np.array([s.size for s in sources] + [0], dtype=np.int64)[rows.source]
    length = lengths(rows.start, size)
    # Windows that begin past the end are left for `Extents` to refuse.
    over = (rows.kind == Kind.DATA) & (rows.offset + length > limits) & (rows.offset < limits)
    if not over.any():
        return rows
    cut = rows.take(over)
    tail = Columns(
        cut.start + limits[over] - cut.offset,
        np.full(len(cut.start), Kind.ZERO, dtype=np.uint8),
        np.full(len(cut.start), -1, dtype=np.int32),
        np.zeros(len(cut.start), dtype=np.int64),
    )
    both = Columns.join([rows, tail])
    return both.take(np.argsort(both.start, kind="stable"))


def on_storage(file: File) -> Extents:
    """Returns the extent map of a file: DATA, and ZERO for holes and unwritten extents.

    Syncs the file first, and queries the filesystem once per file. The result does not depend on the page cache.
    """
    if file.on_storage is None:
        file.on_storage = _of_ranges(file, _ranges(file, linux.written_ranges))
    return file.on_storage


def allocated(file: File) -> Extents:
    """Returns the allocation of a file: DATA for extents, written or not; ZERO for holes."""
    return _of_ranges(file, _ranges(file, linux.allocated_ranges))


def _of_ranges(file: File, ranges: Column) -> Extents:
    """Returns the table of a file with DATA in the given `(start, end)` ranges, and ZERO elsewhere."""
    # Edges alternate between starts and ends of data. The first row is a hole unless data begins at 0.
    edges = np.concatenate([[0], ranges.reshape(-1)])
    kind = np.full(len(edges), Kind.ZERO, dtype=np.uint8)
    kind[1::2] = Kind.DATA
    there = np.diff(edges, append=file.size) > 0
    rows = Columns(edges, kind, np.zeros(len(edges), dtype=np.int32), edges).take(there)
    return Extents(file.size, rows, [file])


def _ranges(file: File, ask: Callable[[int], Column]) -> Column:
    """Returns rows `(start, end)` of FIEMAP, clipped to the file; those of SEEK_DATA if FIEMAP is not supported."""
    file.sync()
    # FIEMAP with FIEMAP_FLAG_SYNC would wait for storage, which a settled file must not.
    if not (file.descriptor < 0 or file.is_device or file.settled):
        with os_errors("extent map cannot be read", ReadError):
            try:
                return np.minimum(ask(file.descriptor), file.size)
            except OSError as exc:
                if not linux.not_told(exc):
                    raise
    return np.array(file.data_ranges(), dtype=np.int64).reshape(-1, 2)
