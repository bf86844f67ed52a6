"""A change in place that was stopped is taken back, or finished when it had been committed.

`vmconv recover` does that, and any command that meets such a file does so, too, when the journal is this user's own.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from vmconv import locks
from vmconv.errors import AccessError, ImageError, os_errors
from vmconv.inplace import ownership
from vmconv.inplace.calls import Calls
from vmconv.inplace.change import Change
from vmconv.inplace.journal import MAX_SIZE, Journal, decode
from vmconv.inplace.names import JOURNAL, WORKING, interrupted, refuse_interrupted


class Recovery(NamedTuple):
    """What was done: `path` is the complete file that there is now, `forward` None when there was nothing to do."""

    path: str
    forward: bool | None


def recover(path: str, *, calls: Calls | None = None) -> Recovery:
    """Finishes or takes back the change in place that a file was in; `path` is any name that it had, has or gets."""
    calls = calls or Calls()
    directory, name = os.path.split(os.path.abspath(path))
    with os_errors("cannot be recovered", where=path):
        source = _source(directory, name.removesuffix(JOURNAL).removesuffix(WORKING))
        if source is not None:
            with _locked(source + JOURNAL) as record:
                return _recovered(source, record, calls)
    if not os.path.lexists(path):
        raise AccessError(f"{path}: does not exist, and no change in place of it was interrupted")
    return Recovery(path, None)


def met(path: str) -> Recovery | None:
    """Recovers what a command meets under the name `path`; returns None when that is nothing.

    Raises `AccessError` when its run is alive, or when the journal is not this user's own: it may be a stranger's.
    """
    directory, name = os.path.split(os.path.abspath(path))
    with os_errors("cannot be recovered", AccessError, where=path):
        source = os.path.join(directory, name) if interrupted(path) else _known(directory, name)
        if source is None:
            return None
        _refuse_lone(source)
        with _locked(source + JOURNAL) as record:
            found = decode(_content(record, source + JOURNAL), source + JOURNAL)
            if found is not None and not ownership.is_ours(directory, found.digest, found.mark):
                refuse_interrupted(source)
            return _recovered(source, record, Calls())


def _source(directory: str, name: str) -> str | None:
    """Returns the path of the source whose journal knows `name`."""
    if os.path.lexists(os.path.join(directory, name + JOURNAL)):
        return os.path.join(directory, name)
    torn = None
    for path, journal in _journals(directory):
        if journal is None:
            torn = path
        elif name in journal.names:
            return path
    if torn is not None:
        # Nobody knows whose it is, and nothing was done: it may go.
        return torn
    _refuse_lone(os.path.join(directory, name))
    return None


def _known(directory: str, name: str) -> str | None:
    """Returns the path of the source whose journal knows `name`, as far as there are any that can be read."""
    with suppress(OSError, ImageError):
        for path, journal in _journals(directory):
            if journal is not None and name in journal.names:
                return path
    return None


def _refuse_lone(source: str) -> None:
    """Raises where a file is out of the way with nothing to say what had been done to it."""
    if os.path.lexists(source + WORKING) and not os.path.lexists(source + JOURNAL):
        raise AccessError(
            f"{source + WORKING}: its journal {os.path.basename(source + JOURNAL)} is gone",
            hint="without it nobody can say what state the file is in",
        )


def _journals(directory: str) -> Iterator[tuple[str, Journal | None]]:
    """Yields the journals of a directory with the paths of their sources; None for those never written to their end."""
    for entry in sorted(os.listdir(directory)):
        path = os.path.join(directory, entry)
        if entry.endswith(JOURNAL):
            with open(path, "rb") as file:
                found = decode(_content(file.fileno(), path), path)
            yield path.removesuffix(JOURNAL), found.journal if found else None


def _content(descriptor: int, path: str) -> bytes:
    size = os.fstat(descriptor).st_size
    if size > MAX_SIZE:
        raise ImageError(f"{path}: is not a journal: {size} bytes, {MAX_SIZE} at most")
    return os.pread(descriptor, size, 0)


@contextmanager
def _locked(record: str) -> Iterator[int]:
    """Yields the descriptor of a journal whose run is dead: a living one locks its own."""
    descriptor = os.open(record, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(descriptor).st_nlink:
            raise BlockingIOError
        yield descriptor
    except BlockingIOError as exc:
        raise AccessError(f"{record.removesuffix(JOURNAL)}: a conversion in place of it is running") from exc
    finally:
        os.close(descriptor)


def _recovered(source: str, record: int, calls: Calls) -> Recovery:
    directory, working = os.path.dirname(source), source + WORKING
    found = decode(_content(record, source + JOURNAL), source + JOURNAL)
    if found is None:
        # It was never durable, so nothing has been done.
        if os.path.lexists(working):
            raise ImageError(f"{source + JOURNAL}: is damaged", hint=f"nobody can say what state {working} is in")
        calls.unlink(source + JOURNAL)
        calls.sync_directory(directory)
        return Recovery(source, False)
    journal, committed = found.journal, found.committed
    descriptor = -1
    try:
        if os.path.lexists(working):
            descriptor = os.open(working, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            locks.claim(descriptor)
        change = Change(directory, journal, calls, descriptor)
        if committed:
            change.finish()
        else:
            change.roll_back()
        return Recovery(change.target if committed else change.source, committed)
    finally:
        if descriptor >= 0:
            os.close(descriptor)
