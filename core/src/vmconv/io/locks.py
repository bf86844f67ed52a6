"""QEMU's image locks: open file description locks on single bytes that say who uses an image and how.

Byte 100 + n is locked by whoever uses permission n, byte 200 + n by whoever does not share it with others; the
permissions are 0 consistent read, 1 write, 2 write unchanged, 3 resize (QEMU, block/file-posix.c).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import suppress

from vmconv.errors import AccessError, os_errors
from vmconv.model.sources import File
from vmconv.system import linux

_USES = 100
_DOES_NOT_SHARE = 200
_CONSISTENT_READ = 0
_WRITE = 1
_OURS = (_USES + _CONSISTENT_READ, _DOES_NOT_SHARE + _WRITE)
_EVERY = tuple(base + n for base in (_USES, _DOES_NOT_SHARE) for n in range(4))

# struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid.
_FLOCK = struct.Struct("@hhqqi")


# man 2 fcntl, and what network and user-space filesystems say: there are no locks, or none for this file.
_NO_LOCKS = linux.NOT_SUPPORTED | {errno.EINVAL, errno.ENOLCK}
_CONFLICT = frozenset({errno.EAGAIN, errno.EACCES})


def share(file: File) -> None:
    """Says, for as long as the file is open, that we read it and that nobody may write; refuses when somebody does.

    Raises `AccessError` when QEMU has the image open for writing, and when the filesystem fails to tell. Where it has
    no such locks, there is nothing that could be asked.
    """
    free = all(_set(file.descriptor, fcntl.F_RDLCK, byte) for byte in _OURS)
    if not free or is_written(file):
        raise AccessError(
            f"{file.name}: is open for writing in another process (QEMU's lock on byte {_USES + _WRITE})",
            hint="stop the guest, or take a snapshot and convert that; --force-share reads it all the same",
        )


def is_written(file: File) -> bool:
    """Returns whether somebody has the file open for writing; takes no lock that others could meet."""
    return any(_is_locked(file, byte) for byte in (_USES + _WRITE, _DOES_NOT_SHARE + _CONSISTENT_READ))


def release(file: File) -> None:
    """Takes back what `share` said, while the file stays open: others may write to it again."""
    # A lock that cannot be taken back only keeps others from writing, and goes when the file is closed.
    with suppress(AccessError):
        for byte in _OURS:
            _set(file.descriptor, fcntl.F_UNLCK, byte)


_IN_PLACE = "close it there; in place, nobody else may use it"


def refuse_users(file: File, hint: str = _IN_PLACE) -> None:
    """Raises `AccessError` when another process uses a file that we read, or has it open for writing."""
    busy = any(_is_locked(file, byte) for byte in _EVERY)
    with os_errors("cannot be asked who has it open", AccessError):
        busy = busy or linux.is_open_for_writing(file.descriptor)
    if busy:
        raise _in_use(file.name, hint)


def claim(descriptor: int) -> None:
    """Says, for as long as the descriptor is open, that nobody else may use this file.

    Raises `AccessError` when somebody has locked it since `refuse_users`.
    """
    if not all(_set(descriptor, fcntl.F_RDLCK, byte) for byte in _EVERY):
        raise _in_use(linux.name_of(descriptor), _IN_PLACE)


def own(descriptor: int) -> None:
    """Locks a file of ours for as long as it is open (flock); does nothing where there are no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as exc:
        _refuse_unknown(exc, descriptor)


def may_be_owned(descriptor: int) -> bool:
    """True when a living run has the file locked, and where there are no locks to tell; locks it if none has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as exc:
        _refuse_unknown(exc, descriptor)
        return True
    return False


def _in_use(name: str, hint: str) -> AccessError:
    return AccessError(f"{name}: is open in another process", hint=hint)


def _set(descriptor: int, kind: int, byte: int) -> bool:
    """Locks or unlocks a byte of a file; False when another process has locked it. Does nothing without such locks."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _lock(kind, byte))
    except OSError as exc:
        if exc.errno in _CONFLICT:
            return False
        _refuse_unknown(exc, descriptor)
    return True


def _is_locked(file: File, byte: int) -> bool:
    try:
        answer = fcntl.fcntl(file.descriptor, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK, byte))
    except OSError as exc:
        _refuse_unknown(exc, file.descriptor)
        return False
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def _refuse_unknown(exc: OSError, descriptor: int) -> None:
    """Raises `AccessError` unless the error says that there are no locks."""
    if exc.errno not in _NO_LOCKS:
        raise AccessError(f"{linux.name_of(descriptor)}: cannot be locked: {exc.strerror}") from exc


def _lock(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
