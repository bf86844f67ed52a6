"""Authentication of journals and undo files.

A journal or undo file tells vmconv to write and remove files. An attacker may have planted it: in an archive, on a
disk, or by write access to the directory. So vmconv trusts it only if it belongs to the user of vmconv, no other user
may write to it, and it has a valid mark: a MAC (keyed BLAKE2b) with the user's key.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import suppress

from vmconv.errors import AccessError
from vmconv.io.directory import Directory
from vmconv.system import linux

SIZE = 32
"""Bytes of a key and of a mark."""

UNMARKED = bytes(SIZE)
"""The mark of a file that was written without a key."""


def opened(directory: Directory, name: str, flags: int = os.O_RDONLY) -> int:
    """Opens a journal or undo file; raises `AccessError` if it is not a regular file with one hard link."""
    descriptor = directory.open(name, flags)
    links = os.fstat(descriptor).st_nlink
    if links > 1:
        os.close(descriptor)
        raise AccessError(f"{directory.join(name)}: has {links} names (hard links), and should have one")
    return descriptor


def stranger(descriptor: int) -> str | None:
    """Returns why a file may be another user's, by owner and mode; None if it is this user's."""
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}, vmconv runs as {os.geteuid()}"
    if status.st_mode & 0o022:
        return f"may be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def forged(directory: Directory | None, digest: bytes, given: bytes | None) -> str | None:
    """Returns why the mark of a file with this digest is not valid; None if it is."""
    if given is None:
        return "was made by an older vmconv, without a mark"
    if any(hmac.compare_digest(_mark(key, directory, digest), given) for key in _keys()):
        return None
    return "has no mark of this user's vmconv" + (" for this directory" if directory else "")


def mark(directory: Directory | None, digest: bytes) -> bytes:
    """Returns the mark of a file with this digest; `UNMARKED` without a key.

    With `directory` the mark is valid in that directory only. That is for journals: vmconv follows any journal that it
    finds, so moving one must invalidate it. Undo files are used on request, and may be moved with their disks.
    """
    key = _own_key()
    return _mark(key, directory, digest) if key else UNMARKED


def can_mark() -> bool:
    """True if the user has a key, or it can be created."""
    return _own_key() is not None


def _mark(key: bytes, directory: Directory | None, digest: bytes) -> bytes:
    where = os.fsencode(directory.real()) if directory else b""
    return hashlib.blake2b(digest + where, key=key, digest_size=SIZE).digest()


# -- the key


def _homes() -> Iterator[str]:
    """Yields directories for the user's state, the preferred first.

    Skips a home of another user, as after sudo, whose owner could exchange the key.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(state):
        yield state
    homes = [os.environ.get("HOME", "")]
    with suppress(KeyError):
        homes.append(pwd.getpwuid(os.geteuid()).pw_dir)
    for home in homes:
        with suppress(OSError):
            if os.path.isabs(home) and os.stat(home).st_uid == os.geteuid():
                yield os.path.join(home, ".local", "state")


def _places(*, make: bool = False) -> Iterator[Directory]:
    """Yields directories for the key that no other user may write to; each is closed before the next."""
    for state in _homes():
        path = os.path.join(state, "vmconv")
        with suppress(OSError):
            if make:
                _make_directories(path)
            with Directory.at(path) as directory:
                if stranger(directory.descriptor) is None:
                    yield directory


def _make_directories(path: str) -> None:
    """Creates a directory and its parents with mode 0700, independent of the umask."""
    if os.path.isdir(path):
        return
    _make_directories(os.path.dirname(path))
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
        os.chmod(path, 0o700)


_NAME = "journal.key"


def _keys() -> Iterator[bytes]:
    """Yields the user's keys."""
    for place in _places():
        if key := _read(place):
            yield key


def _own_key() -> bytes | None:
    """Returns the user's key, created on first use; None if it cannot be stored."""
    for place in _places(make=True):
        with suppress(OSError):
            if key := _read(place) or _made(place):
                return key
    return None


def _read(place: Directory) -> bytes | None:
    with suppress(OSError, AccessError):
        descriptor = place.open(_NAME)
        try:
            status, key = os.fstat(descriptor), linux.read_at(descriptor, SIZE + 1, 0)
        finally:
            os.close(descriptor)
        # A key that others could read does not authenticate.
        private = status.st_uid == os.geteuid() and not status.st_mode & 0o077
        return key if private and len(key) == SIZE else None
    return None


def _made(place: Directory) -> bytes | None:
    scratch = f"{_NAME}.{os.getpid()}"
    descriptor = place.create(scratch)
    try:
        os.write(descriptor, os.urandom(SIZE))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    # link fails if there is a key, where rename would replace it: another run may have used it already.
    with suppress(FileExistsError):
        place.link(scratch, _NAME)
    place.unlink(scratch)
    return _read(place)
