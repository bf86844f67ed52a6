"""The rights with which a mount opens files: those of the mounting user, or of the requesting user.

Files shown to another user are opened with that user's rights, so the kernel checks owner, mode, ACL and the search
permission of every directory in the path. Root can do this per thread (credentials(7): access to files depends on the
filesystem user ID, which each thread has). Other users cannot. On their mounts, others see only files that are readable
to everybody.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import NamedTuple

from vmconv.api import stamp_of
from vmconv.plugin import AccessError, File

_NOBODY = 65534
_READ = 0o444
_SEARCH = 0o111

# The C library's setgroups changes all threads; the kernel's changes one. Numbers: asm/unistd.h.
_SYS_SETGROUPS = {"x86_64": 116, "aarch64": 159, "riscv64": 159, "loongarch64": 159}

# CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of linux/capability.h: either allows to read everything.
_READS_EVERYTHING = 1 << 1 | 1 << 2


class User(NamedTuple):
    """The credentials that the kernel checks when a process opens a file."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


class Rights:
    """The rights of the mounting user. Equal instances share opened images."""

    explains = True
    """False if the reason of an error could disclose what the user may not know."""

    def acting(self) -> AbstractContextManager[object]:
        """Returns a context in which paths are looked up with these rights."""
        return nullcontext()

    def refuse_directory(self, path: str) -> None:
        """Raises `PermissionError` if the directory may not be listed and `acting` does not enforce that."""

    def refuse_files(self, files: Iterable[File]) -> None:
        """Raises `AccessError` if an open file may not be shown and `acting` does not enforce that."""

    def are_current(self, files: Iterable[File]) -> bool:
        """True if the paths still lead to the open files and these are unchanged. Raises `OSError` if one is closed."""
        return not any(file.changed() for file in files)


class RightsOfUser(Rights):
    """The rights of another user, which a thread of root assumes."""

    def __init__(self, user: User) -> None:
        self._user = user

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RightsOfUser) and other._user == self._user

    def __hash__(self) -> int:
        return hash(self._user)

    @contextmanager
    def acting(self) -> Iterator[None]:
        before = User(os.geteuid(), os.getegid(), tuple(os.getgroups()))
        try:
            _set_rights(self._user)
            yield
        finally:
            _set_rights(before)

    def are_current(self, files: Iterable[File]) -> bool:
        # The stamp's ctime covers changes of mode and ACL; stat checks the search permission of the path again.
        opened = list(files)
        with self.acting():
            return all(stamp_of(os.stat(file.path)) == file.stamp for file in opened)


class RightsOfEverybody(Rights):
    """The rights that every user has."""

    explains = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RightsOfEverybody)

    def __hash__(self) -> int:
        return hash(RightsOfEverybody)

    def refuse_directory(self, path: str) -> None:
        status = os.stat(path)
        if not (_open_to_everybody(path, status, _READ | _SEARCH) and _reachable_by_everybody(os.path.realpath(path))):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    def refuse_files(self, files: Iterable[File]) -> None:
        for file in files:
            status = os.fstat(file.descriptor)
            real = file.real_path()
            if not (_open_to_everybody(file.descriptor, status, _READ) and _reachable_by_everybody(real)):
                raise AccessError(f"{file.name}: not everybody may read it")


OWN = Rights()
_EVERYBODY = RightsOfEverybody()


def rights_of(uid: int, gid: int, process: int) -> Rights:
    """Returns the rights for a request of a process."""
    if uid in (0, os.geteuid()):
        return OWN
    if not can_act():
        return _EVERYBODY
    return RightsOfUser(User(uid, gid, groups_of(uid, gid, process)))


def groups_of(uid: int, gid: int, process: int) -> tuple[int, ...]:
    """Returns the supplementary groups of a process; none if it has ended or its ID is another user's by now."""
    fields = {}
    try:
        with open(f"/proc/{process}/status", encoding="utf-8", errors="replace") as status:
            for line in status:
                key, _, value = line.partition(":")
                fields[key] = value.split()
        same = fields["Uid"][3] == str(uid) and fields["Gid"][3] == str(gid)
        return tuple(map(int, fields["Groups"])) if same else ()
    except (OSError, KeyError, IndexError, ValueError):
        return ()


@cache
def can_act() -> bool:
    """True if a thread of this process can assume the rights of any user, and loses root's by that."""
    if os.geteuid() != 0 or os.uname().machine not in _SYS_SETGROUPS or sys.maxsize < 1 << 32:
        return False
    found: list[bool] = []
    # In a thread that ends, so that a failure leaves no other thread with wrong rights.
    tried = threading.Thread(target=lambda: found.append(_loses_rights()))
    tried.start()
    tried.join()
    return found == [True]


def _loses_rights() -> bool:
    try:
        with RightsOfUser(User(_NOBODY, _NOBODY)).acting():
            # No imports here, not even of a codec: Python's own files may be unreadable to that user.
            descriptor = os.open("/proc/thread-self/status", os.O_RDONLY)
            status = os.read(descriptor, 1 << 16)
            os.close(descriptor)
    except OSError:
        return False
    (effective,) = (line.split()[1] for line in status.splitlines() if line.startswith(b"CapEff:"))
    return not int(effective, 16) & _READS_EVERYTHING


def _set_rights(user: User) -> None:
    """Gives this thread a user's rights to files. Raises `PermissionError` if the kernel refuses."""
    library = _library()
    groups = (ctypes.c_uint32 * len(user.groups))(*user.groups)
    number = _SYS_SETGROUPS[os.uname().machine]
    if library.syscall(ctypes.c_long(number), ctypes.c_size_t(len(groups)), groups):
        raise PermissionError(errno.EACCES, f"groups of user {user.uid} cannot be taken on")
    for change, wanted in ((library.setfsgid, user.gid), (library.setfsuid, user.uid)):
        change(ctypes.c_uint32(wanted))
        # These calls report no errors. With an invalid ID they change nothing and return the current one.
        if ctypes.c_uint32(change(ctypes.c_uint32(0xFFFFFFFF))).value != wanted:
            raise PermissionError(errno.EACCES, f"rights of user {user.uid} cannot be taken on")


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _open_to_everybody(place: str | int, status: os.stat_result, wanted: int) -> bool:
    """True if owner, group and others have the permissions `wanted`, and there is no ACL."""
    if status.st_mode & wanted != wanted:
        return False
    try:
        return "system.posix_acl_access" not in os.listxattr(place)
    except OSError as exc:
        return exc.errno in (errno.EOPNOTSUPP, errno.ENOSYS)


def _reachable_by_everybody(real: str) -> bool:
    """True if everybody may search every directory of a real path."""
    directory = os.path.dirname(real)
    while True:
        status = os.stat(directory)
        if not (stat.S_ISDIR(status.st_mode) and _open_to_everybody(directory, status, _SEARCH)):
            return False
        above = os.path.dirname(directory)
        if above == directory:
            return True
        directory = above
