"""Recovery of an interrupted change in place: rollback, or completion after the commit.

`vmconv recover` recovers, and so does any command that opens such a file. Both follow only journals that this user's
vmconv wrote on this machine (`vmconv.io.ownership`); `vmconv recover --trust` follows any.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from vmconv.backends.targets import finish_set, open_directory
from vmconv.errors import AccessError, ImageError, VmconvError, os_errors, warn
from vmconv.inplace import journal as journals
from vmconv.inplace.change import Change
from vmconv.inplace.journal import Found
from vmconv.inplace.names import JOURNAL, WORKING, beside
from vmconv.inplace.syscalls import Syscalls
from vmconv.io import locks, ownership
from vmconv.io.directory import Directory
from vmconv.system import linux


class Recovery(NamedTuple):
    """The outcome: `path` is the complete file; `forward` is False after a rollback, None if nothing was to do."""

    path: str
    forward: bool | None


class StrangerError(AccessError):
    """The journal may be another user's."""


def recover(path: str, *, trust: bool = False, calls: Syscalls | None = None) -> Recovery:
    """Completes or rolls back the interrupted change of a file; `path` is its old, working or new name.

    Also completes an interrupted set of renames. With `trust` follows any user's journal, as after restoring a backup.
    """
    if finish_set(path, trust=trust):
        return Recovery(path, forward=True)
    folder, name = os.path.split(os.path.abspath(path))
    with os_errors("cannot be recovered", where=path), open_directory(folder) as directory:
        entry = _find(directory, name, trust=trust)
        if entry is not None:
            return _follow(directory, entry, calls or Syscalls(), trust=trust)
        if not directory.has(name):
            others = [entry for entry in directory.names() if entry.endswith(JOURNAL)]
            raise AccessError(
                f"{path}: does not exist, and no change in place of it was interrupted",
                hint=f"if it was part of another one: vmconv recover {directory.join(others[0])}" if others else None,
            )
    return Recovery(path, None)


def settle_disk(path: str) -> None:
    """Recovers a file before a command opens it. Raises `AccessError` if it has another name afterwards."""
    if not os.path.lexists(path) and finish_set(path, trust=False):
        return
    done = recover_if_own(path)
    if done is None:
        return
    what = f"a change in place was interrupted, and has been {'completed' if done.forward else 'rolled back'}"
    if not os.path.lexists(path):
        raise AccessError(f"{path}: is {done.path} now: {what}")
    # A warning of the command and not of the image, which is fine now.
    warn(f"{path}: {what}")


def recover_disk(directory: Directory, name: str, calls: Syscalls, *, trust: bool) -> None:
    """Completes or rolls back the interrupted change of one disk, if there is one."""
    entry = _find(directory, name, trust=trust)
    if entry is not None:
        _follow(directory, entry, calls, trust=trust)


def recover_if_own(path: str) -> Recovery | None:
    """Recovers the file `path` if its journal is this user's; returns None if there is nothing to recover.

    Raises `AccessError` if the file is missing and its conversion is running or its journal may be another user's. If
    the file exists it may be read in spite of such a journal: a file under its own name is always complete.
    """
    folder, name = os.path.split(os.path.abspath(path))
    try:
        opened = Directory.at(folder)
    except OSError:
        # Opening the file will fail too, with a better message.
        return None
    with os_errors("cannot be recovered", AccessError, where=path), opened as directory:
        entry = beside(name, JOURNAL)
        if not directory.has(entry):
            _refuse_lone(directory, name)
            found = _find_own(directory, name)
            if found is None:
                return None
            entry = found
        try:
            return _follow(directory, entry, Syscalls(), trust=False)
        except (StrangerError, ImageError) as exc:
            if not directory.has(name):
                raise
            warn(f"{exc}; it is ignored")
            return None


def _find(directory: Directory, name: str, *, trust: bool) -> str | None:
    """Returns the journal that knows `name`, which may be the journal's own name."""
    for entry in (name, beside(name, JOURNAL), beside(name.removesuffix(WORKING), JOURNAL)):
        if entry.endswith(JOURNAL) and directory.has(entry):
            return entry
    torn = None
    for entry, found in _journals(directory, trust=trust):
        if found is None:
            torn = entry
        elif name in found.journal.names:
            return entry
    if torn is not None:
        # A torn journal names no file, and its run changed nothing. Following it removes it.
        return torn
    _refuse_lone(directory, name)
    return None


def _find_own(directory: Directory, name: str) -> str | None:
    """Returns this user's journal that knows `name`; None also if the directory cannot be listed."""
    with suppress(OSError):
        for entry, found in _journals(directory, trust=False):
            if found is not None and name in found.journal.names:
                return entry
    return None


def _refuse_lone(directory: Directory, name: str) -> None:
    """Raises `AccessError` if a file has its working name and no journal."""
    working = name if name.endswith(WORKING) else beside(name, WORKING)
    entry = beside(name.removesuffix(WORKING), JOURNAL)
    if directory.has(working) and not directory.has(entry) and not (working != name and directory.has(name)):
        raise AccessError(
            f"{directory.join(working)}: its journal {entry} is missing",
            hint="without it the state of the file is unknown",
        )


def _journals(directory: Directory, *, trust: bool) -> Iterator[tuple[str, Found | None]]:
    """Yields this user's journals in a directory, or with `trust` all; None for a torn journal.

    Skips files that are no journals or cannot be opened, because one of them must not block all others.
    """
    for entry in directory.names():
        if entry.endswith(JOURNAL):
            with suppress(VmconvError, OSError):
                descriptor = open_journal(directory, entry, trust=trust)
                try:
                    found = _read(directory, descriptor, entry, trust=trust)
                finally:
                    linux.close(descriptor)
                yield entry, found


def _read(directory: Directory, descriptor: int, entry: str, *, trust: bool) -> Found | None:
    """Returns a journal, None if it is torn. Raises `StrangerError`, before parsing the body, if it may be forged."""
    path = directory.join(entry)
    head = journals.read_head(descriptor, path)
    if head is None:
        return None
    if not trust:
        refuse_stranger(path, ownership.forged(directory, head.digest, head.mark))
    return journals.read(descriptor, path, head, entry)


def refuse_stranger(path: str, why: str | None) -> None:
    if why is not None:
        raise StrangerError(
            f"{path}: {why}", hint=f"if you know its origin, vmconv recover --trust {path}; else remove it"
        )


def open_journal(directory: Directory, entry: str, *, trust: bool) -> int:
    """Returns the descriptor of a journal. Raises `StrangerError` if this user's vmconv cannot have made it."""
    path = directory.join(entry)
    try:
        descriptor = ownership.opened(directory, entry)
    except AccessError as exc:
        raise StrangerError(str(exc), hint="move it away") from exc
    except OSError as exc:
        if exc.errno not in (errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO):
            raise
        raise StrangerError(f"{path}: cannot be opened: {exc.strerror}", hint="move it away") from exc
    if not trust:
        try:
            refuse_stranger(path, ownership.stranger(descriptor))
        except StrangerError:
            linux.close(descriptor)
            raise
    return descriptor


@contextmanager
def locked(directory: Directory, entry: str, *, trust: bool) -> Iterator[int]:
    """Yields the locked descriptor of a journal. Raises `AccessError` if its run is alive, which holds the lock."""
    descriptor = open_journal(directory, entry, trust=trust)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another recovery removed the journal before we had its lock.
        if not os.fstat(descriptor).st_nlink:
            raise BlockingIOError
        yield descriptor
    except BlockingIOError as exc:
        raise AccessError(f"{directory.join(entry)}: a change in place is running") from exc
    finally:
        linux.close(descriptor)


def _follow(directory: Directory, entry: str, calls: Syscalls, *, trust: bool) -> Recovery:
    with locked(directory, entry, trust=trust) as record:
        found = _read(directory, record, entry, trust=trust)
        if found is None:
            return _remove_torn(directory, entry, calls)
        # Files of a restored backup may have another owner than the journal says.
        journal = found.journal._replace(owner=None) if trust else found.journal
        return _apply(directory, found._replace(journal=journal), calls)


def _remove_torn(directory: Directory, entry: str, calls: Syscalls) -> Recovery:
    """Removes a journal that was never durable, so its run changed nothing."""
    name = entry.removesuffix(JOURNAL)
    if directory.has(name + WORKING):
        raise ImageError(
            f"{directory.join(entry)}: is damaged",
            hint=f"the state of {directory.join(name + WORKING)} is unknown",
        )
    calls.unlink(directory, entry)
    calls.sync_directory(directory)
    return Recovery(directory.join(name), False)


def _apply(directory: Directory, found: Found, calls: Syscalls) -> Recovery:
    journal, committed = found
    descriptor = -1
    try:
        working = beside(journal.source, WORKING)
        if directory.has(working):
            descriptor = ownership.opened(directory, working, os.O_RDWR)
            _refuse_exchanged(directory.join(working), descriptor, journal.owner)
            locks.claim(descriptor)
        change = Change(directory, journal, calls, descriptor)
        change.committed = committed
        if committed:
            change.finish()
        else:
            change.roll_back()
        return Recovery(change.target if committed else change.source, committed)
    finally:
        if descriptor >= 0:
            linux.close(descriptor)


def _refuse_exchanged(path: str, descriptor: int, owner: int | None) -> None:
    """Raises `AccessError` if the file under the working name belongs to another user than the journal says."""
    uid = os.fstat(descriptor).st_uid
    if owner is not None and uid != owner:
        raise AccessError(f"{path}: belongs to user {uid}, the file that was being changed to {owner}")
