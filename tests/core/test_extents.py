"""The table of extents against a model that is a list of bytes' places, one for each address."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.sources import SOURCES, A, B
from vmconv.model.extents import Columns, Extents, Kind, Row, on_storage
from vmconv.model.sources import Source
from vmconv.testing import patterned, tables

Place = tuple[Kind, Source | None, int]


def model(table: Extents) -> list[Place]:
    """Returns what the table says of each address by itself."""
    places: list[Place] = []
    for row in table:
        for step in range(row.length):
            places.append((row.kind, row.source, row.offset + step if row.kind == Kind.DATA else 0))
    assert len(places) == table.size
    return places


@given(tables(SOURCES))
def test_rows_cover_the_size_without_gaps(table: Extents) -> None:
    assert int(table.length.sum()) == table.size
    assert (np.diff(table.start) > 0).all()


@given(tables(SOURCES))
def test_no_two_neighbours_could_be_one_row(table: Extents) -> None:
    rows = list(table)
    for one, following in itertools.pairwise(rows):
        same = one.kind == following.kind and one.source is following.source
        assert not (same and (one.kind != Kind.DATA or following.offset == one.offset + one.length))


@given(tables(SOURCES), st.data())
def test_tables_are_equal_exactly_when_they_say_the_same(table: Extents, data: st.DataObject) -> None:
    other = data.draw(tables(SOURCES, size=table.size))
    assert (table == other) == (model(table) == model(other))
    assert table == Extents(table.size, table.columns, table.sources)


def test_equal_tables_may_list_their_sources_differently() -> None:
    one = Extents.of([(0, Kind.DATA, A, 0), (10, Kind.DATA, B, 0)], 20)
    other = Extents(20, one.columns._replace(source=np.array([1, 0], dtype=np.int32)), [B, A])
    assert one == other


@given(tables(SOURCES), st.integers(0, 120), st.integers(0, 120))
def test_a_window_is_that_part_and_a_hole_past_the_end(table: Extents, start: int, length: int) -> None:
    expected = model(table)[start : start + length]
    expected += [(Kind.HOLE, None, 0)] * (length - len(expected))
    assert model(table.window(start, length)) == expected


@given(tables(SOURCES), tables(SOURCES))
def test_a_layer_over_a_parent_is_the_parent_in_its_holes(layer: Extents, parent: Extents) -> None:
    below = model(parent) + [(Kind.ZERO, None, 0)] * layer.size
    expected = [below[at] if place[0] == Kind.HOLE else place for at, place in enumerate(model(layer))]
    assert model(layer.over(parent)) == expected


@given(tables(SOURCES), tables(SOURCES), tables(SOURCES))
def test_stacking_is_associative(top: Extents, middle: Extents, bottom: Extents) -> None:
    assert top.over(middle).over(bottom) == top.over(middle.over(bottom))


@given(tables(SOURCES), tables((B,), size=A.size))
def test_composition_replaces_windows_onto_a_source(table: Extents, inner: Extents) -> None:
    below = model(inner)
    expected = [below[offset] if source is A else (kind, source, offset) for kind, source, offset in model(table)]
    assert model(table.through(A, inner)) == expected


@given(tables(SOURCES))
def test_composition_with_the_identity_changes_nothing(table: Extents) -> None:
    assert table.through(A, Extents.whole(A)) == table


@given(tables(SOURCES), st.data())
def test_replaced_ranges_are_those_of_the_other_table(table: Extents, data: st.DataObject) -> None:
    other = data.draw(tables(SOURCES, size=table.size))
    edges = sorted(data.draw(st.sets(st.integers(0, table.size), max_size=6)))
    pairs = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False) if a < b]
    start = np.array([a for a, _ in pairs], dtype=np.int64)
    length = np.array([b - a for a, b in pairs], dtype=np.int64)
    expected = model(table)
    for a, b in pairs:
        expected[a:b] = model(other)[a:b]
    assert model(table.replaced(other, start, length)) == expected


@given(tables(SOURCES))
def test_without_holes_every_hole_is_zero(table: Extents) -> None:
    expected = [(Kind.ZERO, None, 0) if place[0] == Kind.HOLE else place for place in model(table)]
    assert model(table.without_holes()) == expected


@given(tables(SOURCES))
def test_reading_gives_the_bytes_of_the_windows(table: Extents) -> None:
    expected = bytes(0 if source is None else source.read(offset, 1)[0] for _, source, offset in model(table))
    assert table.read(0, table.size) == expected


@given(tables(SOURCES, unit=4), st.integers(0, 20), st.integers(0, 60))
def test_units_match_the_row_by_row_model(table: Extents, first: int, count: int) -> None:
    kind, source, offset = table.units(4, first, count)
    places = model(table)[::4][first : first + count]
    places += [(Kind.HOLE, None, 0)] * (count - len(places))
    named = [table.sources[index] if index >= 0 else None for index in source.tolist()]
    assert list(zip(map(Kind, kind.tolist()), named, offset.tolist(), strict=True)) == places


def test_units_refuse_a_boundary_inside_a_unit() -> None:
    with pytest.raises(ValueError, match="inside a unit"):
        Extents.of([(0, Kind.ZERO, None, 0), (3, Kind.DATA, A, 0)], 8).units(4, 0, 2)


@given(tables(SOURCES, unit=4), st.integers(1, 9))
def test_a_table_comes_back_from_its_units_in_slices(table: Extents, step: int) -> None:
    count = table.size // 4
    slices = [table.units(4, first, min(step, count - first)) for first in range(0, count, step)]
    assert Extents.from_units(4, table.size, slices, table.sources) == table


def test_the_part_of_a_unit_past_the_end_of_its_source_is_zero() -> None:
    kind = np.array([Kind.DATA], dtype=np.uint8)
    table = Extents.from_units(256, 256, [(kind, 0, np.array([0]))], [A])
    assert [(row.start, row.kind) for row in table] == [(0, Kind.DATA), (200, Kind.ZERO)]


def test_a_number_among_slices_is_that_many_holes() -> None:
    kind = np.array([Kind.ZERO], dtype=np.uint8)
    table = Extents.from_units(1 << 20, 1 << 50, [(1 << 30) - 1, (kind, -1, np.array([0]))], [A])
    assert [(row.start, row.kind) for row in table] == [(0, Kind.HOLE), ((1 << 50) - (1 << 20), Kind.ZERO)]


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 20)), max_size=6))
def test_placed_rows_are_where_they_are_and_zero_is_between(pieces: list[tuple[int, int]]) -> None:
    taken: list[tuple[int, int]] = []
    for start, length in pieces:
        if all(start + length <= other or start >= other + size for other, size in taken):
            taken.append((start, length))
    rows = Columns(
        np.array([start for start, _ in taken], dtype=np.int64),
        np.full(len(taken), Kind.DATA, dtype=np.uint8),
        np.zeros(len(taken), dtype=np.int32),
        np.array([start for start, _ in taken], dtype=np.int64),
    )
    table = Extents.placed(130, rows, np.array([length for _, length in taken], dtype=np.int64), [A])
    covered = {address for start, length in taken for address in range(start, start + length)}
    assert model(table) == [(Kind.DATA, A, at) if at in covered else (Kind.ZERO, None, 0) for at in range(130)]


@pytest.mark.parametrize(
    ("start", "length", "size", "right"),
    [
        ([0, 5], [5, 5], 20, True),
        ([0, 5], [6, 5], 20, False),
        ([0, 10, 15], [3, 6, 2], 20, False),
        ([15, 0, 10], [2, 3, 5], 20, True),
        ([0, 10], [3, 10], 20, True),
        ([0, 10], [3, 11], 20, False),
        ([], [], 20, True),
    ],
    ids=str,
)
def test_placed_rows_must_not_overlap(start: list[int], length: list[int], size: int, right: bool) -> None:
    kind, source = np.full(len(start), Kind.DATA, dtype=np.uint8), np.zeros(len(start), dtype=np.int32)
    rows = Columns(np.array(start, dtype=np.int64), kind, source, np.array(start, dtype=np.int64))
    if right:
        placed = Extents.placed(size, rows, np.array(length, dtype=np.int64), [A])
        found = {at for row in placed if row.source for at in range(row.start, row.end)}
        assert found == {at + n for at, count in zip(start, length, strict=True) for n in range(count)}
    else:
        with pytest.raises(ValueError, match="overlap"):
            Extents.placed(size, rows, np.array(length, dtype=np.int64), [A])


@pytest.mark.parametrize(("address", "length"), [(0, 21), (20, 1), (-1, 1), (5, -1), (21, 0)])
def test_nothing_is_read_outside_of_a_table(address: int, length: int) -> None:
    with pytest.raises(ValueError, match="lies outside 20 bytes"):
        list(Extents.filled(20).rows_of(address, length))
    assert list(Extents.filled(20).rows_of(20, 0)) == []


@pytest.mark.parametrize(
    ("rows", "size", "problem"),
    [
        ([(1, Kind.ZERO, None, 0)], 5, "gapless"),
        ([(0, Kind.ZERO, None, 0), (0, Kind.DATA, A, 0)], 5, "gapless"),
        ([(0, Kind.ZERO, None, 0), (5, Kind.DATA, A, 0)], 5, "gapless"),
        ([(0, Kind.DATA, A, 100)], 101, "outside"),
        ([(0, Kind.DATA, A, -1)], 1, "outside"),
        ([(0, Kind.DATA, None, 0)], 1, "names no source"),
        ([], 1, "no rows"),
        ([], -1, "not in"),
        ([], 1 << 63, "not in"),
    ],
)
def test_an_invalid_table_cannot_be_made(
    rows: list[tuple[int, Kind, Source | None, int]], size: int, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        Extents.of(rows, size)


def test_a_table_cannot_be_changed() -> None:
    table = Extents.whole(A)
    with pytest.raises(ValueError, match="read-only"):
        table.start[0] = 1


def test_the_map_of_a_file_says_where_its_holes_are() -> None:
    file = patterned(10 * 512, [(512, 1024), (9 * 512, 512)])
    assert [(row.start, row.kind) for row in on_storage(file)] == [
        (0, Kind.ZERO),
        (512, Kind.DATA),
        (1536, Kind.ZERO),
        (9 * 512, Kind.DATA),
    ]


def test_tables_are_equal_when_all_their_windows_are() -> None:
    def table(source: Source, offset: int, kind: Kind = Kind.DATA) -> Extents:
        return Extents.of([(0, kind, source if kind == Kind.DATA else None, offset)], 10)

    assert table(A, 5) == table(A, 5)
    others = [table(B, 5), table(A, 6), table(B, 6), table(A, 0, Kind.ZERO), table(A, 0, Kind.HOLE), Extents.filled(11)]
    for one, other in itertools.combinations([table(A, 5), *others], 2):
        assert one != other


def test_a_row_without_payload_has_no_window() -> None:
    assert list(Extents.filled(30)) == [Row(0, 30, Kind.ZERO)]
    assert list(Extents.of([(0, Kind.ZERO, None, 7), (10, Kind.HOLE, None, 7)], 30)) == [
        Row(0, 10, Kind.ZERO),
        Row(10, 20, Kind.HOLE),
    ]


@pytest.mark.parametrize("starts", [(-1,), (1,), (0, 0), (0, 5, 4), (0, 10), (0, 11)])
def test_rows_that_do_not_begin_one_behind_the_other_are_refused(starts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not sorted and gapless"):
        Extents.of([(start, Kind(at % 2), None, 0) for at, start in enumerate(starts)], 10)


def test_a_slice_of_no_units_is_left_out() -> None:
    kinds, offsets = np.array([Kind.DATA, Kind.ZERO], dtype=np.uint8), np.array([20, 0])
    slices: list[Any] = [(kinds[:0], 0, offsets[:0]), (kinds, 0, offsets), 0, 1]
    table = Extents.from_units(10, 30, slices, SOURCES)
    assert table == Extents.of([(0, Kind.DATA, A, 20), (10, Kind.ZERO, None, 0), (20, Kind.HOLE, None, 0)], 30)


@pytest.mark.parametrize(("one", "other"), [(A, B), (B, A)])
def test_windows_onto_two_sources_are_two_rows_even_if_offsets_continue(one: Source, other: Source) -> None:
    table = Extents.of(
        [(0, Kind.DATA, A, 0), (5, Kind.DATA, B, 5), (10, Kind.DATA, one, 10), (15, Kind.DATA, other, 15)], 20
    )
    assert [row.source for row in table][-2:] == [one, other]
    assert table.read(0, 20) == A.read(0, 5) + B.read(5, 5) + one.read(10, 5) + other.read(15, 5)


@pytest.mark.parametrize(("one", "other"), [(Kind.HOLE, Kind.ZERO), (Kind.ZERO, Kind.HOLE)])
def test_holes_and_zeros_are_two_rows(one: Kind, other: Kind) -> None:
    assert [row.kind for row in Extents.of([(0, one, None, 0), (5, other, None, 0)], 10)] == [one, other]
