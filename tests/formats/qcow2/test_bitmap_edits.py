"""`vmconv bitmap`: QEMU finds the bitmaps as its own program would have made them."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.disks import MIB, QemuImg, qemu_io
from vmconv.cli.main import main
from vmconv.errors import PlanError, UsageError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv_qcow2.bitmaps import bitmap_named, ranges_of
from vmconv_qcow2.header import read_header

SIZE = 8 * MIB
IMAGES = {
    "default": "",
    "small clusters": "cluster_size=512",
    "extended": "extended_l2=on",
    "data file": "data_file={}/data",
    "long backing name": "backing_file={}/" + "b" * 200 + ",backing_fmt=raw",
}


def make(directory: Path, options: str, qemu_img: QemuImg) -> Path:
    path = directory / "disk.qcow2"
    (directory / ("b" * 200)).write_bytes(bytes(SIZE))
    given = ["-o", options.format(directory)] if options else []
    qemu_img("create", "-q", "-f", "qcow2", *given, path, str(SIZE))
    return path


def bitmaps(path: Path, qemu_img: QemuImg) -> dict[str, Any]:
    """Returns QEMU's description of the bitmaps, and their bits."""
    facts = json.loads(qemu_img("info", "--output=json", path).stdout)["format-specific"]["data"]
    found = {}
    with Opener(installed()) as opener:
        header = read_header(opener.image(str(path)).file)
        for one in facts.get("bitmaps", ()):
            start, length = ranges_of(header, bitmap_named(header, one["name"]))
            found[one["name"]] = (one["granularity"], one["flags"], start.tolist(), length.tolist())
    return found


@pytest.mark.parametrize("options", IMAGES.values(), ids=IMAGES)
def test_the_same_as_by_qemu(options: str, ext4_dir: Path, qemu_img: QemuImg) -> None:
    rng, path = random.Random(options), make(ext4_dir, options, qemu_img)
    other = ext4_dir / "other.qcow2"
    names: list[str] = []
    for step in range(10):
        start = rng.randrange(SIZE // 4096) * 4096
        qemu_io(path, f"write {start} 4k", format_name="qcow2")
        shutil.copy(path, other)
        if len(names) < 2 or rng.random() < 0.2:
            name, given = f"b{step}", rng.choice([[], ["-g", "512"], ["-g", "1M"]])
            changes = rng.choice([["--add"], ["--add", "--disable"]])
        else:
            name, given = rng.choice(names), []
            source = rng.choice([one for one in names if one != name])
            every = [["--clear"], ["--enable"], ["--disable"], ["--remove"], ["--merge", source]]
            changes = rng.choice([*every, ["--merge", source], ["--clear", "--merge", source]])
        assert main(["bitmap", "-q", *changes, *given, str(path), name]) == 0
        qemu_img("bitmap", *changes, *given, other, name)
        names = [one for one in [*names, name] if changes != ["--remove"] or one != name]
        names = list(dict.fromkeys(names))
        assert bitmaps(path, qemu_img) == bitmaps(other, qemu_img), (step, changes, name)
        # Any finding of qemu-img, leaks too, is a failure.
        qemu_img("check", "-q", "-f", "qcow2", path)


def test_undo_brings_the_bits_back(ext4_dir: Path, qemu_img: QemuImg) -> None:
    path = make(ext4_dir, "", qemu_img)
    vmconv.bitmap(path, "changes", ["add"])
    qemu_io(path, "write 1M 64k", format_name="qcow2")
    before = path.read_bytes()
    vmconv.bitmap(path, "changes", ["clear", "disable"], keep_undo=True)
    assert bitmaps(path, qemu_img)["changes"][1:] == ([], [], [])
    vmconv.undo(path)
    assert path.read_bytes() == before
    assert bitmaps(path, qemu_img)["changes"][2] == [MIB]


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("a", ["add"], UsageError, "has a bitmap 'a'"),
        ("other", ["remove"], UsageError, "no bitmap 'other'"),
        ("a", ["merge:other"], UsageError, "no bitmap 'other'"),
        ("a", ["merge"], UsageError, "'merge' is not add"),
        ("a", ["drop"], UsageError, "'drop' is not add"),
        ("a", [], UsageError, "no change"),
        ("x" * 1024, ["add"], UsageError, "bitmap name of 1024 bytes"),
        ("busy", ["clear"], PlanError, "in use"),
    ],
)
def test_what_is_refused_changes_nothing(
    name: str, changes: list[str], error: type[Exception], message: str, ext4_dir: Path, qemu_img: QemuImg
) -> None:
    path = make(ext4_dir, "", qemu_img)
    for one in ("a", "busy"):
        vmconv.bitmap(path, one, ["add"])
    data = path.read_bytes()
    at = data.index(b"busy") - 24 + 12
    data = data[:at] + (1).to_bytes(4, "big") + data[at + 4 :]
    path.write_bytes(data)
    with pytest.raises(error, match=message):
        vmconv.bitmap(path, name, changes)
    assert path.read_bytes() == data
    vmconv.bitmap(path, "busy", ["remove"])
    qemu_img("check", "-q", "-f", "qcow2", path)


@pytest.mark.parametrize("granularity", [1, 256, 3 * 512, 1 << 32])
def test_a_granularity_that_qemu_does_not_have(granularity: int, ext4_dir: Path, qemu_img: QemuImg) -> None:
    with pytest.raises(UsageError, match="is not a power of two from 512"):
        vmconv.bitmap(make(ext4_dir, "", qemu_img), "a", ["add"], granularity=granularity)


@pytest.mark.parametrize(("place", "byte"), [(11, 2), (15, 4), (16, 2)], ids=["table", "flags", "type"])
def test_the_check_finds_a_bitmap_that_qemu_does_not_open(
    place: int, byte: int, ext4_dir: Path, qemu_img: QemuImg
) -> None:
    path = make(ext4_dir, "", qemu_img)
    vmconv.bitmap(path, "changes", ["add"], granularity=65536)
    data = bytearray(path.read_bytes())
    data[data.index(b"changes") - 24 + place] = byte
    path.write_bytes(data)
    qemu_img("info", path, ok=(1,))
    report = vmconv.check(path)
    assert report is not None
    assert "bitmap 0: " in "".join(report.corruptions)


def test_version_2_is_refused(ext4_dir: Path, qemu_img: QemuImg) -> None:
    with pytest.raises(PlanError, match="version 2 of qcow2 has no bitmaps"):
        vmconv.bitmap(make(ext4_dir, "compat=0.10", qemu_img), "a", ["add"])


def test_a_snapshot_is_not_applied_below_a_bitmap(ext4_dir: Path, qemu_img: QemuImg) -> None:
    path = make(ext4_dir, "", qemu_img)
    vmconv.snapshot(path, "create", "one")
    vmconv.bitmap(path, "a", ["add"])
    with pytest.raises(PlanError, match="its bitmaps would not have"):
        vmconv.snapshot(path, "apply", "one")
    vmconv.bitmap(path, "a", ["remove"])
    vmconv.snapshot(path, "apply", "one")
    qemu_img("check", "-q", "-f", "qcow2", path)


def test_a_bitmap_of_another_image_is_merged_as_qemu_merges_it(tmp_path: Path, qemu_img: QemuImg) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu_img("create", "-f", "qcow2", base, "8M")
    qemu_img("create", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top)
    qemu_img("bitmap", "--add", "-g", "64k", base, "all")
    qemu_img("bitmap", "--add", "-g", "32k", top, "new")
    qemu_io(base, "write -P 1 0 100k")
    qemu_io(top, "write -P 2 3M 70k")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for path in (base, top):
        shutil.copy(path, theirs)
    qemu_img("bitmap", "--merge", "new", "-b", theirs / top.name, "-F", "qcow2", theirs / base.name, "all")
    before = top.read_bytes()
    assert main(["bitmap", "-q", "--merge", "new", "-b", str(top), "-F", "qcow2", str(base), "all"]) == 0
    assert top.read_bytes() == before
    found = bitmaps(base, qemu_img)
    assert found == bitmaps(theirs / base.name, qemu_img)
    # Both that of the base and that of the top.
    assert found["all"][2:] == ([0, 3 * MIB], [128 << 10, 128 << 10])
    qemu_img("check", base)


def test_merging_from_another_image_needs_one_that_fits(tmp_path: Path, qemu_img: QemuImg) -> None:
    base, small, raw = (tmp_path / name for name in ("base.qcow2", "small.qcow2", "disk.raw"))
    for path, size in ((base, "8M"), (small, "4M")):
        qemu_img("create", "-f", "qcow2", path, size)
        qemu_img("bitmap", "--add", path, "a")
    raw.write_bytes(bytes(MIB))
    before = base.read_bytes()
    for merge_from, changes, error, message in (
        (small, ["merge:a"], PlanError, "has 8388608 bytes, and small.qcow2 with bitmap 'a' has 4194304"),
        (raw, ["merge:a"], UsageError, "is raw, and base.qcow2 is qcow2"),
        (small, ["clear"], UsageError, "nothing is merged"),
    ):
        with pytest.raises(error, match=message):
            vmconv.bitmap(base, "a", changes, merge_from=merge_from)
    with pytest.raises(UsageError, match="and no image"):
        vmconv.bitmap(base, "a", ["merge:b"], merge_format="qcow2")
    assert base.read_bytes() == before
