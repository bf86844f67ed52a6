"""qcow version 1: the conformance kit, images of qemu-img, hostile headers."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk, qemu_io
from support.kits.qcow import QcowKit, by_qemu
from vmconv.errors import ImageError, UsageError

SIZE = 9 * MIB + 512


class TestQcow(QcowKit):
    """The conformance kit."""


@pytest.fixture
def disk(xfs_dir: Path) -> Path:
    return make_disk(xfs_dir / "disk.raw", SIZE, pieces=30)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "compressed"])
def test_what_qemu_makes_is_the_disk(disk: Path, qemu_img: QemuImg, packed: bool) -> None:
    image, target = disk.with_suffix(".qcow"), disk.with_name("new.qcow2")
    if packed:
        with disk.open("r+b") as file:
            os.pwrite(file.fileno(), b"some text " * 100000, MIB)
    by_qemu(disk, image, packed=packed)
    result = vmconv.convert(image, target)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", disk, target)
    assert vmconv.info(image)["virtual-size"] == SIZE
    # Clusters of 4 KiB that are aligned are shared, as they lie.
    assert result.totals.copied if packed else result.totals.shared > 10 * result.totals.copied
    report = vmconv.check(image)
    assert report
    assert (report.corruptions, report.leaks) == ((), ())


def test_a_layer_is_read_on_its_base(disk: Path, qemu_img: QemuImg) -> None:
    """With a backing file, clusters have 512 bytes."""
    image, theirs = disk.with_name("top.qcow"), disk.with_name("theirs.raw")
    qemu_img("create", "-f", "qcow", "-b", disk, "-F", "raw", image)
    for command in ("write -P 7 5120 1536", "write -P 9 3M 70000", "write -P 0 6M 1M"):
        qemu_io(image, command, format_name="qcow")
    qemu_img("convert", "-O", "raw", "--image-opts", _opened(image, disk), theirs)
    vmconv.convert(image, disk.with_name("ours.raw"), source_backing_format="raw")
    assert disk.with_name("ours.raw").read_bytes() == theirs.read_bytes()
    assert vmconv.info(image)["backing-filename"] == str(disk)


def _opened(image: Path, base: Path) -> str:
    return f"driver=qcow,file.filename={image},backing.driver=raw,backing.file.filename={base}"


HOSTILE = [
    (16, struct.pack(">I", 2000), "backing_file_size"),
    (24, struct.pack(">Q", 0), "size at 0x18: 0 is not in"),
    (24, struct.pack(">Q", 1000), "size at 0x18: 1000 bytes are no whole sectors"),
    (24, struct.pack(">Q", 1 << 50), "size at 0x18: needs an L1 table of 4294967296 bytes"),
    (24, struct.pack(">Q", 1 << 63), "size at 0x18"),
    (32, b"\x08", "cluster_bits at 0x20: 8 is not in 9..16"),
    (33, b"\x1f", "l2_bits at 0x21: 31 is not in 6..13"),
    (36, struct.pack(">I", 1), "crypt_method at 0x24: AES encryption is not supported"),
    (40, struct.pack(">Q", 1 << 60), "l1_table_offset at 0x28"),
]


@pytest.mark.malformed
@pytest.mark.parametrize(("offset", "data", "words"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_header_is_refused_by_field(
    disk: Path, qemu_img: QemuImg, offset: int, data: bytes, words: str
) -> None:
    image = disk.with_suffix(".qcow")
    qemu_img("create", "-f", "qcow", "-u", "-b", "base.raw", "-F", "raw", image, "8M")
    with image.open("r+b") as file:
        os.pwrite(file.fileno(), data, offset)
    with pytest.raises(ImageError, match=words):
        vmconv.info(image)


@pytest.mark.malformed
@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (1 << 40, "payload at 0x10000000000 is no sector of the file"),
        (4097, "payload at 0x1001 is no sector of the file"),
        (1 << 63 | 512, "compressed cluster at 0x200 .*: 0 bytes are not inside the file"),
        (1 << 63 | 1 << 55 | 1 << 50, "compressed cluster at 0x4000000000000 .* bytes are not inside"),
        (1 << 63 | 1 << 55 | 512, "compressed cluster at 0x200: "),
    ],
)
def test_a_hostile_entry_is_refused(disk: Path, qemu_img: QemuImg, entry: int, words: str) -> None:
    image = disk.with_suffix(".qcow")
    qemu_img("convert", "-f", "raw", "-O", "qcow", disk, image)
    with image.open("r+b") as file:
        (l1,) = struct.unpack(">Q", os.pread(file.fileno(), 8, 40))
        (l2,) = struct.unpack(">Q", os.pread(file.fileno(), 8, l1))
        os.pwrite(file.fileno(), struct.pack(">Q", entry), l2)
    with pytest.raises(ImageError, match=words):
        vmconv.convert(image, disk.with_name("new.raw"))


def test_an_l2_table_is_used_once(disk: Path, qemu_img: QemuImg) -> None:
    image = disk.with_suffix(".qcow")
    qemu_img("convert", "-f", "raw", "-O", "qcow", disk, image)
    with image.open("r+b") as file:
        (l1,) = struct.unpack(">Q", os.pread(file.fileno(), 8, 40))
        os.pwrite(file.fileno(), os.pread(file.fileno(), 8, l1), l1 + 8)
    with pytest.raises(ImageError, match=r"L1 entry 1 at .* overlaps another one"):
        vmconv.map_disk(image)
    report = vmconv.check(image)
    assert report
    assert report.corruption_count


def test_no_image_is_made(disk: Path) -> None:
    with pytest.raises(UsageError, match="qcow is only read"):
        vmconv.convert(disk, disk.with_name("new.qcow"))
