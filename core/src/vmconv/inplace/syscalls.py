"""The system calls of changes in place, one method each, so that tests can stop a run at every call."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from vmconv.io import attributes
from vmconv.io.directory import Directory
from vmconv.system import linux


class Syscalls:
    """All writes of a change in place go through these methods; reads do not."""

    def create(self, directory: Directory, name: str) -> int:
        """Returns a new, empty file of mode 0600. Raises `FileExistsError` if the name exists."""
        return directory.create(name)

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(descriptor, view, offset)
            if not done:
                raise OSError(errno.EIO, "nothing was written", linux.name_of(descriptor))
            view, offset = view[done:], offset + done

    def punch(self, descriptor: int, offset: int, length: int) -> None:
        """Punches a hole: the range reads as zero, its whole blocks are freed."""
        linux.punch_hole(descriptor, offset, length)

    def collapse(self, descriptor: int, offset: int, length: int) -> None:
        """Removes whole blocks from a file (FALLOC_FL_COLLAPSE_RANGE)."""
        linux.collapse_range(descriptor, offset, length)

    def insert(self, descriptor: int, offset: int, length: int) -> None:
        """Inserts a hole of whole blocks into a file (FALLOC_FL_INSERT_RANGE)."""
        linux.insert_range(descriptor, offset, length)

    def truncate(self, descriptor: int, size: int) -> None:
        os.ftruncate(descriptor, size)

    def set_times(self, descriptor: int, mtime: int) -> None:
        """Sets the mtime, ns."""
        os.utime(descriptor, ns=(os.fstat(descriptor).st_atime_ns, mtime))

    def carry(self, source: int, target: int, others: Iterable[int] = ()) -> tuple[str, ...]:
        """Gives a new file the owner, mode and attributes of another; see `vmconv.io.attributes.carry`."""
        return attributes.carry(source, target, others)

    def set_mode(self, descriptor: int, mode: int) -> None:
        os.fchmod(descriptor, mode)

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def rename(self, directory: Directory, old: str, new: str, *, replace: bool) -> None:
        """Renames a file. Without `replace` raises `FileExistsError` if the new name exists."""
        directory.rename(old, new, replace=replace)

    def unlink(self, directory: Directory, name: str) -> None:
        directory.unlink(name)

    def sync_directory(self, directory: Directory) -> None:
        directory.sync()
