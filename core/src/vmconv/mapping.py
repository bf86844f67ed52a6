"""The map of a disk as `qemu-img map` has it: what each range is, in which layer, and where in which file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vmconv.extents import Columns, Extents, Kind, on_storage
from vmconv.image import Image
from vmconv.sources import Decoded, File, Source


@dataclass(frozen=True)
class MapRow:
    """Guest bytes `[start, start + length)`: `depth` counts layers from the top; `offset` is in `file`, if there is one.

    `present` is whether a layer says anything; `data` whether bytes are stored; `zero` whether they read as zero.
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
        """Returns the keys of qemu-img, in its order."""
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
    """Stands for "this layer says zero" in a table of all layers."""

    def __init__(self, depth: int, size: int) -> None:
        self.name = f"layer {depth}"
        self.depth = depth
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        return bytes(length)


def map_rows(image: Image) -> Iterator[MapRow]:
    """Yields the rows of the whole disk in order."""
    depths: dict[int, int] = {}
    table: Extents | None = None
    last = 0
    for depth, layer in enumerate(image.chain()):
        marked = _with_marks(layer, depth)
        for source in marked.sources:
            depths.setdefault(id(source), depth)
        table = marked if table is None else table.over(marked)
        last = depth
    assert table is not None
    for row in table:
        source = row.source
        if source is None:
            yield MapRow(row.start, row.length, last, False, True, False, None, None)
        elif isinstance(source, _Layer):
            yield MapRow(row.start, row.length, source.depth, True, True, False, None, None)
        elif isinstance(source, File):
            yield from _file_rows(row.start, row.length, source, row.offset, depths[id(source)])
        else:
            name = source.file.path if isinstance(source, Decoded) else None
            yield MapRow(row.start, row.length, depths[id(source)], True, False, True, None, name)


def _file_rows(start: int, length: int, file: File, offset: int, depth: int) -> Iterator[MapRow]:
    for piece in on_storage(file).window(offset, length):
        zero = piece.kind != Kind.DATA
        yield MapRow(
            start + piece.start, piece.length, depth, True, zero, True, offset + piece.start, file.path
        )


def _with_marks(layer: Image, depth: int) -> Extents:
    """Returns the layer's table with its ZERO rows as windows onto a mark, which stacking keeps."""
    table = layer.guest
    mark = _Layer(depth, table.size)
    zero = table.kind == Kind.ZERO
    kind, source, offset = table.kind.copy(), table.source.copy(), table.offset.copy()
    kind[zero], source[zero], offset[zero] = Kind.DATA, len(table.sources), table.start[zero]
    return Extents(table.size, Columns(table.start, kind, source, offset), [*table.sources, mark])
