"""Verifies what a guest reads: resolves both sides layer by layer (`vmconv.conversion.walk`) and compares them.

Shares no code with the stacking of the source's layers and the layout of the result.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from vmconv.conversion import walk
from vmconv.conversion.walk import Layers
from vmconv.errors import VerifyError
from vmconv.model.extents import Extents, Kind, on_storage
from vmconv.model.plan import Progress
from vmconv.model.sources import File, Source
from vmconv.system.parallel import in_order

if TYPE_CHECKING:
    from random import Random

_POINTS = 1024
"""Addresses that the default verification compares."""
_AROUND = 512
_RANDOM = 64
_BLOCK = 64 << 10
_PIECE = 4 << 20


class Sides(NamedTuple):
    """The two sides of the result `name`: the source's layers, and its own layers with those below.

    `layouts` are the tables of the result's files, by the id of the file object.
    """

    name: str
    wanted: Layers
    found: Layers
    layouts: Mapping[int, Extents]

    @property
    def size(self) -> int:
        """Bytes of the result's disk, which a format may round up."""
        return self.found[0].size


Span = tuple[int, int]
"""`(start, length)`, bytes."""
Place = tuple[Source | None, int]


# -- by metadata


def check_places(sides: Sides) -> None:
    """Raises `VerifyError` unless source and result agree at the edges of rows, before and after each edge.

    Compares positions, and reads payload only where these differ.
    """
    if len(sides.wanted) == len(sides.found) == 1:
        # Nothing was stacked, so this would repeat the check of the tables.
        return
    for address in _points(sides):
        wanted, found = _place(sides.wanted, address, {}), _place(sides.found, address, sides.layouts)
        if wanted != found and _byte(wanted) != _byte(found):
            raise _differs(sides, address)


def _points(sides: Sides) -> Iterator[int]:
    """Yields the addresses at edges and right before them; of too many edges every nth."""
    every = walk.edges([*sides.wanted, *sides.found])
    step = -(-len(every) // (_POINTS // 2))
    for edge in every[::step].tolist():
        yield from (address for address in (edge - 1, edge) if 0 <= address < sides.size)


def _place(layers: Layers, address: int, layouts: Mapping[int, Extents]) -> Place:
    """Returns the position of a byte in a file of the source; None as the source in a hole of the file."""
    source, offset = _at(layers, address)
    if id(source) in layouts:
        source, offset = _at([layouts[id(source)]], offset)
    if isinstance(source, File):
        source, offset = _at([on_storage(source)], offset)
    return source, offset if source else 0


def _at(layers: Layers, address: int) -> Place:
    piece = next(walk.pieces(layers, address, address + 1))
    return piece.source, piece.offset


def _byte(place: Place) -> bytes:
    source, offset = place
    return source.read(offset, 1) if source else b"\0"


# -- by payload


def check_sample(sides: Sides, progress: Progress | None = None) -> None:
    """Raises `VerifyError` unless both sides read the same around every edge of rows and in random blocks."""
    _compare(sides, list(_sample_spans(sides)), progress)


def _sample_spans(sides: Sides) -> Iterator[Span]:
    from random import Random

    size = sides.size
    for edge in walk.edges([*sides.wanted, *sides.found]).tolist():
        low, high = max(0, edge - _AROUND), min(edge + _AROUND, size)
        if low < high:
            yield low, high - low
    # Unseeded: each run looks elsewhere.
    rng = Random()
    for number in range(_RANDOM if size else 0):
        layer = rng.choice([*sides.wanted, *sides.found])
        # Half of the blocks lie in payload, half anywhere.
        start = _random_data(layer, rng) if number % 2 else None
        if start is None or start >= size:
            start = rng.randrange(size)
        yield start, min(_BLOCK, size - start)


def _random_data(layer: Extents, rng: Random) -> int | None:
    """Returns an address in a random row of payload, because random addresses of a sparse disk are mostly holes."""
    rows = (layer.kind == Kind.DATA).nonzero()[0]
    if not len(rows):
        return None
    row = int(rows[rng.randrange(len(rows))])
    return rng.randrange(int(layer.start[row]), int(layer.end[row]))


def check_bytes(sides: Sides, progress: Progress | None = None) -> None:
    """Raises `VerifyError` unless both sides read the same everywhere."""
    _compare(sides, list(_data_spans(sides)), progress)


def _data_spans(sides: Sides) -> Iterator[Span]:
    """Yields the whole disk except for ranges that are zero on both sides."""
    for start in range(0, sides.size, _PIECE):
        end = min(start + _PIECE, sides.size)
        if bytes_to_read(sides, (start, end - start)):
            yield start, end - start


def bytes_to_read(sides: Sides, span: Span | None = None) -> int:
    """Returns the bytes to read, of both sides, to compare a span, by default the whole disk."""
    start, length = span or (0, sides.size)
    return walk.data_bytes(sides.wanted, start, length) + walk.data_bytes(sides.found, start, length)


def _compare(sides: Sides, spans: Sequence[Span], progress: Progress | None) -> None:
    _drop_cached(sides)
    done = 0
    if progress:
        total = sum(bytes_to_read(sides, span) for span in spans)
        progress(0, total)
    for span in in_order(lambda span: _look(sides, span), iter(spans)):
        if progress:
            done += bytes_to_read(sides, span)
            progress(done, total)


def _look(sides: Sides, span: Span) -> Span:
    """Returns the span. Raises `VerifyError` if the sides differ there. Runs in threads."""
    start, length = span
    wanted, found = walk.read(sides.wanted, start, length), walk.read(sides.found, start, length)
    if wanted != found:
        raise _differs(sides, start + next(at for at in range(length) if wanted[at] != found[at]))
    return span


def _drop_cached(sides: Sides) -> None:
    """Drops the result from the page cache, so that it is read from storage."""
    for layer in sides.found:
        for source in layer.sources:
            if id(source) in sides.layouts and isinstance(source, File) and source.descriptor >= 0:
                # Only advice: a filesystem may ignore it.
                with suppress(OSError):
                    os.posix_fadvise(source.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _differs(sides: Sides, address: int) -> VerifyError:
    return VerifyError(
        f"{sides.name}: the result differs from the source at guest address {address:#x}",
        hint="this is a defect of vmconv or of the storage, please report it; nothing was created",
    )
