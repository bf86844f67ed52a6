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

from vmconv import linux
from vmconv.errors import AccessError
from vmconv.sources import File

_USES = 100
_DOES_NOT_SHARE = 200
_CONSISTENT_READ = 0
_WRITE = 1
_EVERY = tuple(base + n for base in (_USES, _DOES_NOT_SHARE) for n in range(4))

# struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid.
_FLOCK = struct.Struct("@hhqqi")


def share(file: File) -> None:
    """Says, for as long as the file is open, that we read it and that nobody may write; refuses when somebody does.

    Raises `AccessError` when QEMU has the image open for writing. Where the filesystem has no such locks, there is
    nothing that could be asked.
    """
    try:
        for byte in (_USES + _CONSISTENT_READ, _DOES_NOT_SHARE + _WRITE):
            fcntl.fcntl(file.descriptor, fcntl.F_OFD_SETLK, _lock(fcntl.F_RDLCK, byte))
        busy = _is_written(file)
    except OSError as exc:
        busy = exc.errno in (errno.EAGAIN, errno.EACCES)
    if busy:
        raise AccessError(
            f"{file.name}: is open for writing in another process (QEMU's lock on byte {_USES + _WRITE})",
            hint="stop the guest, or take a snapshot and convert that; --force-share reads it all the same",
        )


def is_written(file: File) -> bool:
    """Returns whether somebody has the file open for writing; takes no lock that others could meet."""
    try:
        return _is_written(file)
    except OSError:
        return False


def release(file: File) -> None:
    """Takes back what `share` said, while the file stays open: others may write to it again."""
    for byte in (_USES + _CONSISTENT_READ, _DOES_NOT_SHARE + _WRITE):
        with suppress(OSError):
            fcntl.fcntl(file.descriptor, fcntl.F_OFD_SETLK, _lock(fcntl.F_UNLCK, byte))


def refuse_users(file: File) -> None:
    """Raises `AccessError` when another process uses a file that we read, or has it open for writing."""
    try:
        busy = any(_is_locked(file, byte) for byte in _EVERY)
    except OSError:
        busy = False
    if busy or linux.is_open_for_writing(file.descriptor):
        raise AccessError(
            f"{file.name}: is open in another process", hint="close it there; in place, nobody else may use it"
        )


def claim(descriptor: int) -> None:
    """Says, for as long as the descriptor is open, that nobody else may use this file."""
    with suppress(OSError):
        for byte in _EVERY:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _lock(fcntl.F_RDLCK, byte))


def _is_written(file: File) -> bool:
    return any(_is_locked(file, byte) for byte in (_USES + _WRITE, _DOES_NOT_SHARE + _CONSISTENT_READ))


def _lock(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)


def _is_locked(file: File, byte: int) -> bool:
    answer = fcntl.fcntl(file.descriptor, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK, byte))
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK
