"""The map of a disk, as from `qemu-img map`: kind, layer, file and offset of each range."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from vmconv.errors import UsageError
from vmconv.model.extents import Columns, Extents, Kind, Row, on_storage
from vmconv.model.image import Image
from vmconv.model.sources import Decoded, File, Reserved, Source


class MapRow(NamedTuple):
    """Guest bytes `[start, start + length)`: `depth` counts layers from the top; `offset` is in `file`, if any.

    `present`: a layer allocates the range. `data`: bytes are stored. `zero`: they read as zero.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None
    file: str | None

    def as_json(self) -> dict[str, Any]:
        """Returns the row with qemu-img's keys, in its order."""
        row: dict[str, Any] = {
            "start": self.start,
            "length": self.length,
            "depth": self.depth,
            "present": self.present,
            "zero": self.zero,
            "data": self.data,
        }
        if self.offset is not None:
            row["offset"] = self.offset
        return row


class _Layer(Source):
    """Marks zeros of one layer in the table of all layers."""

    def __init__(self, depth: int, size: int) -> None:
        self.name = f"layer {depth}"
        self.depth = depth
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        return bytes(length)


def map_rows(image: Image, start: int = 0, length: int | None = None) -> Iterator[MapRow]:
    """Yields the rows of the disk in order, cut to `length` bytes from `start` on; `UsageError` if one is negative."""
    if start < 0 or (length is not None and length < 0):
        raise UsageError(f"no part of a disk has {length} bytes from {start} on")
    end = image.size if length is None else min(start + length, image.size)
    for row in _all_rows(image):
        skipped = max(0, start - row.start)
        there = min(row.start + row.length, end) - row.start - skipped
        if there > 0:
            offset = None if row.offset is None else row.offset + skipped
            yield row._replace(start=row.start + skipped, length=there, offset=offset)


def _all_rows(image: Image) -> Iterator[MapRow]:
    depths: dict[int, int] = {}
    sparse: dict[int, bool] = {}
    table = Extents.filled(image.size, Kind.HOLE)
    sizes = []
    for depth, layer in enumerate(image.chain()):
        sizes.append(layer.size)
        marked = _with_marks(layer, depth)
        for source in marked.sources:
            depths.setdefault(id(source), depth)
            if isinstance(source, File):
                sparse.setdefault(id(source), _shows_holes(layer, source))
        table = table.over(marked)
    for row in table:
        origin = row.source
        if origin is None:
            yield from _absent_rows(row, sizes)
            continue
        source, depth = origin, depths[id(origin)]
        if isinstance(source, _Layer):
            yield MapRow(row.start, row.length, depth, True, True, False, None, None)
        elif isinstance(source, Reserved):
            yield MapRow(row.start, row.length, depth, source.hides, True, False, row.offset, source.file.path)
        elif isinstance(source, File) and sparse.get(id(source)):
            yield from _file_rows(row, source, depth)
        elif isinstance(source, File):
            yield MapRow(row.start, row.length, depth, True, False, True, row.offset, source.path)
        else:
            name = source.file.path if isinstance(source, Decoded) else None
            yield MapRow(row.start, row.length, depth, True, False, True, None, name)


def _absent_rows(row: Row, sizes: list[int]) -> Iterator[MapRow]:
    """Yields ranges that no layer allocates; as in QEMU, their depth is that of the last layer that is long enough."""
    edges = sorted({row.start, row.end, *(size for size in sizes if row.start < size < row.end)})
    for start, end in itertools.pairwise(edges):
        depth = len(list(itertools.takewhile(lambda size, start=start: size > start, sizes))) - 1  # type: ignore[misc]
        yield MapRow(start, end - start, depth, False, True, False, None, None)


def _shows_holes(layer: Image, file: File) -> bool:
    if layer.shows_holes is not None and not file.is_remote:
        return layer.shows_holes(file)
    return file is layer.file and _is_sparse(file)


def _is_sparse(file: File) -> bool:
    """True if more than a tenth of a file is holes. As QEMU, vmconv looks for holes only in such files."""
    return not file.is_device and file.stored() * 10 // 9 < file.size


def _file_rows(row: Row, file: File, depth: int) -> Iterator[MapRow]:
    for piece in on_storage(file).window(row.offset, row.length):
        zero = piece.kind != Kind.DATA
        start, offset = row.start + piece.start, row.offset + piece.start
        yield MapRow(start, piece.length, depth, True, zero, True, offset, file.path)


def _with_marks(layer: Image, depth: int) -> Extents:
    """Returns the layer's table of places with its ZERO rows as windows onto a mark, which survives stacking.

    Reserved space without content counts in the last layer only. In others the parent's content shows through.
    """
    table = layer.places
    mark = _Layer(depth, table.size)
    zero = table.kind == Kind.ZERO
    kind, source, offset = table.kind.copy(), table.source.copy(), table.offset.copy()
    kind[zero], source[zero], offset[zero] = Kind.DATA, len(table.sources), table.start[zero]
    if layer.parent is not None:
        idle = [i for i, s in enumerate(table.sources) if isinstance(s, Reserved) and not s.hides]
        kind[np.isin(source, idle) & (kind == Kind.DATA)] = Kind.HOLE
    return Extents(table.size, Columns(table.start, kind, source, offset), [*table.sources, mark])
