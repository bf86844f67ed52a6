"""Several sources as one disk, beside what qemu-img makes of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.disks import MIB, QemuImg, qemu_io
from vmconv.errors import UsageError
from vmconv.testing import random_bytes


@pytest.fixture
def disks(xfs_dir: Path, qemu_img: QemuImg) -> tuple[Path, Path, Path]:
    """Returns a raw disk of half a sector too much, a layer on a base, and a VHDX."""
    raw, base, layer, vhdx = (xfs_dir / name for name in ("a.raw", "base.qcow2", "b.qcow2", "c.vhdx"))
    raw.write_bytes(random_bytes(2 * MIB + 256))
    qemu_img("create", "-q", "-f", "qcow2", base, "3M")
    qemu_io(base, "write -P 3 1M 1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", layer)
    qemu_io(layer, "write -P 4 1536K 64K", "write -z 1M 64K")
    qemu_img("create", "-q", "-f", "vhdx", vhdx, "4M")
    subprocess.run(["qemu-io", "-f", "vhdx", "-c", "write -P 5 0 1M", str(vhdx)], check=True, capture_output=True)
    return raw, layer, vhdx


@pytest.mark.parametrize("target", ["out.qcow2", "out.raw", "out.vmdk"])
def test_the_disk_is_that_of_qemu_img(disks: tuple[Path, Path, Path], qemu_img: QemuImg, target: str) -> None:
    first, *rest = disks
    made, theirs = first.with_name(target), first.with_name("theirs.raw")
    vmconv.convert(first, made, more_sources=rest, verify="bytes")
    # qemu-img takes one format for all sources unless none is named.
    qemu_img("convert", "-O", "raw", *disks, theirs)
    qemu_img("compare", made, "-F", "raw", theirs)
    assert theirs.stat().st_size == 2 * MIB + 512 + 3 * MIB + 4 * MIB


def test_payload_is_shared_where_phases_allow(xfs_dir: Path) -> None:
    one, two, made = (xfs_dir / name for name in ("one.raw", "two.raw", "made.raw"))
    one.write_bytes(random_bytes(MIB))
    two.write_bytes(random_bytes(MIB))
    assert vmconv.convert(one, made, more_sources=[two], zero_copy="require").totals.shared == 2 * MIB
    assert made.read_bytes() == one.read_bytes() + two.read_bytes()
    again = vmconv.convert(one, made, more_sources=[one], force=True)
    assert again.totals.shared == 2 * MIB
    one.write_bytes(random_bytes(MIB + 512))
    (copy,) = vmconv.plan(one, xfs_dir / "other.raw", more_sources=[two]).copies[:1]
    assert copy.reason == "offsets in source and target differ modulo the 4096-byte block"


def test_options_may_stand_between_the_names(disks: tuple[Path, Path, Path], qemu_img: QemuImg) -> None:
    first, layer, last = map(str, disks)
    made = disks[0].with_name("made.image")
    command = [sys.executable, "-m", "vmconv", "convert", "-q", first, "-c", layer, last, "-O", "qcow2", str(made)]
    subprocess.run(command, check=True)
    qemu_img("check", "-f", "qcow2", made)
    done = subprocess.run([*command, "--colour"], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "unrecognized arguments: --colour" in done.stderr


def test_by_the_command_line(disks: tuple[Path, Path, Path], qemu_img: QemuImg) -> None:
    made = disks[0].with_name("made.qcow2")
    command = [sys.executable, "-m", "vmconv", "convert", "-q", *map(str, disks), str(made)]
    subprocess.run(command, check=True)
    qemu_img("check", made)
    done = subprocess.run([*command[:-1], "-O", "qcow2", "-"], check=True, capture_output=True)
    made.with_name("stream.qcow2").write_bytes(done.stdout)
    qemu_img("compare", made, made.with_name("stream.qcow2"))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"in_place": True}, "--in-place"),
        ({"chain": True}, "--chain"),
        ({"backing_file": "base.qcow2"}, "-B"),
        ({"snapshot": "x"}, "--snapshot"),
        ({"from_snapshot": "newest"}, "--from-snapshot"),
        ({"bitmaps": True}, "--bitmaps"),
        ({"verify": "qemu"}, "--verify=qemu"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_what_is_for_one_source_is_refused(disks: tuple[Path, Path, Path], given: dict[str, Any], name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}: "):
        vmconv.convert(disks[0], disks[0].with_name("made.qcow2"), more_sources=disks[1:], **given)
    assert not disks[0].with_name("made.qcow2").exists()


def test_a_missing_source_is_named(disks: tuple[Path, Path, Path]) -> None:
    with pytest.raises(vmconv.errors.VmconvError, match=r"no\.raw"):
        vmconv.convert(disks[0], disks[0].with_name("made.qcow2"), more_sources=["no.raw"])
