"""Whose a journal is: one that this user's vmconv wrote here may be acted on unasked, a stranger's may not.

A journal says what to write into which file and what to remove. It may have come with an archive, or with a disk that
was mounted; then only `vmconv recover`, which names it, follows it. So each journal has a mark that only who has the
user's key can make.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from contextlib import suppress

SIZE = 32
"""Bytes of a key, and of a mark."""


def mark(directory: str, digest: bytes) -> bytes:
    """Returns the mark of a journal with this digest in this directory; all zero where there can be no key."""
    key = _key() or _new_key()
    return _mark(key, directory, digest) if key else bytes(SIZE)


def is_ours(directory: str, digest: bytes, given: bytes) -> bool:
    """True when this user's key made the mark, for a journal in this very directory."""
    key = _key()
    return key is not None and hmac.compare_digest(_mark(key, directory, digest), given)


def _mark(key: bytes, directory: str, digest: bytes) -> bytes:
    where = os.fsencode(os.path.realpath(directory))
    return hashlib.blake2b(digest + where, key=key, digest_size=SIZE).digest()


def _path() -> str:
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(state, "vmconv", "journal.key")


def _key() -> bytes | None:
    """Returns the user's key; None where there is none that nobody else can read."""
    try:
        with open(_path(), "rb") as file:
            status = os.fstat(file.fileno())
            key = file.read(SIZE + 1)
    except OSError:
        return None
    private = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
    return key if private and len(key) == SIZE else None


def _new_key() -> bytes | None:
    path = _path()
    scratch = f"{path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, os.urandom(SIZE))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        # Whose key is there first stays: another run may have used it already.
        with suppress(FileExistsError):
            os.link(scratch, path)
        os.unlink(scratch)
    except OSError:
        return None
    return _key()
