"""A volume of JuiceFS, mounted: metadata in SQLite or Redis, and objects in a directory where they can be counted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from support.daemons import free_port, wait_until
from support.requirements import missing, oracle_program

Engine = Literal["sqlite", "redis"]
ENGINES: tuple[Engine, ...] = ("sqlite", "redis")
"""What keeps the metadata: a file, for the mounts of one machine, or a server, for those of many."""


class Range(NamedTuple):
    """`length` bytes of a file: a range of a slice. The file's chunks have 64 MiB each."""

    chunk: int
    slice: int
    length: int


class Volume:
    """A volume below `directory`; `mounts` are its mounted directories, by name."""

    def __init__(self, directory: Path, engine: Engine = "sqlite") -> None:
        if not os.path.exists("/dev/fuse") or not shutil.which("fusermount3"):
            missing("fuse", "there is no /dev/fuse, or no fusermount3")
        self.directory = directory
        self.mounts: dict[str, Path] = {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._program = oracle_program("juicefs")
        self._server: subprocess.Popen[bytes] | None = None
        self.meta = f"sqlite3://{directory}/meta.db" if engine == "sqlite" else self._redis()
        self.objects = directory / "objects"
        bucket = ("--storage", "file", "--bucket", f"{self.objects}/")
        try:
            subprocess.run(
                [self._program, "format", *bucket, "--trash-days", "0", self.meta, "tests"],
                check=True,
                capture_output=True,
            )
        except BaseException:
            self.close()
            raise

    def _redis(self) -> str:
        """Starts a server for the metadata, and returns its URL."""
        port = free_port()
        command = [oracle_program("redis-server"), "--bind", "127.0.0.1", "--port", str(port), "--save", ""]
        self._server = subprocess.Popen(
            [*command, "--dir", self.directory], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        wait_until(port, self._server)
        return f"redis://127.0.0.1:{port}/1"

    def mount(self, name: str, *flags: str) -> Path:
        """Mounts the volume once more, and returns where."""
        point = self.directory / name
        point.mkdir(exist_ok=True)
        cache = self.directory / f"cache-{name}"
        # What another mount has done is seen at once.
        fresh = [f"--{what}-cache=0" for what in ("attr", "entry", "dir-entry")]
        self._running[name] = subprocess.Popen(
            [self._program, "mount", "--no-usage-report", *fresh, *flags, "--cache-dir", cache, self.meta, point],
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

    def added(self, before: Collection[str]) -> int:
        """Returns the bytes of all objects with other names than `before`; old ones may be removed at any time."""
        return sum(os.path.getsize(name) for name in self.names() if name not in before)

    def names(self) -> set[str]:
        """Returns the names of all objects; each is written once."""
        return {str(path) for path in self.objects.rglob("*") if path.is_file()}

    def ranges(self, path: Path) -> list[Range]:
        """Returns the ranges of slices that a file consists of."""
        done = subprocess.run([self._program, "info", "--raw", path], check=True, capture_output=True, text=True)
        # Tables of locks may follow. Slice 0 is a hole.
        table = done.stdout.partition(" chunks:\n")[2].partition("\n ")[0]
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        return [Range(int(row[0]), int(row[1]), int(row[4])) for row in rows if row[0].isdecimal() and int(row[1])]

    def settle(self, path: Path) -> None:
        """Joins the ranges of each chunk of a file, and waits for those that a mount is joining already."""
        subprocess.run([self._program, "compact", path], check=True, capture_output=True)

    def close(self) -> None:
        for name in list(self.mounts):
            self.unmount(name)
        if self._server:
            self._server.kill()
            self._server.wait()
