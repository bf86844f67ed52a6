"""Names several files atomically: all of them or none, whatever interrupts the run.

    temporary names -> journal, durable -> old files removed, last one first -> renames, durable -> no journal

The journal is complete when it is linked under its name: that is the commit. Afterwards the set can only be completed:
by this run, by the next run for one of the targets, or by `vmconv recover`. An old image is removed before its new base
is named, because a top layer must never be seen on another base than its own.

The journal is a header and zero-terminated fields: "new" or "replace", then for each file its temporary name, its inode
and its name. vmconv trusts only journals of its own user (`vmconv.io.ownership`).
"""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from vmconv.backends.temporary import Temporary, already_exists, is_temporary, rename
from vmconv.errors import AccessError, BackendError, ImageError, os_errors
from vmconv.io import locks
from vmconv.io.directory import Directory
from vmconv.system import linux

_MAGIC = b"vmconv: names of several files; vmconv recover\n".ljust(64, b"\0")
_HEAD = struct.Struct("<64s32s32s")
_ENTRY = re.compile(r"\.vmconv-[0-9a-f]{16}\.names")
_MAX_FILES = 1 << 16
"""Files of a set: twice the 2 GiB pieces of a 64 TiB disk."""
_MAX_SIZE = 24 << 20
"""Bytes of a journal, which is held in memory: enough for `_MAX_FILES` files with the longest names."""
_NEW, _REPLACE = "new", "replace"


class Named(NamedTuple):
    """A file with its temporary and its final name; `inode` tells it from a later file of the same name."""

    temporary: str
    inode: int
    name: str


class Set(NamedTuple):
    """Files of one directory in the order of naming; with `replace`, existing files are replaced."""

    files: tuple[Named, ...]
    replace: bool

    @property
    def names(self) -> list[str]:
        return [file.name for file in self.files]

    def encoded(self) -> bytes:
        """Returns the fields of the journal."""
        fields = [_REPLACE if self.replace else _NEW]
        for file in self.files:
            fields += [file.temporary, str(file.inode), file.name]
        return b"".join(os.fsencode(field) + b"\0" for field in fields)


def commit(directory: Directory, files: Sequence[Temporary], *, replace: bool, durable: bool) -> None:
    """Names all of the files, or none.

    Raises `BackendError` if a name exists and `replace` is false. After other errors the message lists the names that
    exist, and the hint says how to complete the set.
    """
    if len(files) > _MAX_FILES:
        raise BackendError(f"{directory.path}: {len(files)} files to rename as one set, {_MAX_FILES} at most")
    for file in files:
        if not replace and directory.has(file.target):
            raise already_exists(directory, file.target)
    wanted = Set(tuple(Named(file.named(), file.inode, file.target) for file in files), replace)
    with _journal(directory, wanted, durable=durable) as journal:
        # From here on recovery needs the temporary names: an abort must not remove them.
        for file in files:
            file.leave()
        try:
            _finish(directory, wanted, journal, durable=durable)
        except OSError as exc:
            _take_back(directory, wanted, journal, exc)


@contextmanager
def _journal(directory: Directory, wanted: Set, *, durable: bool) -> Iterator[str]:
    """Yields the name of a complete journal; it is durable, and locked during the block."""
    name = f".vmconv-{os.urandom(8).hex()}.names"
    file = Temporary(directory, name, known_by=wanted.names[-1])
    try:
        data = memoryview(_with_head(directory, wanted.encoded()))
        at = 0
        while at < len(data):
            done = os.pwrite(file.descriptor, data[at:], at)
            if not done:
                raise OSError(errno.EIO, "nothing was written", directory.join(name))
            at += done
        if durable:
            os.fsync(file.descriptor)
        try:
            file.appear(replace=False)
            if durable:
                directory.sync()
        except BaseException:
            with suppress(OSError):
                directory.unlink(name)
            raise
        yield name
    finally:
        try:
            file.remove()
        finally:
            file.close()


def _with_head(directory: Directory, body: bytes) -> bytes:
    from vmconv.io import ownership

    digest = _digest(body)
    return _HEAD.pack(_MAGIC, digest, ownership.mark(directory, digest)) + body


def _digest(body: bytes) -> bytes:
    from hashlib import blake2b

    return blake2b(body, digest_size=32).digest()


def _finish(directory: Directory, wanted: Set, journal: str, *, durable: bool) -> None:
    """Completes a committed set; may be interrupted and repeated."""
    waiting = [file for file in wanted.files if _is_at(directory, file.temporary, file)]
    if wanted.replace:
        # Not the first: no other file refers to it now, and its rename replaces the old file atomically.
        for file in reversed(waiting[1:]):
            if directory.has(file.name):
                directory.unlink(file.name)
        if durable:
            directory.sync()
    for file in waiting:
        rename(directory, file.temporary, file.name, replace=wanted.replace)
    if durable:
        directory.sync()
    with suppress(FileNotFoundError):
        directory.unlink(journal)


def _is_at(directory: Directory, name: str, file: Named) -> bool:
    status = directory.status(name)
    return status is not None and status.st_ino == file.inode


def _take_back(directory: Directory, wanted: Set, journal: str, error: OSError) -> None:
    """Reverts the renames if nothing was replaced; always raises the error that describes the outcome."""
    if wanted.replace or not _revert(directory, wanted, journal):
        raise _unfinished(directory, wanted, error) from error
    if isinstance(error, FileExistsError):
        taken = next((name for name in wanted.names if directory.has(name)), wanted.names[-1])
        raise already_exists(directory, taken) from error
    raise error


def _revert(directory: Directory, wanted: Set, journal: str) -> bool:
    """Reverts the renames and removes the journal; returns False if the filesystem fails."""
    try:
        for file in reversed(wanted.files):
            if _is_at(directory, file.name, file):
                rename(directory, file.name, file.temporary, replace=False)
        directory.unlink(journal)
    except OSError:
        return False
    # Without the journal the temporary files are mere leftovers.
    for file in wanted.files:
        with suppress(OSError):
            directory.unlink(file.temporary)
    return True


def _unfinished(directory: Directory, wanted: Set, error: OSError) -> BackendError:
    there = [file.name for file in wanted.files if _is_at(directory, file.name, file)]
    missing = [file.name for file in wanted.files if file.name not in there]
    state = f"new files under their final names: {', '.join(there) or 'none'}, missing: {', '.join(missing) or 'none'}"
    return BackendError(
        f"{directory.path}: {state}: {error.strerror}",
        hint=f"vmconv recover {directory.join(wanted.names[-1])} completes it",
    )


# -- after a run that was stopped


def finish(directory: Directory, names: Collection[str], *, trust: bool = False) -> list[str]:
    """Completes the committed sets of interrupted runs that hold one of these names; returns the names of their files.

    Raises `AccessError` if the run is alive, or if the user's own journal lacks this user's mark. Ignores journals of
    other users unless `trust`.
    """
    done: list[str] = []
    for entry in _journals(directory):
        descriptor = _open(directory, entry, trust=trust)
        if descriptor is None:
            continue
        try:
            wanted, believed = _read(directory, descriptor, trust=trust)
            if wanted is None or not set(names) & set(wanted.names):
                continue
            first = directory.join(wanted.names[-1])
            if locks.may_be_owned(descriptor):
                raise AccessError(f"{first}: another process is writing it", hint="wait until it has ended")
            if not believed:
                raise AccessError(
                    f"{directory.join(entry)}: names {first}, and lacks the mark of this user's vmconv",
                    hint=f"vmconv recover --trust {first}, if you know its origin; else remove it",
                )
            _finish_interrupted(directory, wanted, entry)
            done += wanted.names
        finally:
            linux.close(descriptor)
    return done


def needed(directory: Directory) -> set[str]:
    """Returns the temporary names in this user's journals: their sets are not complete yet."""
    found: set[str] = set()
    for entry in _journals(directory):
        descriptor = _open(directory, entry, trust=False)
        if descriptor is not None:
            try:
                wanted, _ = _read(directory, descriptor, trust=False)
            finally:
                linux.close(descriptor)
            found |= {file.temporary for file in wanted.files} if wanted else set()
    return found


def _journals(directory: Directory) -> list[str]:
    return [name for name in directory.listed() if _ENTRY.fullmatch(name)]


def _open(directory: Directory, entry: str, *, trust: bool) -> int | None:
    """Returns a descriptor of a journal; None if it is another user's or no longer exists."""
    from vmconv.io import ownership

    try:
        descriptor = ownership.opened(directory, entry)
    except (FileNotFoundError, PermissionError, AccessError):
        return None
    except OSError as exc:
        # vmconv makes no links and no sockets. A journal that fails otherwise may be ours and list files still needed.
        if exc.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        return None
    if trust or ownership.stranger(descriptor) is None:
        return descriptor
    linux.close(descriptor)
    return None


def _read(directory: Directory, descriptor: int, *, trust: bool) -> tuple[Set | None, bool]:
    """Returns the set of a journal, None if the file is no journal, and whether its mark is this user's."""
    from vmconv.io import ownership

    size = os.fstat(descriptor).st_size
    data = linux.read_at(descriptor, size, 0) if size <= _MAX_SIZE else b""
    if len(data) < _HEAD.size:
        return None, False
    magic, digest, mark = _HEAD.unpack_from(data)
    body = data[_HEAD.size :]
    if magic != _MAGIC or digest != _digest(body):
        return None, False
    return _parse(body), trust or ownership.forged(directory, digest, mark) is None


def _parse(body: bytes) -> Set | None:
    if body.count(0) > 1 + 3 * _MAX_FILES:
        return None
    fields = [os.fsdecode(field) for field in body.split(b"\0")[:-1]]
    if len(fields) % 3 != 1 or fields[0] not in (_NEW, _REPLACE):
        return None
    files = []
    for temporary, inode, name in zip(fields[1::3], fields[2::3], fields[3::3], strict=True):
        plain = name not in ("", ".", "..") and "/" not in name
        if not (is_temporary(temporary) and inode.isdecimal() and plain):
            return None
        files.append(Named(temporary, int(inode), name))
    return Set(tuple(files), fields[0] == _REPLACE)


def _finish_interrupted(directory: Directory, wanted: Set, entry: str) -> None:
    with os_errors("cannot be completed"):
        try:
            _finish(directory, wanted, entry, durable=True)
        except FileExistsError as exc:
            raise BackendError(
                f"{exc.filename2 or exc.filename}: was created before the interrupted conversion was complete",
                hint=f"move it away, then vmconv recover {directory.join(wanted.names[-1])}",
            ) from exc
    gone = [name for name in wanted.names if not directory.has(name)]
    if gone:
        raise ImageError(f"{directory.join(gone[0])}: is missing from the images that were made with it")
