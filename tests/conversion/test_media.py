"""Sources on a medium that nobody can write to: there is nothing to sync, and fsync says so with an error."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk
from support.requirements import missing, oracle_program


@pytest.fixture
def medium(tmp_path: Path) -> Iterator[Path]:
    """A mounted squashfs with a raw disk and a qcow2 image of it."""
    program = oracle_program("mksquashfs")
    if os.geteuid() != 0:
        missing("reflink", "mounting a loop device needs root")
    files, image, point = tmp_path / "files", tmp_path / "fs.squashfs", tmp_path / "medium"
    for path in (files, point):
        path.mkdir()
    raw = make_disk(files / "disk.raw", 8 * MIB)
    vmconv.convert(str(raw), str(files / "disk.qcow2"))
    subprocess.run([program, files, image, "-quiet", "-no-progress"], check=True, capture_output=True)
    done = subprocess.run(["mount", "-o", "loop,ro", image, point], capture_output=True, text=True, check=False)
    if done.returncode:
        missing("reflink", f"mount: {done.stderr.strip()}")
    yield point
    subprocess.run(["umount", point], check=True)


def test_fsync_is_an_error_there(medium: Path) -> None:
    with (medium / "disk.raw").open("rb") as file, pytest.raises(OSError, match="Invalid argument"):
        os.fsync(file.fileno())


@pytest.mark.parametrize("name", ["disk.raw", "disk.qcow2"])
def test_a_source_on_squashfs_is_converted(medium: Path, xfs_dir: Path, qemu_img: QemuImg, name: str) -> None:
    target = xfs_dir / "new.vmdk"
    vmconv.convert(str(medium / name), str(target))
    qemu_img("compare", "-f", "raw", "-F", "vmdk", medium / "disk.raw", target)
    assert vmconv.compare(str(medium / name), str(target)).identical
    # Such a filesystem does not tell where payload lies.
    proof = vmconv.prove(str(medium / name), str(target))
    assert proof.unknown
    assert not proof.apart
