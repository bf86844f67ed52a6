"""What is on storage decides what is planned, not what happens to be cached."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import vmconv
from support.disks import MIB
from vmconv.errors import ReadError
from vmconv.model.extents import Kind, on_storage
from vmconv.model.sources import File
from vmconv.system import linux
from vmconv.testing import random_bytes

SIZE = 16 * MIB


def opened(path: Path) -> File:
    return File(str(path), os.open(path, os.O_RDONLY))


def kinds(path: Path) -> list[tuple[int, int, Kind]]:
    file = opened(path)
    try:
        return [row[:3] for row in on_storage(file)]
    finally:
        file.close()


def preallocated(path: Path) -> Path:
    """A file with room for all of it and 1 MiB written, nothing of which is cached."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE)
        file.seek(4 * MIB)
        file.write(random_bytes(MIB))
        os.fsync(file.fileno())
        uncached(path)
    return path


def uncached(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(path: Path) -> None:
    assert path.read_bytes().count(0) > SIZE - 2 * MIB


def test_a_plan_is_the_same_whatever_is_cached(any_dir: Path) -> None:
    path = preallocated(any_dir / "disk.raw")
    expected = [(0, 4 * MIB, Kind.ZERO), (4 * MIB, MIB, Kind.DATA), (5 * MIB, SIZE - 5 * MIB, Kind.ZERO)]
    plans = []
    for prepare in (uncached, cached, uncached):
        prepare(path)
        assert kinds(path) == expected
        plans.append(vmconv.plan(str(path), str(any_dir / "disk.qcow2")).totals)
    assert plans[0] == plans[1] == plans[2]


def test_unsynced_writes_are_data(any_dir: Path) -> None:
    path = preallocated(any_dir / "disk.raw")
    with path.open("r+b") as file:
        file.seek(8 * MIB)
        file.write(random_bytes(MIB, 1))
        file.flush()
        assert (8 * MIB, MIB, Kind.DATA) in kinds(path)
    vmconv.convert(str(path), str(any_dir / "disk.qcow2"))
    assert vmconv.compare(str(path), str(any_dir / "disk.qcow2"))


def test_small_and_compressed_files_are_data(btrfs_dir: Path) -> None:
    small = btrfs_dir / "inline.raw"
    small.write_bytes(b"x" * 700)
    assert kinds(small) == [(0, 700, Kind.DATA)]
    packed = btrfs_dir / "compressed.raw"
    packed.touch()
    os.setxattr(packed, "btrfs.compression", b"zstd")
    packed.write_bytes(b"y" * SIZE)
    assert kinds(packed) == [(0, SIZE, Kind.DATA)]


def test_room_past_the_end_is_no_part_of_a_file(any_dir: Path) -> None:
    path = any_dir / "disk.raw"
    path.write_bytes(random_bytes(5000))
    descriptor = os.open(path, os.O_RDWR)
    linux.allocate(descriptor, 0, MIB)
    os.close(descriptor)
    assert kinds(path) == [(0, 5000, Kind.DATA)]


def test_a_filesystem_without_a_map_is_searched_for_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = preallocated(tmp_path / "disk.raw")
    monkeypatch.setattr(linux, "written_ranges", failing(errno.EOPNOTSUPP, path))
    assert (4 * MIB, MIB, Kind.DATA) in kinds(path)
    monkeypatch.setattr(linux, "written_ranges", failing(errno.EIO, path))
    with pytest.raises(ReadError, match=r"disk\.raw: extent map cannot be read: Input/output error"):
        kinds(path)


def failing(number: int, path: Path) -> Callable[[int], np.ndarray[tuple[int, ...], np.dtype[np.int64]]]:
    def fails(descriptor: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        raise OSError(number, os.strerror(number), str(path))

    return fails
