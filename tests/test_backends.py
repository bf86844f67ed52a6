"""The backends that come with vmconv pass the kit on the filesystems they are for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmconv.backends.copy import CopyBackend
from vmconv.backends.memory import MemoryBackend
from vmconv.backends.reflink import ReflinkBackend
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
