"""EWF: the conformance kit, images of ewf-tools, damage that libewf does not report."""

from __future__ import annotations

import hashlib
import os
import random
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk
from support.kits.ewf import EwfKit, acquire, sections
from support.mounting import mounted
from support.requirements import oracle_program
from vmconv.cli.main import main
from vmconv.errors import AccessError, ImageError, UsageError
from vmconv.testing import image_file
from vmconv_ewf.sections import segment_name

SIZE = 9 * MIB


class TestEwf(EwfKit):
    """The conformance kit."""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw", SIZE, pieces=30)


def segmented(disk: Path, *options: str) -> list[Path]:
    """Returns the segment files of an acquisition in several."""
    acquire(disk.read_bytes(), disk.parent, "-f", "encase6", "-c", "none", "-S", str(2 * MIB), *options)
    found = sorted(disk.parent.glob("case.E*"))
    assert len(found) > 3
    return found


FLAVOURS = [
    "-f encase6 -c fast",
    "-f encase6 -c none",
    "-f encase7 -c best",
    "-f encase5 -c empty-block",
    "-f encase2 -c fast",
    "-f encase1 -c fast",
    "-f ftk -c fast",
    "-f linen6 -c fast",
    "-f ewfx -c fast",
    "-f encase6 -c fast -b 16",
    "-f encase6 -c fast -b 8192",
    "-f encase6 -c none -b 1024 -S 2MiB",
]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_ewf_tools_acquire_is_the_disk(disk: Path, qemu_img: QemuImg, flavour: str) -> None:
    image = acquire(disk.read_bytes(), disk.parent, *flavour.split())
    target = disk.parent / "new.qcow2"
    result = vmconv.convert(image, target)
    assert result.totals.shared == 0
    assert result.totals.copied > 0
    qemu_img("compare", "-f", "raw", "-F", "qcow2", disk, target)
    assert vmconv.check(image, payload=True) == vmconv.check(image)


@pytest.mark.parametrize("size", [512, 32768, 32768 + 512, 5 * MIB - 512])
def test_a_disk_of_any_number_of_sectors(tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    image = acquire(data, tmp_path, "-f", "encase6", "-c", "fast")
    vmconv.convert(image, tmp_path / "new.raw")
    assert (tmp_path / "new.raw").read_bytes() == data


@pytest.mark.parametrize("flavour", ["-f encase6 -c fast", "-f encase5 -c best -b 512", "-f encase6 -c empty-block"])
def test_an_empty_disk_stays_empty(tmp_path: Path, flavour: str) -> None:
    disk = make_disk(tmp_path / "disk.raw", 64 * MIB, pieces=1)
    image = acquire(disk.read_bytes(), tmp_path, *flavour.split())
    result = vmconv.convert(image, tmp_path / "new.raw")
    assert result.totals.copied <= 3 * MIB
    assert (tmp_path / "new.raw").read_bytes() == disk.read_bytes()
    assert (tmp_path / "new.raw").stat().st_blocks * 512 <= 3 * MIB


def test_what_only_looks_like_zeros_is_data(tmp_path: Path) -> None:
    # All chunks of one byte are packed to the same length.
    data = b"".join(bytes([value]) * 32768 for value in (0, 255, 0, 0, 7, 255, 0, 1)) * 8
    image = acquire(data, tmp_path, "-f", "encase6", "-c", "fast")
    result = vmconv.convert(image, tmp_path / "new.raw")
    assert (tmp_path / "new.raw").read_bytes() == data
    assert 32768 * 32 <= result.totals.copied <= 32768 * 33


def test_ewfexport_has_the_same_disk(disk: Path) -> None:
    image = acquire(disk.read_bytes(), disk.parent, "-f", "encase6", "-c", "best")
    command = [oracle_program("ewfexport"), "-q", "-u", "-f", "raw", "-t", str(disk.parent / "theirs"), str(image)]
    subprocess.run(command, check=True, capture_output=True)
    vmconv.convert(image, disk.parent / "ours.raw")
    assert (disk.parent / "ours.raw").read_bytes() == (disk.parent / "theirs.raw").read_bytes()


def test_a_mount_shows_it_in_every_format(
    disk: Path, qemu_img: QemuImg, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first, *_ = segmented(disk)
    (disk.parent / "other.raw").write_bytes(bytes(MIB))
    point = tmp_path_factory.mktemp("point")
    with mounted(first, point):
        assert [path.name for path in point.iterdir()] == [first.name]
        for name in ("vhdx", "qcow2", "raw", "vmdk"):
            view = point / first.name / name / f"case.{name}"
            qemu_img("compare", "-f", "raw", "-F", name, disk, view)


def test_what_an_image_says_of_its_case_is_described(disk: Path) -> None:
    image = acquire(disk.read_bytes(), disk.parent, "-f", "encase6", "-c", "fast")
    said = vmconv.info(image)
    data = said["format-specific"]["data"]
    assert {name: data[name] for name in ("case-number", "evidence-number", "examiner", "description", "notes")} == {
        "case-number": "12/7",
        "evidence-number": "4",
        "examiner": "J. Doe",
        "description": "a disk",
        "notes": "seized",
    }
    content = disk.read_bytes()
    assert data["md5"] == hashlib.md5(content, usedforsecurity=False).hexdigest()
    assert data["sha1"] == hashlib.sha1(content, usedforsecurity=False).hexdigest()
    assert said["losses"]


def test_segments_are_found_beside_the_first(disk: Path) -> None:
    first, *others = segmented(disk)
    vmconv.convert(first, disk.parent / "new.raw")
    assert (disk.parent / "new.raw").read_bytes() == disk.read_bytes()
    assert [one["filename"] for one in vmconv.info(first)["references"]] == [path.name for path in others]


@pytest.mark.malformed
def test_a_missing_segment_is_refused_by_name(disk: Path) -> None:
    first, *_, last = segmented(disk)
    last.unlink()
    with pytest.raises(AccessError, match=rf"segment '{last.name}': No such file"):
        vmconv.convert(first, disk.parent / "new.raw")


def test_a_segment_in_another_directory_is_refused(disk: Path, tmp_path: Path) -> None:
    first, second, *_ = segmented(disk)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    first.rename(elsewhere / first.name)
    (elsewhere / second.name).symlink_to(second)
    with pytest.raises(AccessError, match="lies outside the image's directory"):
        vmconv.info(elsewhere / first.name)


@pytest.mark.malformed
def test_segments_in_the_wrong_order_are_refused(disk: Path) -> None:
    first, second, third, *_ = segmented(disk)
    os.rename(second, first.with_name("kept"))
    os.rename(third, second)
    with pytest.raises(ImageError, match=r"case\.E02: segment at 0x9: segment 3 where segment 2 is expected"):
        vmconv.info(first)
    with pytest.raises(ImageError, match="segment 3 where segment 1") as caught:
        vmconv.info(second, format_name="ewf")
    assert "x.E01" in str(caught.value.hint)


@pytest.mark.malformed
def test_a_segment_of_another_acquisition_is_refused(disk: Path) -> None:
    first, second, *_ = segmented(disk)
    data = bytearray(second.read_bytes())
    start = next(start for kind, start, _ in sections(bytes(data)) if kind == b"data")
    data[start + 76 + 64] ^= 1
    second.write_bytes(data)
    with pytest.raises(ImageError, match="set identifier is not that of the first segment"):
        vmconv.info(first)


@pytest.mark.parametrize(
    ("number", "name"),
    [(2, "E02"), (99, "E99"), (100, "EAA"), (125, "EAZ"), (126, "EBA"), (775, "EZZ"), (776, "FAA"), (14971, "ZZZ")],
)
def test_segments_have_the_names_that_encase_gives_them(number: int, name: str) -> None:
    assert segment_name(image_file(b"", "case.E01"), number) == f"case.{name}"
    assert segment_name(image_file(b"", "case.e01"), number) == f"case.{name.lower()}"


def test_one_segment_more_has_no_name() -> None:
    with pytest.raises(ImageError, match="more than 14971 segments"):
        segment_name(image_file(b"", "case.E01"), 14972)


@pytest.mark.malformed
@pytest.mark.parametrize("packed", ["fast", "none"])
def test_a_damaged_chunk_is_never_read_as_zeros(disk: Path, packed: str) -> None:
    # libewf reads zeros there and reports nothing.
    image = acquire(disk.read_bytes(), disk.parent, "-f", "encase6", "-c", packed)
    data = bytearray(image.read_bytes())
    start, end = next((start, end) for kind, start, end in sections(bytes(data)) if kind == b"sectors")
    data[(start + end) // 2] ^= 1
    image.write_bytes(data)
    with pytest.raises(ImageError, match="its checksum or length does not match"):
        vmconv.convert(image, disk.parent / "new.raw")
    assert not (disk.parent / "new.raw").exists()
    report = vmconv.check(image, payload=True)
    assert report
    assert report.corruption_count == 1


def test_a_disk_that_is_not_what_was_hashed_is_found(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = acquire(disk.read_bytes(), disk.parent, "-f", "encase6", "-c", "fast")
    kit, data = EwfKit(), bytearray(image.read_bytes())
    for kind, start, _ in list(sections(bytes(data))):
        if kind in (b"digest", b"hash"):
            data[start + 76] ^= 1
    kit.seal(data)
    image.write_bytes(data)
    assert main(["check", str(image)]) == 0
    assert main(["check", "--payload", str(image)]) == 2
    assert "ERROR md5 of the disk is " in capsys.readouterr().out


def test_a_format_without_hashes_has_nothing_to_compare_with(disk: Path) -> None:
    vmconv.convert(disk, disk.parent / "disk.qcow2")
    with pytest.raises(UsageError, match="qcow2 stores no hash"):
        vmconv.check(disk.parent / "disk.qcow2", payload=True)


@pytest.mark.malformed
def test_a_chunk_that_decompresses_without_end_is_refused(disk: Path) -> None:
    image = acquire(bytes(64 << 10), disk.parent, "-f", "encase6", "-c", "fast")
    data = bytearray(image.read_bytes())
    start = next(start for kind, start, _ in sections(bytes(data)) if kind == b"sectors")
    table = next(start for kind, start, _ in sections(bytes(data)) if kind == b"table")
    bomb = zlib.compress(bytes(50 << 20), 9)
    # The bomb takes the place of the chunks, and all that follows moves by as much.
    head, tail = bytes(data[: start + 76]), bytes(data[table:])
    shift = start + 76 + len(bomb) - table
    moved = bytearray(head + bomb + tail)
    struct.pack_into("<Q", moved, start + 16, table + shift)
    at = table + shift
    while at + 76 <= len(moved):
        kind, following = struct.unpack_from("<16sQ", moved, at)
        struct.pack_into("<Q", moved, at + 16, following + shift)
        if kind.startswith(b"done"):
            break
        at = following + shift
    EwfKit().seal(moved)
    image.write_bytes(moved)
    with pytest.raises(ImageError, match=r"entry \d: chunk of|its checksum or length"):
        vmconv.convert(image, disk.parent / "new.raw")


def test_no_image_is_made(disk: Path) -> None:
    with pytest.raises(UsageError, match="ewf is only read") as caught:
        vmconv.convert(disk, disk.parent / "new.E01")
    assert "qcow2" in str(caught.value.hint)
    with pytest.raises(UsageError, match="ewf is only read"):
        vmconv.fanout(disk, ["qcow2", "ewf"])


@pytest.mark.malformed
def test_version_2_and_smart_are_refused_by_name(disk: Path) -> None:
    smart = disk.parent / "old.s01"
    volume = struct.pack("<16sQQ40xI", b"volume", 13 + 76 + 94, 76 + 94, 0) + bytes(94)
    done = struct.pack("<16sQQ40xI", b"done", 13 + 76 + 94, 76, 0)
    data = bytearray(b"EVF\t\r\n\xff\0\1\1\0\0\0" + volume + done)
    EwfKit().seal(data)
    smart.write_bytes(data)
    with pytest.raises(ImageError, match="SMART"):
        vmconv.info(smart, format_name="ewf")
    new = disk.parent / "new.Ex01"
    new.write_bytes(b"EVF2\r\n\x81\0" + bytes(4096))
    with pytest.raises(ImageError, match="EWF version 2"):
        vmconv.info(new)
