"""Files of a layout that can be read before they are made."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.sources import SOURCES, A
from vmconv.errors import ImageError
from vmconv.model.extents import Extents, Kind
from vmconv.model.planned import PlannedFile
from vmconv.testing import tables


@settings(deadline=None)
@given(tables(SOURCES, holes=False), st.integers(0, 40), st.none() | st.integers(0, 1100))
def test_ranges_of_data_are_the_payload_in_as_few_pieces_as_can_be(table: Extents, start: int, end: int | None) -> None:
    ranges = PlannedFile("disk", table).data_ranges(start, end)
    found = [at for low, high in ranges for at in range(low, high)]
    limit = table.size if end is None else min(end, table.size)
    data = [at for row in table if row.kind == Kind.DATA for at in range(row.start, row.end)]
    assert found == [at for at in data if start <= at < limit]
    assert all(before[1] < after[0] for before, after in itertools.pairwise(ranges))
    assert PlannedFile("disk", table).data_ranges() == PlannedFile("disk", table).data_ranges(0, table.size)


def test_a_planned_file_reads_as_its_table_says_and_no_further() -> None:
    file = PlannedFile("/tmp/disk.raw", Extents.of([(0, Kind.DATA, A, 5), (10, Kind.ZERO, None, 0)], 30))
    assert file.read(0, 30) == A.read(5, 10) + bytes(20)
    assert file.read(30, 0) == b""
    for offset, length in ((0, 31), (30, 1), (-1, 1), (20, 12)):
        with pytest.raises(ImageError, match=r"disk.raw: ends at 0x1e"):
            file.read(offset, length)


def test_a_planned_file_is_no_device_and_has_no_descriptor() -> None:
    file, other = (PlannedFile("/tmp/disk.raw", Extents.filled(30)) for _ in range(2))
    assert (file.path, file.name, file.size, file.descriptor, file.is_device) == (
        "/tmp/disk.raw",
        "disk.raw",
        30,
        -1,
        False,
    )
    assert file.stamp != other.stamp
    assert file.stamp.size == 30
    assert not file.changed()
    file.sync()
    file.close()
