"""A file as a source: which answers of the filesystem are taken for what."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.disks import MIB
from vmconv.errors import ReadError
from vmconv.model.sources import File, Placeholder
from vmconv.testing import random_bytes

SIZE = 3 * MIB
Lseek = Callable[[int, int, int], int]


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    """A hole, data, and a hole up to the end, 1 MiB each."""
    path = tmp_path / "disk.raw"
    with path.open("wb") as out:
        out.seek(MIB)
        out.write(random_bytes(MIB))
        out.truncate(SIZE)
    file = File(str(path), os.open(path, os.O_RDONLY))
    yield file
    file.close()


def failing(number: int, whence: int) -> Lseek:
    """Returns `os.lseek`, which fails with the given error when it is asked for data, or for a hole."""
    lseek = os.lseek

    def fails(descriptor: int, at: int, how: int) -> int:
        if how == whence:
            raise OSError(number, os.strerror(number))
        return lseek(descriptor, at, how)

    return fails


def test_holes_are_not_data(file: File) -> None:
    assert file.data_ranges() == [(MIB, 2 * MIB)]
    assert file.data_ranges(0, MIB) == []
    assert file.data_ranges(MIB + 512, 2 * MIB - 512) == [(MIB + 512, 2 * MIB - 512)]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_all_is_data_where_the_filesystem_cannot_tell(file: File, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr("vmconv.model.sources.os.lseek", failing(number, os.SEEK_DATA))
    assert file.data_ranges() == [(0, SIZE)]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_data_lasts_to_the_end_where_the_filesystem_knows_no_holes(
    file: File, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr("vmconv.model.sources.os.lseek", failing(number, os.SEEK_HOLE))
    assert file.data_ranges() == [(MIB, SIZE)]


@pytest.mark.parametrize(
    ("whence", "number"),
    [
        *((os.SEEK_DATA, number) for number in (errno.EIO, errno.EOVERFLOW, errno.ESTALE, errno.EPERM, errno.EBADF)),
        *((os.SEEK_HOLE, number) for number in (errno.EIO, errno.ENXIO, errno.ESTALE, errno.EPERM)),
    ],
)
def test_other_errors_are_no_answers(file: File, monkeypatch: pytest.MonkeyPatch, whence: int, number: int) -> None:
    monkeypatch.setattr("vmconv.model.sources.os.lseek", failing(number, whence))
    at = 0 if whence == os.SEEK_DATA else MIB
    message = f"disk.raw: cannot be searched for holes at {at:#x}: {os.strerror(number)}"
    with pytest.raises(ReadError, match=f"^{message}$"):
        file.data_ranges()


@pytest.mark.parametrize("whence", [os.SEEK_DATA, os.SEEK_HOLE])
def test_edges_that_lie_behind_are_refused(file: File, monkeypatch: pytest.MonkeyPatch, whence: int) -> None:
    lseek = os.lseek
    monkeypatch.setattr("vmconv.model.sources.os.lseek", lambda fd, at, how: 5 if how == whence else lseek(fd, at, how))
    with pytest.raises(ReadError, match=r"search for holes from 0x[0-9a-f]+ returned 0x5"):
        file.data_ranges(MIB + 512)


def test_a_placeholder_has_a_size_and_no_bytes() -> None:
    output = Placeholder("output", 9)
    assert (output.name, output.size) == ("output", 9)
    with pytest.raises(NotImplementedError, match="output"):
        output.read(0, 1)
