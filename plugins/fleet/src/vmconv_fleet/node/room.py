"""A start on a full disk waits for room: SQLite cannot even open its database without any."""

from __future__ import annotations

import errno
import logging
import os
import signal
from collections.abc import Callable
from typing import IO

from vmconv.plugin import os_errors

ROOM = 1 << 20
"""Bytes that the start of a node needs, at most, besides its database."""
AGAIN_S = 2.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_log = logging.getLogger("vmconv_fleet.daemon")


def wait_for_room(directory: str, event: Callable[[float], int | None]) -> bool:
    """Returns True once the filesystem has room, False if an event other than SIGHUP comes first.

    `event` waits at most some seconds for the next event.
    """
    if _has_room(directory):
        return True
    _log.error("%s: no room on the disk: the node starts once %d KiB are free", directory, ROOM >> 10)
    while not _has_room(directory):
        if event(AGAIN_S) not in (None, signal.SIGHUP):
            return False
    _log.info("%s: the disk has room again", directory)
    return True


def _has_room(directory: str) -> bool:
    """Asks by allocating: quotas and inodes count too."""
    with os_errors(directory):
        try:
            with _temporary(directory) as file:
                os.posix_fallocate(file.fileno(), 0, ROOM)
        except OSError as exc:
            if exc.errno not in _NO_ROOM:
                raise
            return False
    return True


def _temporary(directory: str) -> IO[bytes]:
    """Returns a file without a name."""
    try:
        return open(os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600), "r+b", buffering=0)
    except OSError as exc:
        if exc.errno in _NO_ROOM:
            raise
    # For filesystems without such files, such as NFS; the module imports two compression libraries.
    from tempfile import TemporaryFile

    return TemporaryFile(dir=directory)
