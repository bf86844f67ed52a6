"""Whose a journal or an undo file is: what this user's vmconv wrote here may be acted on, a stranger's may not.

Such a file says what to write into which file, and what to remove. It may have come with an archive or with a disk, or
somebody who may write to the directory has put it there. So it is believed only when it belongs to the user who runs
vmconv, when nobody else may write to it, and when it has a mark that takes the user's key to make.
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

SIZE = 32
"""Bytes of a key, and of a mark."""

UNMARKED = bytes(SIZE)
"""The mark of what was written where there can be no key."""


def opened(directory: Directory, name: str, flags: int = os.O_RDONLY) -> int:
    """Returns a descriptor of a journal or undo file; raises `AccessError` for what is no file with one name."""
    descriptor = directory.open(name, flags)
    links = os.fstat(descriptor).st_nlink
    if links > 1:
        os.close(descriptor)
        raise AccessError(f"{directory.join(name)}: has {links} names (hard links), and should have one")
    return descriptor


def stranger(descriptor: int) -> str | None:
    """Returns why a file may be somebody else's, from its status alone; None when it is this user's alone."""
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}, vmconv runs as {os.geteuid()}"
    if status.st_mode & 0o022:
        return f"may be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def forged(directory: Directory | None, digest: bytes, given: bytes | None) -> str | None:
    """Returns why a file with this digest and mark was not written by this user's vmconv; None when it was."""
    if given is None:
        return "was made by an older vmconv, and has no mark of its maker"
    if any(hmac.compare_digest(_mark(key, directory, digest), given) for key in _keys()):
        return None
    return "has no mark of this user's vmconv" + (" for this directory" if directory else "")


def mark(directory: Directory | None, digest: bytes) -> bytes:
    """Returns the mark of a file with this digest; `UNMARKED` where there can be no key.

    With a directory it holds in that one only. Journals are followed where they are met, so it matters that nobody can
    bring one to another place; undo files are asked for, and may be moved with their disks.
    """
    key = _own_key()
    return _mark(key, directory, digest) if key else UNMARKED


def can_mark() -> bool:
    """True when there is a key, or one can be made."""
    return _own_key() is not None


def _mark(key: bytes, directory: Directory | None, digest: bytes) -> bytes:
    where = os.fsencode(directory.real()) if directory else b""
    return hashlib.blake2b(digest + where, key=key, digest_size=SIZE).digest()


# -- the key


def _homes() -> Iterator[str]:
    """Yields where the user's state may be kept, the best place first.

    Never below a home that is another user's, as after sudo: its owner could exchange the key.
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
    """Yields directories for the key that are this user's alone, open until the next one is asked for."""
    for state in _homes():
        path = os.path.join(state, "vmconv")
        with suppress(OSError):
            if make:
                _make_directories(path)
            with Directory.at(path) as directory:
                if stranger(directory.descriptor) is None:
                    yield directory


def _make_directories(path: str) -> None:
    """Makes a directory and those above it, for this user only, whatever the umask takes."""
    if os.path.isdir(path):
        return
    _make_directories(os.path.dirname(path))
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
        os.chmod(path, 0o700)


_NAME = "journal.key"


def _keys() -> Iterator[bytes]:
    """Yields the user's keys that nobody else can read."""
    for place in _places():
        if key := _read(place):
            yield key


def _own_key() -> bytes | None:
    """Returns the user's key, which is made where there is none yet; None where there can be none."""
    for place in _places(make=True):
        with suppress(OSError):
            if key := _read(place) or _made(place):
                return key
    return None


def _read(place: Directory) -> bytes | None:
    with suppress(OSError, AccessError):
        descriptor = place.open(_NAME)
        try:
            status, key = os.fstat(descriptor), os.pread(descriptor, SIZE + 1, 0)
        finally:
            os.close(descriptor)
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
    # Whose key is there first stays: another run may have used it already.
    with suppress(FileExistsError):
        place.link(scratch, _NAME)
    place.unlink(scratch)
    return _read(place)
