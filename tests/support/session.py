"""The directory of one test run, and the removal of what killed runs have left behind.

A run holds a lock on a file in its directory for as long as its process lives. A process that gets this lock may
unmount and remove all that is below the directory.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "vmconv-tests-"
_LOCK = "lock"


class Run:
    """The directory of this run below `parent`; directories of runs that were killed are removed first."""

    def __init__(self, parent: Path) -> None:
        for left in sorted(parent.glob(f"{PREFIX}*")):
            _remove_if_left(left)
        # Named only when it is locked: another run that begins now never sees it without its lock.
        made = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent))
        self._lock = os.open(made / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.directory = made.rename(parent / made.name[1:])
        self.state = self.directory / "state"
        self.state.mkdir(0o700)

    def end(self) -> None:
        _remove(self.directory)
        os.close(self._lock)


def _remove_if_left(directory: Path) -> None:
    status = directory.lstat() if os.path.lexists(directory) else None
    if status is None or status.st_uid != os.geteuid() or not os.path.isdir(directory) or directory.is_symlink():
        return
    try:
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(directory)
    except BlockingIOError:
        pass  # The run is alive.
    finally:
        os.close(lock)


def _remove(directory: Path) -> None:
    """Unmounts all that is mounted below a directory, frees the loop devices of its files, and removes it."""
    for point in _mount_points(directory):
        if subprocess.run(["umount", point], capture_output=True, check=False).returncode:
            # A process that the run has started may still have files open there.
            subprocess.run(["umount", "--lazy", point], capture_output=True, check=False)
    for device in _loop_devices(directory):
        subprocess.run(["losetup", "--detach", device], capture_output=True, check=False)
    if not _mount_points(directory):
        shutil.rmtree(directory, ignore_errors=True)


def _mount_points(directory: Path) -> list[str]:
    """Returns what is mounted below a directory, the innermost first."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split()[4].encode().decode("unicode_escape") for line in lines]
    return [point for point in reversed(points) if point.startswith(f"{directory.resolve()}/")]


def _loop_devices(directory: Path) -> Iterator[str]:
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            file = backing.read_text().strip()
        except OSError:
            continue  # It was detached meanwhile.
        if file.startswith(f"{directory.resolve()}/"):
            yield f"/dev/{backing.parents[1].name}"
