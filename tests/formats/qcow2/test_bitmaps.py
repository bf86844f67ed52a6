"""Persistent bitmaps: which ranges they have as written, beside what qemu-nbd serves of the same bitmap."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import vmconv
from support.bitmaps import served
from support.disks import MIB, QemuImg, qemu_io
from vmconv.errors import ImageError, PlanError, UsageError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv_qcow2.bitmaps import dirty_ranges
from vmconv_qcow2.header import read_bitmaps, read_header

KIB = 1 << 10
SIZE = 40 * MIB + 1536


def made(path: Path, qemu_img: QemuImg, *options: str, cluster: str = "64K") -> Path:
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", path, str(SIZE))
    qemu_img("bitmap", "--add", *options, path, "b0")
    return path


def ranges(path: Path, name: str = "b0") -> list[tuple[int, int]]:
    """Returns the `(start, end)` ranges of a bitmap, apart."""
    with Opener(installed()) as opener:
        start, length = dirty_ranges(opener.image(str(path)), name)
    found: list[tuple[int, int]] = []
    for low, high in zip(start.tolist(), (start + length).tolist(), strict=True):
        found.append((found.pop()[0] if found and found[-1][1] == low else low, high))
    return found


@pytest.mark.parametrize(
    ("granularity", "cluster"), [(None, "64K"), ("512", "4K"), ("4096", "64K"), ("2M", "64K")], ids=str
)
def test_the_ranges_are_those_that_qemu_serves(
    tmp_path: Path, qemu_img: QemuImg, granularity: str | None, cluster: str
) -> None:
    path = made(tmp_path / "a.qcow2", qemu_img, *(["-g", granularity] if granularity else []), cluster=cluster)
    assert ranges(path) == []
    qemu_io(path, "write 0 512", "write 1M 64k", f"write {1 * MIB + 65536} 64k", "write -z 9M 3M", "write 40M 1536")
    found = ranges(path)
    assert len(found) >= 3
    assert found == served(path, "b0", tmp_path / "nbd")


def test_a_part_with_all_bits_set(tmp_path: Path, qemu_img: QemuImg) -> None:
    path = made(tmp_path / "a.qcow2", qemu_img)
    patch(path, lambda _: struct.pack(">Q", 1))
    assert ranges(path) == [(0, SIZE)]


def patch(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Changes the first entry of the table of the first bitmap."""
    with Opener(installed()) as opener:
        (bitmap,) = read_bitmaps(read_header(opener.image(str(path)).file))
    with path.open("r+b") as file:
        file.seek(bitmap.table_offset)
        entry = file.read(8)
        file.seek(bitmap.table_offset)
        file.write(change(entry))


def directory(path: Path, at: int, data: bytes) -> None:
    """Changes bytes of the entry of the first bitmap in the directory."""
    with Opener(installed()) as opener:
        start = read_header(opener.image(str(path)).file).bitmaps.directory_offset
    with path.open("r+b") as file:
        file.seek(start + at)
        file.write(data)


@pytest.mark.parametrize(
    ("at", "data", "error", "said"),
    [
        (8, b"\0\0\0\0", ImageError, "its table has 0 entries, 1 expected"),
        (8, b"\xff\xff\xff\xff", ImageError, "its table has 4294967295 entries"),
        (0, b"\0\0\0\0\x7f\0\0\0", ImageError, "bitmap 'b0'"),
        (12, b"\0\0\0\x03", PlanError, "is in use"),
        (12, b"\0\0\0\0", PlanError, "is disabled"),
        (12, b"\0\0\1\2", PlanError, "unknown flags"),
        (16, b"\x02", PlanError, "unknown type 2"),
    ],
    ids=["no table", "long table", "table past the end", "in use", "disabled", "flags", "type"],
)
def test_a_bitmap_that_tells_nothing_is_refused(
    tmp_path: Path, qemu_img: QemuImg, at: int, data: bytes, error: type[Exception], said: str
) -> None:
    path = made(tmp_path / "a.qcow2", qemu_img)
    directory(path, at, data)
    with pytest.raises(error, match=said):
        ranges(path)


@pytest.mark.parametrize("entry", [2, 3, 1 << 60, 0x200, 65536 | 1, 1 << 50], ids=hex)
def test_a_damaged_table_is_refused(tmp_path: Path, qemu_img: QemuImg, entry: int) -> None:
    path = made(tmp_path / "a.qcow2", qemu_img)
    patch(path, lambda _: struct.pack(">Q", entry))
    with pytest.raises(ImageError, match="bitmap 'b0'"):
        ranges(path)


def test_a_bitmap_has_to_exist(tmp_path: Path, qemu_img: QemuImg) -> None:
    path = made(tmp_path / "a.qcow2", qemu_img)
    with pytest.raises(UsageError, match="no bitmap 'b1'"):
        ranges(path, "b1")
    plain = tmp_path / "a.raw"
    plain.write_bytes(bytes(MIB))
    target = tmp_path / "b.qcow2"
    vmconv.sync(plain, target)
    # No bitmap is needed while nothing has changed.
    plain.write_bytes(b"1" * MIB)
    with pytest.raises(UsageError, match="raw has no bitmaps"):
        vmconv.sync(plain, target, bitmap="b0")
