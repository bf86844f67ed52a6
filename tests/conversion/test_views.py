"""Planned files as bytes: what a view reads is what its table says, in every way of reading it."""

from __future__ import annotations

import itertools
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.disks import MIB, make_disk
from vmconv.conversion.views import views
from vmconv.errors import AccessError, ImageError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.model.extents import Columns, Extents, Kind
from vmconv.model.sources import Blob, Decoded, File, Source
from vmconv.model.view import FilePart, View
from vmconv.testing import random_bytes

SIZE = 3 * MIB + 700


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> File:
    path = tmp_path_factory.mktemp("views") / "payload"
    path.write_bytes(random_bytes(SIZE))
    return File(str(path), os.open(path, os.O_RDONLY))


def mixed(file: File) -> Extents:
    """Returns a table of everything there is: long and short ranges of a file, metadata, decoded units, zeros."""
    blob = Blob("computed", lambda offset, length: bytes((offset + i) % 251 for i in range(length)), 300_000)
    decoded = Decoded(
        "decoded",
        file,
        unit=5000,
        count=60,
        decode=lambda first, n: [bytes([i]) * 5000 for i in range(first, first + n)],
        reason="",
    )
    rows: list[tuple[int, Kind, Source | None, int]] = []
    at = 0
    for length, kind, source, offset in [
        (512, Kind.DATA, blob, 7),
        (MIB, Kind.DATA, file, 4096),
        (1000, Kind.ZERO, None, 0),
        (3000, Kind.DATA, file, 0),
        (200_000, Kind.DATA, blob, 1000),
        (2 * MIB, Kind.HOLE, None, 0),
        (123_456, Kind.DATA, decoded, 11),
        (70_000, Kind.DATA, file, 2 * MIB),
        (600, Kind.DATA, file, 100),
        (50_000, Kind.ZERO, None, 0),
    ]:
        rows.append((at, kind, source, offset))
        at += length
    return Extents.of(rows, at)


RANGES = st.tuples(st.integers(0, 1 << 23), st.integers(0, 3 * MIB))


@given(RANGES)
def test_every_way_of_reading_gives_the_bytes_of_the_table(file: File, where: tuple[int, int]) -> None:
    view = View(mixed(file))
    offset = where[0] % view.size
    length = min(where[1], view.size - offset)
    wanted = view.table.read(offset, length)
    assert view.read(offset, length) == wanted
    # Once more, with what was kept from the first time.
    assert view.read(offset, length) == wanted
    parts = [
        part.file.read(part.offset, part.length) if isinstance(part, FilePart) else bytes(part)
        for part in view.parts(offset, length)
    ]
    assert b"".join(parts) == wanted
    spans = list(view.spans(offset, length))
    assert sum(span for span, _ in spans) == length
    assert all(one[1] != other[1] for one, other in itertools.pairwise(spans))
    at = 0
    for span, is_data in spans:
        assert is_data or wanted[at : at + span] == bytes(span)
        at += span


def test_spans_are_data_exactly_where_rows_are(file: File) -> None:
    view = View(mixed(file))
    assert sum(span for span, is_data in view.spans(0, view.size) if is_data) == view.data_size
    assert view.data_size == view.table.total(Kind.DATA)
    assert list(view.spans(view.size, 0)) == []


def test_long_ranges_of_files_are_not_read(file: File) -> None:
    parts = list(View(mixed(file)).parts(0, MIB + 512))
    assert parts[1] == FilePart(file, 4096, MIB)


def test_sending_to_a_pipe_gives_the_bytes(file: File) -> None:
    view = View(mixed(file))
    reader, writer = os.pipe()
    got: list[bytes] = []

    def read() -> None:
        with open(reader, "rb") as pipe:
            got.append(pipe.read())

    thread = threading.Thread(target=read)
    thread.start()
    view.send(writer, 100, view.size - 100)
    os.close(writer)
    thread.join()
    assert got[0] == view.table.read(100, view.size - 100)


def test_sending_to_a_file_that_is_appended_to_gives_the_bytes(file: File, tmp_path: Path) -> None:
    # sendfile refuses such a file.
    view = View(mixed(file))
    with (tmp_path / "out").open("ab") as out:
        view.send(out.fileno(), 0, view.size)
    assert (tmp_path / "out").read_bytes() == view.table.read(0, view.size)


def test_computed_metadata_is_cached_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmconv.model.view._KEPT", 4 * (128 << 10))
    asked: list[int] = []

    def compute(offset: int, length: int) -> bytes:
        asked.append(offset)
        return bytes(length)

    view = View(Extents.whole(Blob("metadata", compute, 16 * (128 << 10))))
    for _ in range(3):
        view.read(1000, 4096)
        view.read(200_000, 4096)
    assert asked == [0, 131072]
    for number in range(16):
        view.read(number * 131072, 1)
    view.read(0, 1)
    assert asked.count(0) == 2


def test_a_source_that_changes_is_an_error_at_the_next_read(tmp_path: Path) -> None:
    path = make_disk(tmp_path / "disk.raw", 4 * MIB)
    with Opener(installed()) as opener:
        (view,) = views(opener.image(str(path)), installed().format("qcow2"), {}, "disk.qcow2").values()
        view.read(0, view.size)
        with path.open("r+b") as file:
            file.seek(100)
            file.write(b"x")
        # Metadata alone is as true as it was.
        assert view.read(0, 4) == b"QFI\xfb"
        with pytest.raises(AccessError, match=r"disk\.raw: changed while it was being viewed"):
            view.read(0, view.size)
        with pytest.raises(AccessError, match="changed"):
            view.refuse_changed()


def test_a_source_that_was_cut_off_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "payload"
    path.write_bytes(bytes(MIB))
    file = File(str(path), os.open(path, os.O_RDONLY))
    view = View(Extents.whole(file))
    os.truncate(path, 1000)
    with pytest.raises(ImageError, match="ends at 0x3e8"):
        view.read(0, MIB)
    with (tmp_path / "out").open("wb") as out, pytest.raises(ImageError, match="ends at 0x3e8"):
        view.send(out.fileno(), 0, MIB)
    file.close()


def test_reading_a_table_of_many_rows_looks_only_at_those_it_reads(file: File) -> None:
    n = 1000
    import numpy as np

    start = np.arange(n, dtype=np.int64) * 512
    rows = Columns(start, np.full(n, Kind.DATA, dtype=np.uint8), np.zeros(n, dtype=np.int32), start[::-1].copy())
    table = Extents(n * 512, rows, [file])
    assert [row.start for row in table.rows_of(700, 1000)] == [700, 1024, 1536]
    assert [row.offset for row in table.rows_of(700, 1000)] == [997 * 512 + 188 + 512, 997 * 512, 996 * 512]
    assert sum(row.length for row in table.rows_of(700, 1000)) == 1000
    with pytest.raises(ValueError, match="outside"):
        list(table.rows_of(0, n * 512 + 1))


def test_a_view_may_be_read_from_several_threads(file: File) -> None:
    view = View(mixed(file))
    wanted = view.table.read(0, view.size)
    wrong: list[int] = []

    def read(step: int) -> None:
        for at in range(0, view.size - step, step):
            if view.read(at, step) != wanted[at : at + step]:
                wrong.append(at)

    threads = [threading.Thread(target=read, args=(step,)) for step in (4096, 100_000, 777_777)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
