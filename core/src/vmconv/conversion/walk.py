"""Reads a disk layer by layer, for verification, which must not share code with what it verifies.

Nothing here stacks or composes tables (`Extents.over`, `through`, `Image.flat`). Each address is looked up in one layer
after the other, from the top.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vmconv.model.extents import MAX_SIZE, Column, Extents, Kind, distinct
from vmconv.model.sources import Source

Layers = Sequence[Extents]
"""The tables of a chain as its readers return them, the top first."""


class Piece(NamedTuple):
    """Guest bytes `[start, start + length)` at `offset` of a source; zeros if the source is None."""

    start: int
    length: int
    source: Source | None
    offset: int


def pieces(layers: Layers, start: int, end: int) -> Iterator[Piece]:
    """Yields the pieces of `[start, end)`, each from the topmost layer without a hole there.

    Bytes past the end of a layer, and holes of the last layer, are zero.
    """
    if not layers:
        yield Piece(start, end - start, None, 0)
        return
    while start < end:
        stop, kind, source, offset = _row(layers[0], start)
        stop = min(stop, end)
        if kind == Kind.HOLE:
            yield from pieces(layers[1:], start, stop)
        else:
            yield Piece(start, stop - start, source, offset)
        start = stop


def _row(layer: Extents, address: int) -> tuple[int, int, Source | None, int]:
    """Returns a layer's row from an address on: its end, kind, source and offset."""
    # A shorter layer hides what lies below its end: it reads as zero there, as in QEMU.
    if address >= layer.size:
        return MAX_SIZE, Kind.ZERO, None, 0
    row = int(layer.start.searchsorted(address, "right")) - 1
    stop = int(layer.start[row + 1]) if row + 1 < len(layer.start) else layer.size
    kind = int(layer.kind[row])
    if kind != Kind.DATA:
        return stop, kind, None, 0
    return stop, kind, layer.sources[layer.source[row]], int(layer.offset[row]) + address - int(layer.start[row])


def read(layers: Layers, start: int, length: int) -> bytes:
    """Returns the bytes that a guest reads."""
    return b"".join(
        bytes(piece.length) if piece.source is None else piece.source.read(piece.offset, piece.length)
        for piece in pieces(layers, start, start + length)
    )


def data_bytes(layers: Layers, start: int, length: int) -> int:
    """Returns the number of bytes that `read` reads from sources."""
    return sum(piece.length for piece in pieces(layers, start, start + length) if piece.source is not None)


def edges(layers: Layers) -> Column:
    """Returns the starts of all rows and the ends of all layers, sorted."""
    return distinct(np.concatenate([np.append(layer.start, np.int64(layer.size)) for layer in layers]))
