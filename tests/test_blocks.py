"""A disk in whole blocks, against a model that looks at each block by itself."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vmconv import blocks
from vmconv.backends.memory import MemoryFile
from vmconv.extents import Extents, Kind
from vmconv.sources import Blob
from vmconv.testing import disk_of, tables

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
def test_what_a_format_adds_to_a_layer_reads_as_zero_whatever_its_parent_has(table: Extents, size: int) -> None:
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


def test_what_lies_together_in_a_source_stays_together() -> None:
    """A disk scattered over its source in any order is placed in the source's order, in one piece."""
    order = np.random.default_rng(1).permutation(30)
    table = Extents.of([(i * UNIT, Kind.DATA, A, int(o) * UNIT) for i, o in enumerate(order)], 30 * UNIT)
    runs = blocks.whole_blocks(table, UNIT)
    placed = blocks.place(table, runs, UNIT, 0, 64)
    length = runs.blocks[placed.run] * UNIT
    assert placed.offset.tolist() == (np.cumsum(length) - length).tolist()
    assert placed.end == 30 * UNIT
    assert (np.diff(order[runs.first[placed.run]]) > 0).all()
