"""A disk in whole blocks, against a model that looks at each block by itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmconv.model.extents import Extents, Kind
from vmconv.model.sources import Blob
from vmconv.placing import blocks
from vmconv.testing import disk_of, tables
from vmconv.testing.memory import MemoryFile

A, B = Blob("a", bytes(300)), Blob("b", bytes(300))
UNIT = 8


@given(tables((A, B)))
def test_runs_say_what_each_block_is(table: Extents) -> None:
    table = blocks.padded(table, UNIT)
    runs = blocks.whole_blocks(table, UNIT)
    at = 0
    for first, count, kind, mixed in zip(*(column.tolist() for column in runs), strict=True):
        assert first == at
        at += count
        for block in range(first, first + count):
            rows = list(table.window(block * UNIT, UNIT))
            assert mixed == (len(rows) > 1)
            assert kind == max(row.kind for row in rows)
    assert at * UNIT == table.size


@given(tables((A,)))
def test_padding_adds_no_payload(table: Extents) -> None:
    longer = blocks.padded(table, UNIT)
    assert longer.size % UNIT == 0
    assert longer.window(0, table.size) == table
    assert longer.total(Kind.DATA) == table.total(Kind.DATA)
    # Where a guest can look into the last block, it is not the parent's in what is past the end alone.
    if longer.size > table.size and longer.kind[-1] == Kind.HOLE:
        assert longer.window(longer.size - UNIT, UNIT) == Extents.filled(UNIT, Kind.HOLE)


@given(tables((A,), size=77), st.sampled_from([40, 77, 78, 80, 200]))
def test_space_that_a_format_adds_to_a_layer_reads_as_zero(table: Extents, size: int) -> None:
    parent = disk_of(Extents.of([(0, Kind.DATA, B, 0)], size), MemoryFile("base", 0))
    layer = disk_of(table, MemoryFile("layer", 0), parent=parent)
    grown = blocks.grown(layer, 80, on_parent=True)
    assert grown.window(0, 77) == table
    assert all(row.kind != Kind.DATA for row in grown.over(parent.guest).window(77, 3))
    assert blocks.grown(layer, 80, on_parent=False) == layer.flat.window(0, 80).without_holes()
    # A parent that is no longer shows nothing there: nothing has to be said.
    if size <= 77:
        assert grown.window(77, 3) == Extents.filled(3, Kind.HOLE)


@given(tables((A,), size=80), tables((B,), size=80, holes=False))
def test_filled_blocks_read_the_same_and_have_no_partial_hole(table: Extents, parent: Extents) -> None:
    filled = blocks.fill_partial_holes(table, parent, UNIT)
    assert filled.over(parent) == table.over(parent)
    for block in range(10):
        kinds = {row.kind for row in filled.window(block * UNIT, UNIT)}
        assert kinds == {Kind.HOLE} or Kind.HOLE not in kinds


@given(tables((A, B), unit=UNIT, holes=False), st.sampled_from([1, 8, 16, 64]))
def test_places_do_not_overlap_and_are_congruent_where_they_can_be(table: Extents, modulus: int) -> None:
    runs = blocks.whole_blocks(table, UNIT)
    runs = runs.take(runs.kind == Kind.DATA)
    base = 128
    placed = blocks.place(table, runs, UNIT, base, modulus)
    ends = base
    for run, offset in zip(placed.run.tolist(), placed.offset.tolist(), strict=True):
        assert offset >= ends
        assert offset % UNIT == 0
        ends = offset + int(runs.blocks[run]) * UNIT
        window = table.window(int(runs.first[run]) * UNIT, UNIT)
        assert (offset - int(window.offset[0])) % min(modulus, UNIT) == 0
        assert (offset - int(window.offset[0])) % modulus == 0
    assert placed.end == ends
    assert sorted(placed.run.tolist()) == list(range(len(runs.first)))


def test_neighbouring_payload_of_a_source_stays_together() -> None:
    """A disk scattered over its source in any order is placed in the source's order, in one piece."""
    order = np.random.default_rng(1).permutation(30)
    table = Extents.of([(i * UNIT, Kind.DATA, A, int(o) * UNIT) for i, o in enumerate(order)], 30 * UNIT)
    runs = blocks.whole_blocks(table, UNIT)
    placed = blocks.place(table, runs, UNIT, 0, 64)
    length = runs.blocks[placed.run] * UNIT
    assert placed.offset.tolist() == (np.cumsum(length) - length).tolist()
    assert placed.end == 30 * UNIT
    assert (np.diff(order[runs.first[placed.run]]) > 0).all()


@pytest.mark.parametrize(("begins", "added"), [(60, Kind.HOLE), (72, Kind.HOLE), (73, Kind.ZERO), (76, Kind.ZERO)])
def test_a_last_block_that_is_all_the_parents_stays_the_parents(begins: int, added: Kind) -> None:
    table = Extents.of([(0, Kind.ZERO, None, 0), (begins, Kind.HOLE, None, 0)], 77)
    assert blocks.padded(table, UNIT).window(77, 3) == Extents.filled(3, added)
    assert blocks.padded(Extents.filled(77), UNIT) == Extents.filled(80)
    assert blocks.padded(Extents.filled(0), UNIT) == Extents.filled(0)


@settings(deadline=None)
@given(st.data())
def test_places_are_those_of_the_first_payload_of_each_run(data: st.DataObject) -> None:
    table = data.draw(tables((A, B), size=80))
    runs = blocks.whole_blocks(table, UNIT)
    runs = runs.take(runs.kind == Kind.DATA)
    rows = [row for row in table if row.source]
    for first, source, wish in zip(
        runs.first.tolist(), *(c.tolist() for c in blocks.preferred(table, runs.first * UNIT)), strict=True
    ):
        row = next(row for row in rows if row.end > first * UNIT)
        assert table.sources[source] is row.source
        assert wish == row.offset - row.start + first * UNIT


def test_offsets_of_groups_restart_at_the_modulus() -> None:
    """Two runs side by side in each source, one elsewhere, and one that no whole blocks make congruent."""
    rows = [(0, Kind.DATA, A, 40), (16, Kind.DATA, A, 24), (32, Kind.DATA, A, 200), (40, Kind.DATA, B, 3)]
    rows += [(56, Kind.DATA, B, 40), (64, Kind.DATA, B, 32)]
    table = Extents.of(rows, 72)
    runs = blocks.whole_blocks(table, UNIT)
    placed = blocks.place(table, runs, UNIT, 64, 32)
    assert dict(zip(placed.run.tolist(), placed.offset.tolist(), strict=True)) == {
        1: 88,
        0: 104,
        2: 136,
        3: 160,
        5: 192,
        4: 200,
    }
    assert placed.run.tolist() == [1, 0, 2, 3, 5, 4]
    assert placed.end == 208
    none = runs.take(runs.first < 0)
    assert blocks.place(table, none, UNIT, 64, 32).end == 64


def test_a_table_that_is_not_whole_blocks_has_no_runs() -> None:
    with pytest.raises(ValueError, match="81 bytes are not whole units of 8"):
        blocks.whole_blocks(Extents.filled(81), UNIT)


def test_a_layer_is_allocated_where_it_has_no_hole() -> None:
    table = Extents.of([(0, Kind.DATA, A, 5), (10, Kind.HOLE, None, 0), (20, Kind.ZERO, None, 0)], 30)
    assert blocks.allocated(table) == Extents.of(
        [(0, Kind.ZERO, None, 0), (10, Kind.HOLE, None, 0), (20, Kind.ZERO, None, 0)], 30
    )


def test_an_output_is_metadata_and_the_rows_of_the_guest() -> None:
    guest = Extents.of([(0, Kind.DATA, A, 5), (10, Kind.ZERO, None, 0), (20, Kind.DATA, B, 7)], 30)
    header, table = Blob("header", bytes(12)), Blob("table", bytes(3))
    rows = guest.columns.take(guest.kind == Kind.DATA)
    rows = rows._replace(start=np.array([50, 20]))
    metadata = [(40, table), (0, header), (33, Blob("empty", b""))]
    found = blocks.output_table(metadata, guest, rows, np.array([10, 10]), 64)
    assert found.size == 64
    assert [(row.start, row.length, row.source, row.offset) for row in found if row.source] == [
        (0, 12, header, 0),
        (20, 10, B, 7),
        (40, 3, table, 0),
        (50, 10, A, 5),
    ]
