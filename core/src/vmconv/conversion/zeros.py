"""Payload that is zero and is found by reading it: `convert -S`."""

from __future__ import annotations

import numpy as np

from vmconv.model.extents import Column, Extents, Kind
from vmconv.model.image import Image
from vmconv.placing import blocks
from vmconv.system.parallel import in_order

BLOCK = 4096
"""Bytes: what storage allocates at least, so that smaller pieces of zeros save nothing."""

_TOGETHER = 1 << 20


def without_zeros(image: Image, least: int) -> Image:
    """Returns the whole disk as one layer, in which runs of zeros of at least `least` bytes are no payload.

    Runs are whole blocks of `BLOCK` bytes. All payload is read when the table is loaded.
    """
    return image.merged(lambda table: _dropped(table, least))


def _dropped(table: Extents, least: int) -> Extents:
    start, end = _zeros(blocks.padded(table, BLOCK))
    long = end - start >= least
    start, end = start[long], np.minimum(end[long], table.size)
    return table.replaced(Extents.filled(table.size), start, end - start) if len(start) else table


def _zeros(table: Extents) -> tuple[Column, Column]:
    """Returns start and end of the longest runs of blocks with payload that is zero, in order."""

    def look(piece: tuple[int, int]) -> Column:
        first, count = piece
        words = np.frombuffer(table.read(first * BLOCK, count * BLOCK), dtype=np.uint64).reshape(count, -1)
        edges = np.diff((~words.any(axis=1)).astype(np.int8), prepend=np.int8(0), append=np.int8(0))
        return first + np.flatnonzero(edges).astype(np.int64)

    runs = blocks.whole_blocks(table, BLOCK)
    pieces = blocks.pieces(runs.take(runs.kind == Kind.DATA), _TOGETHER // BLOCK)
    # Where a piece ends in zeros and the next begins with them, the edge is there twice.
    edges, times = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *in_order(look, pieces)]), return_counts=True)
    edges = edges[times == 1] * BLOCK
    return edges[::2], edges[1::2]
