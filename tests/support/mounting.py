"""Real mounts of `vmconv mount`."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.requirements import missing

PATIENCE = 600.0

ERRORS = "vmconv-errors.txt"


class Mounted:
    """A running `vmconv mount`; `said` is what it printed, once it has ended."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said = ""
        self.has_ended = False

    def end(self) -> int:
        self.has_ended = True
        self.said += self.process.communicate(timeout=PATIENCE)[0]
        return self.process.returncode


def need_fuse() -> None:
    """Skips a test where FUSE cannot be used."""
    if not (os.path.exists("/dev/fuse") and shutil.which("fusermount3")):
        missing("fuse", "FUSE cannot be used: /dev/fuse or fusermount3 is not there")


@contextlib.contextmanager
def mount_point() -> Iterator[Path]:
    """Yields an empty directory to mount on, which other users can reach."""
    directory = Path(tempfile.mkdtemp(prefix="vmconv-mount-"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], capture_output=True, check=False)
        directory.rmdir()


@contextlib.contextmanager
def mounted(directory: Path | str, point: Path, *flags: str) -> Iterator[Mounted]:
    command = [sys.executable, "-m", "vmconv", "mount", *flags, str(directory), str(point)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        running = Mounted(process)
        try:
            wait_for(point, running)
            yield running
        finally:
            if process.poll() is None and os.path.ismount(point):
                subprocess.run(["fusermount3", "-u", "-z", str(point)], check=True)
            if not running.has_ended:
                assert running.end() == 0, running.said


def wait_for(point: Path, running: Mounted) -> None:
    until = time.monotonic() + PATIENCE
    while not os.path.ismount(point):
        if running.process.poll() is not None:
            running.end()
            pytest.fail(running.said)
        assert time.monotonic() < until
        time.sleep(0.01)
