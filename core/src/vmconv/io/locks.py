"""QEMU's image locks: OFD locks on single bytes of the image (QEMU, block/file-posix.c).

A lock on byte 100 + n means that the process uses permission n, one on byte 200 + n that it does not share permission n
with others. Permissions: 0 consistent read, 1 write, 2 write unchanged, 3 resize.
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


# man 2 fcntl, network filesystems and FUSE: locks are not supported.
_NO_LOCKS = linux.NOT_SUPPORTED | {errno.EINVAL, errno.ENOLCK}
_CONFLICT = frozenset({errno.EAGAIN, errno.EACCES})


def share(file: File) -> None:
    """Locks the image for reading and against writers until the file is closed.

    Raises `AccessError` if QEMU has it open for writing, or locking fails. Does nothing on filesystems without locks.
    """
    # Locks before the check, so that a writer that starts in between meets them.
    free = all(_set(file.descriptor, fcntl.F_RDLCK, byte) for byte in _OURS)
    if not free or is_written(file):
        raise AccessError(
            f"{file.name}: is open for writing in another process (QEMU's lock on byte {_USES + _WRITE})",
            hint="stop the guest, or take a snapshot and convert that; --force-share reads it anyway",
        )


def is_written(file: File) -> bool:
    """Returns whether QEMU has the file open for writing; takes no lock."""
    return any(_is_locked(file, byte) for byte in (_USES + _WRITE, _DOES_NOT_SHARE + _CONSISTENT_READ))


def write(file: File) -> None:
    """Locks the image for writing, as its only user, until the file is closed.

    Raises `AccessError` if another process has it open. Does nothing on filesystems without locks.
    """
    # Locks before the check: of two that start at once at most one finds itself alone.
    free = all(_set(file.descriptor, fcntl.F_RDLCK, byte) for byte in _EVERY)
    if not free or any(_is_locked(file, byte) for byte in _EVERY):
        raise _in_use(file.name, "close it there; it can be written to by one process only")


def release(file: File) -> None:
    """Releases the locks of `share` while the file stays open."""
    # A lock that remains only keeps others from writing, until the file is closed.
    with suppress(AccessError):
        for byte in _OURS:
            _set(file.descriptor, fcntl.F_UNLCK, byte)


_IN_PLACE = "close it there; a file that is changed in place must not be in use"


def refuse_users(file: File, hint: str = _IN_PLACE) -> None:
    """Raises `AccessError` if another process has locked the file, or has it open for writing."""
    busy = any(_is_locked(file, byte) for byte in _EVERY)
    with os_errors("cannot be checked for writers", AccessError):
        busy = busy or linux.is_open_for_writing(file.descriptor)
    if busy:
        raise _in_use(file.name, hint)


def claim(descriptor: int) -> None:
    """Locks the file against all other users until the descriptor is closed.

    Raises `AccessError` if another process has locked it since `refuse_users`.
    """
    if not all(_set(descriptor, fcntl.F_RDLCK, byte) for byte in _EVERY):
        raise _in_use(linux.name_of(descriptor), _IN_PLACE)


def own(descriptor: int) -> None:
    """Locks our own file until it is closed (flock); does nothing on filesystems without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as exc:
        _refuse_unknown(exc, descriptor)


def may_be_owned(descriptor: int) -> bool:
    """True if a running vmconv has locked the file, or locks are not supported; otherwise locks it."""
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
    """Locks or unlocks a byte of a file; False if another process has locked it. Ignores missing support."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _lock(kind, byte))
    except OSError as exc:
        if exc.errno in _CONFLICT:
            return False
        _refuse_unknown(exc, descriptor)
    return True


def _is_locked(file: File, byte: int) -> bool:
    try:
        # A write lock would conflict with any lock of another process. F_OFD_GETLK only tests.
        answer = fcntl.fcntl(file.descriptor, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK, byte))
    except OSError as exc:
        _refuse_unknown(exc, file.descriptor)
        return False
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def _refuse_unknown(exc: OSError, descriptor: int) -> None:
    """Raises `AccessError` unless the error means that locks are not supported."""
    if exc.errno not in _NO_LOCKS:
        raise AccessError(f"{linux.name_of(descriptor)}: cannot be locked: {exc.strerror}") from exc


def _lock(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
