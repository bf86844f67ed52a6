"""`vmconv resize`: every format grows and shrinks in its own file, as QEMU reads it, and nothing else changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk, qemu_io
from support.variants import Variant, make, qemu_name, self_contained, title
from vmconv.cli.main import main
from vmconv.conversion import pipeline
from vmconv.errors import AccessError, BackendError, PlanError, UsageError

Capture = pytest.CaptureFixture[str]

REFUSED = {
    "vmdk-streamOptimized": "is always rebuilt as a whole",
    "vmdk-twoGbMaxExtentSparse": "refers to disk-s001.vmdk, which is a disk of its own",
}
"""Images that cannot be changed in place anywhere."""
REFUSED_ON_EXT4 = REFUSED | {
    "vmdk-monolithicFlat": "is part of the source",
    "vmdk-twoGbMaxExtentFlat": "is part of the source",
    "vmdk-vmfs": "is part of the source",
}


def state(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in path.parent.iterdir()}


def assert_resized(path: Path, variant: Variant, disk: Path, size: int, qemu_img: QemuImg) -> None:
    """Resizes an image with the content of a raw disk, and the disk, and asks QEMU whether they are equal."""
    before, names = vmconv.info(path), set(state(path))
    result = vmconv.resize(path, size, shrink=True)
    os.truncate(disk, size)
    qemu_img("compare", "-f", qemu_name(variant), "-F", "raw", path, disk)
    after = vmconv.info(path)
    assert after["virtual-size"] == size
    for name in ("format", "cluster-size"):
        assert after.get(name) == before.get(name)
    assert (set(state(path)), result.losses) == (names, ())
    report = vmconv.check(path)
    assert report is None or not (report.errors or report.corruptions or report.leaks)


def assert_refused(path: Path, size: int, message: str) -> None:
    before = state(path)
    with pytest.raises((PlanError, AccessError), match=message):
        vmconv.resize(path, size)
    assert state(path) == before


@pytest.mark.parametrize("size", [24 * MIB, 5 * MIB], ids=["grow", "shrink"])
@pytest.mark.parametrize("variant", self_contained(), ids=title)
def test_each_format_on_a_filesystem_that_shares(
    variant: Variant, size: int, reflink_dir: Path, qemu_img: QemuImg
) -> None:
    disk = make_disk(reflink_dir / "disk.raw", 16 * MIB)
    path = make(disk, variant, reflink_dir)
    if title(variant) in REFUSED:
        assert_refused(path, 24 * MIB, REFUSED[title(variant)])
    else:
        assert_resized(path, variant, disk, size, qemu_img)


@pytest.mark.parametrize("size", [24 * MIB, 5 * MIB], ids=["grow", "shrink"])
@pytest.mark.parametrize("variant", self_contained(), ids=title)
def test_each_format_in_its_own_blocks_on_ext4(variant: Variant, size: int, ext4_dir: Path, qemu_img: QemuImg) -> None:
    disk = make_disk(ext4_dir / "disk.raw", 16 * MIB)
    path = make(disk, variant, ext4_dir)
    if title(variant) in REFUSED_ON_EXT4:
        assert_refused(path, 24 * MIB, REFUSED_ON_EXT4[title(variant)])
        return
    inode = path.stat().st_ino
    assert_resized(path, variant, disk, size, qemu_img)
    assert path.stat().st_ino == inode


@pytest.mark.parametrize("base_size", [16 * MIB, 48 * MIB], ids=["shorter base", "longer base"])
def test_a_base_does_not_show_behind_the_old_end(base_size: int, tmp_path: Path, qemu_img: QemuImg) -> None:
    base = make_disk(tmp_path / "base.raw", base_size)
    content = base.read_bytes()
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", tmp_path / "top.qcow2", "20M")
    qemu_io(tmp_path / "top.qcow2", "write -P 7 1M 1M", format_name="qcow2")
    expected = tmp_path / "expected.raw"
    expected.write_bytes(content[: 20 * MIB])
    qemu_io(expected, "write -P 7 1M 1M", format_name="raw")
    os.truncate(expected, 32 * MIB)
    vmconv.resize(tmp_path / "top.qcow2", 32 * MIB)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", tmp_path / "top.qcow2", expected)
    assert vmconv.info(tmp_path / "top.qcow2")["backing-filename"] == "base.raw"
    assert base.read_bytes() == content


def with_bytes_behind_the_end(path: Path, name: str) -> Path:
    """Returns a copy of an image with bytes in its last cluster, behind the end of the disk, that no guest can see."""
    dirty = path.with_name(name)
    dirty.write_bytes(path.read_bytes())
    last = max(row.offset + row.length for row in vmconv.map_disk(path) if row.offset is not None)
    with dirty.open("r+b") as file:
        file.seek(last)
        file.write(b"what no guest has written")
    return dirty


@pytest.mark.parametrize("made_by", ["qemu-img", "vmconv"])
def test_bytes_behind_the_old_end_do_not_show_on_ext4(made_by: str, ext4_dir: Path, qemu_img: QemuImg) -> None:
    disk = make_disk(ext4_dir / "disk.raw", 4 * MIB + 1536, unit=512)
    path = ext4_dir / "disk.qcow2"
    if made_by == "vmconv":
        vmconv.convert(disk, path)
    else:
        qemu_img("convert", "-f", "raw", "-O", "qcow2", disk, path)
    dirty = with_bytes_behind_the_end(path, "dirty.qcow2")
    assert_resized(path, ("qcow2", ""), disk, 8 * MIB, qemu_img)
    assert_refused(dirty, 8 * MIB, "not whole blocks|not zero")


def test_bytes_behind_the_old_end_do_not_show_where_blocks_are_shared(reflink_dir: Path, qemu_img: QemuImg) -> None:
    disk = make_disk(reflink_dir / "disk.raw", 4 * MIB + 1536, unit=512)
    vmconv.convert(disk, reflink_dir / "disk.qcow2")
    dirty = with_bytes_behind_the_end(reflink_dir / "disk.qcow2", "dirty.qcow2")
    assert_resized(dirty, ("qcow2", ""), disk, 8 * MIB, qemu_img)


def test_what_is_cut_off_is_zero_when_the_disk_grows_again(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.raw", 4 * MIB)
    vmconv.convert(disk, tmp_path / "disk.qcow2")
    first = disk.read_bytes()[:MIB]
    for path in (disk, tmp_path / "disk.qcow2"):
        vmconv.resize(path, MIB, shrink=True)
        vmconv.resize(path, 3 * MIB, relative=True)
    assert disk.read_bytes() == first + bytes(3 * MIB)
    assert vmconv.compare(disk, tmp_path / "disk.qcow2")


def test_an_undo_file_brings_the_old_disk_back(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.raw", 4 * MIB)
    path = tmp_path / "disk.qcow2"
    vmconv.convert(disk, path)
    before = path.read_bytes()
    vmconv.resize(path, MIB, shrink=True, keep_undo=True)
    vmconv.undo(path)
    assert path.read_bytes() == before


def test_an_undo_file_is_not_made_useless(tmp_path: Path) -> None:
    path = make_disk(tmp_path / "disk.raw", 4 * MIB)
    before = path.read_bytes()
    vmconv.resize(path, MIB, shrink=True, keep_undo=True)
    assert_refused(path, 2 * MIB, "disk.raw.vmconv-undo: would no longer undo")
    vmconv.undo(path)
    assert path.read_bytes() == before


def test_a_size_is_changed_once_though_the_first_run_was_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    vmconv.convert(make_disk(tmp_path / "disk.raw", 8 * MIB), path)
    code = (
        "import os, sys, vmconv\nfrom vmconv.inplace import change\n"
        "change.Change._finish_file = lambda *_: os._exit(9)\n"
        "vmconv.resize(sys.argv[1], -2 << 20, relative=True, shrink=True)"
    )
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == 9
    with pytest.raises(AccessError, match="was interrupted"):
        vmconv.resize(path, -2 * MIB, relative=True, shrink=True)
    vmconv.recover(path)
    assert vmconv.info(path)["virtual-size"] == 6 * MIB


def test_a_size_that_the_format_would_round_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    vmconv.create(path, 32 * MIB, options={"subformat": "fixed"})
    assert_refused(path, 32 * MIB + 512, "cannot have 33554944 bytes")


def test_bitmaps_are_kept(tmp_path: Path, qemu_img: QemuImg) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "16M")
    qemu_img("bitmap", "--add", path, "one")
    vmconv.resize(path, 24 * MIB)
    qemu_img("check", path)
    (bitmap,) = vmconv.info(path)["format-specific"]["data"]["bitmaps"]
    assert bitmap == {"name": "one", "granularity": 65536, "flags": ["auto"]}


def test_a_disk_in_use_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    vmconv.convert(make_disk(tmp_path / "disk.raw", 4 * MIB), path)
    with subprocess.Popen(["qemu-io", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guest:
        assert guest.stdin and guest.stdout
        guest.stdin.write(b"write 0 512\n")
        guest.stdin.flush()
        guest.stdout.readline()
        assert_refused(path, 8 * MIB, "open for writing in another process")
        guest.stdin.close()


def test_a_disk_with_snapshots_is_named_and_kept(tmp_path: Path, qemu_img: QemuImg) -> None:
    path = tmp_path / "disk.qcow2"
    vmconv.convert(make_disk(tmp_path / "disk.raw", 4 * MIB), path)
    qemu_img("snapshot", "-c", "one", path)
    with pytest.raises(PlanError, match=r"disk\.qcow2: in place, .* lost: 1 internal snapshot") as caught:
        vmconv.resize(path, 8 * MIB)
    assert caught.value.hint and caught.value.hint.startswith("--keep-undo allows it")
    vmconv.resize(path, 8 * MIB, keep_undo=True)
    vmconv.undo(path)
    assert [one["name"] for one in vmconv.info(path)["snapshots"]] == ["one"]


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"size": MIB}, PlanError, "what lies behind 1048576 would be lost"),
        ({"size": -MIB, "relative": True}, PlanError, "what lies behind 3145728 would be lost"),
        ({"size": 0, "shrink": True}, UsageError, "size 0 is not a positive multiple of 512"),
        ({"size": -5 * MIB, "relative": True, "shrink": True}, UsageError, "size -1048576 is not"),
        ({"size": 1000, "shrink": True}, UsageError, "size 1000 is not"),
        ({"size": "5M"}, UsageError, "size"),
        ({"size": 1 << 63}, UsageError, "is more than 4611686018427387904, the largest disk"),
    ],
)
def test_a_size_that_cannot_be_is_refused(
    keywords: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    disk = make_disk(tmp_path / "disk.raw", 4 * MIB)
    before = disk.read_bytes()
    with pytest.raises(error, match=message):
        vmconv.resize(disk, **keywords)
    assert disk.read_bytes() == before


def test_the_command_line_takes_sizes_with_a_sign(tmp_path: Path, capsys: Capture) -> None:
    disk = str(make_disk(tmp_path / "disk.raw", 4 * MIB))
    assert main(["resize", disk, "+1M"]) == 0
    assert "kept" in capsys.readouterr().out
    assert main(["resize", "--shrink", "--output", "json", disk, "-2M"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["plan", "result"]
    assert os.path.getsize(disk) == 3 * MIB
    assert main(["resize", disk, "-1M"]) == 1
    assert "--shrink" in capsys.readouterr().err


def test_a_qed_of_zero_clusters_only_is_resized(tmp_path: Path, qemu_img: QemuImg) -> None:
    path = tmp_path / "disk.qed"
    qemu_img("create", "-f", "qed", path, "4M")
    qemu_io(path, "write -z 0 1M")
    vmconv.resize(path, 8 * MIB)
    assert json.loads(qemu_img("info", "--output=json", path).stdout)["virtual-size"] == 8 * MIB
    qemu_img("check", "-f", "qed", path)
    (tmp_path / "empty.raw").touch()
    os.truncate(tmp_path / "empty.raw", 8 * MIB)
    qemu_img("compare", "-f", "qed", "-F", "raw", path, tmp_path / "empty.raw")


def test_a_resize_is_planned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = make_disk(tmp_path / "disk.raw", 4 * MIB)
    vmconv.convert(raw, tmp_path / "disk.qcow2")
    planned: list[str] = []
    real = pipeline.prepared

    def counted(*requests: Any) -> Any:
        planned.extend(one.target for one in requests)
        return real(*requests)

    monkeypatch.setattr(pipeline, "prepared", counted)
    vmconv.resize(tmp_path / "disk.qcow2", 8 * MIB)
    assert planned == [str(tmp_path / "disk.qcow2")]


def test_json_names_the_file_as_other_changes_in_place_do(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "disk.qcow2"
    vmconv.convert(make_disk(tmp_path / "disk.raw", 4 * MIB), path)
    for command in (["resize", str(path), "8M"], ["snapshot", "-c", "one", str(path)]):
        assert main([*command, "--output", "json"]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (result["event"], result["path"]) == ("result", str(path))
        assert not {"source", "target", "filename"} & set(result)


def blocks(path: Path) -> int:
    subprocess.run(["sync", path], check=True)
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("size", [6 * MIB, 3 * MIB], ids=["grow", "shrink"])
def test_a_raw_disk_keeps_the_space_that_it_has_allocated(size: int, any_dir: Path, qemu_img: QemuImg) -> None:
    """Space without payload is what a preallocated disk was made for; QEMU keeps it, too."""
    path = any_dir / "disk.raw"
    qemu_img("create", "-f", "raw", "-o", "preallocation=falloc", path, "4M")
    qemu_io(path, "write -P 7 0 1M", format_name="raw")
    inode = path.stat().st_ino
    vmconv.resize(path, size, shrink=True)
    assert (path.stat().st_size, path.stat().st_ino) == (size, inode)
    assert blocks(path) >= min(size, 4 * MIB)
    assert path.read_bytes() == (b"\7" * MIB).ljust(size, b"\0")


@pytest.mark.parametrize("way", ["falloc", "full"])
def test_the_space_that_a_raw_disk_grows_by_is_allocated(way: str, any_dir: Path, capsys: Capture) -> None:
    disk = make_disk(any_dir / "disk.raw", 4 * MIB)
    content = disk.read_bytes()
    before = blocks(disk)
    assert main(["resize", f"--preallocation={way}", str(disk), "+2M"]) == 0
    assert capsys.readouterr().err == ""
    assert blocks(disk) >= before + 2 * MIB
    assert disk.read_bytes() == content.ljust(6 * MIB, b"\0")


def test_without_space_a_raw_disk_stays_as_it_is(any_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = make_disk(any_dir / "disk.raw", 4 * MIB)
    before, content, when = blocks(disk), disk.read_bytes(), disk.stat().st_mtime_ns
    with pytest.raises(BackendError, match="no space can be allocated: No space left"):
        vmconv.resize(disk, 1 << 43, preallocation="falloc")

    def failing(*_: object, **__: object) -> None:
        raise PlanError("stopped")

    monkeypatch.setattr("vmconv.conversion.editing.carry_out", failing)
    with pytest.raises(PlanError, match="stopped"):
        vmconv.resize(disk, 6 * MIB, preallocation="falloc")
    assert (blocks(disk), disk.read_bytes(), disk.stat().st_mtime_ns) == (before, content, when)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("disk.qcow2", ["+1M"], "only for a raw file"),
        ("disk.raw", ["--keep-undo", "+1M"], "only for a raw file"),
        ("disk.raw", ["--shrink", "2M"], "becomes smaller"),
    ],
)
def test_preallocation_that_cannot_be_is_refused(
    name: str, arguments: list[str], said: str, tmp_path: Path, capsys: Capture
) -> None:
    disk = make_disk(tmp_path / "disk.raw", 4 * MIB)
    vmconv.convert(disk, tmp_path / "disk.qcow2")
    before = state(disk)
    assert main(["resize", "--preallocation=falloc", str(tmp_path / name), *arguments]) in (1, 2)
    assert said in capsys.readouterr().err
    assert state(disk) == before
