"""A draft is the file as it will be: what it reads is what its table makes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmconv.errors import ImageError, PlanError
from vmconv.model.draft import Draft
from vmconv.model.extents import Kind
from vmconv.model.sources import Blob, File

SIZE = 5000
WRITES = st.lists(st.tuples(st.integers(0, 7000), st.binary(min_size=1, max_size=1500)), max_size=8)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[File]:
    path: Path = tmp_path_factory.mktemp("draft") / "file"
    path.write_bytes(bytes(index % 251 for index in range(SIZE)))
    opened = File(str(path), os.open(path, os.O_RDONLY))
    yield opened
    opened.close()


@given(writes=WRITES, size=st.none() | st.integers(1, 9000))
def test_reads_and_table_agree_with_a_plain_array(
    file: File, writes: list[tuple[int, bytes]], size: int | None
) -> None:
    model, draft = bytearray(file.read(0, SIZE)), Draft(file)
    for offset, data in writes:
        model.extend(bytes(max(0, offset + len(data) - len(model))))
        model[offset : offset + len(data)] = data
        draft.write(offset, data)
    if size is not None:
        draft.truncate(size)
        model = bytearray(model[:size].ljust(size, b"\0"))
    assert draft.size == len(model)
    assert draft.read(0, draft.size) == bytes(model)
    assert draft.table().read(0, draft.size) == bytes(model)


def test_what_is_there_already_is_not_written(file: File) -> None:
    draft = Draft(file)
    draft.write(700, file.read(700, 2000))
    draft.write(3000, b"new")
    table = draft.table()
    written = [row for row in table if isinstance(row.source, Blob)]
    assert [(row.start, row.length) for row in written] == [(2560, 512)]


def test_freed_ranges_read_as_zero_unless_written_again(file: File) -> None:
    draft = Draft(file)
    draft.free(512, 1024)
    draft.write(1024, b"x" * 512)
    table = draft.table()
    assert [(row.start, row.kind) for row in table][:4] == [
        (0, Kind.DATA),
        (512, Kind.ZERO),
        (1024, Kind.DATA),
        (1536, Kind.DATA),
    ]


@given(writes=WRITES, start=st.integers(0, 8000), length=st.integers(0, 8000))
def test_data_ranges_hold_all_that_was_written_and_all_of_the_file(
    file: File, writes: list[tuple[int, bytes]], start: int, length: int
) -> None:
    draft = Draft(file)
    kept = [(0, SIZE)]
    for offset, data in writes:
        draft.write(offset, data)
        # A sector is written as a whole.
        kept.append((offset // 512 * 512, -(-(offset + len(data)) // 512) * 512))
    end = start + length
    wanted = {at for low, high in kept for at in range(max(low, start), min(high, end, draft.size))}
    found = draft.data_ranges(start, end)
    assert [at for low, high in found for at in range(low, high)] == sorted(wanted)
    assert all(one[1] < other[0] for one, other in pairwise(found))
    assert draft.data_ranges(0) == draft.data_ranges(0, draft.size)


@given(writes=WRITES, offset=st.integers(0, SIZE), length=st.integers(0, 3000))
def test_a_part_reads_as_it_does_in_the_whole(
    file: File, writes: list[tuple[int, bytes]], offset: int, length: int
) -> None:
    draft = Draft(file)
    for at, data in writes:
        draft.write(at, data)
    length = min(length, draft.size - offset)
    part = bytearray(length)
    draft.read_into(offset, memoryview(part))
    assert draft.read(offset, length) == part == draft.read(0, draft.size)[offset : offset + length]


def test_a_draft_is_another_file_than_the_one_beneath(file: File) -> None:
    one, other = Draft(file), Draft(file)
    assert len({one.stamp, other.stamp, file.stamp}) == 3
    assert not one.is_changed
    assert not one.changed()


@pytest.mark.parametrize(("size", "changed"), [(SIZE, False), (SIZE - 1, True), (SIZE + 1, True)])
def test_another_size_is_a_change(file: File, size: int, changed: bool) -> None:
    draft = Draft(file)
    draft.truncate(size)
    assert draft.is_changed is changed


def test_a_freed_range_is_a_change(file: File) -> None:
    draft = Draft(file)
    draft.free(512, 512)
    assert draft.is_changed


def test_what_lies_past_a_new_end_is_neither_written_nor_freed(file: File) -> None:
    draft = Draft(file)
    draft.write(4096, b"x" * 1024)
    draft.free(1024, 2048)
    draft.free(3584, 512)
    draft.truncate(2000)
    table = draft.table()
    assert [(row.start, row.length, row.kind) for row in table] == [(0, 1024, Kind.DATA), (1024, 976, Kind.ZERO)]


def test_more_metadata_than_memory_should_hold_is_refused(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmconv.model.draft._MOST", 2048)
    draft = Draft(file)
    draft.write(0, b"x" * 1536)
    # The fourth sector is still held; a fifth is not.
    draft.write(2048, b"x" * 512)
    with pytest.raises(PlanError, match="more than 2048 bytes of metadata"):
        draft.write(4096, b"x")


def test_reading_before_the_beginning_is_refused(file: File) -> None:
    with pytest.raises(ImageError, match="ends at"):
        Draft(file).read(-1, 2)


def test_reading_past_the_end_is_refused(file: File) -> None:
    with pytest.raises(ImageError, match="ends at"):
        Draft(file).read(SIZE - 1, 2)
