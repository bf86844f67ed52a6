"""Persistent bitmaps carried over by conversions and resizes, beside what QEMU says of source and result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vmconv
from support.bitmaps import served
from support.disks import MIB, QemuImg, qemu_io
from vmconv.errors import PlanError, UsageError, VerifyError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.model.bitmaps import DirtyBitmap
from vmconv_qcow2 import bitmap_writer
from vmconv_qcow2.bitmap_writer import _packed
from vmconv_qcow2.header import read_header

SIZE = 40 * MIB + 1536


@pytest.fixture
def source(xfs_dir: Path, qemu_img: QemuImg) -> Path:
    """An image with an enabled, a disabled, an empty and a fine bitmap."""
    path = xfs_dir / "source.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, str(SIZE))
    qemu_img("bitmap", "--add", path, "b0")
    qemu_img("bitmap", "--add", "-g", "512", path, "fine")
    qemu_io(path, "write 0 512", "write 1M 64k", "write -z 9M 3M", "write 40M 1536")
    qemu_img("bitmap", "--disable", path, "fine")
    qemu_img("bitmap", "--add", "-g", "2M", path, "leer \u00e4")
    return path


def stated(path: Path, qemu_img: QemuImg) -> list[dict[str, Any]]:
    data = json.loads(qemu_img("info", "--output=json", path).stdout)["format-specific"]["data"]
    found: list[dict[str, Any]] = data.get("bitmaps", [])
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"cluster_size": "512"}, {"cluster_size": "2M"}, {"compress": "on"}, {"extended_l2": "on"}],
    ids=lambda options: "-".join(options.values()) or "default",
)
def test_qemu_finds_the_bitmaps_of_the_source(
    source: Path, qemu_img: QemuImg, tmp_path: Path, options: dict[str, str]
) -> None:
    target = source.with_name("target.qcow2")
    result = vmconv.convert(source, target, options=options, bitmaps=True)
    assert not result.losses
    qemu_img("check", target)
    assert stated(target, qemu_img) == stated(source, qemu_img)
    for name in ("b0", "fine"):
        ranges = served(source, name, tmp_path / f"one-{name}")
        assert len(ranges) >= 3
        assert served(target, name, tmp_path / f"two-{name}") == ranges


def test_without_the_option_they_are_named_as_lost(source: Path, qemu_img: QemuImg) -> None:
    target = source.with_name("target.qcow2")
    assert vmconv.convert(source, target).losses == ("3 persistent bitmaps",)
    assert not stated(target, qemu_img)


def test_in_place_and_by_resizing(source: Path, qemu_img: QemuImg, tmp_path: Path) -> None:
    before, ranges = stated(source, qemu_img), served(source, "b0", tmp_path / "one")
    vmconv.convert(source, source, target_format="qcow2", in_place=True, bitmaps=True)
    qemu_img("check", source)
    assert stated(source, qemu_img) == before
    assert served(source, "b0", tmp_path / "two") == ranges
    vmconv.resize(source, SIZE + MIB)
    qemu_img("check", source)
    assert stated(source, qemu_img) == before
    # The last range ended with the disk; a bit says nothing of less than its granularity.
    grown = served(source, "b0", tmp_path / "three")
    assert grown[:-1] == ranges[:-1]
    assert grown[-1] == (40 * MIB, 40 * MIB + 65536)
    vmconv.resize(source, 2 * MIB, shrink=True)
    qemu_img("check", source)
    assert served(source, "b0", tmp_path / "four") == ranges[:2]


def break_bitmap(path: Path) -> None:
    """Marks the first bitmap as in use, as a killed QEMU leaves it."""
    with Opener(installed()) as opener:
        at = read_header(opener.image(str(path)).file).bitmaps.directory_offset
    data = bytearray(path.read_bytes())
    data[at + 12 : at + 16] = b"\0\0\0\1"
    path.write_bytes(data)


def test_bitmaps_in_use_are_refused_or_left_out(source: Path, qemu_img: QemuImg) -> None:
    break_bitmap(source)
    target = source.with_name("target.qcow2")
    with pytest.raises(PlanError, match=r"source.qcow2: bitmap 'b0' is in use, or its last user did not save it"):
        vmconv.convert(source, target, bitmaps=True)
    assert not target.exists()
    result = vmconv.convert(source, target, bitmaps=True, skip_broken_bitmaps=True)
    assert [loss.split(",")[0] for loss in result.losses] == ["bitmap 'b0'"]
    assert [one["name"] for one in stated(target, qemu_img)] == ["fine", "leer \u00e4"]


def test_what_has_no_bitmaps_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--bitmaps: vhdx has no bitmaps"):
        vmconv.convert(source, source.with_suffix(".vhdx"), bitmaps=True)
    with pytest.raises(PlanError, match=r"version 2 of qcow2 has no bitmaps"):
        vmconv.convert(source, source.with_name("old.qcow2"), bitmaps=True, options={"compat": "0.10"})
    with pytest.raises(UsageError, match="--bitmaps: only for the present state"):
        vmconv.convert(source, source.with_name("old.qcow2"), bitmaps=True, chain=True)
    with pytest.raises(UsageError, match="--skip-broken-bitmaps is for --bitmaps"):
        vmconv.convert(source, source.with_name("old.qcow2"), skip_broken_bitmaps=True)
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(MIB))
    with pytest.raises(UsageError, match="raw has no bitmaps"):
        vmconv.convert(raw, tmp_path / "new.qcow2", bitmaps=True)


def test_a_wrong_bitmap_is_noticed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(first: Any, end: Any, begin: int, count: int) -> bytes:
        return _packed(first, end - 1, begin, count)

    monkeypatch.setattr(bitmap_writer, "_packed", wrong)
    with pytest.raises(VerifyError, match="bitmap 'b0' is not that of the source"):
        vmconv.convert(source, source.with_name("target.qcow2"), bitmaps=True)


def test_bits_of_ranges() -> None:
    start, length = np.array([0, 5, 16, 40, 90]), np.array([3, 11, 4, 20, 20])
    first, end = DirtyBitmap("b", 8, True, start, length).bits(100)
    assert (first.tolist(), end.tolist()) == ([0, 5, 11], [3, 8, 13])
    assert _packed(first, end, 0, 16) == bytes([0b11100111, 0b00011000])
    assert _packed(first, end, 8, 8) == bytes([0b00011000])
