"""A block device that becomes a target: claimed for this process alone, with its content untouched."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from vmconv.errors import AccessError, PlanError, os_errors
from vmconv.io import locks
from vmconv.io.directory import Directory
from vmconv.model.sources import File
from vmconv.system import block, linux

_IN_USE = "unmount or detach it first"
# The loop device was detached meanwhile.
_DETACHED = frozenset({errno.ENOENT, errno.ENXIO, errno.ENODEV})


class Device:
    """A block device that no one else mounts, claims or images use until it is closed; open for reading."""

    def __init__(self, directory: Directory, name: str, path: str) -> None:
        """Claims the device `name`; `path` is for messages. Raises `AccessError` if it is in use."""
        self.path = path
        self._directory, self._name = directory, name
        self.descriptor = self._claim()
        try:
            with os_errors("cannot be looked up", AccessError, where=path):
                self.place = block.place_of(os.fstat(self.descriptor))
                self.size = os.lseek(self.descriptor, 0, os.SEEK_END)
                self.block = block.logical_block(self.descriptor)
                self._below = block.below(self.place)
                self._refuse_use()
        except BaseException:
            self.close()
            raise

    def _claim(self) -> int:
        # O_EXCL without O_CREAT: the kernel's claim, which mounts, swap, LVM and md take too (man 2 open).
        try:
            return self._open(os.O_RDONLY | os.O_EXCL)
        except OSError as exc:
            if exc.errno == errno.EBUSY:
                raise AccessError(f"{self.path}: is in use{self._by_whom()}", hint=_IN_USE) from exc
            raise AccessError(f"{self.path}: cannot be opened: {exc.strerror}") from exc

    def _open(self, flags: int) -> int:
        flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        return os.open(self._name, flags, dir_fd=self._directory.descriptor)

    def _by_whom(self) -> str:
        """Returns the use of a device that is claimed, as the end of a sentence; empty if it is not known."""
        status = self._directory.status(self._name)
        for mount in linux.mounts():
            if status and mount.source.startswith("/") and _is_device(mount.source, status):
                return f": mounted at {mount.point}"
        return " (mounted, swap space, or a part of LVM, RAID or another device)"

    def _refuse_use(self) -> None:
        if not stat.S_ISBLK(os.fstat(self.descriptor).st_mode):
            raise AccessError(f"{self.path}: is not a block device")
        if block.is_read_only(self.descriptor):
            raise AccessError(f"{self.path}: is read-only")
        for name, place in block.loops():
            # Loop devices do not claim what they lie on.
            if place not in self._below and self._has_in_common(place):
                raise AccessError(f"{self.path}: is in use as {name}", hint=_IN_USE)
        locks.refuse_users(File(self.path, self.descriptor), hint=_IN_USE)

    def _has_in_common(self, loop: block.Place) -> bool:
        """True if a loop device lies on this device, or on the same file or disk as a whole."""
        try:
            return self.place in block.below(loop) or not self._below.isdisjoint(block.directly_below(loop))
        except OSError as exc:
            if exc.errno not in _DETACHED:
                raise
            return False

    def refuse_sources(self, files: Sequence[File]) -> None:
        """Raises `PlanError` if one of the files is the device or lies on it, or the device lies on one of them."""
        for file in (each for each in files if not each.is_remote):
            with os_errors("cannot be looked up", AccessError, where=file.path):
                place = block.place_of(os.fstat(file.descriptor))
                overlaps = place in self._below or (file.is_device and self.place in block.below(place))
            if overlaps:
                raise PlanError(f"{self.path}: is part of the source", hint="choose another device")
        locks.claim(self.descriptor)

    def open_for_writing(self) -> int:
        """Returns a new descriptor of the device, open for reading and writing."""
        with os_errors("cannot be opened for writing", AccessError, where=self.path):
            descriptor = self._open(os.O_RDWR)
            if block.place_of(os.fstat(descriptor)) != self.place:
                os.close(descriptor)
                raise AccessError(f"{self.path}: became another device", hint="try again")
        return descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            linux.close(descriptor)


def _is_device(path: str, status: os.stat_result) -> bool:
    try:
        return block.place_of(os.stat(path)) == block.place_of(status)
    except OSError:
        return False
