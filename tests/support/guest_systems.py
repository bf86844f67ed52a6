"""Disks with a Linux guest as `vmconv machine check` sees it: a partition table, filesystems, a kernel's modules."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

import pytest

from .disks import MIB
from .requirements import missing, oracle_program

ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"

FIRST = 8 * MIB
"""Where the first filesystem begins, behind the EFI system partition."""


@cache
def installed_kernel() -> str:
    """Returns the version of a kernel of Debian whose modules and initramfs are on this machine."""
    found = [path for path in Path("/lib/modules").glob("*") if Path(f"/boot/initrd.img-{path.name}").exists()]
    if not found:
        missing("oracle", "linux-image-cloud-amd64 is not installed")
    return found[0].name


def write_tree(directory: Path, files: dict[str, str | bytes | Path]) -> Path:
    """Makes files; a value that is a path is the target of a symbolic link."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            path.symlink_to(content)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return directory


def filesystem(path: Path, kind: str, tree: Path, size: int) -> Path:
    """Makes a file with a filesystem that holds a tree."""
    with path.open("wb") as file:
        file.truncate(size)
    if kind == "ext4":
        subprocess.run([oracle_program("mkfs.ext4"), "-q", "-d", str(tree), str(path)], check=True, capture_output=True)
        return path
    if os.geteuid() != 0:
        pytest.skip("mounting a loop device needs root")
    subprocess.run([oracle_program(f"mkfs.{kind}"), "-q", str(path)], check=True, capture_output=True)
    point = path.parent / f"{path.name}.mnt"
    point.mkdir()
    subprocess.run(["mount", "-o", "loop", str(path), str(point)], check=True)
    try:
        subprocess.run(["cp", "-a", f"{tree}/.", str(point)], check=True)
    finally:
        subprocess.run(["umount", str(point)], check=True)
    return path


def disk_of(path: Path, filesystems: list[Path]) -> Path:
    """Makes a disk with an EFI system partition, and one partition for each file with a filesystem."""
    at, lines = FIRST, ["label: gpt", f"start=1MiB, size=4MiB, type={ESP}"]
    starts = []
    for each in filesystems:
        starts.append(at)
        lines.append(f"start={at // MIB}MiB, size={each.stat().st_size // MIB}MiB, type={LINUX}")
        at += each.stat().st_size
    with path.open("wb") as file:
        file.truncate(at + MIB)
    command = [oracle_program("sfdisk"), "-q", "--no-reread", "--no-tell-kernel", str(path)]
    subprocess.run(command, input="\n".join(lines), text=True, check=True, capture_output=True)
    with path.open("r+b") as disk:
        for start, each in zip(starts, filesystems, strict=True):
            _copy_data(each, disk.fileno(), start)
    return path


def _copy_data(source: Path, target: int, start: int) -> None:
    """Copies what is no hole."""
    with source.open("rb") as file:
        size, at = source.stat().st_size, 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                return
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            os.pwrite(target, os.pread(file.fileno(), end - at, at), start + at)
            at = end
