"""A new file before it is named: without a name if the filesystem supports that, else with a temporary one.

A killed run leaves no trace of a file without a name. Temporary names are short, however long the target's name is.
They contain a checksum of the target's name: the next run for the same target removes those that no living run has
locked.
"""

from __future__ import annotations

import binascii
import errno
import os
import re
from collections.abc import Collection
from contextlib import suppress

from vmconv.errors import AccessError, BackendError
from vmconv.io import locks
from vmconv.io.directory import NO_UNNAMED, Directory
from vmconv.system import linux

PREFIX = ".vmconv-"
"""The prefix of all temporary files of vmconv."""

_PATTERN = re.compile(r"\.vmconv-([0-9a-f]{8})[0-9a-f]{8}\.tmp")

# man 2 rename: no RENAME_NOREPLACE. man 2 link: no hard links, or no more of them.
_NO_NEW_NAME = linux.NOT_SUPPORTED | {errno.EINVAL, errno.EPERM, errno.EMLINK, errno.EXDEV}


def temporary_name(name: str) -> str:
    """Returns a new temporary name for the file `name`."""
    return f"{PREFIX}{_checksum(name)}{os.urandom(4).hex()}.tmp"


def is_temporary(name: str) -> bool:
    """True for any name from `temporary_name`."""
    return _PATTERN.fullmatch(name) is not None


def is_unnamed(path: str) -> bool:
    """True if a path read from /proc/self/fd is that of a file without a name, or with a temporary one."""
    name = os.path.basename(path)
    return is_temporary(name) or re.fullmatch(r"#\d+ \(deleted\)", name) is not None


def _checksum(name: str) -> str:
    return f"{binascii.crc32(os.fsencode(name)):08x}"


def remove_stale(directory: Directory, names: Collection[str], but: Collection[str] = ()) -> list[str]:
    """Removes the temporary files of targets `names` that no living run has locked; returns the removed names.

    `but` are temporary names still needed. Does nothing if the directory cannot be listed.
    """
    wanted = {_checksum(name) for name in names}
    removed = []
    for entry in directory.listed():
        match = _PATTERN.fullmatch(entry)
        if match and match[1] in wanted and entry not in but and _is_dead(directory, entry):
            # Another run may remove it at the same time.
            with suppress(FileNotFoundError):
                directory.unlink(entry)
                removed.append(entry)
    return removed


def _is_dead(directory: Directory, name: str) -> bool:
    try:
        descriptor = directory.open(name)
    except (OSError, AccessError):
        # Another user's, or no regular file: not ours to remove.
        return False
    try:
        return not locks.may_be_owned(descriptor)
    finally:
        os.close(descriptor)


class Temporary:
    """A new, empty, locked file of mode 0600 that will become the file `target` of a directory.

    `descriptor` is open for reading and writing. `name` is its temporary name, None without one. If this run dies, the
    next run for the target `known_by` (default: `target`) removes the file.
    """

    def __init__(
        self, directory: Directory, target: str, name: str | None = None, *, known_by: str | None = None
    ) -> None:
        self.directory = directory
        self.target = target
        self.name = name
        self.known_by = known_by or target
        self.descriptor = -1
        if name is None:
            self.descriptor = _create_unnamed(directory)
        if self.descriptor < 0:
            self.name, self.descriptor = _create_named(directory, self.known_by, name)
        self.inode = os.fstat(self.descriptor).st_ino

    def reopened(self, flags: int) -> int:
        """Returns another descriptor of the file with its own flags. Raises `OSError` without /proc."""
        return os.open(f"/proc/self/fd/{self.descriptor}", flags | os.O_CLOEXEC)

    def named(self) -> str:
        """Gives the file a temporary name unless it has one, and returns it."""
        if self.name is None:
            name = temporary_name(self.known_by)
            self.directory.link_open(self.descriptor, name)
            self.name = name
        return self.name

    def appear(self, *, replace: bool) -> None:
        """Gives the file its final name. Without `replace` raises `FileExistsError` if the name exists."""
        if self.name is None and not replace:
            self.directory.link_open(self.descriptor, self.target)
            return
        rename(self.directory, self.named(), self.target, replace=replace)
        self.name = self.target

    def remove(self) -> None:
        """Removes the file's temporary name, if it has one."""
        if self.name not in (None, self.target):
            with suppress(FileNotFoundError):
                self.directory.unlink(self.name)
        self.name = None

    def leave(self) -> None:
        """Keeps the temporary name on disk: `remove` no longer removes it."""
        self.name = None

    def close(self) -> None:
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            # Linux closes the descriptor even on errors, and `finish` has reported failed writes.
            with suppress(OSError):
                os.close(descriptor)


def rename(directory: Directory, old: str, new: str, *, replace: bool) -> None:
    """Renames a file. Without `replace` raises `FileExistsError` if the new name exists.

    Without RENAME_NOREPLACE, uses a hard link; without hard links, a check before the rename, which may race.
    """
    if replace:
        directory.rename(old, new, replace=True)
        return
    try:
        directory.rename(old, new, replace=False)
        return
    except OSError as exc:
        if exc.errno not in _NO_NEW_NAME:
            raise
    try:
        directory.link(old, new)
    except OSError as exc:
        if exc.errno not in _NO_NEW_NAME:
            raise
    else:
        directory.unlink(old)
        return
    if directory.has(new):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), directory.join(new))
    directory.rename(old, new, replace=True)


def _create_unnamed(directory: Directory) -> int:
    """Returns a new file without a name; -1 if the filesystem has none, or without /proc, which naming it needs.

    Also -1 on filesystems in user space: JuiceFS 1.4 lets such a file be named, and removes it when it is closed.
    """
    if not os.path.exists("/proc/self/fd") or linux.is_fuse(directory.descriptor):
        return -1
    try:
        descriptor = directory.create_unnamed()
    except OSError as exc:
        if exc.errno not in NO_UNNAMED:
            raise
        return -1
    try:
        locks.own(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _create_named(directory: Directory, target: str, name: str | None) -> tuple[str, int]:
    """Returns the name and descriptor of a new file; the name is `name` if given."""
    while True:
        chosen = name or temporary_name(target)
        descriptor = directory.create(chosen)
        try:
            locks.own(descriptor)
            if os.fstat(descriptor).st_nlink:
                return (chosen if name else _try_rename(directory, target, chosen)), descriptor
        except BaseException:
            try:
                # If this fails too, an empty file stays.
                with suppress(OSError):
                    directory.unlink(chosen)
            finally:
                os.close(descriptor)
            raise
        # Another run removed it as stale before it was locked.
        os.close(descriptor)


def _try_rename(directory: Directory, target: str, name: str) -> str:
    """Renames the file to another temporary name and returns that, as a trial of the final rename.

    Raises `OSError` in directories where files can be created and not renamed.
    """
    other = temporary_name(target)
    directory.rename(name, other, replace=True)
    return other


def already_exists(directory: Directory, name: str) -> BackendError:
    """Returns the error of a target that another process created during the run."""
    return BackendError(f"{directory.join(name)}: already exists", hint="--force replaces it")
