"""Reads a disk layer by layer: what verifies a conversion must not share the code that it verifies.

Nothing here stacks or composes tables (`Extents.over`, `through`, `Image.flat`). For each address the layers are asked
one after the other, the top first.
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
    """Guest bytes `[start, start + length)`: they lie at `offset` of a source, or read as zero where there is none."""

    start: int
    length: int
    source: Source | None
    offset: int


def pieces(layers: Layers, start: int, end: int) -> Iterator[Piece]:
    """Yields where the bytes of `[start, end)` are, in order: in the first layer that says anything of them.

    Past the end of a layer, and below the last one, they are zero.
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
    """Returns what a layer says from an address on: up to where, of what kind, and the window there."""
    if address >= layer.size:
        return MAX_SIZE, Kind.ZERO, None, 0
    row = int(layer.start.searchsorted(address, "right")) - 1
    stop = int(layer.start[row + 1]) if row + 1 < len(layer.start) else layer.size
    kind = int(layer.kind[row])
    if kind != Kind.DATA:
        return stop, kind, None, 0
    return stop, kind, layer.sources[layer.source[row]], int(layer.offset[row]) + address - int(layer.start[row])


def read(layers: Layers, start: int, length: int) -> bytes:
    """Returns what a guest reads."""
    return b"".join(
        bytes(piece.length) if piece.source is None else piece.source.read(piece.offset, piece.length)
        for piece in pieces(layers, start, start + length)
    )


def data_bytes(layers: Layers, start: int, length: int) -> int:
    """Returns how many bytes `read` reads from sources."""
    return sum(piece.length for piece in pieces(layers, start, start + length) if piece.source is not None)


def edges(layers: Layers) -> Column:
    """Returns the addresses where a row of any layer begins, and where the layers end, sorted."""
    return distinct(np.concatenate([np.append(layer.start, np.int64(layer.size)) for layer in layers]))
