"""A draft is the file as it will be: what it reads is what its table makes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmconv.errors import ImageError
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


def test_reading_past_the_end_is_refused(file: File) -> None:
    with pytest.raises(ImageError, match="ends at"):
        Draft(file).read(SIZE - 1, 2)
