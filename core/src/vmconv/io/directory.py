"""A directory that is opened once, with operations relative to its descriptor.

Between two uses of a path, other users may replace a directory or a symbolic link in it. A descriptor always leads to
the same directory.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from vmconv.errors import AccessError
from vmconv.system import linux

if TYPE_CHECKING:
    from vmconv.model.sources import File

NAME_MAX = 255
"""Bytes of a name, on all filesystems that Linux writes to."""

# man 2 open: no O_TMPFILE in this filesystem or kernel. Old kernels take it for O_DIRECTORY, or O_CREAT of a directory.
NO_UNNAMED = linux.NOT_SUPPORTED | {errno.EISDIR, errno.ENOENT, errno.EINVAL}


class Directory:
    """An open directory, and a context manager that closes its descriptor.

    `path` is for messages only. Methods take plain names and never follow symbolic links. They raise `OSError` with the
    whole path, and `ValueError` for a name that is not plain.
    """

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    @classmethod
    def at(cls, path: str, start: int | None = None) -> Self:
        """Opens a directory by path, following symbolic links; a relative path starts at the descriptor `start`."""
        # O_PATH needs only search permission (x), but does not allow listing and syncing.
        flags = os.O_DIRECTORY | os.O_CLOEXEC
        try:
            return cls(path, os.open(path, flags | os.O_RDONLY, dir_fd=start))
        except PermissionError:
            return cls(path, os.open(path, flags | os.O_PATH, dir_fd=start))

    @classmethod
    def of(cls, file: File) -> Self:
        """Opens the directory of an open file; raises `AccessError` if the file is no longer there."""
        path, name = os.path.split(os.path.realpath(file.path))
        directory = cls.at(path)
        if not directory.holds(name, file.descriptor):
            directory.close()
            raise AccessError(f"{file.path}: was moved or replaced while it was being opened", hint="try again")
        return directory

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            # Linux closes the descriptor even if close fails, and nothing was written through it.
            with suppress(OSError):
                os.close(descriptor)

    def join(self, name: str) -> str:
        """Returns the path of a name, for messages."""
        return os.path.join(self.path, name)

    # -- queries

    def names(self) -> list[str]:
        """Returns all names, sorted."""
        with self._blaming(None):
            return sorted(os.listdir(self.descriptor))

    def listed(self) -> list[str]:
        """Returns all names, sorted; none if the user may not list the directory."""
        try:
            return self.names()
        except OSError as exc:
            # EBADF: opened with O_PATH.
            if exc.errno not in (errno.EACCES, errno.EPERM, errno.EBADF):
                raise
            return []

    def status(self, name: str) -> os.stat_result | None:
        """Returns the status of a name, of a symbolic link itself; None if it does not exist."""
        with self._blaming(name):
            try:
                return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
            except FileNotFoundError:
                return None

    def has(self, name: str) -> bool:
        """True if the name exists, even as a dangling symbolic link."""
        return self.status(name) is not None

    def holds(self, name: str, descriptor: int) -> bool:
        """True if the name leads to the open file."""
        found = self.status(name)
        return found is not None and os.path.samestat(found, os.fstat(descriptor))

    def is_same(self, path: str) -> bool:
        """True if the path leads to this directory."""
        return os.path.samestat(os.stat(path), os.fstat(self.descriptor))

    def real(self) -> str:
        """Returns the current path of the directory."""
        return os.readlink(f"/proc/self/fd/{self.descriptor}")

    def by_descriptor(self) -> str:
        """Returns a path that leads this process to the directory, wherever it was moved."""
        return f"/proc/self/fd/{self.descriptor}"

    def open(self, name: str, flags: int = os.O_RDONLY) -> int:
        """Opens a regular file; raises `AccessError` if it is not one."""
        with self._blaming(name):
            # Without O_NONBLOCK, opening a FIFO would wait for its other end.
            flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(name, flags, dir_fd=self.descriptor)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise AccessError(f"{self.join(name)}: is not a regular file")
        return descriptor

    # -- changes

    def create(self, name: str, mode: int = 0o600) -> int:
        """Creates a file of exactly `mode`, open for reading and writing; raises `FileExistsError`."""
        with self._blaming(name):
            # Others get access only by fchmod, which ignores the umask.
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(name, flags, mode & 0o600, dir_fd=self.descriptor)
            os.fchmod(descriptor, mode)
        return descriptor

    def create_unnamed(self) -> int:
        """Creates a file without a name (O_TMPFILE) of mode 0600, open for reading and writing."""
        with self._blaming(None):
            flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
            descriptor = os.open(".", flags, 0o600, dir_fd=self.descriptor)
            # The umask may remove bits of the owner, too.
            os.fchmod(descriptor, 0o600)
        return descriptor

    def create_scratch(self) -> int:
        """Creates a file that vanishes when it is closed, open for reading and writing.

        Where the filesystem has no files without a name, the name is removed at once.
        """
        try:
            return self.create_unnamed()
        except OSError as exc:
            if exc.errno not in NO_UNNAMED:
                raise
        name = f".vmconv-{os.urandom(8).hex()}.tmp"
        descriptor = self.create(name)
        try:
            self.unlink(name)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def link_open(self, descriptor: int, name: str) -> None:
        """Links an open file, named or not, under a name; raises `FileExistsError` if the name exists."""
        with self._blaming(name):
            # linkat through /proc, because AT_EMPTY_PATH needs privileges (man 2 open, O_TMPFILE).
            os.link(f"/proc/self/fd/{descriptor}", name, dst_dir_fd=self.descriptor, follow_symlinks=True)

    def link(self, old: str, new: str) -> None:
        """Creates a hard link; raises `FileExistsError` if the new name exists."""
        with self._blaming(old, new):
            os.link(old, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor, follow_symlinks=False)

    def rename(self, old: str, new: str, *, replace: bool) -> None:
        """Renames a file; without `replace` raises `FileExistsError` if the new name exists."""
        with self._blaming(old, new):
            if replace:
                os.rename(old, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
            else:
                linux.rename_new(old, new, self.descriptor)

    def make(self, name: str) -> None:
        """Creates a directory, with the mode that the umask leaves; raises `FileExistsError`."""
        with self._blaming(name):
            os.mkdir(name, dir_fd=self.descriptor)

    def inner(self, name: str) -> Directory:
        """Opens a directory in this one."""
        with self._blaming(name):
            flags = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_RDONLY
            return Directory(self.join(name), os.open(name, flags, dir_fd=self.descriptor))

    def remove(self, name: str) -> None:
        """Removes an empty directory."""
        with self._blaming(name):
            os.rmdir(name, dir_fd=self.descriptor)

    def unlink(self, name: str) -> None:
        with self._blaming(name):
            os.unlink(name, dir_fd=self.descriptor)

    def sync(self) -> None:
        """Syncs the directory's entries, if the filesystem supports it."""
        with self._blaming(None):
            try:
                os.fsync(self.descriptor)
            except OSError as exc:
                # Network filesystems and FUSE may have no fsync for directories.
                if exc.errno not in linux.NOT_SUPPORTED | {errno.EINVAL, errno.EBADF}:
                    raise
                if exc.errno == errno.EBADF:
                    # A descriptor with O_PATH has no fsync.
                    os.sync()

    @contextmanager
    def _blaming(self, name: str | None, other: str | None = None) -> Iterator[None]:
        """Adds whole paths to errors of the block; raises `ValueError` for a name that is not plain."""
        for each in (name, other):
            if each is not None and (each in ("", ".", "..") or "/" in each or "\0" in each):
                raise ValueError(f"{each!r} is not a plain name")
        try:
            yield
        except OSError as exc:
            exc.filename = self.path if name is None else self.join(name)
            exc.filename2 = None if other is None else self.join(other)
            raise
