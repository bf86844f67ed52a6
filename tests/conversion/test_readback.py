"""What verifies a conversion, in memory: where it looks, what it reads, and that it sees every wrong byte."""

from __future__ import annotations

import os
from random import Random
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.sources import SOURCES, A, B
from vmconv.conversion import readback, walk
from vmconv.conversion.readback import Sides
from vmconv.conversion.walk import Piece
from vmconv.errors import VerifyError
from vmconv.inspect import comparison
from vmconv.inspect.comparison import Comparison, compare_images, first_difference, unproved
from vmconv.model.extents import Extents, Kind
from vmconv.model.image import Image
from vmconv.model.sources import Blob, Source
from vmconv.testing import tables
from vmconv.testing.disks import disk_of
from vmconv.testing.memory import MemoryFile

quick = settings(deadline=None, max_examples=80)


def rows(size: int, *given: tuple[int, Source | None, int]) -> Extents:
    """Returns a table of rows `(start, source, offset)`; what has no source is a hole, or zero at offset 1."""
    kinds = [Kind.DATA if source else (Kind.ZERO if offset else Kind.HOLE) for _, source, offset in given]
    return Extents.of(
        [
            (start, kind, source, offset if source else 0)
            for kind, (start, source, offset) in zip(kinds, given, strict=True)
        ],
        size,
    )


def image_of(table: Extents) -> Image:
    return disk_of(table, MemoryFile("disk", table.size))


def sides(wanted: list[Extents], found: list[Extents]) -> Sides:
    return Sides("disk", wanted, found, {})


# -- walking


def test_pieces_are_rows_of_the_first_layer_that_says_anything() -> None:
    top = rows(60, (0, None, 0), (10, A, 5), (20, None, 1), (30, None, 0), (50, A, 100))
    base = rows(40, (0, B, 7), (35, None, 1))
    assert list(walk.pieces([top, base], 5, 70)) == [
        Piece(5, 5, B, 12),
        Piece(10, 10, A, 5),
        Piece(20, 10, None, 0),
        Piece(30, 5, B, 37),
        Piece(35, 5, None, 0),
        Piece(40, 10, None, 0),
        Piece(50, 10, A, 100),
        Piece(60, 10, None, 0),
    ]
    assert list(walk.pieces([], 3, 10)) == [Piece(3, 7, None, 0)]
    # Up to the end of a row, with new number objects each time.
    far = rows(4 << 20, (0, None, 1), (1 << 20, None, 0))
    assert list(walk.pieces([far], 5, 1 << 20)) == [Piece(5, (1 << 20) - 5, None, 0)]
    assert list(walk.pieces([top], 12, 12)) == []
    assert walk.read([top, base], 8, 4) == B.read(15, 2) + A.read(5, 2)
    assert walk.data_bytes([top, base], 5, 65) == 5 + 10 + 5 + 10
    assert walk.data_bytes([top, base], 12, 3) == 3
    assert walk.edges([top, base]).tolist() == [0, 10, 20, 30, 35, 40, 50, 60]


# -- by metadata


@quick
@given(st.data())
def test_a_wrong_place_is_seen_where_reading_sees_it(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 60))
    wanted = [data.draw(tables(SOURCES, size=size)), data.draw(tables(SOURCES))]
    found = [data.draw(tables(SOURCES, size=size)), data.draw(tables(SOURCES))]
    edges = [edge for edge in walk.edges([*wanted, *found]).tolist() for edge in (edge - 1, edge) if 0 <= edge < size]
    differ = [at for at in edges if walk.read(wanted, at, 1) != walk.read(found, at, 1)]
    if differ:
        with pytest.raises(VerifyError, match=f"at guest address {differ[0]:#x}$"):
            readback.check_places(sides(wanted, found))
    else:
        readback.check_places(sides(wanted, found))


def test_a_place_is_found_through_the_layout_of_the_result() -> None:
    source, result = MemoryFile("source", 100), MemoryFile("result", 150)
    layout = rows(150, (0, Blob("header", bytes(50)), 0), (50, source, 10), (140, None, 1))
    source.on_storage = rows(100, (0, source, 0), (90, None, 1))
    result.on_storage = rows(150, (0, result, 0))
    layouts = {id(result): layout}
    assert readback._place([rows(150, (0, result, 0))], 60, layouts) == (source, 20)
    assert readback._place([rows(150, (0, result, 0))], 130, layouts) == (None, 0)
    assert readback._place([rows(150, (0, result, 0))], 145, layouts) == (None, 0)
    assert readback._place([rows(150, (0, result, 0))], 60, {}) == (result, 60)
    assert readback._place([rows(90, (0, None, 0)), rows(90, (0, source, 3))], 5, layouts) == (source, 8)
    assert readback._byte((A, 9)) == A.read(9, 1)
    assert readback._byte((None, 0)) == b"\0"


def test_a_single_layer_on_both_sides_needs_no_look() -> None:
    readback.check_places(sides([rows(9, (0, A, 0))], [rows(9, (0, A, 1))]))
    with pytest.raises(VerifyError):
        readback.check_places(sides([rows(9, (0, A, 0)), rows(9, (0, A, 0))], [rows(9, (0, A, 1))]))


@pytest.mark.parametrize(
    ("points", "found"), [(2, [0]), (4, [0, 29, 30]), (12, [0, 9, 10, 19, 20, 29, 30, 39, 40, 49])]
)
def test_of_too_many_edges_some_are_examined(monkeypatch: pytest.MonkeyPatch, points: int, found: list[int]) -> None:
    monkeypatch.setattr(readback, "_POINTS", points)
    table = rows(50, (0, A, 0), (10, A, 50), (20, A, 0), (30, A, 50), (40, A, 0))
    assert list(readback._points(sides([table], [table]))) == found


def test_the_number_of_addresses_is_limited() -> None:
    table = rows(2600, *((at, A, at % 2 * 9) for at in range(2500)))
    found = list(readback._points(sides([table], [table])))
    assert 900 < len(found) <= readback._POINTS
    assert max(found) > 2400


# -- by payload


class Drawn(Random):
    """Draws the last of what may be drawn."""

    def choice(self, seq):  # type: ignore[no-untyped-def]
        return seq[-1]

    def randrange(self, *bounds):  # type: ignore[no-untyped-def]
        assert bounds[-1] > (bounds[0] if len(bounds) > 1 else 0)
        return bounds[-1] - 1


def test_samples_lie_around_edges_and_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readback, "_AROUND", 10)
    monkeypatch.setattr(readback, "_RANDOM", 4)
    monkeypatch.setattr(readback, "_BLOCK", 30)
    monkeypatch.setattr("random.Random", Drawn)
    one = rows(200, (0, A, 0), (100, None, 1))
    two = rows(200, (0, None, 1), (50, A, 0), (80, None, 1))
    found = list(readback._sample_spans(sides([one], [two])))
    assert found == [(0, 10), (40, 20), (70, 20), (90, 20), (190, 10), (199, 1), (79, 30), (199, 1), (79, 30)]
    assert list(readback._sample_spans(sides([one], [rows(0)]))) == []
    # A layer may be longer than the disk, and hold payload there.
    longer = list(readback._sample_spans(sides([one], [one, rows(300, (0, None, 1), (210, A, 0), (290, None, 1))])))
    assert longer[-4:] == [(199, 1)] * 4
    assert readback._random_data(one, Drawn()) == 99
    assert readback._random_data(rows(9, (0, None, 1)), Drawn()) is None


def test_a_sample_is_as_large_as_the_guide_says() -> None:
    """docs/guide/verifying.md: 1 KiB around each edge, and 4 MiB in 64 blocks."""
    edge, size = 1 << 29, 1 << 30
    table = rows(size, (0, None, 1), (edge, None, 0))
    found = list(readback._sample_spans(sides([table], [table])))
    assert found[:3] == [(0, 512), (edge - 512, 1024), (size - 512, 512)]
    assert len(found) == 3 + 64
    assert all(length == min(65536, size - start) for start, length in found[3:])


@quick
@given(st.data())
def test_every_wrong_byte_is_seen_by_reading_all(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 60))
    wanted = [data.draw(tables(SOURCES, size=size)), data.draw(tables(SOURCES))]
    found = [data.draw(tables(SOURCES, size=size)), data.draw(tables(SOURCES))]
    differ = [at for at in range(size) if walk.read(wanted, at, 1) != walk.read(found, at, 1)]
    with patch.object(readback, "_PIECE", 13):
        if differ:
            with pytest.raises(VerifyError, match=f"at guest address {differ[0]:#x}$"):
                readback.check_bytes(sides(wanted, found))
        else:
            readback.check_bytes(sides(wanted, found))


def test_progress_counts_bytes_read_of_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readback, "_PIECE", 40)
    table = rows(200, (0, A, 0), (50, None, 1), (150, B, 0))
    said: list[tuple[int, int]] = []
    both = sides([table], [table])
    readback.check_bytes(both, lambda done, to_do: said.append((done, to_do)))
    assert said == [(0, 200), (80, 200), (100, 200), (120, 200), (200, 200)]
    assert readback.bytes_to_read(both) == 200
    assert readback.bytes_to_read(both, (145, 10)) == 10
    assert list(readback._data_spans(both)) == [(0, 40), (40, 40), (120, 40), (160, 40)]


def test_written_data_is_read_back_from_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    made, other = MemoryFile("made", 9), MemoryFile("other", 9)
    made.descriptor, other.descriptor = 0, 8
    advised: list[tuple[int, ...]] = []

    def refuse(*arguments: int) -> None:
        advised.append(arguments)
        raise OSError

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    found = rows(27, (0, made, 0), (9, other, 0), (18, Blob("x", bytes(9)), 0))
    readback._drop_cached(Sides("disk", [], [found], {id(made): found}))
    assert advised == [(0, 0, 0, os.POSIX_FADV_DONTNEED)]
    made.descriptor = -1
    readback._drop_cached(Sides("disk", [], [found], {id(made): found}))
    assert len(advised) == 1


# -- comparing


@quick
@given(st.data())
def test_unproved_ranges_are_those_that_differ_in_place(data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 80))
    a, b = (data.draw(tables(SOURCES, size=size, holes=False)) for _ in range(2))

    def place(table: Extents, at: int) -> tuple[Kind, Source | None, int]:
        row = next(row for row in table if row.start <= at < row.end)
        return row.kind, row.source, row.offset + at - row.start if row.source else 0

    start, length = unproved(a, b)
    apart = {at for low, count in zip(start.tolist(), length.tolist(), strict=True) for at in range(low, low + count)}
    assert apart == {at for at in range(size) if place(a, at) != place(b, at)}
    assert start.dtype == length.dtype
    differ = [at for at in range(size) if a.read(at, 1) != b.read(at, 1)]
    with patch.object(comparison, "_PIECE", 7):
        assert first_difference(a, b) == (differ[0] if differ else None)


def changed(data: bytes, *places: int) -> Blob:
    found = bytearray(data)
    for at in places:
        found[at] ^= 1
    return Blob("changed", bytes(found))


@pytest.mark.parametrize("places", [(), (0,), (6,), (7,), (8, 3), (99,), (14, 90)])
def test_images_are_compared_byte_by_byte_where_nothing_is_proved(
    monkeypatch: pytest.MonkeyPatch, places: tuple[int, ...]
) -> None:
    monkeypatch.setattr(comparison, "_PIECE", 7)
    data = bytes(range(1, 101))
    one, other = Extents.whole(Blob("one", data)), Extents.whole(changed(data, *places))
    first = min(places, default=None)
    found = compare_images(image_of(one), image_of(other))
    assert found == Comparison(not places, first, (100, 100), 0, 100)
    assert bool(found) == (not places)
    same = compare_images(image_of(one), image_of(one))
    assert same == Comparison(True, None, (100, 100), 100, 0)


@pytest.mark.parametrize(
    ("rest", "equal"), [((100, None, 1), True), ((100, Blob("z", bytes(40)), 0), True), ((100, A, 1), False)]
)
def test_the_rest_of_the_longer_one_must_be_zero(rest: tuple[int, Source | None, int], equal: bool) -> None:
    short, long = rows(100, (0, A, 0)), rows(140, (0, A, 0), rest)
    for one, other in ((short, long), (long, short)):
        found = compare_images(image_of(one), image_of(other))
        assert found == Comparison(
            equal, None if equal else 100, (one.size, other.size), 140 if rest[1] is None else 100, 40 if rest[1] else 0
        )
        assert compare_images(image_of(one), image_of(other), strict=True) == Comparison(
            False, 100, (one.size, other.size), 0, 0
        )


def test_pieces_are_of_that_size() -> None:
    asked: list[int] = []
    size = 9 << 20

    def zeros(_offset: int, length: int) -> bytes:
        asked.append(length)
        return bytes(length)

    computed = Extents.whole(Blob("computed", zeros, size))
    assert compare_images(image_of(computed), image_of(Extents.filled(size))).identical
    assert set(asked) == {512 << 10}
    assert sum(asked) == size
