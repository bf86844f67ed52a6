"""The lock of a node's directory: one process at a time runs the node."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from vmconv_fleet.config import NodeConfig
from vmconv_fleet.errors import FleetError


@contextmanager
def locked(config: NodeConfig) -> Iterator[None]:
    """Prevents a second process for the same node."""
    with open(config.path("lock"), "a+", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FleetError(f"{config.directory}: the node is already running, as process {_pid(config)}") from None
        lock.truncate(0)
        try:
            yield
        finally:
            lock.truncate(0)


def note_process(config: NodeConfig) -> None:
    """Writes this process into the lock file, for `running`; while it is locked."""
    with open(config.path("lock"), "w", encoding="ascii") as lock:
        lock.write(str(os.getpid()))


def _pid(config: NodeConfig) -> str:
    with open(config.path("lock"), encoding="ascii") as file:
        return file.read().strip() or "?"


def running(config: NodeConfig) -> int | None:
    """Returns the process id of the node's daemon; None if it does not run, or waits for room."""
    with contextlib.suppress(FileNotFoundError, ValueError), open(config.path("lock"), encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(lock.read())
    return None
