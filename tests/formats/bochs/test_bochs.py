"""Bochs: the conformance kit, images of bximage, QEMU's view of ours, damage."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

import vmconv
from support.corpus import compare_with_qemu, rows
from support.disks import MIB, QemuImg, make_disk
from support.kits.bochs import BochsKit, growing
from support.requirements import oracle_program
from vmconv.errors import ImageError, UsageError


class TestBochs(BochsKit):
    """The conformance kit."""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw", 10 * MIB, pieces=20)


def test_what_bximage_converts_is_the_disk(disk: Path, qemu_img: QemuImg) -> None:
    image = disk.parent / "disk.bochs"
    command = [oracle_program("bximage"), "-q", "-func=convert", "-imgmode=growing", str(disk), str(image)]
    subprocess.run(command, check=True, capture_output=True)
    vmconv.convert(image, disk.parent / "new.qcow2")
    qemu_img("compare", "-f", "raw", "-F", "qcow2", disk, disk.parent / "new.qcow2")
    report = vmconv.check(image)
    assert report is not None
    assert (report.corruption_count, report.leak_count) == (0, 0)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("extent", [4096, 65536, 8 * MIB])
def test_qemu_reads_our_images_as_we_do(disk: Path, qemu_img: QemuImg, version: int, extent: int) -> None:
    image = disk.parent / "disk.bochs"
    image.write_bytes(growing(disk.read_bytes(), extent, version))
    vmconv.convert(image, disk.parent / "new.raw")
    assert (disk.parent / "new.raw").read_bytes() == disk.read_bytes()
    qemu_img("compare", "-f", "bochs", "-F", "raw", image, disk)


def test_payload_is_shared(disk: Path, xfs_dir: Path) -> None:
    image = xfs_dir / "disk.bochs"
    # Bitmaps of 512 bytes lie before the extents, so that only a target of small clusters is aligned as they are.
    image.write_bytes(growing(disk.read_bytes(), 8 * MIB))
    result = vmconv.convert(image, xfs_dir / "new.vmdk")
    assert result.totals.shared + result.totals.copied > 0
    assert vmconv.compare(image, xfs_dir / "new.vmdk")


def test_a_part_of_the_disk_that_is_no_extent(tmp_path: Path) -> None:
    data = b"\1" * 512 * 3
    (tmp_path / "disk.bochs").write_bytes(growing(data, 4096))
    vmconv.convert(tmp_path / "disk.bochs", tmp_path / "new.raw")
    assert (tmp_path / "new.raw").read_bytes() == data


def test_sectors_that_are_not_allocated_are_zero_whatever_their_extent_holds(tmp_path: Path) -> None:
    data = bytearray(growing(b"\1" * 4096, 4096))
    # The bitmap lies behind header and catalog.
    data[512 + 4] = 0b10110001
    (tmp_path / "disk.bochs").write_bytes(data)
    vmconv.convert(tmp_path / "disk.bochs", tmp_path / "new.raw")
    said = b"".join((b"\1" if bit == "1" else b"\0") * 512 for bit in reversed("10110001"))
    assert (tmp_path / "new.raw").read_bytes() == said


@pytest.mark.malformed
@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (32, b"Flat\0", "type at 0x20: 'Flat' is not supported"),
        (48, b"Undoable\0", "subtype at 0x30: 'Undoable': holds the changes of a disk"),
        (48, b"\xff", "is not ASCII"),
        (64, struct.pack("<I", 3 << 16), "version at 0x40"),
        (68, struct.pack("<I", 8), "header_size at 0x44"),
        (68, struct.pack("<I", 0xFFFFFFFF), "header_size at 0x44"),
        (72, struct.pack("<I", 0), "catalog at 0x48"),
        (72, struct.pack("<I", 0xFFFFFFFF), "catalog at 0x48"),
        (76, struct.pack("<I", 0), "bitmap at 0x4c"),
        (80, struct.pack("<I", 4095), "extent at 0x50"),
        (80, struct.pack("<I", 16 << 20), "extent at 0x50"),
        (88, struct.pack("<Q", 1 << 62), "size of the disk at 0x54"),
        (88, struct.pack("<Q", 4097), "size of the disk at 0x54"),
    ],
)
def test_a_damaged_header_is_refused_by_field(tmp_path: Path, at: int, value: bytes, said: str) -> None:
    data = bytearray(growing(b"\1" * 8192, 4096))
    data[at : at + len(value)] = value
    (tmp_path / "disk.bochs").write_bytes(data)
    with pytest.raises(ImageError, match=said):
        vmconv.info(tmp_path / "disk.bochs")


@pytest.mark.malformed
@pytest.mark.parametrize(
    ("catalog", "said"),
    [
        ((0, 0), "extent 0 is that of another entry too"),
        ((0, 2), "extent 2 lies past the end of the file"),
        ((0xFFFFFFFE, 0), "extent 4294967294 lies past the end of the file"),
    ],
)
def test_a_damaged_catalog_is_refused(tmp_path: Path, catalog: tuple[int, int], said: str) -> None:
    data = bytearray(growing(b"\1" * 8192, 4096))
    data[512:520] = struct.pack("<II", *catalog)
    (tmp_path / "disk.bochs").write_bytes(data)
    with pytest.raises(ImageError, match=said):
        vmconv.convert(tmp_path / "disk.bochs", tmp_path / "new.raw")
    report = vmconv.check(tmp_path / "disk.bochs")
    assert report is not None
    assert report.corruption_count == 1


@pytest.mark.malformed
def test_a_truncated_image_is_refused(tmp_path: Path) -> None:
    data = growing(b"\1" * 8192, 4096)
    (tmp_path / "disk.bochs").write_bytes(data[:-512])
    with pytest.raises(ImageError, match="has sectors past the end of the file"):
        vmconv.convert(tmp_path / "disk.bochs", tmp_path / "new.raw")


def test_an_extent_that_no_entry_names_is_a_leak(tmp_path: Path) -> None:
    data = bytearray(growing(b"\1" * 8192, 4096))
    data[512:516] = b"\xff" * 4
    (tmp_path / "disk.bochs").write_bytes(data)
    report = vmconv.check(tmp_path / "disk.bochs")
    assert report is not None
    assert (report.corruption_count, report.leak_count) == (0, 1)


@pytest.mark.parametrize("row", rows("bochs"), ids=lambda row: row["name"])
def test_a_real_image_is_the_disk_that_qemu_reads(
    row: dict[str, str], corpus: Path, tmp_path: Path, qemu_img: QemuImg
) -> None:
    compare_with_qemu(row, corpus, tmp_path, qemu_img)


def test_a_snapshot_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk.bochs").write_bytes(growing(b"\1" * 512, 4096))
    with pytest.raises(UsageError, match="has no snapshots"):
        vmconv.convert(tmp_path / "disk.bochs", tmp_path / "new.raw", snapshot="1")
