"""Writes around the page cache (man 2 open, O_DIRECT), for payload that must be durable and is not read soon."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress

from vmconv.system import linux

STEP = 4 << 20
"""Bytes of one read and write. Smaller steps do not keep storage busy with few threads."""

_SHORTEST = 1 << 20
_BLOCK = 4096
# Btrfs silently writes data with checksums through the page cache.
_FILESYSTEMS = frozenset({"ext4", "xfs"})


class DirectFile:
    """A second descriptor of a file being written, with O_DIRECT. Thread-safe.

    `write` leaves partial blocks to the caller, and everything if the filesystem refuses.
    """

    def __init__(self, descriptor: int) -> None:
        self._through_cache = descriptor
        self._lock = threading.Lock()
        self._descriptor = -1
        self._refused = False

    def prepare(self, offset: int, length: int) -> bool:
        """Allocates the range and returns whether the caller should use `write` for it.

        ext4 and XFS run direct writes in parallel only into allocated space.
        """
        if length < _SHORTEST or offset % _BLOCK or not self._try_open():
            return False
        try:
            linux.allocate(self._descriptor, offset, length)
        except OSError as exc:
            # EPERM: a seccomp filter. ENOSPC is raised now, before any payload is copied.
            if exc.errno not in linux.NOT_SUPPORTED | {errno.EINVAL, errno.EPERM}:
                raise
            self._refused = True
        return not self._refused

    def _try_open(self) -> bool:
        with self._lock:
            if self._descriptor < 0 and not self._refused:
                # The file may have no name. Without /proc everything goes through the cache.
                path = f"/proc/self/fd/{self._through_cache}"
                self._refused = not self._suits(path)
                if not self._refused:
                    self._open(path)
            return not self._refused

    def _suits(self, path: str) -> bool:
        return linux.mount_of(os.path.dirname(os.path.realpath(path))).type in _FILESYSTEMS

    def _open(self, path: str) -> None:
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise
            self._refused = True

    def write(self, offset: int, part: memoryview) -> int:
        """Writes the whole blocks of `part`, which is page-aligned in memory; returns the bytes written."""
        whole = len(part) // _BLOCK * _BLOCK
        done = 0
        while done < whole and done % _BLOCK == 0 and not self._refused:
            try:
                step = os.pwrite(self._descriptor, part[done:whole], offset + done)
            except OSError as exc:
                if exc.errno != errno.EINVAL:
                    raise
                # The storage has larger blocks than `_BLOCK`.
                self._refused = True
                continue
            if not step:
                raise OSError(errno.EIO, "nothing was written", linux.name_of(self._descriptor))
            done += step
        return done

    def close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            # Linux closes the descriptor even on errors, and fsync has reported failed writes.
            with suppress(OSError):
                os.close(descriptor)


class DirectDevice(DirectFile):
    """A second descriptor of a block device, with O_DIRECT: nothing has to be allocated."""

    def prepare(self, offset: int, length: int) -> bool:
        return length >= _SHORTEST and offset % _BLOCK == 0 and self._try_open()

    def _suits(self, path: str) -> bool:
        return True
