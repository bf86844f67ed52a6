"""`-o preallocation`: ranges without payload get what `qemu-img` gives them, and payload is shared all the same."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk
from vmconv.errors import BackendError, PlanError, UsageError
from vmconv.system import linux

SIZE = 24 * MIB
WAYS = [("raw", "falloc"), ("raw", "full"), ("qcow2", "metadata"), ("qcow2", "falloc"), ("qcow2", "full")]


def allocated(path: Path) -> int:
    os.sync()
    return path.stat().st_blocks * 512


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_space_and_content_are_those_of_qemu_img(xfs_dir: Path, qemu_img: QemuImg, name: str, way: str) -> None:
    source = make_disk(xfs_dir / "source.raw", SIZE)
    ours, theirs = xfs_dir / f"ours.{name}", xfs_dir / f"theirs.{name}"
    result = vmconv.convert(source, ours, options={"preallocation": way}, zero_copy="require", verify="bytes")
    qemu_img("convert", "-f", "raw", "-O", name, "-o", f"preallocation={way}", source, theirs)
    qemu_img("compare", "-f", "raw", "-F", name, source, ours)
    assert result.totals.shared == vmconv.plan(source, xfs_dir / "other.raw").totals.shared
    # Metadata takes other places, and filesystems allocate more than was asked for. QEMU writes zeros over what it has
    # only mapped.
    assert (-SIZE if way == "metadata" else -MIB) < allocated(ours) - allocated(theirs) < MIB
    assert abs(ours.stat().st_size - theirs.stat().st_size) < MIB


@pytest.mark.parametrize("more", [{}, {"extended_l2": True}, {"compat": "0.10"}, {"cluster_size": 512}])
@pytest.mark.parametrize("way", ["metadata", "falloc", "full"])
def test_each_cluster_of_a_new_qcow2_is_allocated(
    tmp_path: Path, qemu_img: QemuImg, way: str, more: dict[str, Any]
) -> None:
    target = tmp_path / "disk.qcow2"
    vmconv.create(target, 3 * MIB + 512, options={"preallocation": way, **more})
    report = vmconv.check(target)
    assert report
    assert not report.corruptions
    assert not report.leaks
    qemu_img("check", "-q", target)
    rows = [row for row in vmconv.map_disk(target) if not row.present]
    assert rows == []
    assert (allocated(target) > 3 * MIB) == (way != "metadata")


def test_zeros_that_are_written_count_as_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    source = make_disk(tmp_path / "source.raw", SIZE)
    plans: list[vmconv.Plan] = []
    vmconv.convert(
        source,
        tmp_path / "target.raw",
        options={"preallocation": "full"},
        progress=lambda done, total: seen.append((done, total)),
        announce=plans.append,
    )
    assert seen[-1] == (SIZE, SIZE)
    assert plans[0].notes == (f"target.raw: {plans[0].totals.zero} bytes without payload are written as zeros",)


def test_a_filesystem_that_cannot_allocate_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(linux, "allocate", fail)
    with pytest.raises(BackendError, match="cannot allocate space") as caught:
        vmconv.create(tmp_path / "disk.raw", SIZE, options={"preallocation": "falloc"})
    assert caught.value.hint == "use preallocation=full, which writes zeros"
    assert list(tmp_path.iterdir()) == []


def test_space_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="bytes would have to be written"):
        vmconv.create(tmp_path / "disk.raw", 1 << 50, options={"preallocation": "falloc"})
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_preallocated_is_refused(tmp_path: Path) -> None:
    source = make_disk(tmp_path / "source.raw", SIZE)
    vmconv.create(tmp_path / "base.qcow2", SIZE)
    for name in ("raw", "qcow2"):
        options = {"preallocation": "falloc"}
        with pytest.raises((UsageError, PlanError), match="nothing can be preallocated"):
            vmconv.convert(source, tmp_path / f"disk.{name}", target_format=name, options=options, in_place=True)
    with pytest.raises(PlanError, match="exclude each other"):
        vmconv.create(tmp_path / "top.qcow2", backing_file="base.qcow2", options={"preallocation": "metadata"})
    with pytest.raises(UsageError, match="payload in the image itself"):
        options = {"preallocation": "metadata", "data_file": "source.raw"}
        vmconv.convert(source, tmp_path / "disk.qcow2", options=options)
    assert source.exists()
