"""System calls that answer less than they were asked for."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vmconv.system import linux


@pytest.fixture
def descriptor(tmp_path: Path) -> int:
    (tmp_path / "file").write_bytes(bytes(range(100)))
    return os.open(tmp_path / "file", os.O_RDONLY)


def test_short_reads_are_continued(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: pread(fd, min(length, 7), offset))
    assert linux.read_at(descriptor, 40, 10) == bytes(range(10, 50))
    assert linux.read_at(descriptor, 0, 10) == b""
    os.close(descriptor)


def test_only_the_end_of_a_file_ends_a_read(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert linux.read_at(descriptor, 40, 90) == bytes(range(90, 100))
    assert linux.read_at(descriptor, 40, 100) == b""
    monkeypatch.setattr(os, "pread", lambda *_: b"")
    with pytest.raises(OSError, match="nothing was read at 0x5a") as caught:
        linux.read_at(descriptor, 40, 90)
    assert caught.value.errno == errno.EIO
    os.close(descriptor)
