"""A part of a disk as a disk: against `qemu-img dd`, and what of it is shared."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk
from vmconv.cli.main import main


@pytest.mark.parametrize(("block", "count", "skip"), [("512", 3, 5), ("1M", 2, 1), ("4k", None, 700), ("1M", 1, 0)])
def test_it_is_what_qemu_img_dd_makes(
    tmp_path: Path, qemu_img: QemuImg, block: str, count: int | None, skip: int
) -> None:
    source = tmp_path / "disk.qcow2"
    vmconv.convert(make_disk(tmp_path / "disk.raw", 8 * MIB), source)
    # QEMU 7.2 counts the blocks of the input from its start, those that it skips too.
    more = [] if count is None else [f"count={count + skip}"]
    given = [f"bs={block}", *more, f"skip={skip}", f"if={source}", f"of={tmp_path / 'theirs.raw'}"]
    qemu_img("dd", "-f", "qcow2", "-O", "raw", *given)
    unit = {"512": 512, "4k": 4096, "1M": MIB}[block]
    length = [] if count is None else ["--length", str(count * unit)]
    part = ["--offset", str(skip * unit), *length]
    assert main(["convert", "-q", *part, "--verify", "bytes", str(source), str(tmp_path / "ours.raw")]) == 0
    assert (tmp_path / "ours.raw").read_bytes() == (tmp_path / "theirs.raw").read_bytes()


def test_a_partition_is_shared_if_it_begins_at_a_block(reflink_dir: Path) -> None:
    disk = make_disk(reflink_dir / "disk.raw", 16 * MIB)
    for target in ("part.raw", "part.qcow2", "part.vhdx"):
        done = vmconv.convert(disk, reflink_dir / target, offset=MIB, length=8 * MIB)
        assert done.totals.shared and not done.totals.copied
        assert vmconv.prove(reflink_dir / target, reflink_dir / "part.raw").shared


def test_what_begins_within_a_block_is_copied_with_the_reason(reflink_dir: Path) -> None:
    disk = reflink_dir / "disk.raw"
    disk.write_bytes(random.Random(1).randbytes(16 * MIB))
    plan = vmconv.plan(disk, reflink_dir / "part.raw", offset=MIB + 512)
    assert not plan.totals.shared
    assert [copy.reason for copy in plan.copies] == ["offsets in source and target differ modulo the 4096-byte block"]
    done = vmconv.convert(disk, reflink_dir / "part.qcow2", offset=MIB + 512)
    assert done.totals.shared == 15 * MIB - 4096, "qcow2 has a place for payload at each multiple of 512"


def test_a_part_is_streamed_and_fanned_out(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.raw", 4 * MIB)
    wanted = disk.read_bytes()[MIB : 3 * MIB]
    with (tmp_path / "streamed").open("wb") as file:
        vmconv.stream(disk, file.fileno(), "raw", offset=MIB, length=2 * MIB)
    assert (tmp_path / "streamed").read_bytes() == wanted
    (tmp_path / "out").mkdir()
    for made in vmconv.fanout(disk, ["raw", "vdi"], directory=tmp_path / "out", offset=MIB, length=2 * MIB):
        assert vmconv.compare(made.target, tmp_path / "streamed", right_format="raw")


def test_what_an_image_states_of_its_disk_does_not_hold_for_a_part(tmp_path: Path) -> None:
    vmconv.convert(make_disk(tmp_path / "disk.raw", 4 * MIB), tmp_path / "disk.vhd")
    whole = vmconv.plan(tmp_path / "disk.vhd", tmp_path / "x.raw")
    part = vmconv.plan(tmp_path / "disk.vhd", tmp_path / "x.raw", offset=MIB)
    assert any("geometry" in loss for loss in whole.losses)
    assert not any("geometry" in loss for loss in part.losses)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"offset": 5 * MIB}, "has 4194304 bytes, and no 1 from 5242880 on"),
        ({"offset": 3 * MIB, "length": 2 * MIB}, "and no 2097152 from 3145728 on"),
        ({"length": 0}, "no part of a disk has 0 bytes"),
        ({"offset": -1}, "from -1 on"),
        ({"offset": 512, "in_place": True}, "--in-place"),
        ({"offset": 512, "chain": True}, "--chain"),
        ({"offset": 512, "backing_file": "disk.raw"}, "-B"),
        ({"offset": 512, "options": {"subformat": "reference"}}, "--offset and --length"),
        ({"offset": 512, "verify": "qemu"}, "--verify=qemu"),
    ],
)
def test_what_is_no_part_is_refused(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    disk = make_disk(tmp_path / "disk.raw", 4 * MIB)
    with pytest.raises(vmconv.UsageError, match=message):
        vmconv.convert(disk, tmp_path / "target.qcow2", **given)
    assert [path.name for path in tmp_path.iterdir()] == ["disk.raw"]
