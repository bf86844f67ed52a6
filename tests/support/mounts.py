"""Loop-mounted filesystems."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

from support.requirements import missing

FILESYSTEM_SIZE = 4 << 30
TEMPORARY_SIZE = 64 << 30
"""Bytes of the filesystem of temporary files; it is a sparse file."""


class Mounts:
    """Loop-mounted filesystems, made when they are first asked for and kept for the session."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made: dict[str, Path | str] = {}

    def get(self, kind: str) -> Path:
        """Returns the mount point of a filesystem of this kind; skips with the reason where none can be had."""
        if kind not in self._made:
            self._made[kind] = self._make(kind)
        made = self._made[kind]
        if isinstance(made, str):
            missing("reflink", made)
        assert isinstance(made, Path)
        return made

    def _make(self, kind: str) -> Path | str:
        return mounted(kind, self._directory / kind, FILESYSTEM_SIZE)

    def close(self) -> None:
        for point in self._made.values():
            if isinstance(point, Path):
                subprocess.run(["umount", str(point)], check=True)


def quick_directory(directory: Path) -> Path | None:
    """Returns a directory on an ext4 of its own below `directory`, or None where none can be mounted."""
    point = mounted("ext4", directory / "t", TEMPORARY_SIZE)
    return None if isinstance(point, str) else point / "t"


def mounted(kind: str, point: Path, size: int) -> Path | str:
    """Returns a new mount point of a filesystem in a sparse file of `size` bytes, or why there is none."""
    if os.geteuid() != 0:
        return "mounting a loop device needs root"
    maker = f"mkfs.{kind}"
    if not shutil.which(maker):
        return f"{maker} is not installed"
    image = point.with_suffix(".img")
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(size)
    flags = {"xfs": ["-q", "-m", "reflink=1"], "btrfs": ["-q"], "ext4": ["-q", "-F"]}[kind]
    for command in ([maker, *flags, str(image)], ["mount", "-o", "loop", str(image), str(point)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{' '.join(command)}: {done.stderr.strip()}"
    _skip_flushes(image)
    return point


def _skip_flushes(image: Path) -> None:
    """Makes the kernel treat the loop device of a file as one without a write cache.

    Otherwise tests wait for thousands of flushes of the machine's own disk. No test cuts its power.
    """
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        # Other devices may vanish meanwhile, and /sys may be read-only.
        with contextlib.suppress(OSError):
            if backing.read_text().strip() == str(image.resolve()):
                (backing.parents[1] / "queue" / "write_cache").write_text("write through")
