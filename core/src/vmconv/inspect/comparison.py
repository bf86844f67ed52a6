"""Guest-visible equality of two disks: ranges that share storage are equal by algebra, only the rest is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vmconv.io.physical import PhysicalMap
from vmconv.model.extents import Column, Extents, Kind, distinct, gather, merge_sources
from vmconv.model.image import Image

# Larger pieces leave the processor's cache, and their memory comes from the kernel each time.
_PIECE = 512 << 10


class Comparison(NamedTuple):
    """The outcome, in bytes of the guest's disk: `first_difference` is an offset, the others are amounts."""

    identical: bool
    first_difference: int | None
    sizes: tuple[int, int]
    proved: int
    read: int

    def __bool__(self) -> bool:
        return self.identical


def unproved(a: Extents, b: Extents) -> tuple[Column, Column]:
    """Returns `(start, length)` of the ranges that two tables of equal size do not prove equal."""
    _, (a, b) = merge_sources(a, b)
    cuts = distinct(np.concatenate([a.start, b.start]))
    length = np.diff(cuts, append=a.size)
    if not len(cuts):
        return cuts, length
    mine, theirs = gather(a, cuts, length, cuts), gather(b, cuts, length, cuts)
    data = mine.kind == Kind.DATA
    same = (mine.kind == theirs.kind) & (~data | ((mine.source == theirs.source) & (mine.offset == theirs.offset)))
    return cuts[~same], length[~same]


def compare_images(a: Image, b: Image, *, strict: bool = False) -> Comparison:
    """Returns whether a guest sees the same bytes in both.

    As in qemu-img, the rest of the longer disk must read as zero; with `strict` the sizes must be equal.
    """
    sizes = (a.size, b.size)
    if strict and a.size != b.size:
        return Comparison(False, min(sizes), sizes, 0, 0)
    size = max(sizes)
    left, right = (image.flat.window(0, size).without_holes() for image in (a, b))
    places = PhysicalMap()
    start, length = unproved(places.apply(left), places.apply(right))
    total = int(length.sum())
    first = next(_differences(left, right, start, length), None)
    return Comparison(first is None, first, sizes, size - total, total)


def _differences(a: Extents, b: Extents, start: Column, length: Column) -> Iterator[int]:
    """Yields the address of the first different byte of each piece, in order."""
    from vmconv.system.parallel import in_order

    def look(piece: tuple[int, int]) -> int | None:
        at, count = piece
        left, right = a.read(at, count), b.read(at, count)
        if left == right:
            return None
        differ = np.frombuffer(left, dtype=np.uint8) != np.frombuffer(right, dtype=np.uint8)
        return at + int(differ.argmax())

    pieces = (
        (first + at, min(_PIECE, count - at))
        for first, count in zip(start.tolist(), length.tolist(), strict=True)
        for at in range(0, count, _PIECE)
    )
    yield from (found for found in in_order(look, pieces) if found is not None)


def first_difference(a: Extents, b: Extents) -> int | None:
    """Returns the first address where two tables of equal size read differently; reads only unproved ranges."""
    return next(_differences(a, b, *unproved(a, b)), None)
