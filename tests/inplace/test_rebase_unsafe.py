"""`vmconv rebase -u`: the stored name of the parent changes, in each format with parents, and nothing else does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import vmconv
from support.disks import QemuImg, qemu_io
from vmconv.cli.main import main
from vmconv.errors import PlanError, UsageError

WITH_QEMU = ["qcow2", "qed"]
BY_IDENTITY = ["vmdk", "vhd", "vhdx"]
"""Formats whose layers know their parent's identity, which stays."""


def layer(directory: Path, name: str) -> Path:
    vmconv.create(directory / f"base.{name}", 8 << 20)
    vmconv.create(directory / f"layer.{name}", backing_file=f"base.{name}", backing_format=name)
    return directory / f"layer.{name}"


@pytest.mark.parametrize("name", WITH_QEMU)
@pytest.mark.parametrize("reference", ["new.raw", "sub/a name with spaces and Ümlaut.raw", "n"], ids=len)
def test_qemu_reads_the_new_parent(name: str, reference: str, ext4_dir: Path, qemu_img: QemuImg) -> None:
    path = ext4_dir / f"layer.{name}"
    qemu_img("create", "-q", "-f", "raw", ext4_dir / "base.raw", "4M")
    qemu_img("create", "-q", "-f", name, "-b", "base.raw", "-F", "raw", path)
    qemu_io(path, "write -P 5 1M 1M", format_name=name)
    (ext4_dir / "sub").mkdir()
    (ext4_dir / reference).write_bytes(b"\7" * (4 << 20))
    vmconv.rebase(path, reference, backing_format="raw", unsafe=True)
    qemu_img("check", "-q", "-f", name, path)
    expected = ext4_dir / "expected.raw"
    expected.write_bytes(b"\7" * (1 << 20) + b"\5" * (1 << 20) + b"\7" * (2 << 20))
    qemu_img("compare", "-f", name, "-F", "raw", path, expected)
    vmconv.rebase(path, "", unsafe=True)
    assert "backing-filename" not in json.loads(qemu_img("info", "--output=json", path).stdout)


@pytest.mark.parametrize("name", BY_IDENTITY)
@pytest.mark.parametrize("length", [4, 40, 200])
def test_a_parent_under_another_name(name: str, length: int, ext4_dir: Path) -> None:
    path = layer(ext4_dir, name)
    moved = ext4_dir / f"{'m' * length}.{name}"
    vmconv.rebase(path, moved.name, backing_format=name, unsafe=True)
    os.rename(ext4_dir / f"base.{name}", moved)
    described = vmconv.info(path)
    assert described["backing-filename"] == moved.name
    vmconv.compare(path, moved)
    report = vmconv.check(path)
    assert report is not None
    assert (report.corruptions, report.errors, report.leaks) == ((), (), ())


@pytest.mark.parametrize("name", WITH_QEMU + BY_IDENTITY)
def test_undo_restores_every_byte(name: str, ext4_dir: Path) -> None:
    path = layer(ext4_dir, name)
    before = path.read_bytes()
    vmconv.rebase(path, f"a-longer-name-than-the-one-before.{name}", backing_format=name, unsafe=True, keep_undo=True)
    assert path.read_bytes() != before
    with pytest.raises(PlanError, match="would no longer undo"):
        vmconv.rebase(path, f"base.{name}", backing_format=name, unsafe=True)
    vmconv.undo(path)
    assert path.read_bytes() == before


def test_other_extensions_of_qcow2_stay(ext4_dir: Path, qemu_img: QemuImg) -> None:
    path = ext4_dir / "layer.qcow2"
    vmconv.create(ext4_dir / "base.qcow2", 8 << 20)
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", path)
    qemu_img("bitmap", "--add", path, "changes")
    vmconv.rebase(path, "x" * 1000, backing_format="qcow2", unsafe=True)
    assert [one["name"] for one in vmconv.info(path)["format-specific"]["data"]["bitmaps"]] == ["changes"]
    assert b"dirty bit" in path.read_bytes()[:4096]


@pytest.mark.parametrize(
    ("name", "reference", "kind", "message"),
    [
        ("qcow2", "x" * 1024, "raw", "backing file name of 1024 bytes"),
        ("qed", "x" * 1024, "raw", "backing file name of 1024 bytes"),
        ("vmdk", 'a"b.vmdk', "vmdk", "cannot be written into a descriptor"),
        ("vmdk", "base.qcow2", "qcow2", "must be a VMDK"),
        ("vhd", "", None, "cannot lose its parent"),
        ("vhdx", "", None, "cannot lose its parent"),
        ("vhdx", "base.raw", "raw", "must be a VHDX"),
    ],
)
def test_what_is_refused_changes_nothing(
    name: str, reference: str, kind: str | None, message: str, ext4_dir: Path
) -> None:
    path = layer(ext4_dir, name)
    before = {each.name: each.read_bytes() for each in ext4_dir.iterdir()}
    with pytest.raises(PlanError, match=message):
        vmconv.rebase(path, reference, backing_format=kind, unsafe=True)
    assert {each.name: each.read_bytes() for each in ext4_dir.iterdir()} == before


@pytest.mark.parametrize("name", ["vdi", "raw"])
def test_formats_without_parents_are_refused(name: str, ext4_dir: Path) -> None:
    vmconv.create(ext4_dir / f"disk.{name}", 8 << 20)
    with pytest.raises(PlanError, match="stores no name of a parent"):
        vmconv.rebase(ext4_dir / f"disk.{name}", "base.raw", backing_format="raw", unsafe=True)


def test_the_format_of_a_file_that_is_not_opened_is_asked_for(ext4_dir: Path) -> None:
    with pytest.raises(UsageError, match="its format is not known"):
        vmconv.rebase(layer(ext4_dir, "qcow2"), "other.qcow2", unsafe=True)


def test_the_command_prints_the_outcome(ext4_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = layer(ext4_dir, "qcow2")
    capsys.readouterr()
    arguments = ["rebase", "-u", "-b", "other.qcow2", "-F", "qcow2", "--output", "json", str(path)]
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["event"], printed["path"], printed["format_name"]) == ("result", str(path), "qcow2")
    assert 0 < printed["written"] <= 1024
