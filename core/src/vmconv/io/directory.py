"""A directory that is named once: everything in it is reached by the descriptor, with plain names.

The owner of a directory can exchange it, or a link on the way to it, between two openings by path. The descriptor is
the same directory all the time.
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


class Directory:
    """An open directory; owns its descriptor, and is a context manager that closes it.

    `path` is for messages only. Methods take plain names: ValueError for any other. They raise `OSError` with the whole
    path in it. No method follows a symbolic link.
    """

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    @classmethod
    def at(cls, path: str, start: int | None = None) -> Self:
        """Returns the directory of this path, links on the way followed; a relative path begins at `start`.

        One that may be entered and not listed is opened all the same.
        """
        flags = os.O_DIRECTORY | os.O_CLOEXEC
        try:
            return cls(path, os.open(path, flags | os.O_RDONLY, dir_fd=start))
        except PermissionError:
            return cls(path, os.open(path, flags | os.O_PATH, dir_fd=start))

    @classmethod
    def of(cls, file: File) -> Self:
        """Returns the directory that holds an open file; raises `AccessError` when the file is not there any more."""
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
            # It is closed whatever is said, and nothing was written by it.
            with suppress(OSError):
                os.close(descriptor)

    def join(self, name: str) -> str:
        """Returns the path of a name, for messages."""
        return os.path.join(self.path, name)

    # -- looking

    def names(self) -> list[str]:
        """Returns all names, sorted."""
        with self._blaming(None):
            return sorted(os.listdir(self.descriptor))

    def listed(self) -> list[str]:
        """Returns all names, sorted; none where the user may not list them: what a run left there cannot be found."""
        try:
            return self.names()
        except OSError as exc:
            # EBADF: a descriptor that was opened for going through the directory only.
            if exc.errno not in (errno.EACCES, errno.EPERM, errno.EBADF):
                raise
            return []

    def status(self, name: str) -> os.stat_result | None:
        """Returns the status of what has this name, a link's own if it is one; None when nothing has."""
        with self._blaming(name):
            try:
                return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
            except FileNotFoundError:
                return None

    def has(self, name: str) -> bool:
        """True when something has this name, be it a dangling link."""
        return self.status(name) is not None

    def holds(self, name: str, descriptor: int) -> bool:
        """True when this name is that of the open file."""
        found = self.status(name)
        return found is not None and os.path.samestat(found, os.fstat(descriptor))

    def is_same(self, path: str) -> bool:
        """True when the path leads to this directory."""
        return os.path.samestat(os.stat(path), os.fstat(self.descriptor))

    def real(self) -> str:
        """Returns the path that the directory has now."""
        return os.readlink(f"/proc/self/fd/{self.descriptor}")

    def open(self, name: str, flags: int = os.O_RDONLY) -> int:
        """Returns a descriptor of what has this name; raises `AccessError` for what is no regular file.

        Never waits: a pipe is refused, too.
        """
        with self._blaming(name):
            flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(name, flags, dir_fd=self.descriptor)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise AccessError(f"{self.join(name)}: is not a regular file")
        return descriptor

    # -- changing

    def create(self, name: str, mode: int = 0o600) -> int:
        """Returns a new, empty file, open for reading and writing; the umask takes nothing of its mode.

        Raises `FileExistsError` when something has the name, be it a dangling link.
        """
        with self._blaming(name):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(name, flags, mode & 0o600, dir_fd=self.descriptor)
            os.fchmod(descriptor, mode)
        return descriptor

    def create_unnamed(self) -> int:
        """Returns a new, empty file of mode 0600 without a name, open for reading and writing."""
        with self._blaming(None):
            flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
            descriptor = os.open(".", flags, 0o600, dir_fd=self.descriptor)
            # The umask may take from the owner, too.
            os.fchmod(descriptor, 0o600)
        return descriptor

    def link_open(self, descriptor: int, name: str) -> None:
        """Gives an open file a name, also one without any; raises `FileExistsError` when something has that."""
        with self._blaming(name):
            # Follows the link of /proc to the file itself (man 2 open, O_TMPFILE).
            os.link(f"/proc/self/fd/{descriptor}", name, dst_dir_fd=self.descriptor, follow_symlinks=True)

    def link(self, old: str, new: str) -> None:
        """Gives a file a further name; raises `FileExistsError` when something has that."""
        with self._blaming(old, new):
            os.link(old, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor, follow_symlinks=False)

    def rename(self, old: str, new: str, *, replace: bool) -> None:
        """Gives a file another name; without `replace` raises `FileExistsError` when something has that."""
        with self._blaming(old, new):
            if replace:
                os.rename(old, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
            else:
                linux.rename_new(old, new, self.descriptor)

    def unlink(self, name: str) -> None:
        with self._blaming(name):
            os.unlink(name, dir_fd=self.descriptor)

    def sync(self) -> None:
        """Makes the names durable, as far as the filesystem has a call for that."""
        with self._blaming(None):
            try:
                os.fsync(self.descriptor)
            except OSError as exc:
                # Network and user-space filesystems may have no fsync for directories.
                if exc.errno not in linux.NOT_SUPPORTED | {errno.EINVAL, errno.EBADF}:
                    raise
                if exc.errno == errno.EBADF:
                    # Opened without the right to list it, and so without fsync.
                    os.sync()

    @contextmanager
    def _blaming(self, name: str | None, other: str | None = None) -> Iterator[None]:
        """Completes the errors of the block by the whole path; refuses what is not a plain name."""
        for each in (name, other):
            if each is not None and (each in ("", ".", "..") or "/" in each or "\0" in each):
                raise ValueError(f"{each!r} is not a plain name")
        try:
            yield
        except OSError as exc:
            exc.filename = self.path if name is None else self.join(name)
            exc.filename2 = None if other is None else self.join(other)
            raise
