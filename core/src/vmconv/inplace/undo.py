"""`vmconv undo`: the old container again, byte for byte, as long as nobody has written to the new one."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np

from vmconv import locks
from vmconv.errors import AccessError, PlanError, os_errors
from vmconv.extents import Kind, cut, on_storage
from vmconv.inplace import rules, undofile
from vmconv.inplace.calls import Calls
from vmconv.inplace.change import Change
from vmconv.inplace.journal import Journal, Leftover, Ranges
from vmconv.inplace.names import UNDO
from vmconv.inplace.undofile import Stamp, Undo
from vmconv.opener import Opener
from vmconv.registry import installed
from vmconv.sources import File

_PIECE = 1 << 20


def undo(path: str, *, calls: Calls | None = None) -> str:
    """Turns the file `path` back into what it was made of in place, and returns the path of that."""
    path = os.path.abspath(path.removesuffix(UNDO))
    directory, kept = os.path.dirname(path), path + UNDO
    with os_errors("cannot be undone", AccessError, where=path), ExitStack() as stack:
        if not os.path.lexists(kept):
            raise AccessError(
                f"{path}: there is no {kept}", hint="only --keep-undo makes one, when something is converted"
            )
        found = undofile.read(kept)
        # A descriptor is named by the user, what it describes was changed; and names may have changed since.
        carrier = os.path.join(directory, found.target)
        carrier = carrier if os.path.lexists(carrier) else path
        opener = stack.enter_context(Opener(installed()))
        file = opener.file(carrier)
        _refuse_changed(file, found, undofile.read_stamp(kept))
        rules.refuse_places(carrier, [file], directory)
        rules.refuse_dependents([file], opener, directory, but=found.made)
        locks.refuse_users(file)
        writable = os.open(carrier, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, writable)
        locks.claim(writable)
        return _undone(file, writable, found, kept, calls or Calls())


def _refuse_changed(file: File, found: Undo, stamp: Stamp) -> None:
    """Raises, with what it is that changed, unless the new container is as the conversion left it."""
    now = Stamp.of(file.descriptor, found.metadata) if file.size == stamp.size else None
    problem = None
    if now is None:
        problem = f"its size is {file.size}, it was {stamp.size}"
    elif now.mtime != stamp.mtime:
        problem = f"it was written to at {_time(now.mtime)}, and was made at {_time(stamp.mtime)}"
    elif now.digest != stamp.digest:
        problem = "its metadata is not what the conversion wrote"
    if problem:
        raise PlanError(
            f"{file.path}: cannot be undone: {problem}",
            hint=f"convert it back: vmconv convert -O {found.source_format} {file.path} {found.source}",
        )


def _time(ns: int) -> str:
    import time

    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ns / 1e9)) + f".{ns % 10**9:09d}"


def _undone(file: File, descriptor: int, found: Undo, kept: str, calls: Calls) -> str:
    directory = os.path.dirname(file.path)
    for name in (found.source, *(sibling.name for sibling in found.siblings)):
        if name != os.path.basename(file.path) and os.path.lexists(os.path.join(directory, name)):
            raise PlanError(f"{os.path.join(directory, name)}: already exists", hint="move it away")
    change = Change(directory, _journal(file, found, kept), calls, descriptor)
    try:
        change.begin()
        with undofile.unpacked(kept, found) as old:
            for offset, length in found.ranges.tolist():
                _write(calls, descriptor, offset, length, old)
            for sibling in found.siblings:
                made = change.make(sibling.name, sibling.mode)
                try:
                    _write(calls, made, 0, sibling.size, old)
                    calls.sync(made)
                finally:
                    os.close(made)
        calls.sync(descriptor)
        change.complete()
        return change.target
    finally:
        change.give_up()


def _write(calls: Calls, descriptor: int, offset: int, length: int, old: Callable[[int], bytes]) -> None:
    """Writes the next bytes of the undo file to a place."""
    for at in range(offset, offset + length, _PIECE):
        calls.write(descriptor, old(min(_PIECE, offset + length - at)), at)


def _journal(file: File, found: Undo, kept: str) -> Journal:
    """Returns the journal of the way back: what it overwrites of the new container are its header, and holes."""
    directory = os.path.dirname(file.path)
    inside = found.ranges[found.ranges[:, 0] < file.size]
    start = inside[:, 0]
    length = np.minimum(inside[:, 1], file.size - start)
    rows, row_length = cut(on_storage(file), start, length, start)
    data = rows.kind == Kind.DATA
    table: Ranges = np.stack([rows.start, row_length], axis=1)
    saved, holes = table[data], table[~data]
    gone = [kept, *(os.path.join(directory, name) for name in found.made)]
    return Journal(
        source=os.path.basename(file.path),
        target=found.source,
        old_size=file.size,
        new_size=found.size,
        old_mtime=file.stamp.mtime,
        saved=saved,
        old=b"".join(file.read(offset, count) for offset, count in saved.tolist()),
        holes=holes,
        made=tuple(sibling.name for sibling in found.siblings),
        leftovers=tuple(Leftover.of(path) for path in gone if os.path.lexists(path)),
        mtime=found.mtime,
    )
