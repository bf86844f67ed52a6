"""cloop: the conformance kit, images of create_compressed_fs, QEMU's view of them, damage."""

from __future__ import annotations

import random
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

import vmconv
from support.corpus import compare_with_qemu, rows
from support.disks import MIB, QemuImg, make_disk
from support.kits.cloop import HEAD, CloopKit, compressed_loop
from support.requirements import oracle_program
from vmconv.errors import ImageError, UsageError


class TestCloop(CloopKit):
    """The conformance kit."""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw", 3 * MIB, pieces=20)


def theirs(disk: Path, block: int) -> Path:
    """Returns the disk as create_compressed_fs compresses it, at its fastest."""
    path = disk.parent / "disk.cloop"
    command = [oracle_program("create_compressed_fs"), "-q", "-L", "1", "-B", str(block), str(disk), str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


@pytest.mark.parametrize("block", [65536, 131072, 16384])
def test_what_create_compressed_fs_makes_is_the_disk(disk: Path, qemu_img: QemuImg, block: int) -> None:
    image = theirs(disk, block)
    result = vmconv.convert(image, disk.parent / "new.qcow2")
    assert result.totals.copied > 0
    qemu_img("compare", "-f", "raw", "-F", "qcow2", disk, disk.parent / "new.qcow2")
    qemu_img("compare", "-f", "cloop", "-F", "qcow2", image, disk.parent / "new.qcow2")
    assert vmconv.info(image)["cluster-size"] == block


@pytest.mark.parametrize("block", [512, 65536, MIB])
def test_qemu_reads_our_images_as_we_do(disk: Path, qemu_img: QemuImg, block: int) -> None:
    image = disk.parent / "disk.cloop"
    image.write_bytes(compressed_loop(disk.read_bytes(), block))
    vmconv.convert(image, disk.parent / "new.raw")
    assert (disk.parent / "new.raw").read_bytes() == disk.read_bytes()
    qemu_img("compare", "-f", "cloop", "-F", "raw", image, disk)


def test_a_part_of_a_block_is_read(disk: Path) -> None:
    image = disk.parent / "disk.cloop"
    image.write_bytes(compressed_loop(disk.read_bytes(), 65536))
    vmconv.convert(image, disk.parent / "new.raw", offset=65536 - 512, length=1024)
    assert (disk.parent / "new.raw").read_bytes() == disk.read_bytes()[65536 - 512 : 65536 + 512]


def test_an_empty_image_is_an_empty_disk(tmp_path: Path) -> None:
    (tmp_path / "disk.cloop").write_bytes(compressed_loop(b"", 65536))
    assert vmconv.info(tmp_path / "disk.cloop")["virtual-size"] == 0


@pytest.mark.malformed
@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (128, struct.pack(">I", 0), "block_size at 0x80"),
        (128, struct.pack(">I", 513), "block_size at 0x80: 513 is not whole sectors"),
        (128, struct.pack(">I", (64 << 20) + 512), "block_size at 0x80"),
        (132, struct.pack(">I", 1 << 31), "num_blocks at 0x84"),
        (132, struct.pack(">I", 1 << 20), "reach past the end of the file"),
        (HEAD, struct.pack(">Q", 0), "offset of block 0 at 0x88"),
        (HEAD + 8, struct.pack(">Q", HEAD), "offset of block 0 at 0x88"),
        (HEAD + 8, struct.pack(">Q", 1 << 63), "offset of block 0 at 0x88"),
    ],
)
def test_a_damaged_header_is_refused_by_field(tmp_path: Path, at: int, value: bytes, said: str) -> None:
    data = bytearray(compressed_loop(random.Random(1).randbytes(8192), 4096))
    data[at : at + len(value)] = value
    (tmp_path / "disk.cloop").write_bytes(data)
    with pytest.raises(ImageError, match=said):
        vmconv.info(tmp_path / "disk.cloop")


@pytest.mark.malformed
@pytest.mark.parametrize("content", [b"\1" * 4095, b"\1" * 4097, b"\0" * (16 * MIB)], ids=["short", "long", "endless"])
def test_a_block_of_another_length_is_refused(tmp_path: Path, content: bytes) -> None:
    block = zlib.compress(content, 9)
    offsets = struct.pack(">QQ", HEAD + 16, HEAD + 16 + min(len(block), 8192))
    head = compressed_loop(bytes(4096), 4096)[:HEAD]
    (tmp_path / "disk.cloop").write_bytes(head + offsets + block)
    with pytest.raises(ImageError, match=r"block 0 at 0x98 .*: does not decompress to 4096 bytes"):
        vmconv.convert(tmp_path / "disk.cloop", tmp_path / "new.raw", target_format="raw")


@pytest.mark.malformed
def test_a_damaged_block_is_never_read_as_anything(disk: Path) -> None:
    data = bytearray(compressed_loop(disk.read_bytes(), 65536))
    data[-1] ^= 0xFF
    (disk.parent / "disk.cloop").write_bytes(data)
    with pytest.raises(ImageError, match=r"block 47 at .*guest address 0x2f0000"):
        vmconv.convert(disk.parent / "disk.cloop", disk.parent / "new.raw")


@pytest.mark.parametrize("row", rows("cloop"), ids=lambda row: row["name"])
def test_a_real_image_is_the_disk_that_qemu_reads(
    row: dict[str, str], corpus: Path, tmp_path: Path, qemu_img: QemuImg
) -> None:
    compare_with_qemu(row, corpus, tmp_path, qemu_img)


def test_a_snapshot_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk.cloop").write_bytes(compressed_loop(b"\1" * 512, 512))
    with pytest.raises(UsageError, match="has no snapshots"):
        vmconv.convert(tmp_path / "disk.cloop", tmp_path / "new.raw", snapshot="1")
