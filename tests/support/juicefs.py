"""A volume of JuiceFS, mounted: its metadata in SQLite, its objects in a directory where they can be counted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from support.requirements import missing, oracle_program


class Volume:
    """A volume below `directory`; `mounts` are its mounted directories, by name."""

    def __init__(self, directory: Path) -> None:
        if not os.path.exists("/dev/fuse") or not shutil.which("fusermount3"):
            missing("fuse", "there is no /dev/fuse, or no fusermount3")
        self.directory = directory
        self.mounts: dict[str, Path] = {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._program = oracle_program("juicefs")
        self.meta = f"sqlite3://{directory}/meta.db"
        self.objects = directory / "objects"
        bucket = ("--storage", "file", "--bucket", f"{self.objects}/")
        subprocess.run(
            [self._program, "format", *bucket, "--trash-days", "0", self.meta, "tests"], check=True, capture_output=True
        )

    def mount(self, name: str) -> Path:
        """Mounts the volume once more, and returns where."""
        point = self.directory / name
        point.mkdir(exist_ok=True)
        cache = self.directory / f"cache-{name}"
        # What another mount has done is seen at once.
        fresh = [f"--{what}-cache=0" for what in ("attr", "entry", "dir-entry")]
        self._running[name] = subprocess.Popen(
            [self._program, "mount", "--no-usage-report", *fresh, "--cache-dir", cache, self.meta, point],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while not os.path.ismount(point):
            assert self._running[name].poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.mounts[name] = point
        return point

    def kill(self, name: str) -> None:
        """Kills the processes of a mount; the mount stays, without anything behind it."""
        os.killpg(self._running[name].pid, signal.SIGKILL)

    def unmount(self, name: str) -> None:
        subprocess.run(["umount", "--lazy", self.mounts.pop(name)], check=True, capture_output=True)
        # A lazy umount ends a mount once nothing uses it, so its processes need not wait for that.
        with suppress(ProcessLookupError):
            os.killpg(self._running[name].pid, signal.SIGKILL)
        self._running.pop(name).wait()

    def stored(self) -> int:
        """Returns the bytes of all objects."""
        return sum(path.stat().st_size for path in self.objects.rglob("*") if path.is_file())

    def close(self) -> None:
        for name in list(self.mounts):
            self.unmount(name)
