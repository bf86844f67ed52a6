"""Writing past the page cache (man 2 open, O_DIRECT): payload that has to be durable, and is not read soon."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress

from vmconv.system import linux

STEP = 4 << 20
"""Bytes that are read and written at a time: at least so many keep storage busy from a few threads."""

_SHORTEST = 1 << 20
_BLOCK = 4096
# Btrfs writes what has checksums through the page cache all the same, and nothing says so.
_FILESYSTEMS = frozenset({"ext4", "xfs"})


class DirectFile:
    """A second way into a file that is being written. May be used from several threads at once.

    Where the filesystem cannot, and for what is not whole blocks, `write` leaves bytes to the caller.
    """

    def __init__(self, descriptor: int) -> None:
        self._through_cache = descriptor
        self._lock = threading.Lock()
        self._descriptor = -1
        self._refused = False

    def prepare(self, offset: int, length: int) -> bool:
        """Returns whether the given range is to be written by `write`, and has the filesystem find room for it.

        ext4 and XFS let writers go on beside each other only where room was found before.
        """
        if length < _SHORTEST or offset % _BLOCK or not self._try_open():
            return False
        try:
            linux.allocate(self._descriptor, offset, length)
        except OSError as exc:
            # A filter of system calls may deny it. Where there is no room, writing would find that out too late.
            if exc.errno not in linux.NOT_SUPPORTED | {errno.EINVAL, errno.EPERM}:
                raise
            self._refused = True
        return not self._refused

    def _try_open(self) -> bool:
        with self._lock:
            if self._descriptor < 0 and not self._refused:
                # The file itself, whatever its name is; without /proc all goes through the cache.
                path = f"/proc/self/fd/{self._through_cache}"
                self._refused = linux.mount_of(os.path.dirname(os.path.realpath(path))).type not in _FILESYSTEMS
                if not self._refused:
                    self._open(path)
            return not self._refused

    def _open(self, path: str) -> None:
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise
            self._refused = True

    def write(self, offset: int, part: memoryview) -> int:
        """Writes whole blocks from the beginning of `part`, which begins at a page; returns how many bytes."""
        whole = len(part) // _BLOCK * _BLOCK
        done = 0
        while done < whole and done % _BLOCK == 0 and not self._refused:
            try:
                step = os.pwrite(self._descriptor, part[done:whole], offset + done)
            except OSError as exc:
                if exc.errno != errno.EINVAL:
                    raise
                # Storage with larger blocks than ours.
                self._refused = True
                continue
            if not step:
                raise OSError(errno.EIO, "nothing was written", linux.name_of(self._descriptor))
            done += step
        return done

    def close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            # It is closed whatever is said; what could not be written, fsync has said.
            with suppress(OSError):
                os.close(descriptor)
