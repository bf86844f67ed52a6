"""Payload that stays in its file, against a model that looks at each byte by itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmconv.errors import PlanError
from vmconv.model.extents import Extents, Kind
from vmconv.placing import pinning
from vmconv.placing.blocks import Runs
from vmconv.testing.memory import MemoryFile

CELL = 2
"""Bytes of a cell; the tables of these tests consist of cells."""
D, Z, H = Kind.DATA, Kind.ZERO, Kind.HOLE
Cells = list[tuple[Kind, int]]
"""Kind and, for payload, offset in the file."""


def carrier_of(size: int, *data: tuple[int, int], byte: bytes = b"x") -> MemoryFile:
    """Returns a file in which storage holds data in the given `(start, end)` ranges, in order: all of one byte."""
    file = MemoryFile("carrier", size)
    for start, end in data:
        file.write(start, byte * (min(end, size) - start))
    rows: list[tuple[int, Kind, None, int]] = [(0, Kind.ZERO, None, 0)]
    for start, end in data:
        rows += [(start, Kind.DATA, file, start), (end, Kind.ZERO, None, 0)]  # type: ignore[list-item]
    kept = [row for row, after in zip(rows, [*(row[0] for row in rows[1:]), size], strict=True) if row[0] < after]
    file.on_storage = Extents.of(kept, size)
    return file


def table_of(cells: Cells, carrier: MemoryFile, size: int) -> Extents:
    """Returns the table of a disk of `size` bytes, which may end inside the last cell."""
    rows = [
        (at * CELL, kind, carrier if kind == Kind.DATA else None, offset if kind == Kind.DATA else 0)
        for at, (kind, offset) in enumerate(cells)
    ]
    return Extents.of(rows, size)


@st.composite
def carried(draw: st.DrawFn) -> tuple[Extents, MemoryFile]:
    """Draws a disk whose blocks mostly lie in whole, in any order, in a file that holds little else."""
    unit = draw(st.sampled_from([4, 8]))
    shift = draw(st.sampled_from([0, 0, 0, 2, 4]))
    places = draw(st.permutations(range(5)))[: draw(st.integers(1, 5))]
    cells: Cells = []
    kinds = st.lists(st.sampled_from([Kind.DATA, Kind.DATA, Kind.ZERO, Kind.HOLE]), min_size=1, max_size=2)
    for place in places:
        allowed = draw(kinds)
        for at in range(0, unit, CELL):
            cells.append((draw(st.sampled_from(allowed)), place * unit + at + shift))
    if draw(st.integers(0, 3)) == 0:
        odd = draw(st.integers(0, len(cells) - 1))
        cells[odd] = Kind.DATA, draw(st.integers(0, 9)) * CELL
    size = len(cells) * CELL - draw(st.integers(0, unit - 1))
    cells = cells[: -(-size // CELL)]
    # The file may end inside a block.
    least = max((offset + CELL for kind, offset in cells if kind == Kind.DATA), default=0)
    length = draw(st.sampled_from([least, 5 * unit + shift, 60]))
    held = {offset + at for kind, offset in cells if kind == Kind.DATA for at in range(CELL)}
    if draw(st.integers(0, 3)) == 0:
        held |= set(range(first := draw(st.integers(0, 39)), first + 3))
    edges = [at for at in range(length + 1) if (at in held and at < length) != (at - 1 in held)]
    carrier = carrier_of(length, *zip(edges[::2], edges[1::2], strict=True))
    return table_of(cells, carrier, size), carrier


def model(table: Extents, carrier: MemoryFile, unit: int, align: int) -> dict[int, int] | None:
    """Returns the place of each block with payload; None when they cannot all stay."""
    storage = carrier.on_storage
    assert storage is not None
    held = {at for row in storage if row.kind == Kind.DATA for at in range(row.start, row.end)}
    rows = {at: row for row in table for at in range(row.start, row.end)}
    places: dict[int, int] = {}
    taken: set[int] = set()
    for block in range(-(-table.size // unit)):
        inside = range(block * unit, min((block + 1) * unit, table.size))
        kinds = {rows[at].kind for at in inside}
        if Kind.DATA not in kinds:
            if len(kinds) > 1:
                return None
            continue
        wanted = {rows[at].offset + at - rows[at].start - (at - block * unit) for at in inside if rows[at].source}
        place = min(wanted)
        others = [place + at - block * unit for at in inside if not rows[at].source]
        mine = set(range(place, place + unit))
        if len(wanted) > 1 or place < 0 or place % align or Kind.HOLE in kinds or held & set(others) or taken & mine:
            return None
        taken |= mine
        places[block] = place
    return places


def places_of(stay: pinning.Pinned) -> dict[int, int]:
    """Returns the place of each block by its number."""
    columns = (stay.runs.first.tolist(), stay.runs.blocks.tolist(), stay.offset.tolist())
    return {
        first + block: offset + block * stay.unit
        for first, count, offset in zip(*columns, strict=True)
        for block in range(count)
    }


@settings(deadline=None)
@given(carried(), st.sampled_from([(2, 4, 8), (8, 4), (4,), (8,)]), st.sampled_from([None, 2]))
def test_blocks_stay_in_the_largest_unit_that_the_model_allows(
    given: tuple[Extents, MemoryFile], units: tuple[int, ...], align: int | None
) -> None:
    table, carrier = given
    allowed = {unit: model(table, carrier, unit, align or unit) for unit in units}
    right = [unit for unit in units if allowed[unit] is not None]
    if not right:
        with pytest.raises(PlanError, match="payload cannot stay where it lies"):
            pinning.pin(table, carrier, units, align)
        return
    stay = pinning.pin(table, carrier, units, align)
    places = places_of(stay)
    assert (stay.unit, places) == (max(right), allowed[max(right)])
    assert stay.table.window(0, table.size) == table
    assert 0 <= stay.table.size - table.size < stay.unit
    ends = max([carrier.size, *(place + stay.unit for place in places.values())])
    assert 0 <= stay.end - ends < stay.unit
    assert stay.end % stay.unit == 0


def test_data_is_looked_for_in_each_range_and_not_past_the_end() -> None:
    carrier = carrier_of(40, (4, 6), (20, 30))
    asked = [(0, 4), (0, 5), (5, 1), (6, 14), (6, 15), (29, 11), (30, 20), (38, 9), (40, 4), (44, 1), (4, 30)]
    start, length = (np.array(column, dtype=np.int64) for column in zip(*asked, strict=True))
    found = pinning._holds_data(carrier, start, length).tolist()
    assert found == [False, True, True, False, True, True, False, False, False, False, True]
    assert pinning._holds_data(carrier, start[9:10], length[9:10]).tolist() == [False]
    full = carrier_of(40, (0, 40))
    asked = [(36, 8), (40, 4), (44, 4), (0, 4), (60, 1), (39, 1)]
    start, length = (np.array(column, dtype=np.int64) for column in zip(*asked, strict=True))
    assert pinning._holds_data(full, start, length).tolist() == [True, False, False, True, False, True]


@pytest.mark.parametrize(("held", "right"), [((14, 15), True), ((8, 10), True), ((12, 13), False), ((11, 12), False)])
def test_zeros_of_a_block_stay_zeros_where_the_file_holds_nothing(held: tuple[int, int], right: bool) -> None:
    carrier = carrier_of(24, (8, 10), held) if held[0] > 8 else carrier_of(24, held)
    table = table_of([(Kind.DATA, 8), (Kind.ZERO, 0), (Kind.ZERO, 0)], carrier, 6)
    if right:
        assert places_of(pinning.pin(table, carrier, [8])) == {0: 8}
    else:
        with pytest.raises(PlanError, match="a block of 8 bytes around guest address 0x2 covers bytes that are not"):
            pinning.pin(table, carrier, [8])


def test_zeros_that_the_file_holds_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    carrier = carrier_of(24, (8, 16), byte=b"\0")
    table = table_of([(Kind.DATA, 8), (Kind.ZERO, 0), (Kind.ZERO, 0)], carrier, 6)
    assert places_of(pinning.pin(table, carrier, [8])) == {0: 8}
    monkeypatch.setattr(pinning, "_MOST_READ", 3)
    with pytest.raises(PlanError, match="covers bytes that are not zero"):
        pinning.pin(table, carrier, [8])


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (
            [(D, 0), (D, 2), (D, 6), (D, 8), (D, 13), (D, 15)],
            "guest address 0x4 is at 0x6, not a multiple of 4",
        ),
        ([(D, 0), (D, 2), (Z, 0), (H, 0), (H, 0), (Z, 0)], "a block of 4 bytes at guest address 0x4 is partly zero"),
        ([(D, 0), (D, 2), (D, 8), (D, 6), (D, 12), (D, 18)], "around guest address 0x6 is not contiguous"),
        ([(D, 0), (D, 2), (D, 8), (H, 0), (D, 12), (H, 0)], "around guest address 0x6 is not contiguous"),
        # In the parent's part the file holds what is used elsewhere.
        ([(D, 8), (H, 0), (H, 0), (D, 10)], "around guest address 0x2 is not contiguous"),
        ([(D, 0), (D, 2), (D, 12), (D, 14), (D, 8), (D, 10), (D, 12), (D, 14)], "bytes at 0xc belong to two blocks"),
        ([(D, 8), (D, 10), (Z, 0), (Z, 0), (D, 4), (D, 6), (Z, 0), (Z, 0), (D, 8), (D, 10)], "bytes at 0x8 belong to"),
    ],
    ids=["misplaced", "zero-in-part", "torn", "parents", "parents-held", "twice", "twice-later"],
)
def test_the_first_block_that_cannot_stay_is_named(cells: Cells, said: str) -> None:
    held = sorted({offset for kind, offset in cells if kind == Kind.DATA})
    carrier = carrier_of(24, *((at, at + CELL) for at in held))
    with pytest.raises(PlanError, match=said):
        pinning.pin(table_of(cells, carrier, len(cells) * CELL), carrier, [4])


def test_nothing_stays_of_nothing() -> None:
    stay = pinning.pin(Extents.filled(6), carrier_of(0), [4])
    assert (places_of(stay), stay.end, stay.table.size) == ({}, 0, 8)


@pytest.mark.parametrize(("size", "end"), [(6, 8), (8, 8), (20, 20)])
def test_the_last_block_is_whole_even_if_the_file_ends_in_it(size: int, end: int) -> None:
    carrier = carrier_of(size, (0, 6))
    stay = pinning.pin(table_of([(D, 0), (D, 2), (D, 4)], carrier, 6), carrier, [4])
    assert (places_of(stay), stay.end) == ({0: 0, 1: 4}, end)


# -- what has to move


def settled(*places: tuple[int, int, int], unit: int, end: int) -> pinning.Pinned:
    """Returns a disk of runs `(first, blocks, offset)`."""
    first, count, offset = (np.array(column, dtype=np.int64) for column in zip(*places, strict=True))
    runs = Runs(first, count, np.full(len(first), Kind.DATA, dtype=np.uint8), np.zeros(len(first), dtype=bool))
    return pinning.Pinned(unit, Extents.filled(1 << 40), runs, offset, end)


def test_blocks_in_the_header_move_behind_the_end() -> None:
    stay = settled((7, 3, 8), (0, 1, 32), (2, 1, 0), (4, 2, 40), unit=8, end=56)
    assert places_of(stay.cleared(0)) == places_of(stay)
    cleared = stay.cleared(17)
    assert places_of(cleared) == {7: 56, 8: 72, 9: 24, 0: 32, 2: 64, 4: 40, 5: 48}
    assert cleared.end == 80
    assert places_of(stay.cleared(16)) == {7: 56, 8: 16, 9: 24, 0: 32, 2: 64, 4: 40, 5: 48}
    assert len(cleared.runs.first) == len(cleared.offset) == 6


@pytest.mark.parametrize(
    ("unit", "most"), [(512, 128), (4096, 16), (65536, 1), (1 << 20, 1), (2 << 20, 1), (4 << 20, 0)]
)
def test_only_a_block_of_the_usual_size_moves(unit: int, most: int) -> None:
    stay = settled((0, 200, 0), unit=unit, end=200 * unit)
    assert stay.cleared(most * unit).end == (200 + most) * unit
    with pytest.raises(PlanError, match="would have to move to clear the header"):
        stay.cleared(most * unit + 1)
