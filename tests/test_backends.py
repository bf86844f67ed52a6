"""The backends that come with vmconv pass the kit on the filesystems they are for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from vmconv.backends.copy import CopyBackend
from vmconv.backends.files import FileOutput
from vmconv.backends.memory import MemoryBackend
from vmconv.backends.reflink import ReflinkBackend
from vmconv.planner import ShareSteps
from vmconv.sources import Decoded, File
from vmconv.testing import BackendTests


class TestReflinkOnXfs(BackendTests):
    backend = ReflinkBackend()
    shares = True

    @pytest.fixture
    def directory(self, xfs_dir: Path) -> Iterator[str]:
        yield str(xfs_dir)


class TestReflinkOnBtrfs(BackendTests):
    backend = ReflinkBackend()
    shares = True

    @pytest.fixture
    def directory(self, btrfs_dir: Path) -> Iterator[str]:
        yield str(btrfs_dir)


class TestCopyOnExt4(BackendTests):
    backend = CopyBackend()
    shares = False

    @pytest.fixture
    def directory(self, ext4_dir: Path) -> Iterator[str]:
        yield str(ext4_dir)


class TestCopy(BackendTests):
    backend = CopyBackend()
    shares = False


class TestMemory(BackendTests):
    backend = MemoryBackend()
    shares = True

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Iterator[str]:
        yield str(tmp_path)
        self.backend.files.clear()

    def read_back(self, path: str) -> bytes:
        file = self.backend.files[path]
        data: bytes = file.read(0, file.size)
        return data

    def names(self, directory: str) -> list[str]:
        return sorted(os.path.basename(path) for path in self.backend.files)


@pytest.mark.parametrize("durable", [True, False])
def test_only_a_durable_transaction_waits_for_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    transaction = CopyBackend().begin(str(tmp_path), durable=durable)
    output = transaction.create("target", 5, [])
    output.share(no_steps())
    output.write(0, b"bytes")
    output.finish()
    transaction.commit()
    assert (tmp_path / "target").read_bytes() == b"bytes"
    assert bool(synced) == (str(tmp_path) in synced) == durable


def test_what_the_kernel_takes_in_parts_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, offset: pwrite(fd, b"".join(parts)[:5], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, bytes(data)[:2], offset))
    output = FileOutput(str(tmp_path / "target"), 16, kernel_copies=False, durable=True)
    source = Decoded("letters", output_source(tmp_path), unit=4, count=4, decode=letters, reason="they are made up")
    output.copy(source, 1, 0, 14)
    output.close()
    assert (tmp_path / "target").read_bytes() == b"AAABBBBCCCCDDD"


def letters(first: int, count: int) -> list[bytes]:
    return [bytes([65 + number]) * 4 for number in range(first, first + count)]


def output_source(directory: Path) -> File:
    path = directory / "source"
    path.write_bytes(b"encoded")
    return File(str(path), os.open(path, os.O_RDONLY))


def no_steps() -> ShareSteps:
    empty = np.empty(0, dtype=np.int64)
    return ShareSteps((), empty.astype(np.int32), empty, empty, empty)
