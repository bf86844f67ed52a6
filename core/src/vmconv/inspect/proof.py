"""The proof that two images share their payload: the physical addresses of both, from FIEMAP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vmconv.io.physical import BlockSpace, Encoded, PhysicalMap
from vmconv.model.extents import Columns, Extents, Kind, distinct, gather
from vmconv.model.image import Image


class Place(NamedTuple):
    """The place of payload: the address of the block; if `encoded`, of the extent with the offset in it."""

    storage: BlockSpace
    address: int

    @property
    def encoded(self) -> bool:
        return isinstance(self.storage, Encoded)

    @property
    def physical(self) -> int:
        """The physical address that the filesystem reports."""
        return Encoded.extent(self.address) if self.encoded else self.address


class ProofRow(NamedTuple):
    """One range of the guest's disk, bytes; `has_left` and `has_right`: that image has payload there.

    A place is None without payload, or if the filesystem does not report it.
    """

    start: int
    length: int
    left_place: Place | None
    right_place: Place | None
    has_left: bool
    has_right: bool

    @property
    def left(self) -> int | None:
        """Physical address in the left image; that of the whole extent if it is encoded."""
        return self.left_place.physical if self.left_place else None

    @property
    def right(self) -> int | None:
        """Physical address in the right image; that of the whole extent if it is encoded."""
        return self.right_place.physical if self.right_place else None

    @property
    def same(self) -> bool | None:
        """Whether both images have the same bytes of storage there; None if unknown."""
        if not (self.has_left and self.has_right):
            # If the place is unknown, this may be a hole that the filesystem does not report.
            known = self.left_place if self.has_left else self.right_place
            return None if known is None else False
        left, right = self.left_place, self.right_place
        if left is None or right is None:
            return None
        if left == right:
            return True
        # FIEMAP does not tell which part of an encoded extent a file uses.
        part_unknown = left.encoded and right.encoded and left.physical == right.physical
        return None if part_unknown and left.storage.identity == right.storage.identity else False


class Proof(NamedTuple):
    """`shared` bytes of payload have the same physical addresses in both images, `apart` bytes have not.

    For `unknown` bytes the filesystem does not report it.
    """

    shared: int
    apart: int
    unknown: int
    left: Extents
    right: Extents

    def __bool__(self) -> bool:
        return self.apart == 0 and self.unknown == 0

    def rows(self) -> Iterator[ProofRow]:
        """Yields the ranges where at least one image has payload, in guest order."""
        cuts = distinct(np.concatenate([self.left.start, self.right.start]))
        length = np.diff(cuts, append=self.left.size)
        left, right = (
            gather(table, cuts, length, cuts) if len(cuts) else table.columns for table in (self.left, self.right)
        )
        has_left, has_right = left.kind == Kind.DATA, right.kind == Kind.DATA
        for i in np.flatnonzero(has_left | has_right).tolist():
            yield ProofRow(
                int(cuts[i]),
                int(length[i]),
                _place(self.left, left, i) if has_left[i] else None,
                _place(self.right, right, i) if has_right[i] else None,
                bool(has_left[i]),
                bool(has_right[i]),
            )


def _place(table: Extents, rows: Columns, at: int) -> Place | None:
    source = table.sources[rows.source[at]]
    return Place(source, int(rows.offset[at])) if isinstance(source, BlockSpace) else None


def prove_images(left: Image, right: Image) -> Proof:
    """Returns the proof for two images of one disk; reads no payload."""
    size = max(left.size, right.size)
    places = PhysicalMap(encoded=True)
    a, b = (places.apply(image.flat.window(0, size).without_holes()) for image in (left, right))
    return prove_tables(a, b)


def prove_tables(left: Extents, right: Extents) -> Proof:
    """Returns the proof for two tables of equal size that one `PhysicalMap(encoded=True)` was applied to."""
    found = {True: 0, False: 0, None: 0}
    for row in Proof(0, 0, 0, left, right).rows():
        found[row.same] += row.length
    return Proof(found[True], found[False], found[None], left, right)
