"""`vmconv undo`: restores the old container byte for byte, unless the new one was written to."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from vmconv.backends.targets import open_directory
from vmconv.errors import AccessError, ImageError, PlanError, os_errors
from vmconv.inplace import neighbours, rules, undofile
from vmconv.inplace.change import Change
from vmconv.inplace.codec import PIECE, Ranges
from vmconv.inplace.journal import Journal, Leftover
from vmconv.inplace.names import UNDO, beside, is_interrupted
from vmconv.inplace.recovery import settle_disk
from vmconv.inplace.rules import Own
from vmconv.inplace.syscalls import Syscalls
from vmconv.inplace.undofile import Stamp, Undo
from vmconv.io import locks, ownership
from vmconv.io.directory import Directory
from vmconv.io.registry import installed
from vmconv.model.extents import Kind, cut, on_storage
from vmconv.model.sources import File
from vmconv.system import linux, signals


class _UndoFile(NamedTuple):
    """An open undo file that may be followed."""

    entry: str
    path: str
    descriptor: int
    head: undofile.Head
    undo: Undo


def undo(path: str, *, trust: bool = False, calls: Syscalls | None = None) -> str:
    """Restores the source of the file `path`, which was converted in place; returns the source's path.

    With `trust` follows any user's undo file, as after restoring a backup. A signal that arrives after the commit is
    delivered afterwards: its exception carries the attribute `results`, a tuple with the path.
    """
    # An interrupted undo is recovered first. If that completes it, `settle_disk` raises.
    disk = path.removesuffix(UNDO)
    if is_interrupted(disk):
        settle_disk(disk)
    folder, name = os.path.split(os.path.abspath(path))
    with os_errors("cannot be undone", AccessError, where=path), ExitStack() as stack:
        directory = stack.enter_context(open_directory(folder))
        entry = name if name.endswith(UNDO) and directory.has(name) else beside(name.removesuffix(UNDO), UNDO)
        if not directory.has(entry):
            raise AccessError(
                f"{path}: there is no {directory.join(entry)}",
                hint="only a change with --keep-undo makes one",
            )
        descriptor = ownership.opened(directory, entry)
        stack.callback(linux.close, descriptor)
        kept = _read(directory, descriptor, entry, trust=trust)
        # The user may name a descriptor file, while its extent was changed; or the target was renamed since.
        carrier = kept.undo.target if directory.has(kept.undo.target) else name
        file = File(directory.join(carrier), directory.open(carrier))
        stack.callback(file.close)
        own = Own(file, carrier)
        _refuse(own, kept, directory, named=name if directory.has(name) else carrier, trust=trust)
        locks.refuse_users(file)
        writable = directory.open(carrier, os.O_RDWR)
        stack.callback(linux.close, writable)
        rules.refuse_exchanged(directory, own, writable)
        locks.claim(writable)
        return _restore(own, directory, writable, kept, calls or Syscalls(), trust=trust)


def _read(directory: Directory, descriptor: int, entry: str, *, trust: bool) -> _UndoFile:
    """Returns an undo file. Raises `AccessError`, before parsing the body, if another user may have made it."""
    path = directory.join(entry)
    why = None if trust else ownership.stranger(descriptor)
    head = None
    if why is None:
        head = undofile.read_head(descriptor, path)
        why = None if trust else ownership.forged(None, head.digest, head.mark)
    if head is None or why is not None:
        raise AccessError(f"{path}: {why}", hint=f"if you know its origin: vmconv undo --trust {path}")
    return _UndoFile(entry, path, descriptor, head, undofile.read(descriptor, path, head, entry))


def _refuse(own: Own, kept: _UndoFile, directory: Directory, *, named: str, trust: bool) -> None:
    """Raises an error if the disk may not be changed, or changed since the conversion."""
    locks.share(own.file)
    _refuse_changed(own.file, kept.undo, undofile.read_stamp(kept.descriptor, kept.path))
    rules.refuse_places([own], directory)
    if not trust:
        made = [name for name in kept.undo.made if directory.has(name)]
        rules.refuse_other_owners(directory, named, [own.name, *made], "--trust")
    found = neighbours.look(directory, [own], installed(), but=kept.undo.made)
    neighbours.refuse(found)
    neighbours.warn(found)


def _refuse_changed(file: File, found: Undo, stamp: Stamp) -> None:
    """Raises `PlanError` with the difference if the new container changed since the conversion."""
    ends = found.metadata.sum(axis=1)
    if file.size == stamp.size and len(ends) and int(ends.max()) > file.size:
        raise ImageError(
            f"{file.path}: its undo file has metadata up to {int(ends.max())}, the file has {file.size} bytes"
        )
    now = Stamp.of(file.descriptor, found.metadata) if file.size == stamp.size else None
    problem = None
    if now is None:
        problem = f"its size was {stamp.size} and is {file.size}"
    elif now.mtime != stamp.mtime:
        problem = f"it was made at {_time(stamp.mtime)} and modified at {_time(now.mtime)}"
    elif now.digest != stamp.digest:
        problem = "its metadata differs from what the change made"
    if problem:
        raise PlanError(
            f"{file.path}: cannot be undone: {problem}",
            hint=f"convert it back: vmconv convert -O {found.source_format} {file.path} {found.source}",
        )


def _time(ns: int) -> str:
    import time

    seconds, rest = divmod(ns, 10**9)
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) + f".{rest:09d}"
    except (OverflowError, ValueError, OSError):
        # Undo files may hold times beyond year 9999.
        return f"{seconds}.{rest:09d} s"


def _restore(own: Own, directory: Directory, descriptor: int, kept: _UndoFile, calls: Syscalls, *, trust: bool) -> str:
    found = kept.undo
    for name in (found.source, *(sibling.name for sibling in found.siblings)):
        if name != own.name and directory.has(name):
            raise PlanError(f"{directory.join(name)}: already exists", hint="move it away")
    _refuse_too_large(directory, found)
    owner = None if trust else os.fstat(descriptor).st_uid
    change = Change(directory, _journal(own, directory, kept, owner), calls, descriptor)
    try:
        change.begin()
        with undofile.unpacked(kept.descriptor, kept.path, kept.head) as old:
            for offset, length in found.ranges.tolist():
                _write(calls, descriptor, offset, length, old)
            for sibling in found.siblings:
                _recreate(change, descriptor, sibling, old)
        calls.sync(descriptor)
        with signals.held():
            change.complete()
    except KeyboardInterrupt as exc:
        vars(exc)["results"] = (change.target,) if change.committed else ()
        raise
    finally:
        change.give_up()
    return change.target


def _refuse_too_large(directory: Directory, found: Undo) -> None:
    space = os.fstatvfs(directory.descriptor)
    free = space.f_bavail * space.f_frsize
    if found.restored > free:
        raise PlanError(f"{directory.path}: {found.restored} bytes would have to be written, {free} are free")


def _recreate(change: Change, carrier: int, sibling: undofile.Sibling, old: Callable[[int], bytes]) -> None:
    """Recreates a file that was removed with the source, with the carrier's owner."""
    made = change.make(sibling.name)
    try:
        _write(change.calls, made, 0, sibling.size, old)
        if not change.calls.carry(carrier, made):
            change.calls.set_mode(made, sibling.mode)
        change.calls.sync(made)
    finally:
        linux.close(made)


def _write(calls: Syscalls, descriptor: int, offset: int, length: int, old: Callable[[int], bytes]) -> None:
    """Writes the next old bytes of the undo file to a range."""
    for at in range(offset, offset + length, PIECE):
        calls.write(descriptor, old(min(PIECE, offset + length - at)), at)


def _journal(own: Own, directory: Directory, kept: _UndoFile, owner: int | None) -> Journal:
    """Returns the journal of the undo, which saves the new container's metadata that the undo overwrites."""
    file, found = own.file, kept.undo
    # A rollback need not save ranges behind the present end: it truncates them.
    inside = found.ranges[found.ranges[:, 0] < file.size]
    start = inside[:, 0]
    length = np.minimum(inside[:, 1], file.size - start)
    rows, row_length = cut(on_storage(file), start, length, start)
    data = rows.kind == Kind.DATA
    table: Ranges = np.stack([rows.start, row_length], axis=1)
    saved, holes = table[data], table[~data]
    rules.refuse_too_much(file.name, saved)
    gone = {name: directory.status(name) for name in (kept.entry, *found.made)}
    return Journal(
        source=own.name,
        target=found.source,
        old_size=file.size,
        new_size=found.size,
        old_mtime=file.stamp.mtime,
        saved=saved,
        old=b"".join(file.read(offset, count) for offset, count in saved.tolist()),
        holes=holes,
        made=tuple(sibling.name for sibling in found.siblings),
        leftovers=tuple(Leftover.of(name, status) for name, status in gone.items() if status),
        mtime=found.mtime,
        owner=owner,
    )
