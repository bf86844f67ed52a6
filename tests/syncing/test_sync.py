"""Images that are brought up to date with their source, on real filesystems; qemu-img compares the results."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk, process_io, qemu_io
from support.mounts import Mounts
from support.variants import QEMU_NAMES, Variant, has_identity, options, self_contained, title
from vmconv.errors import AccessError, BackendError, PlanError, UsageError, VerifyError, ZeroCopyError
from vmconv.model.sources import stamp_of
from vmconv.system import linux

KIB = 1 << 10
VARIANTS = [variant for variant in self_contained() if "streamOptimized" not in variant[1]]
IDENTITY = "01234567-89ab-4cde-8f01-23456789abcd"


def write(disk: Path, offset: int, length: int, seed: int = 1) -> None:
    with disk.open("r+b") as file:
        file.seek(offset)
        file.write(random.Random(seed).randbytes(length))
        os.fsync(file.fileno())


def same(qemu_img: QemuImg, one: Path, other: Path, other_format: str, one_format: str = "raw") -> None:
    """Fails unless QEMU sees the same disk, or a padded one, in both."""
    qemu_img("compare", "-f", one_format, "-F", QEMU_NAMES.get(other_format, other_format), one, other)


def content_ids(path: Path, format_name: str) -> dict[str, Any]:
    """Returns the ids that change with the content."""
    data = vmconv.info(str(path), format_name=format_name).get("format-specific", {}).get("data", {})
    names = ("modification-uuid", "data-write-guid", "file-write-guid", "cid")
    return {name: data[name] for name in names if name in data}


@pytest.fixture
def disk(xfs_dir: Path) -> Path:
    return make_disk(xfs_dir / "disk.raw", 40 * MIB)


@pytest.fixture
def other_dir(mounts: Mounts, xfs_dir: Path) -> Any:
    """A directory on another filesystem that shares blocks."""
    directory = mounts.get("btrfs") / "other"
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)


# -- where blocks can be shared


@pytest.mark.parametrize("variant", VARIANTS, ids=title)
def test_a_target_shares_what_changed_and_stays_what_it_is(
    reflink_dir: Path, qemu_img: QemuImg, variant: Variant
) -> None:
    disk, target = make_disk(reflink_dir / "disk.raw", 40 * MIB), reflink_dir / "target.img"
    name = variant[0]
    identity = {"identity": IDENTITY} if has_identity(variant) else {}
    vmconv.convert(disk, target, target_format=name, options=options(variant) | identity)
    before, ids = vmconv.info(target, format_name=name), content_ids(target, name)
    write(disk, 5 * MIB, 64 * KIB)
    write(disk, 33 * MIB, 4 * KIB)
    result = vmconv.sync(disk, target, target_format=name, zero_copy="require", options=options(variant))
    assert (result.changed, result.ranges, result.compared, result.totals.copied) == (68 * KIB, 2, 0, 0)
    same(qemu_img, disk, target, name)
    after = vmconv.info(target, format_name=name)
    assert [after.get(key) for key in ("virtual-size", "cluster-size", "identity")] == [
        before.get(key) for key in ("virtual-size", "cluster-size", "identity")
    ]
    now = content_ids(target, name)
    assert now.keys() == ids.keys()
    assert all(now[key] != ids[key] for key in ids)
    assert {path.name for path in reflink_dir.iterdir()} >= {"disk.raw", "target.img"}
    assert not [path for path in reflink_dir.iterdir() if path.name.startswith(".vmconv")]


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("qcow2", {"cluster_size": "4K", "compat": "0.10"}),
        ("qcow2", {"extended_l2": "on", "cluster_size": "64K", "refcount_bits": "64"}),
        ("qcow2", {"lazy_refcounts": "on"}),
        ("qed", {"cluster_size": "128K", "table_size": "2"}),
        ("parallels", {"cluster_size": "64K"}),
        ("vhdx", {"block_size": "1M", "logical_sector_size": "4096", "log_size": "2M"}),
        ("vhd", {"subformat": "fixed", "azure": "on"}),
        ("vhd", {"force_size": "off"}),
        ("vmdk", {"adapter_type": "pvscsi", "hwversion": "19", "zeroed_grain": "on"}),
    ],
    ids=str,
)
def test_the_options_of_a_target_are_told_from_it(xfs_dir: Path, name: str, given: dict[str, str]) -> None:
    disk, target = make_disk(xfs_dir / "disk.raw", 40 * MIB + 4096), xfs_dir / "target.img"
    vmconv.convert(disk, target, target_format=name, options=given)
    size = vmconv.info(target, format_name=name)["virtual-size"]
    write(disk, MIB, 4096)
    # An option that is given has to be the target's.
    vmconv.sync(disk, target, target_format=name, options=given)
    assert vmconv.info(target, format_name=name)["virtual-size"] == size
    assert vmconv.compare(disk, target, right_format=name)


def test_other_options_are_refused(disk: Path) -> None:
    target = disk.with_name("target.qcow2")
    vmconv.sync(disk, target, options={"cluster_size": "64K"})
    with pytest.raises(UsageError, match="cluster_size is 65536"):
        vmconv.sync(disk, target, options={"cluster_size": "4K"})


def test_what_did_not_change_is_not_written(disk: Path) -> None:
    target = disk.with_name("target.qcow2")
    assert vmconv.sync(disk, target).evidence == "the target is new"
    inode = target.stat().st_ino
    result = vmconv.sync(disk, target)
    assert (result.backend, result.changed) == ("none", 0)
    assert target.stat().st_ino == inode


def test_no_payload_is_read(reflink_dir: Path) -> None:
    grown = []
    for size in (16 * MIB, 128 * MIB):
        disk, target = reflink_dir / f"{size}.raw", reflink_dir / f"{size}.qcow2"
        with disk.open("wb") as file:
            for _ in range(size // MIB):
                file.write(os.urandom(MIB))
        vmconv.convert(disk, target)
        for at in range(0, size, 6400 * KIB):
            write(disk, at, 64 * KIB)
        vmconv.sync(disk, reflink_dir / "warm.qcow2")
        (reflink_dir / "warm.qcow2").unlink()
        before = process_io()
        assert vmconv.sync(disk, target).changed == len(range(0, size, 6400 * KIB)) * 64 * KIB
        after = process_io()
        grown.append({key: after[key] - before[key] for key in ("rchar", "wchar", "read_bytes")})
    small, large = grown
    assert all(large[key] - small[key] < MIB for key in small), grown
    assert large["rchar"] < 2 * MIB


def test_owner_mode_and_attributes_stay(disk: Path) -> None:
    target = disk.with_name("target.qcow2")
    vmconv.sync(disk, target)
    os.chown(target, 54321, 54322)
    target.chmod(0o640)
    os.setxattr(target, "user.note", b"kept")
    disk.chmod(0o644)
    write(disk, 0, 4096)
    vmconv.sync(disk, target)
    status = target.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (54321, 54322, 0o640)
    assert os.getxattr(target, "user.note") == b"kept"


def test_a_link_keeps_leading_to_the_target(disk: Path) -> None:
    (disk.parent / "there").mkdir()
    target, link = disk.parent / "there" / "target.qcow2", disk.with_name("link.qcow2")
    vmconv.sync(disk, target)
    link.symlink_to(target)
    write(disk, 0, 4096)
    vmconv.sync(disk, link)
    assert link.is_symlink()
    assert vmconv.compare(disk, target)


@pytest.mark.parametrize("name", ["qcow2", "vhd", "vdi", "vhdx", "vmdk", "qed", "parallels", "raw"])
def test_the_disk_grows_with_the_source_and_shrinks_only_on_demand(xfs_dir: Path, qemu_img: QemuImg, name: str) -> None:
    disk, target = make_disk(xfs_dir / "disk.raw", 20 * MIB), xfs_dir / "target.img"
    vmconv.sync(disk, target, target_format=name)
    os.truncate(disk, 30 * MIB)
    write(disk, 25 * MIB, MIB)
    vmconv.sync(disk, target, target_format=name)
    assert vmconv.info(target, format_name=name)["virtual-size"] == 30 * MIB
    same(qemu_img, disk, target, name)
    os.truncate(disk, 16 * MIB)
    before = target.read_bytes()
    with pytest.raises(PlanError, match="31457280 bytes, the source has 16777216"):
        vmconv.sync(disk, target, target_format=name)
    assert target.read_bytes() == before
    vmconv.sync(disk, target, target_format=name, shrink=True)
    assert vmconv.info(target, format_name=name)["virtual-size"] == 16 * MIB
    same(qemu_img, disk, target, name)


@pytest.mark.parametrize("mode", ["sample", "bytes", "qemu"])
def test_a_result_is_verified_against_the_source(disk: Path, other_dir: Path, mode: Any) -> None:
    for target in (disk.with_name("target.qcow2"), other_dir / "target.qcow2"):
        vmconv.sync(disk, target)
        write(disk, 3 * MIB, 64 * KIB, seed=len(str(target)))
        vmconv.sync(disk, target, verify=mode)
        assert vmconv.compare(disk, target)


# -- across filesystems


@pytest.mark.parametrize("variant", VARIANTS, ids=title)
def test_only_what_changed_is_copied(ext4_dir: Path, other_dir: Path, qemu_img: QemuImg, variant: Variant) -> None:
    disk, target = make_disk(ext4_dir / "disk.raw", 40 * MIB), other_dir / "target.img"
    name = variant[0]
    vmconv.sync(disk, target, target_format=name, options=options(variant))
    write(disk, 5 * MIB, 64 * KIB)
    read: list[tuple[int, int]] = []
    result = vmconv.sync(disk, target, target_format=name, comparing=lambda *step: read.append(step))
    # Some formats keep a little payload at places that cannot be shared.
    assert result.changed == 64 * KIB <= result.totals.copied < 2 * MIB
    assert result.evidence.startswith("both disks were read")
    assert read[0] == (0, result.compared) and read[-1] == (result.compared, result.compared)
    same(qemu_img, disk, target, name)


@pytest.mark.parametrize("variant", VARIANTS, ids=title)
def test_only_what_changed_is_written_where_nothing_is_shared(
    ext4_dir: Path, tmp_path: Path, qemu_img: QemuImg, variant: Variant
) -> None:
    disk, target = make_disk(tmp_path / "disk.raw", 40 * MIB), ext4_dir / "target.img"
    name = variant[0]
    vmconv.sync(disk, target, target_format=name, options=options(variant))
    for path in ext4_dir.iterdir():
        path.chmod(0o640)
        os.chown(path, 54321, 54322)
    disk.chmod(0o644)
    before, ids = vmconv.info(target, format_name=name), content_ids(target, name)
    for number, (at, length) in enumerate([(5 * MIB, 64 * KIB), (20 * MIB + 512, 4 * KIB), (39 * MIB, MIB)]):
        write(disk, at, length, seed=number)
    # A part of it is new payload where the target has none, and a part has become zeros.
    with disk.open("r+b") as file:
        file.seek(8 * MIB)
        file.write(bytes(128 * KIB))
    result = vmconv.sync(disk, target, target_format=name)
    assert result.backend == "in-place"
    assert result.totals.copied < 4 * MIB
    same(qemu_img, disk, target, name)
    after = vmconv.info(target, format_name=name)
    assert [after.get(key) for key in ("virtual-size", "cluster-size", "identity")] == [
        before.get(key) for key in ("virtual-size", "cluster-size", "identity")
    ]
    assert all(content_ids(target, name)[key] != ids[key] for key in ids)
    assert (target.stat().st_uid, target.stat().st_mode & 0o777) == (54321, 0o640)
    assert vmconv.sync(disk, target, target_format=name).backend == "none"
    assert not [path for path in ext4_dir.iterdir() if ".vmconv" in path.name]
    report = vmconv.check(target, format_name=name) if name != "raw" else None
    assert report is None or not (report.corruptions or report.leaks or report.errors)


@pytest.mark.parametrize("name", ["qcow2", "vmdk", "vhdx", "vdi", "parallels", "raw"])
def test_a_disk_grows_in_place(ext4_dir: Path, tmp_path: Path, qemu_img: QemuImg, name: str) -> None:
    disk, target = make_disk(tmp_path / "disk.raw", 20 * MIB), ext4_dir / "target.img"
    vmconv.sync(disk, target, target_format=name)
    os.truncate(disk, 30 * MIB)
    write(disk, 25 * MIB, MIB)
    vmconv.sync(disk, target, target_format=name)
    assert vmconv.info(target, format_name=name)["virtual-size"] == 30 * MIB
    same(qemu_img, disk, target, name)


def test_payload_of_other_programs_images_stays(ext4_dir: Path, tmp_path: Path, qemu_img: QemuImg) -> None:
    disk, target = make_disk(tmp_path / "disk.raw", 20 * MIB), ext4_dir / "target.qcow2"
    qemu_img("convert", "-O", "qcow2", "-o", "cluster_size=4096", disk, target)
    write(disk, 3 * MIB, 4096)
    result = vmconv.sync(disk, target)
    # Both disks are compared in pieces of 64 KiB.
    assert result.backend == "in-place"
    assert result.totals.copied <= 64 * KIB
    qemu_img("check", target)
    same(qemu_img, disk, target, "qcow2")


def test_too_much_for_a_journal_is_copied_as_a_whole(
    ext4_dir: Path, tmp_path: Path, qemu_img: QemuImg, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, target = make_disk(tmp_path / "disk.raw", 20 * MIB), ext4_dir / "target.raw"
    vmconv.sync(disk, target)
    write(disk, 0, 4096)
    monkeypatch.setattr("vmconv.syncing.in_place.MOST_JOURNALLED", 65535)
    found = vmconv.sync_plan(disk, target)
    assert "65536 bytes would be journalled, 65535 at most" in found.evidence
    assert vmconv.sync(disk, target).backend == "copy"
    same(qemu_img, disk, target, "raw")


def test_a_plan_says_what_is_written_twice(ext4_dir: Path, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.raw", 20 * MIB)
    for name, twice in (("raw", True), ("qcow2", False)):
        target = ext4_dir / f"target.{name}"
        vmconv.sync(disk, target)
        write(disk, 0, 4096, seed=len(name))
        plan = vmconv.sync_plan(disk, target).plan
        assert plan is not None
        assert [("written to a journal first" in copy.reason) for copy in plan.copies] == [twice]
        vmconv.sync(disk, target)


def test_in_place_qemu_cannot_verify(ext4_dir: Path, tmp_path: Path) -> None:
    disk, target = make_disk(tmp_path / "disk.raw", 8 * MIB), ext4_dir / "target.qcow2"
    vmconv.sync(disk, target)
    write(disk, 0, 4096)
    with pytest.raises(UsageError, match="has no name meanwhile"):
        vmconv.sync(disk, target, verify="qemu")
    vmconv.sync(disk, target, verify="bytes")


def test_an_unchanged_source_is_known_by_the_record(ext4_dir: Path, other_dir: Path) -> None:
    disk, target = make_disk(ext4_dir / "disk.raw", 40 * MIB), other_dir / "target.qcow2"
    vmconv.sync(disk, target)
    result = vmconv.sync(disk, target)
    assert (result.backend, result.compared) == ("none", 0)
    assert "the source is unchanged" in result.evidence


def test_layers_that_were_made_since_are_what_changed(ext4_dir: Path, other_dir: Path, qemu_img: QemuImg) -> None:
    disk = make_disk(ext4_dir / "disk.raw", 40 * MIB)
    base, top, above = (ext4_dir / name for name in ("base.qcow2", "top.qcow2", "above.qcow2"))
    qemu_img("convert", "-O", "qcow2", disk, base)
    target = other_dir / "target.vhdx"
    vmconv.sync(base, target)
    qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top, "48M")
    qemu_io(top, "write -P 7 1M 64k", "write -z 9M 128k", "write -P 9 44M 64k")
    result = vmconv.sync(top, target)
    assert (result.compared, result.evidence) == (0, "layers made since the last sync: top.qcow2")
    assert result.totals.copied < 2 * MIB
    same(qemu_img, top, target, "vhdx", "qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", top.name, "-F", "qcow2", above)
    qemu_io(above, "write -P 8 2M 64k")
    assert "above.qcow2" in vmconv.sync(above, target).evidence
    same(qemu_img, above, target, "vhdx", "qcow2")


def test_a_base_that_was_written_to_is_no_evidence(ext4_dir: Path, other_dir: Path, qemu_img: QemuImg) -> None:
    base, top, target = ext4_dir / "base.raw", ext4_dir / "top.qcow2", other_dir / "target.qcow2"
    make_disk(base, 40 * MIB)
    vmconv.sync(base, target)
    qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "raw", top)
    write(base, 12 * MIB, 4096)
    assert vmconv.sync(top, target).evidence.startswith("both disks were read")
    same(qemu_img, top, target, "qcow2", "qcow2")


def snapshot(disk: Path, name: str) -> Path:
    copy = disk.with_name(name)
    subprocess.run(["cp", "--reflink=always", disk, copy], check=True)
    return copy


def test_a_snapshot_of_the_last_sync_tells_what_changed(disk: Path, other_dir: Path, qemu_img: QemuImg) -> None:
    first, target = snapshot(disk, "first.raw"), other_dir / "target.vmdk"
    vmconv.sync(first, target)
    write(disk, 7 * MIB, 64 * KIB)
    second = snapshot(disk, "second.raw")
    result = vmconv.sync(second, target, since=first)
    assert (result.changed, result.compared) == (64 * KIB, 0)
    assert result.totals.copied < MIB
    same(qemu_img, second, target, "vmdk")
    # The last pass: the disk itself, since the snapshot of the pass before.
    write(disk, 0, 4 * KIB)
    assert vmconv.sync(disk, target, since=second).changed == 4 * KIB
    same(qemu_img, disk, target, "vmdk")


def test_wrong_evidence_is_refused(disk: Path, other_dir: Path) -> None:
    first, target = snapshot(disk, "first.raw"), other_dir / "target.qcow2"
    with pytest.raises(UsageError, match="does not exist"):
        vmconv.sync(disk, target, since=first)
    vmconv.convert(first, target)
    with pytest.raises(PlanError, match="has no record"):
        vmconv.sync(disk, target, since=first)
    assert vmconv.sync(first, target).backend == "none"
    other = snapshot(disk, "other.raw")
    with pytest.raises(AccessError, match="is not the disk"):
        vmconv.sync(disk, target, since=other)
    write(first, 9 * MIB, 4096)
    with pytest.raises(AccessError, match="was modified since"):
        vmconv.sync(disk, target, since=first)


def test_the_same_sync_again_finds_nothing_to_do(disk: Path, other_dir: Path) -> None:
    first, target = snapshot(disk, "first.raw"), other_dir / "target.qcow2"
    vmconv.sync(first, target)
    write(disk, 5 * MIB, 64 * KIB)
    assert vmconv.sync(disk, target, since=first).changed == 64 * KIB
    first.unlink()
    again = vmconv.sync(disk, target, since=first)
    assert (again.backend, again.compared) == ("none", 0)
    assert again.evidence == "the record of the last sync: the source is unchanged"


@pytest.mark.parametrize(
    ("name", "warns"),
    [("target.vmss", True), ("TARGET.VMEM", True), ("target.save", True), ("other.vmss", False), ("target.txt", False)],
)
def test_a_saved_state_beside_the_target_is_named(name: str, warns: bool, ext4_dir: Path, other_dir: Path) -> None:
    disk, target = make_disk(ext4_dir / "disk.raw", 8 * MIB), other_dir / "target.vmdk"
    vmconv.sync(disk, target)
    (other_dir / name).write_bytes(b"")
    write(disk, 0, 4096)
    said = [text for text in vmconv.sync(disk, target).warnings if "saved state" in text]
    assert said == (
        [f"{other_dir / name}: if it is a saved state of this machine, do not resume it on the synced disk"]
        if warns
        else []
    )


def test_zero_copy_can_be_required(ext4_dir: Path, other_dir: Path) -> None:
    disk, target = make_disk(ext4_dir / "disk.raw", 8 * MIB), other_dir / "target.qcow2"
    vmconv.sync(disk, target)
    write(disk, 0, 4096)
    before = target.read_bytes()
    with pytest.raises(ZeroCopyError):
        vmconv.sync(disk, target, zero_copy="require")
    assert target.read_bytes() == before


# -- bitmaps


@pytest.fixture
def recorded(ext4_dir: Path, other_dir: Path, qemu_img: QemuImg) -> tuple[Path, Path]:
    """A qcow2 image whose bitmap has all writes since it was synced, and its target."""
    source, target = ext4_dir / "disk.qcow2", other_dir / "target.vmdk"
    qemu_img("convert", "-O", "qcow2", make_disk(ext4_dir / "disk.raw", 40 * MIB), source)
    qemu_img("bitmap", "--add", source, "b0")
    vmconv.sync(source, target)
    return source, target


def mapped(qemu_img: QemuImg, path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(qemu_img("map", "--output=json", path).stdout)
    return rows


def test_a_bitmap_tells_what_changed(recorded: tuple[Path, Path], qemu_img: QemuImg) -> None:
    source, target = recorded
    qemu_io(source, "write -P 7 1M 64k", "write -z 9M 128k", "write -P 9 33M 4k")
    result = vmconv.sync(source, target, bitmap="b0")
    assert (result.compared, result.evidence[:12]) == (0, "bitmap 'b0' ")
    assert result.totals.copied < MIB
    same(qemu_img, source, target, "vmdk", "qcow2")
    # It may be cleared after a sync, and need not be.
    qemu_io(source, "write -P 8 2M 64k")
    assert vmconv.sync(source, target, bitmap="b0").compared == 0
    same(qemu_img, source, target, "vmdk", "qcow2")
    qemu_img("bitmap", "--clear", source, "b0")
    assert vmconv.sync(source, target, bitmap="b0").changed == 0
    qemu_io(source, "discard 3M 1M")
    assert vmconv.sync(source, target, bitmap="b0").compared == 0
    same(qemu_img, source, target, "vmdk", "qcow2")


def test_a_wrong_bitmap_is_found_by_comparing(recorded: tuple[Path, Path], qemu_img: QemuImg) -> None:
    source, target = recorded
    used = next(row["start"] for row in mapped(qemu_img, source) if row["data"])
    qemu_io(source, f"write -P 7 {used} 4k")
    qemu_img("bitmap", "--clear", source, "b0")
    qemu_io(source, "write -P 7 33M 64k")
    before = target.read_bytes()
    with pytest.raises(VerifyError, match="differs"):
        vmconv.sync(source, target, bitmap="b0", verify="bytes")
    assert target.read_bytes() == before
    assert vmconv.sync(source, target, compare=True).compared
    same(qemu_img, source, target, "vmdk", "qcow2")


def test_allocation_that_a_bitmap_does_not_explain_is_moved(recorded: tuple[Path, Path], qemu_img: QemuImg) -> None:
    source, target = recorded
    free = next(row["start"] for row in mapped(qemu_img, source) if not row["data"] and row["length"] >= 2 * MIB)
    qemu_io(source, f"write -P 7 {free + MIB} 64k")
    qemu_img("bitmap", "--clear", source, "b0")
    assert vmconv.sync(source, target, bitmap="b0").changed == 64 * KIB
    same(qemu_img, source, target, "vmdk", "qcow2")


def test_a_bitmap_of_another_disk_is_refused(recorded: tuple[Path, Path]) -> None:
    source, target = recorded
    copy = source.with_name("copy.qcow2")
    subprocess.run(["cp", source, copy], check=True)
    with pytest.raises(AccessError, match=r"is not the file that .* was last synced with"):
        vmconv.sync(copy, target, bitmap="b0")
    qemu_io(target, "write -P 3 10M 64k")
    with pytest.raises(PlanError, match="was modified since its last sync, so no bitmap counts from it"):
        vmconv.sync(source, target, bitmap="b0", force=True)
    with pytest.raises(PlanError, match=r"was modified since its last sync, so .*copy.qcow2 is no evidence"):
        vmconv.sync(source, target, since=copy, force=True)


def test_the_same_sync_by_bitmap_again_finds_nothing_to_do(recorded: tuple[Path, Path]) -> None:
    source, target = recorded
    qemu_io(source, "write -P 7 1M 64k")
    assert vmconv.sync(source, target, bitmap="b0").changed == 64 * KIB
    again = vmconv.sync(source, target, bitmap="b0")
    assert (again.backend, again.changed) == ("none", 0)


def test_a_bitmap_is_the_only_evidence(recorded: tuple[Path, Path]) -> None:
    source, target = recorded
    for other in ({"compare": True}, {"since": source}, {"snapshot": "s"}):
        with pytest.raises(UsageError, match="exclude each other"):
            vmconv.sync(source, target, bitmap="b0", **other)
    with pytest.raises(UsageError, match="does not exist"):
        vmconv.sync(source, target.with_name("new.vmdk"), bitmap="b0")


@pytest.mark.parametrize("changed", [False, True])
def test_a_bitmap_that_cannot_be_used_is_refused_though_nothing_changed(
    changed: bool, recorded: tuple[Path, Path], ext4_dir: Path, other_dir: Path
) -> None:
    source, target = recorded
    disk, copy = ext4_dir / "disk.raw", other_dir / "raw.qcow2"
    vmconv.sync(disk, copy)
    if changed:
        write(disk, 0, 4096)
        qemu_io(source, "write -P 7 1M 64k")
    with pytest.raises(UsageError, match=r"disk\.raw: raw has no bitmaps"):
        vmconv.sync(disk, copy, bitmap="b0")
    with pytest.raises(UsageError, match="no bitmap 'b1'"):
        vmconv.sync(source, target, bitmap="b1")


# -- a target that does not exist


def test_a_target_that_another_process_makes_meanwhile_is_kept(disk: Path) -> None:
    target = disk.with_name("target.qcow2")

    def make(_: object) -> None:
        target.write_bytes(b"theirs")

    with pytest.raises(AccessError, match=r"target.qcow2: was made by another process during this sync") as caught:
        vmconv.sync(disk, target, announce=make)
    assert caught.value.hint == "sync again, which brings it up to date"
    assert target.read_bytes() == b"theirs"


def test_a_part_in_the_way_of_a_new_target_is_named(disk: Path) -> None:
    disk.with_name("target-flat.vmdk").write_bytes(b"theirs")
    with pytest.raises(PlanError, match=r"target-flat.vmdk: already exists, and is no part of a target") as caught:
        vmconv.sync(disk, disk.with_name("target.vmdk"), options={"subformat": "monolithicFlat"})
    assert caught.value.hint == "move it away"


def test_a_dangling_link_gets_the_file_that_it_names(disk: Path) -> None:
    """As with convert: the link keeps naming the target."""
    link, made = disk.with_name("target.qcow2"), disk.with_name("real.qcow2")
    link.symlink_to(made.name)
    assert vmconv.sync(disk, link).evidence == "the target is new"
    assert link.is_symlink()
    assert vmconv.compare(disk, made)
    assert vmconv.sync(disk, link).backend == "none"


@pytest.mark.parametrize("undone", [False, True])
def test_a_conversion_in_place_leaves_no_record(ext4_dir: Path, undone: bool) -> None:
    disk, target = make_disk(ext4_dir / "disk.raw", 8 * MIB), ext4_dir / "target.qcow2"
    vmconv.sync(disk, target)
    assert os.listxattr(target) == ["user.vmconv.sync"]
    made = ext4_dir / "target.vmdk"
    vmconv.convert(target, made, in_place=True, keep_undo=undone)
    if undone:
        vmconv.undo(made)
        made = target
    assert os.listxattr(made) == []
    assert vmconv.sync(disk, made).evidence == "both disks were read: nothing told what changed"
    assert vmconv.compare(disk, made)


# -- the record


@pytest.mark.parametrize("way", ["written", "copied", "touched"])
def test_a_target_that_is_not_as_it_was_synced_is_refused(disk: Path, way: str) -> None:
    target = disk.with_name("target.qcow2")
    vmconv.sync(disk, target)
    if way == "written":
        qemu_io(target, "write -P 3 10M 64k")
    elif way == "copied":
        subprocess.run(["cp", "--preserve=all", target, disk.with_name("copy.qcow2")], check=True)
        os.replace(disk.with_name("copy.qcow2"), target)
    else:
        os.utime(target, ns=(0, 0))
    with pytest.raises(PlanError, match="was modified since its last sync"):
        vmconv.sync(disk, target)
    vmconv.sync(disk, target, force=True)
    assert vmconv.compare(disk, target)


@pytest.mark.parametrize("last", ["first", "again", "same"])
@pytest.mark.parametrize("way", ["replaced", "appended", "journalled", "split"])
def test_a_target_whose_mtime_was_put_back_is_read(
    xfs_dir: Path, ext4_dir: Path, other_dir: Path, way: str, last: str
) -> None:
    disk = make_disk(xfs_dir / "disk.raw", 8 * MIB)
    suffix = {"journalled": "vhdx", "split": "vmdk"}.get(way, "qcow2")
    target = (other_dir if way == "replaced" else ext4_dir) / f"target.{suffix}"
    vmconv.sync(disk, target, options={"subformat": "monolithicFlat"} if way == "split" else {})
    if last != "first":
        write(disk, 0, 4096)
        vmconv.sync(disk, target)
    if last == "same":
        assert vmconv.sync(disk, target).backend == "none"
    assert vmconv.sync(disk, target).evidence == "the record of the last sync: the source is unchanged"
    held = target.with_name("target-flat.vmdk") if way == "split" else target
    before = held.stat()
    with held.open("r+b") as file:
        at = held.read_bytes().index(disk.read_bytes()[4096:8192])
        file.seek(at)
        file.write(b"\x55" * 512)
    os.utime(held, ns=(before.st_atime_ns, before.st_mtime_ns))
    result = vmconv.sync(disk, target)
    assert result.evidence == "both disks were read: the target's ctime is not that of its last sync"
    assert vmconv.compare(disk, target)
    assert vmconv.sync(disk, target).evidence == "the record of the last sync: the source is unchanged"


def test_a_source_whose_mtime_was_put_back_is_read(disk: Path, other_dir: Path) -> None:
    target = other_dir / "target.qcow2"
    vmconv.sync(disk, target)
    before = disk.stat()
    write(disk, 5 * MIB, 4096)
    os.utime(disk, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert vmconv.sync(disk, target).evidence == "both disks were read: nothing told what changed"
    assert vmconv.compare(disk, target)


@pytest.mark.parametrize("since", [False, True])
def test_a_target_with_another_mode_is_read_and_recorded_again(disk: Path, other_dir: Path, since: bool) -> None:
    first, target = snapshot(disk, "first.raw"), other_dir / "target.qcow2"
    vmconv.sync(first, target)
    write(disk, 5 * MIB, 4096)
    target.chmod(0o600)
    result = vmconv.sync(disk, target, since=first if since else None)
    assert result.evidence == "both disks were read: the target's ctime is not that of its last sync"
    assert vmconv.compare(disk, target)
    assert vmconv.sync(disk, target).evidence == "the record of the last sync: the source is unchanged"


def test_a_record_without_ctimes_is_no_evidence(disk: Path, other_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process leaves it that is killed right after the commit."""
    target = other_dir / "target.qcow2"
    with monkeypatch.context() as patch:
        patch.setattr("vmconv.syncing.record.settle", lambda *_: None)
        vmconv.sync(disk, target)
    assert vmconv.sync(disk, target).evidence.startswith("both disks were read: the target's ctime")
    assert vmconv.sync(disk, target).evidence == "the record of the last sync: the source is unchanged"


@contextmanager
def loop_device(path: Path) -> Iterator[str]:
    attach = ["losetup", "--find", "--show", str(path)]
    device = subprocess.run(attach, capture_output=True, text=True, check=True).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextmanager
def mounted(device: str, directory: Path, *words: str) -> Iterator[None]:
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", *words, device, str(directory)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("given", ["record", "since"])
def test_a_record_holds_after_a_mount_with_another_device_number(tmp_path: Path, kind: str, given: str) -> None:
    """As after a restart of the host."""
    store, spare, directory = tmp_path / "store.img", tmp_path / "spare.img", tmp_path / "there"
    for path in (store, spare):
        path.touch()
        os.truncate(path, 320 * MIB)
    subprocess.run([f"mkfs.{kind}", "-q", str(store)], check=True, capture_output=True)
    disk, target = directory / "disk.raw", make_disk(tmp_path / "other.raw", MIB).with_name("target.qcow2")
    back = directory / "back.qcow2"
    with loop_device(store) as device, mounted(device, directory):
        make_disk(disk, 8 * MIB)
        shutil.copy2(disk, directory / "first.raw")
        vmconv.sync(directory / "first.raw" if given == "since" else disk, target)
        vmconv.sync(tmp_path / "other.raw", back)
        first = directory.stat().st_dev
    # Whatever number the first mount had, another one has it now.
    with (
        loop_device(spare),
        mounted("none", tmp_path / "memory", "-t", "tmpfs"),
        loop_device(store) as device,
        mounted(device, directory),
    ):
        assert directory.stat().st_dev != first
        for source, made in ((disk, target), (tmp_path / "other.raw", back)):
            since = directory / "first.raw" if given == "since" and source is disk else None
            result = vmconv.sync(source, made, since=since)
            assert result.compared == 0
            if since is None:
                assert result.evidence == "the record of the last sync: the source is unchanged"


def test_a_block_device_is_never_known_to_be_unchanged(ext4_dir: Path, tmp_path: Path) -> None:
    """A mounted filesystem writes to it, which changes none of its times."""
    disk, target, directory = ext4_dir / "disk.img", ext4_dir / "target.qcow2", tmp_path / "there"
    disk.touch()
    os.truncate(disk, 16 * MIB)
    subprocess.run(["mkfs.ext4", "-q", str(disk)], check=True, capture_output=True)
    with loop_device(disk) as device:
        vmconv.sync(device, target)
        with mounted(device, directory):
            (directory / "file").write_bytes(os.urandom(MIB))
        result = vmconv.sync(device, target)
        assert result.evidence == "both disks were read: nothing told what changed"
        assert result.changed >= MIB
        assert vmconv.compare(device, target)


def test_a_file_of_a_fuse_filesystem_is_never_known_to_be_unchanged(
    disk: Path, other_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nbdfuse, a file has the time at which it began, whatever is written to the export."""
    target = other_dir / "target.qcow2"
    found = linux.mount_of(str(disk))
    monkeypatch.setattr(linux, "mount_of", lambda _: found._replace(type="fuse.nbdfuse"))
    vmconv.sync(disk, target)
    assert vmconv.sync(disk, target).evidence == "both disks were read: nothing told what changed"


@pytest.mark.parametrize("value", [b"", b"2 ", b"1 00 []", b"2 00 {}", b"2 " + b"00" * 32 + b" {}", b"x" * 4000])
def test_a_record_of_nobody_s_is_ignored(
    ext4_dir: Path, other_dir: Path, value: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    disk, target = make_disk(ext4_dir / "disk.raw", 8 * MIB), other_dir / "target.qcow2"
    vmconv.convert(disk, target)
    os.setxattr(target, "user.vmconv.sync", value)
    assert vmconv.sync(disk, target).evidence.startswith("both disks were read")
    assert "is ignored" in caplog.text


def test_a_record_that_another_key_marked_is_ignored(
    ext4_dir: Path, other_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, target = make_disk(ext4_dir / "disk.raw", 8 * MIB), other_dir / "target.qcow2"
    vmconv.sync(disk, target)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    monkeypatch.setenv("HOME", str(home))
    write(disk, 0, 4096)
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError()))
    assert vmconv.sync(disk, target).evidence.startswith("both disks were read")


def test_nothing_is_recorded_unless_wanted(disk: Path) -> None:
    target = disk.with_name("target.qcow2")
    vmconv.convert(disk, target)
    vmconv.sync(disk, target, record=False)
    write(disk, 0, 4096)
    vmconv.sync(disk, target, record=False)
    assert os.listxattr(target) == []


@pytest.mark.parametrize("way", ["replaced", "appended", "journalled", "up to date", "converted"])
def test_a_sync_without_a_record_leaves_none(xfs_dir: Path, ext4_dir: Path, way: str) -> None:
    disk = make_disk(xfs_dir / "disk.raw", 8 * MIB)
    there = ext4_dir if way in ("appended", "journalled") else xfs_dir
    target = there / f"target.{'vhdx' if way == 'journalled' else 'qcow2'}"
    vmconv.sync(disk, target)
    assert os.listxattr(target) == ["user.vmconv.sync"]
    if way == "up to date":
        os.utime(target, ns=(0, 0))
    else:
        write(disk, 0, 4096)
    inode = target.stat().st_ino
    if way == "converted":
        vmconv.convert(disk, target, force=True)
    else:
        vmconv.sync(disk, target, record=False, force=way == "up to date")
    assert (target.stat().st_ino == inode) == (way not in ("replaced", "converted"))
    assert os.listxattr(target) == []
    write(disk, 0, 4096, seed=2)
    vmconv.sync(disk, target)
    assert vmconv.compare(disk, target)


@pytest.mark.parametrize("there", ["xfs", "ext4"])
def test_a_record_that_cannot_be_written_is_not_left_stale(
    xfs_dir: Path, ext4_dir: Path, there: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk, target = make_disk(xfs_dir / "disk.raw", 8 * MIB), {"xfs": xfs_dir, "ext4": ext4_dir}[there] / "target.qcow2"
    vmconv.sync(disk, target)
    write(disk, 0, 4096)
    with monkeypatch.context() as patch:
        patch.setattr("vmconv.io.ownership.can_mark", lambda: False)
        vmconv.sync(disk, target)
        assert "no record of this sync can be kept" in caplog.text
        assert os.listxattr(target) == []


def test_a_failed_sync_without_a_record_leaves_the_old_one(
    xfs_dir: Path, ext4_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, target = make_disk(xfs_dir / "disk.raw", 8 * MIB), ext4_dir / "target.qcow2"
    vmconv.sync(disk, target)
    before = os.getxattr(target, "user.vmconv.sync")
    write(disk, 0, 4096)
    with monkeypatch.context() as patch:
        patch.setattr("vmconv.inplace.stay.InPlaceTransaction.commit", Mock(side_effect=BackendError("no commit")))
        with pytest.raises(BackendError, match="no commit"):
            vmconv.sync(disk, target, record=False)
    assert os.getxattr(target, "user.vmconv.sync") == before
    vmconv.sync(disk, target)
    assert vmconv.compare(disk, target)


# -- refused


def test_a_target_of_another_disk_is_refused(disk: Path, other_dir: Path) -> None:
    other = disk.with_name("other.raw")
    other.write_bytes(random.Random(5).randbytes(40 * MIB))
    for target in (disk.with_name("target.qcow2"), other_dir / "target.qcow2"):
        vmconv.convert(other, target)
        before = target.read_bytes()
        with pytest.raises(PlanError, match="has nothing in common"):
            vmconv.sync(disk, target)
        assert target.read_bytes() == before
        vmconv.sync(disk, target, force=True)
        assert vmconv.compare(disk, target)


def test_a_target_in_use_is_refused(disk: Path) -> None:
    target = disk.with_name("target.qcow2")
    vmconv.sync(disk, target)
    with target.open("r+b"), pytest.raises(AccessError, match="is open in another process"):
        vmconv.sync(disk, target)


def test_a_target_with_children_is_refused(disk: Path, qemu_img: QemuImg) -> None:
    target, child = disk.with_name("target.qcow2"), disk.with_name("child.qcow2")
    vmconv.sync(disk, target)
    qemu_img("create", "-q", "-f", "qcow2", "-b", target.name, "-F", "qcow2", child)
    write(disk, 0, 4096)
    with pytest.raises(PlanError, match=r"child.qcow2: refers to target.qcow2"):
        vmconv.sync(disk, target)


def test_a_target_that_is_a_layer_or_part_of_the_source_is_refused(disk: Path, qemu_img: QemuImg) -> None:
    top = disk.with_name("top.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", disk.name, "-F", "raw", top)
    with pytest.raises(PlanError, match=r"is a layer on top of disk\.raw"):
        vmconv.sync(make_disk(disk.with_name("other.raw"), 40 * MIB), top)
    for source in (top, disk):
        with pytest.raises(PlanError, match="is part of the source"):
            vmconv.sync(source, disk)


def test_internal_snapshots_of_a_target_are_not_lost_unasked(disk: Path, qemu_img: QemuImg) -> None:
    target = disk.with_name("target.qcow2")
    vmconv.convert(disk, target)
    qemu_img("snapshot", "-c", "one", target)
    with pytest.raises(PlanError, match="would lose 1 internal snapshot"):
        vmconv.sync(disk, target)
    vmconv.sync(disk, target, force=True)
    assert vmconv.compare(disk, target)


@pytest.mark.parametrize("subformat", ["streamOptimized", "reference"])
def test_an_image_that_is_made_as_a_whole_is_refused(disk: Path, subformat: str) -> None:
    target = disk.with_name("target.vmdk")
    vmconv.convert(disk, target, options={"subformat": subformat})
    with pytest.raises(PlanError, match=r"is always rebuilt as a whole|is part of the source"):
        vmconv.sync(disk, target)


def test_a_file_in_the_way_of_a_target_s_parts_is_refused(disk: Path) -> None:
    target = disk.with_name("target.vmdk")
    vmconv.sync(disk, target, options={"subformat": "monolithicFlat"})
    moved = disk.with_name("moved.vmdk")
    os.rename(target, moved)
    disk.with_name("moved-flat.vmdk").write_bytes(b"mine")
    write(disk, 0, 4096)
    with pytest.raises(PlanError, match=r"moved-flat.vmdk: already exists, and is no part"):
        vmconv.sync(disk, moved)


@pytest.mark.parametrize("there", ["xfs", "ext4"])
def test_a_target_names_no_file_that_is_changed(mounts: Mounts, xfs_dir: Path, ext4_dir: Path, there: str) -> None:
    directory = {"xfs": xfs_dir, "ext4": ext4_dir}[there]
    disk = make_disk(directory / "disk.raw", 8 * MIB)
    target, victim = directory / "target.vmdk", directory / "victim.raw"
    vmconv.sync(disk, target, options={"subformat": "monolithicFlat"})
    os.rename(directory / "target-flat.vmdk", victim)
    target.write_text(target.read_text().replace("target-flat.vmdk", "victim.raw"))
    before = victim.stat()
    write(disk, 0, 4096)
    with pytest.raises(PlanError, match=r"victim.raw: is a part of the target, and has not the name"):
        vmconv.sync(disk, target, force=True)
    after = victim.stat()
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)


def test_a_target_that_is_no_regular_file_is_refused(disk: Path) -> None:
    pipe = disk.with_name("pipe.qcow2")
    os.mkfifo(pipe)
    with pytest.raises((PlanError, AccessError), match=r"pipe\.qcow2"):
        vmconv.sync(disk, pipe)


def test_a_source_that_changes_meanwhile_leaves_the_target(disk: Path) -> None:
    target = disk.with_name("target.qcow2")
    vmconv.sync(disk, target)
    write(disk, 0, 4096)
    before = target.read_bytes()
    with pytest.raises(AccessError, match="changed while it was being converted"):
        vmconv.sync(disk, target, announce=lambda _: write(disk, 8192, 4096, seed=2))
    assert target.read_bytes() == before


# -- the plan


def test_a_plan_changes_nothing(disk: Path) -> None:
    target = disk.with_name("target.qcow2")
    vmconv.sync(disk, target)
    assert vmconv.sync_plan(disk, target).plan is None
    write(disk, MIB, 64 * KIB)
    before = stamp_of(target.stat())
    found = vmconv.sync_plan(disk, target)
    assert found.plan is not None
    assert (found.changed, found.ranges, found.plan.totals.copied) == (64 * KIB, 1, 0)
    assert stamp_of(target.stat()) == before


def test_a_new_target_needs_no_plan_of_its_own(disk: Path) -> None:
    found = vmconv.sync_plan(disk, disk.with_name("target.qcow2"))
    assert found.evidence == "the target is new"
    assert not disk.with_name("target.qcow2").exists()


# -- many syncs


@pytest.mark.parametrize("name", ["qcow2", "vmdk", "vhdx", "vhd", "vdi", "qed", "parallels", "raw"])
@pytest.mark.parametrize("where", ["same", "btrfs", "ext4"])
def test_random_writes_between_syncs(
    mounts: Mounts, xfs_dir: Path, other_dir: Path, qemu_img: QemuImg, name: str, where: str
) -> None:
    rng = random.Random(f"{name} {where}")
    there = {"same": xfs_dir, "btrfs": other_dir}.get(where) or mounts.get("ext4") / "random"
    there.mkdir(exist_ok=True)
    source, target = xfs_dir / "source.qcow2", there / "target.img"
    qemu_img("create", "-q", "-f", "qcow2", source, "64M")
    qemu_io(source, "write -P 1 0 8M", "write -P 2 40M 3M")
    vmconv.sync(source, target, target_format=name)
    for number in range(5):
        commands = []
        for _ in range(rng.randrange(1, 8)):
            kind = rng.choice([f"write -P {rng.randrange(1, 255)}", "write -z", "discard"])
            start = rng.randrange(0, 64 * MIB - MIB) // 512 * 512
            commands.append(f"{kind} {start} {rng.randrange(512, MIB, 512)}")
        qemu_io(source, *commands)
        vmconv.sync(source, target, target_format=name, verify=rng.choice(["metadata", "sample"]))
        same(qemu_img, source, target, name, "qcow2")
        assert vmconv.sync(source, target, target_format=name).backend == "none", number
    target.unlink()


def test_the_image_of_another_disk_is_not_replaced_after_a_sync(reflink_dir: Path) -> None:
    first, other = (
        make_disk(reflink_dir / f"{name}.raw", MIB, pieces=8, seed=number) for number, name in enumerate("ab")
    )
    target = reflink_dir / "target.qcow2"
    vmconv.sync(first, target)
    before = target.read_bytes()
    with pytest.raises(PlanError, match=r"has nothing in common with .*b\.raw"):
        vmconv.sync(other, target)
    assert target.read_bytes() == before
    vmconv.sync(other, target, force=True)
    assert vmconv.compare(other, target)
