"""The system calls by which files are changed in place, one method for each: tests stop a run at every single one."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from vmconv.io import attributes
from vmconv.io.directory import Directory
from vmconv.system import linux


class Syscalls:
    """All that a change in place does to storage goes through one of these; reading does not."""

    def create(self, directory: Directory, name: str) -> int:
        """Returns a new, empty file of mode 0600; raises `FileExistsError` when there is one."""
        return directory.create(name)

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(descriptor, view, offset)
            if not done:
                raise OSError(errno.EIO, "nothing was written", linux.name_of(descriptor))
            view, offset = view[done:], offset + done

    def punch(self, descriptor: int, offset: int, length: int) -> None:
        """Makes a range read as zero and gives its whole blocks back to the filesystem."""
        linux.punch_hole(descriptor, offset, length)

    def collapse(self, descriptor: int, offset: int, length: int) -> None:
        """Takes whole blocks out of a file."""
        linux.collapse_range(descriptor, offset, length)

    def insert(self, descriptor: int, offset: int, length: int) -> None:
        """Puts a hole of whole blocks into a file."""
        linux.insert_range(descriptor, offset, length)

    def truncate(self, descriptor: int, size: int) -> None:
        os.ftruncate(descriptor, size)

    def set_times(self, descriptor: int, mtime: int) -> None:
        """Sets the time of the last change, ns."""
        os.utime(descriptor, ns=(os.fstat(descriptor).st_atime_ns, mtime))

    def carry(self, source: int, target: int, others: Iterable[int] = ()) -> tuple[str, ...]:
        """Gives a new file the owner, mode and attributes of another; see `vmconv.io.attributes.carry`."""
        return attributes.carry(source, target, others)

    def set_mode(self, descriptor: int, mode: int) -> None:
        os.fchmod(descriptor, mode)

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def rename(self, directory: Directory, old: str, new: str, *, replace: bool) -> None:
        """Gives a file another name; without `replace` raises `FileExistsError` when there is such a file."""
        directory.rename(old, new, replace=replace)

    def unlink(self, directory: Directory, name: str) -> None:
        directory.unlink(name)

    def sync_directory(self, directory: Directory) -> None:
        directory.sync()
