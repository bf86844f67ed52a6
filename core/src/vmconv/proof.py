"""The proof that two images share their payload: the physical addresses of both, from the filesystem itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vmconv.extents import Extents, Kind, distinct, gather
from vmconv.image import Image
from vmconv.physical import PhysicalMap, Storage


class ProofRow(NamedTuple):
    """One range of the guest's disk, bytes; `has_` is whether that image has payload there.

    The physical addresses are None where there is no payload, and where the filesystem does not tell.
    """

    start: int
    length: int
    left: int | None
    right: int | None
    has_left: bool
    has_right: bool

    @property
    def same(self) -> bool:
        return self.left is not None and self.left == self.right


class Proof(NamedTuple):
    """`shared` bytes of payload lie at the same physical addresses in both images, `apart` bytes do not or may not."""

    shared: int
    apart: int
    left: Extents
    right: Extents

    def __bool__(self) -> bool:
        return self.apart == 0

    def rows(self) -> Iterator[ProofRow]:
        """Yields the ranges where at least one image has payload, in guest order."""
        cuts = distinct(np.concatenate([self.left.start, self.right.start]))
        length = np.diff(cuts, append=self.left.size)
        sides = []
        for table in (self.left, self.right):
            rows = gather(table, cuts, length, cuts) if len(cuts) else table.columns
            known = np.array([isinstance(s, Storage) for s in table.sources] + [False])[rows.source]
            sides.append((rows.kind == Kind.DATA, known, rows.offset))
        (has_left, knows_left, left), (has_right, knows_right, right) = sides
        for i in np.flatnonzero(has_left | has_right).tolist():
            yield ProofRow(
                int(cuts[i]),
                int(length[i]),
                int(left[i]) if knows_left[i] else None,
                int(right[i]) if knows_right[i] else None,
                bool(has_left[i]),
                bool(has_right[i]),
            )


def prove_images(left: Image, right: Image) -> Proof:
    """Returns the proof for two images of one disk; reads no payload."""
    size = max(left.size, right.size)
    places = PhysicalMap()
    a, b = (places.apply(image.flat.window(0, size).without_holes()) for image in (left, right))
    proof = Proof(0, 0, a, b)
    shared = apart = 0
    for row in proof.rows():
        if row.same:
            shared += row.length
        else:
            apart += row.length
    return Proof(shared, apart, a, b)
