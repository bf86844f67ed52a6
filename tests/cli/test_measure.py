"""`vmconv measure`: against what `convert` makes, and against `qemu-img measure`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vmconv
from support.disks import MIB, QemuImg, make_disk, qemu_io
from vmconv.cli.main import main

Capture = pytest.CaptureFixture[str]

WRITTEN = sorted(name for name, one in vmconv.installed().formats.items() if one.can_write and one.kind == "disk")


def measured(capsys: Capture, *arguments: object) -> dict[str, int]:
    assert main(["measure", "--output", "json", *map(str, arguments)]) == 0
    found: dict[str, int] = json.loads(capsys.readouterr().out)
    return found


def by_qemu(qemu_img: QemuImg, *arguments: object) -> dict[str, int]:
    found: dict[str, int] = json.loads(qemu_img("measure", "--output=json", *arguments).stdout)
    return found


def made_size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


@pytest.mark.parametrize(
    "options", ["", "subformat=fixed", "subformat=monolithicFlat", "subformat=twoGbMaxExtentSparse"]
)
@pytest.mark.parametrize("name", WRITTEN)
def test_it_is_the_size_of_all_files_that_convert_makes(name: str, options: str, tmp_path: Path) -> None:
    given: dict[str, Any] = dict([options.split("=")]) if options else {}
    source = make_disk(tmp_path / "disk.raw", 24 * MIB)
    out = tmp_path / "out"
    out.mkdir()
    try:
        vmconv.convert(source, out / "disk.img", target_format=name, options=given)
    except vmconv.UsageError:
        with pytest.raises(vmconv.UsageError):
            vmconv.measure(name, source, options=given)
        return
    assert vmconv.measure(name, source, options=given).required == made_size(out)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_full_disk_is_as_large_as_said(name: str, tmp_path: Path) -> None:
    (tmp_path / "full.raw").write_bytes(b"full" * (2 * MIB))
    out = tmp_path / "out"
    out.mkdir()
    vmconv.convert(tmp_path / "full.raw", out / "disk.img", target_format=name)
    found = vmconv.measure(name, size=8 * MIB)
    assert found.fully_allocated == made_size(out)
    assert found.required <= found.fully_allocated


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(1, 1 << 31).map(lambda sectors: sectors * 512),
    bits=st.integers(12, 21),
    more=st.sampled_from(["", ",extended_l2=on", ",refcount_bits=1", ",refcount_bits=64", ",compat=0.10"]),
)
def test_qemu_says_the_same_of_a_full_qcow2_and_more_of_an_empty_one(
    qemu_img: QemuImg, size: int, bits: int, more: str
) -> None:
    if "extended" in more:
        bits = max(bits, 14)
    options = f"cluster_size={1 << bits}{more}"
    theirs = by_qemu(qemu_img, "--size", size, "-O", "qcow2", "-o", options)
    try:
        ours = vmconv.measure("qcow2", size=size, options=dict(one.split("=") for one in options.split(",")))
    except vmconv.PlanError as exc:
        assert "larger clusters" in str(exc.hint)
        return
    assert ours.fully_allocated == theirs["fully-allocated"]
    assert ours.required <= theirs["required"]


def test_qemu_says_the_same_of_raw_and_of_bitmaps(tmp_path: Path, capsys: Capture, qemu_img: QemuImg) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "3G")
    qemu_io(image, "write 0 10M", "write 2G 1M", format_name="qcow2")
    assert measured(capsys, "-O", "qcow2", image)["bitmaps"] == 0
    for number, grain in enumerate(("512", "64k", "1M")):
        qemu_img("bitmap", "--add", "-g", grain, image, "b" * (number * 9 + 1))
    for options in ((), ("-o", "cluster_size=4k"), ("-o", "cluster_size=2M"), ("-o", "compat=0.10")):
        ours, theirs = (
            measured(capsys, "-O", "qcow2", *options, image),
            by_qemu(qemu_img, "-O", "qcow2", *options, image),
        )
        assert ours.get("bitmaps") == theirs.get("bitmaps")
        assert ours["fully-allocated"] == theirs["fully-allocated"]
        assert ours["required"] <= theirs["required"]
    assert measured(capsys, "-O", "raw", image) == by_qemu(qemu_img, "-O", "raw", image)
    assert "bitmaps" not in measured(capsys, "-O", "vhdx", image)


def test_a_snapshot_is_measured(tmp_path: Path, capsys: Capture, qemu_img: QemuImg) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "64M")
    qemu_io(image, "write 0 10M", format_name="qcow2")
    qemu_img("snapshot", "-c", "old", image)
    qemu_io(image, "write 10M 20M", format_name="qcow2")
    now, then = measured(capsys, "-O", "vdi", image), measured(capsys, "-O", "vdi", "-l", "old", image)
    assert now["required"] - then["required"] == 20 * MIB


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "a disk to measure is an image, or has a size"),
        (["--size", "1M", "there.raw"], 2, "give one of them"),
        (["--size", "1M", "-l", "x"], 2, "-l is for an image"),
        (["--size", "1M", "-f", "raw"], 2, "-f is for an image"),
        (["--size", "1000"], 2, "is not a positive multiple of 512"),
        (["--size", "0"], 2, "a new disk needs a size"),
        (["--size", "1M", "-O", "lime"], 2, "memory"),
        (["--size", "1M", "-O", "qcow3"], 2, "did you mean qcow2"),
        (["-O", "vmdk", "-o", "subformat=streamOptimized", "there.raw"], 1, "depends on the disk's content"),
        (["-O", "qcow2", "-o", "subformat=reference", "there.raw"], 1, "would refer to the source"),
        (["-O", "vhd", "--size", "4T"], 1, "VHD cannot hold"),
    ],
)
def test_what_has_no_size_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_disk(tmp_path / "there.raw", MIB)
    assert main(["measure", *arguments]) == code
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there.raw"]


def test_text_is_that_of_qemu(capsys: Capture, qemu_img: QemuImg) -> None:
    assert main(["measure", "-O", "raw", "--size", "10M"]) == 0
    assert capsys.readouterr().out == qemu_img("measure", "-O", "raw", "--size", "10M").stdout
