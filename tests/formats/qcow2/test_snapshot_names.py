"""The snapshot that `-l` names, beside the one that qemu-img converts."""

from __future__ import annotations

from pathlib import Path

import pytest

import vmconv
from support.disks import QemuImg, qemu_io
from vmconv.errors import UsageError


@pytest.fixture
def image(tmp_path: Path, qemu_img: QemuImg) -> Path:
    """An image whose second snapshot has the first one's id as its name, and a third with a comma."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    for number, name in enumerate(("first", "1", "a,b"), start=1):
        qemu_io(path, f"write -P {number} 0 64K")
        qemu_img("snapshot", "-c", name, path)
    return path


@pytest.mark.parametrize(
    "wanted",
    [
        "1",
        "first",
        "a,b",
        "snapshot.id=1",
        "snapshot.name=1",
        "snapshot.name=first",
        "snapshot.name=a,,b",
        "snapshot.id=1,snapshot.name=first",
        "snapshot.id=3",
    ],
)
def test_the_snapshot_is_that_of_qemu_img(image: Path, qemu_img: QemuImg, tmp_path: Path, wanted: str) -> None:
    ours, theirs = tmp_path / "ours.raw", tmp_path / "theirs.raw"
    vmconv.convert(image, ours, snapshot=wanted)
    qemu_img("convert", "-l", wanted, "-O", "raw", image, theirs)
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ("snapshot.id=first", "no snapshot 'snapshot.id=first'"),
        ("snapshot.id=1,snapshot.name=1", "no snapshot"),
        ("snapshot.size=1", "'snapshot.size=1' is neither snapshot.id=ID nor snapshot.name=NAME"),
        ("snapshot.id", "'snapshot.id' is neither"),
    ],
)
def test_what_no_snapshot_has_is_refused(image: Path, tmp_path: Path, wanted: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        vmconv.convert(image, tmp_path / "ours.raw", snapshot=wanted)
