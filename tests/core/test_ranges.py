"""Ranges of a disk that lie in files as they are."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given

from vmconv.model.extents import Extents, Kind, on_storage
from vmconv.model.sources import Blob
from vmconv.placing.ranges import joined_over_holes, ranges_in_files
from vmconv.testing.memory import MemoryFile
from vmconv.testing.strategies import tables

SECTOR = 512


def holey(name: str, sectors: int, seed: int) -> MemoryFile:
    """Returns a file with random bytes in half of its sectors."""
    rng = random.Random(seed)
    file = MemoryFile(name, sectors * SECTOR)
    for sector in rng.sample(range(sectors), sectors // 2):
        file.write(sector * SECTOR, rng.randbytes(SECTOR))
    return file


ONE, OTHER = holey("one", 64, 1), holey("other", 64, 2)
MADE = Blob("made", bytes(range(256)) * 128)


def through_storage(table: Extents) -> Extents:
    for file in (ONE, OTHER):
        table = table.through(file, on_storage(file))
    return table


@given(tables((ONE, OTHER, MADE), unit=SECTOR, holes=False))
def test_a_table_joined_over_holes_is_the_same_disk_in_no_more_rows(table: Extents) -> None:
    flat = through_storage(table)
    joined = joined_over_holes(flat)
    assert through_storage(joined) == flat
    assert len(joined) <= len(flat)


def test_a_file_from_its_first_byte_to_its_last_is_one_row() -> None:
    flat = through_storage(Extents.whole(ONE))
    assert len(flat) > 10
    assert joined_over_holes(flat) == Extents.whole(ONE)


def test_zeros_where_the_file_has_something_else_are_not_joined() -> None:
    data = next(row for row in on_storage(ONE) if row.kind == Kind.DATA)
    rows = [(0, Kind.DATA, ONE, data.start), (SECTOR, Kind.ZERO, None, 0)]
    table = Extents.of(rows, 2 * SECTOR)
    second = on_storage(ONE).window(data.start + SECTOR, SECTOR).without_holes()
    assert (len(joined_over_holes(table)) == 1) == (second.total(Kind.ZERO) == SECTOR)
    past = Extents.of([(0, Kind.DATA, ONE, ONE.size - SECTOR), (SECTOR, Kind.ZERO, None, 0)], 2 * SECTOR)
    assert joined_over_holes(past) == past


def test_zeros_are_joined_to_the_file_that_is_beside_them() -> None:
    one, other = MemoryFile("one", 8 * SECTOR), MemoryFile("other", 8 * SECTOR)
    one.write(0, b"1" * 2 * SECTOR)
    other.write(5 * SECTOR, b"2" * SECTOR)
    rows = [(0, Kind.DATA, one, 0), (SECTOR, Kind.ZERO, None, 0), (2 * SECTOR, Kind.DATA, other, 5 * SECTOR)]
    joined = joined_over_holes(Extents.of(rows, 3 * SECTOR))
    assert joined == Extents.of([rows[0], (SECTOR, Kind.DATA, other, 4 * SECTOR)], 3 * SECTOR)


def test_zeros_beside_what_is_no_file_do_not_keep_others_from_being_joined() -> None:
    other = MemoryFile("other", 8 * SECTOR)
    other.write(5 * SECTOR, b"2" * SECTOR)
    zero, made = (0, Kind.ZERO, None, 0), (SECTOR, Kind.DATA, MADE, 0)
    rows = [zero, made, (2 * SECTOR, Kind.ZERO, None, 0), (3 * SECTOR, Kind.DATA, other, 5 * SECTOR)]
    joined = joined_over_holes(Extents.of(rows, 4 * SECTOR))
    assert joined == Extents.of([zero, made, (2 * SECTOR, Kind.DATA, other, 4 * SECTOR)], 4 * SECTOR)


def test_a_table_of_nothing() -> None:
    assert len(joined_over_holes(Extents.filled(0))) == 0
    assert len(ranges_in_files(Extents.filled(0), SECTOR).start) == 0


@given(tables((ONE, OTHER, MADE), unit=100, holes=False))
def test_ranges_are_whole_units_in_disk_and_file_and_there_are_no_more_of_them(table: Extents) -> None:
    ranges = ranges_in_files(table, SECTOR)
    for column in (ranges.start, ranges.length, ranges.offset):
        assert (column % SECTOR == 0).all()
    covered = np.zeros(table.size, dtype=bool)
    for start, length, source, offset in zip(*ranges, strict=True):
        assert not covered[start : start + length].any()
        covered[start : start + length] = True
        row = next(row for row in table if row.start <= start < row.end)
        assert row.source is table.sources[source]
        assert row.offset + start - row.start == offset
        assert start + length <= row.end
    for row in table:
        if row.source in (ONE, OTHER) and (row.offset - row.start) % SECTOR == 0:
            inner = covered[-(-row.start // SECTOR) * SECTOR : row.end // SECTOR * SECTOR]
            assert inner.all()
        else:
            assert not covered[row.start : row.end].any()


def test_a_range_of_whole_units_is_taken_from_its_first_byte_to_its_last() -> None:
    rows = [
        (0, Kind.ZERO, None, 0),
        (512, Kind.DATA, ONE, 1024),
        (1536, Kind.DATA, OTHER, 0),
        (2560, Kind.DATA, ONE, 512),
    ]
    ranges = ranges_in_files(Extents.of(rows, 2660), SECTOR)
    assert [column.tolist() for column in ranges] == [[512, 1536], [1024, 1024], [0, 1], [1024, 0]]


def test_a_range_inside_units_is_cut_to_the_whole_ones() -> None:
    inner = ranges_in_files(Extents.of([(0, Kind.ZERO, None, 0), (100, Kind.DATA, ONE, 612)], 2000), SECTOR)
    assert [column.tolist() for column in inner] == [[512], [1024], [0], [1024]]
