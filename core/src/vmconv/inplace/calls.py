"""The system calls by which files are changed in place, one method for each: tests stop a run at every single one."""

from __future__ import annotations

import errno
import os

from vmconv import linux


class Calls:
    """All that a change in place does to storage goes through one of these; reading does not."""

    def create(self, path: str, mode: int = 0o600) -> int:
        """Returns a new, empty file, open for reading and writing; raises `FileExistsError` when there is one."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)

    def write(self, descriptor: int, data: bytes, offset: int) -> None:
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

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def rename(self, old: str, new: str, *, replace: bool) -> None:
        """Gives a file another name; without `replace` raises `FileExistsError` when there is such a file."""
        if replace:
            os.rename(old, new)
        else:
            linux.rename_new(old, new)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def sync_directory(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
