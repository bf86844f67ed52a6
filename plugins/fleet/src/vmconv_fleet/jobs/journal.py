"""The journal of a conversion: it tells a restarted node whether a target is its own.

Linking a file under its name keeps its device, inode and generation. A later file with that inode number has another
generation. The journal lists these of the files being made, durably, before they are named. Afterwards a target
belongs to the job if and only if it is one of them.

An object is known by its version, which the journal states before the object appears. A process of its own asks the
store: the client of a store takes much memory.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from vmconv.api import generation, recover
from vmconv.plugin import VmconvError

_PATIENCE = 20.0
"""Seconds for a store to answer."""


class JobJournal:
    """The journal of one job, a file at `path` in the node's directory."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = -1

    def lock(self) -> bool:
        """Locks the job until `unlock` or the end of this process; returns False if another process has it.

        The worker of a killed node may run a moment longer, and may even finish.
        """
        self._lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.unlock()
            return False
        return True

    def unlock(self) -> None:
        os.close(self._lock)
        self._lock = -1

    def write(self, target: str, directory: os.stat_result, descriptors: Iterable[int]) -> None:
        """Records durably that the target will be one of the open files, and in this directory."""
        place = [directory.st_dev, directory.st_ino]
        files = [_identity(descriptor) for descriptor in descriptors]
        self._write({"target": target, "directory": place, "files": files})

    def write_object(self, container: str, name: str, version: str) -> None:
        """Records durably that the target will be this version of an object in the container at a URL."""
        self._write({"target": name, "container": container, "version": version})

    def _write(self, said: Mapping[str, Any]) -> None:
        temporary = f"{self.path}.new"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(said, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        own = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(own)
        finally:
            os.close(own)

    def made(self) -> str | None:
        """Returns the path of the target if the job made it; None otherwise.

        Completes a job that was killed after the commit, while its files were named. A store that cannot be asked has
        made nothing.
        """
        try:
            with open(self.path, encoding="utf-8") as file:
                said = json.load(file)
            if "container" in said:
                return said["target"] if _appeared(said) else None
            place, name = os.path.split(said["target"])
            with _held(place, said["directory"]) as directory:
                # Nobody can lead this path elsewhere by renaming the directory.
                here = f"/proc/self/fd/{directory}/{name}"
                if not os.path.lexists(here):
                    recover(here)
                target = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        except (OSError, ValueError, KeyError, VmconvError):
            return None
        try:
            return said["target"] if _identity(target) in said["files"] else None
        finally:
            os.close(target)

    def remove(self) -> None:
        """Removes the journal, once the job's record is final."""
        for path in (self.path, f"{self.path}.lock"):
            with suppress(FileNotFoundError):
                os.unlink(path)


def _appeared(said: Mapping[str, str]) -> bool:
    """Returns whether an object has the version that a job has made."""
    try:
        asked = subprocess.run(
            [sys.executable, "-m", "vmconv_fleet.jobs.appeared"],
            input=json.dumps(said).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_PATIENCE,
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return asked.returncode == 0


@contextmanager
def _held(path: str, identity: list[int]) -> Iterator[int]:
    """Yields a descriptor of the directory. Raises FileNotFoundError if another one has the path by now."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        status = os.fstat(directory)
        if [status.st_dev, status.st_ino] != identity:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        yield directory
    finally:
        os.close(directory)


def _identity(descriptor: int) -> list[int | None]:
    status = os.fstat(descriptor)
    return [status.st_dev, status.st_ino, generation(descriptor)]
