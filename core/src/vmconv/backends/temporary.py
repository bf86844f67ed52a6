"""A new file before it has its name: without any where the filesystem can do that, else with a temporary one.

A run that is killed leaves nothing of a file without a name. Temporary names are short, whatever the target is called.
They begin with a checksum of the target's name: the next run that makes the same target removes those that no living
run has locked.
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
from vmconv.io.directory import Directory
from vmconv.system import linux

PREFIX = ".vmconv-"
"""What the names of all files begin with that vmconv makes for the time of a run."""

_PATTERN = re.compile(r"\.vmconv-([0-9a-f]{8})[0-9a-f]{8}\.tmp")

# man 2 open: no O_TMPFILE in this filesystem or kernel; it is O_DIRECTORY and a flag then, or O_CREAT of a directory.
_NO_UNNAMED = linux.NOT_SUPPORTED | {errno.EISDIR, errno.ENOENT, errno.EINVAL}
# man 2 rename: no RENAME_NOREPLACE. man 2 link: no hard links, or no more of them.
_NO_NEW_NAME = linux.NOT_SUPPORTED | {errno.EINVAL, errno.EPERM, errno.EMLINK, errno.EXDEV}


def temporary_name(name: str) -> str:
    """Returns a new temporary name for the file `name`."""
    return f"{PREFIX}{_checksum(name)}{os.urandom(4).hex()}.tmp"


def is_temporary(name: str) -> bool:
    """True for what `temporary_name` returns, for whatever file."""
    return _PATTERN.fullmatch(name) is not None


def is_unnamed(path: str) -> bool:
    """True for a path in /proc/self/fd of a file that has no name, or a temporary one."""
    name = os.path.basename(path)
    return is_temporary(name) or re.fullmatch(r"#\d+ \(deleted\)", name) is not None


def _checksum(name: str) -> str:
    return f"{binascii.crc32(os.fsencode(name)):08x}"


def remove_stale(directory: Directory, names: Collection[str], but: Collection[str] = ()) -> list[str]:
    """Removes temporary files of files `names` whose run is dead (a living one locks its own), and returns them.

    `but` are those that are still needed. Does nothing in a directory that cannot be listed.
    """
    wanted = {_checksum(name) for name in names}
    removed = []
    for entry in directory.listed():
        match = _PATTERN.fullmatch(entry)
        if match and match[1] in wanted and entry not in but and _is_dead(directory, entry):
            # Another run may be doing the same.
            with suppress(FileNotFoundError):
                directory.unlink(entry)
                removed.append(entry)
    return removed


def _is_dead(directory: Directory, name: str) -> bool:
    try:
        descriptor = directory.open(name)
    except (OSError, AccessError):
        # Somebody else's, or no file at all: not ours to remove.
        return False
    try:
        return not locks.may_be_owned(descriptor)
    finally:
        os.close(descriptor)


class Temporary:
    """A new, empty file of mode 0600 that will become the file `target` of a directory; it is locked.

    `descriptor` is open for reading and writing, `name` its temporary name, None while it has none. The next run that
    makes the file `known_by`, mostly the target itself, removes it.
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
        """Returns another descriptor of the file, with flags of its own; raises `OSError` where /proc is missing."""
        return os.open(f"/proc/self/fd/{self.descriptor}", flags | os.O_CLOEXEC)

    def named(self) -> str:
        """Gives the file a temporary name unless it has one, and returns it."""
        if self.name is None:
            name = temporary_name(self.known_by)
            self.directory.link_open(self.descriptor, name)
            self.name = name
        return self.name

    def appear(self, *, replace: bool) -> None:
        """Gives the file its name; without `replace` raises `FileExistsError` when something has that."""
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
        """Leaves the temporary name where it is."""
        self.name = None

    def close(self) -> None:
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            # It is closed whatever is said; what could not be written has been said when the file was finished.
            with suppress(OSError):
                os.close(descriptor)


def rename(directory: Directory, old: str, new: str, *, replace: bool) -> None:
    """Gives a file another name; without `replace` raises `FileExistsError` when something has that.

    Where the filesystem cannot do that in one step, a hard link does it, or a look before.
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
    """Returns a new file without a name, -1 where there are none or none could be given a name later."""
    if not os.path.exists("/proc/self/fd"):
        return -1
    try:
        descriptor = directory.create_unnamed()
    except OSError as exc:
        if exc.errno not in _NO_UNNAMED:
            raise
        return -1
    try:
        locks.own(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _create_named(directory: Directory, target: str, name: str | None) -> tuple[str, int]:
    """Returns the name and descriptor of a new file; the name is `name`, if it is given."""
    while True:
        chosen = name or temporary_name(target)
        descriptor = directory.create(chosen)
        try:
            locks.own(descriptor)
            if os.fstat(descriptor).st_nlink:
                return (chosen if name else _try_rename(directory, target, chosen)), descriptor
        except BaseException:
            try:
                # Where this fails, too, an empty file stays.
                with suppress(OSError):
                    directory.unlink(chosen)
            finally:
                os.close(descriptor)
            raise
        # Before it was locked, another run has taken it for a dead one's and removed it.
        os.close(descriptor)


def _try_rename(directory: Directory, target: str, name: str) -> str:
    """Returns another temporary name that the file has now: a trial of what has to be done at the end.

    There are directories in which files may be made and not renamed. Raises `OSError` there.
    """
    other = temporary_name(target)
    directory.rename(name, other, replace=True)
    return other


def already_exists(directory: Directory, name: str) -> BackendError:
    """Returns the error for a target that somebody else has made meanwhile."""
    return BackendError(f"{directory.join(name)}: already exists", hint="--force replaces it")
