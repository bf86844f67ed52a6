"""`vmconv convert -n` into an existing image: another content, and all else stays, as with qemu-img."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk
from support.loops import loop_device
from vmconv.errors import AccessError, PlanError, UsageError

SIZE = 12 * MIB
LARGER = 20 * MIB

TARGETS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "raw": ("disk.raw", {}),
    "qcow2": ("disk.qcow2", {"cluster_size": 4096, "compat": "0.10"}),
    "vdi": ("disk.vdi", {}),
    "vhd": ("disk.vhd", {"subformat": "fixed"}),
    "vhdx": ("disk.vhdx", {"block_size": 2 * MIB}),
    "vmdk": ("disk.vmdk", {}),
    "qed": ("disk.qed", {"cluster_size": 4096}),
    "parallels": ("disk.hdd", {"cluster_size": 64 << 10}),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "source.raw", SIZE)


def convert(source: Path, target: Path, **given: Any) -> vmconv.Result:
    return vmconv.convert(source, target, no_create=True, **given)


@pytest.mark.parametrize("name", TARGETS)
def test_an_image_keeps_its_format_options_size_and_ids(source: Path, tmp_path: Path, name: str) -> None:
    file, options = TARGETS[name]
    target = tmp_path / file
    vmconv.create(target, LARGER, target_format=name, options=options)
    before = vmconv.info(target, format_name=name)
    convert(source, target, target_format=name, verify="bytes")
    after = vmconv.info(target, format_name=name)
    assert after["virtual-size"] == before["virtual-size"] >= LARGER
    for key in ("format", "cluster-size"):
        assert after.get(key) == before.get(key)
    assert after["disk"].get("identity") == before["disk"].get("identity")
    wanted = tmp_path / "wanted.raw"
    shutil.copy(source, wanted)
    with wanted.open("r+b") as grown:
        grown.truncate(before["virtual-size"])
    assert vmconv.compare(wanted, target, right_format=name)


def test_qemu_img_leaves_the_same_disk_with_the_same_options(source: Path, tmp_path: Path, qemu_img: QemuImg) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    for target in (ours, theirs):
        qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=8k,refcount_bits=64", target, str(LARGER))
    convert(source, ours)
    qemu_img("convert", "-n", "-f", "raw", "-O", "qcow2", source, theirs)
    qemu_img("compare", "-f", "qcow2", "-F", "qcow2", ours, theirs)
    said = [vmconv.info(target)["format-specific"] for target in (ours, theirs)]
    assert said[0] == said[1]


def test_an_overlay_on_the_old_content_is_noticed(source: Path, tmp_path: Path) -> None:
    target, top = tmp_path / "disk.qcow2", tmp_path / "top.qcow2"
    vmconv.create(target, SIZE)
    vmconv.create(top, backing_file=target.name)
    before = target.read_bytes()
    with pytest.raises(PlanError, match=r"top\.qcow2: refers to disk\.qcow2"):
        convert(source, target)
    assert target.read_bytes() == before


def test_a_parent_replaced_elsewhere_gets_another_id_of_its_content(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "disk.vhdx"
    vmconv.create(target, SIZE)
    (tmp_path / "elsewhere").mkdir()
    top = tmp_path / "elsewhere" / "top.vhdx"
    vmconv.create(top, backing_file="../disk.vhdx", allow_external=[tmp_path])
    convert(source, target)
    with pytest.raises(vmconv.VmconvError):
        vmconv.convert(top, tmp_path / "flat.raw", allow_external=[tmp_path])


def layered(target: Path, qemu_img: QemuImg) -> None:
    qemu_img("create", "-q", "-f", "raw", target.with_name("base.raw"), str(LARGER))
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", target)


def with_snapshot(target: Path, qemu_img: QemuImg) -> None:
    qemu_img("create", "-q", "-f", "qcow2", target, str(LARGER))
    qemu_img("snapshot", "-c", "kept", target)


def small(target: Path, qemu_img: QemuImg) -> None:
    qemu_img("create", "-q", "-f", "qcow2", target, str(SIZE - MIB))


def linked(target: Path, qemu_img: QemuImg) -> None:
    qemu_img("create", "-q", "-f", "qcow2", target, str(LARGER))
    target.with_name("link.qcow2").hardlink_to(target)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (layered, "is a layer on top of base.raw"),
        (with_snapshot, "would lose 1 internal snapshot"),
        (small, f"has a disk of {SIZE - MIB} bytes, and the source has {SIZE}"),
        (linked, "has other names"),
    ],
)
def test_an_image_that_would_lose_more_than_its_content_stays(
    source: Path, tmp_path: Path, qemu_img: QemuImg, made: Any, words: str
) -> None:
    target = tmp_path / "disk.qcow2"
    made(target, qemu_img)
    before = target.read_bytes()
    with pytest.raises(PlanError, match=words):
        convert(source, target)
    assert target.read_bytes() == before


def test_force_drops_snapshots(source: Path, tmp_path: Path, qemu_img: QemuImg) -> None:
    target = tmp_path / "disk.qcow2"
    with_snapshot(target, qemu_img)
    convert(source, target, force=True)
    assert not vmconv.info(target).get("snapshots")


def test_an_image_of_several_files_is_refused(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "disk.vmdk"
    vmconv.create(target, LARGER, options={"subformat": "monolithicFlat"})
    with pytest.raises(PlanError, match="has several files"):
        convert(source, target)


def test_an_image_in_use_stays(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "disk.raw"
    target.write_bytes(bytes(SIZE))
    with loop_device(target), pytest.raises(AccessError, match=r"open in another process|in use as"):
        convert(source, target)
    assert target.read_bytes() == bytes(SIZE)


def test_the_source_is_not_its_own_target(source: Path) -> None:
    with pytest.raises(PlanError, match="is part of the source"):
        convert(source, source)


@pytest.mark.parametrize("given", [{"options": {"cluster_size": "4k"}}, {"chain": True}, {"in_place": True}])
def test_what_does_not_apply_is_refused(source: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    target = tmp_path / "disk.qcow2"
    vmconv.create(target, LARGER)
    with pytest.raises(UsageError, match=r"-n keeps what .* is: "):
        convert(source, target, **given)


def test_a_target_said_to_be_zero_is_replaced_all_the_same(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "disk.raw"
    target.write_bytes(b"\xee" * SIZE)
    convert(source, target, target_is_zero=True)
    assert target.read_bytes() == source.read_bytes()
