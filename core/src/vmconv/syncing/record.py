"""The record of a sync, an extended attribute of the target: which state of the source it holds.

It is evidence, so it is believed only with the mark of this user's vmconv (`vmconv.io.ownership`), and only while size,
mtime and inode of the target's files are those of the record: after any write, and in any copy, it says nothing.

A program may put the mtime back, so the ctime counts, too. It also changes with a new mode or name, and with the record
itself. So a ctime that does not fit proves no write, but the record then proves nothing: the disks are read.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

from vmconv.errors import PlanError, warn
from vmconv.io import ownership
from vmconv.io.attributes import SYNC_RECORD
from vmconv.model.sources import Decoded, File
from vmconv.system import linux

if TYPE_CHECKING:
    from vmconv.model.image import Image
    from vmconv.syncing.request import SyncRequest

_VERSION = b"2"
_DIGEST = 16
_MOST = 4096
"""Bytes of an attribute: ext4 keeps all attributes of a file in one block."""

_SPANS = (1_000_000, 2_000_000, 8_000_000, 32_000_000, 256_000_000)
"""How long writing a record may take, ns; the first time tells what the clock of the filesystem says."""

_MOST_LATE = 100_000_000
"""Nanoseconds that the clock of file times may be late."""
_COARSE = 5
"""CLOCK_REALTIME_COARSE, the kernel's clock of file times, which the module `time` does not name."""

_NO_RECORD = linux.NOT_SUPPORTED | {errno.ENODATA, errno.EPERM, errno.EACCES, errno.ERANGE}
_NO_ROOM = linux.NOT_SUPPORTED | {errno.EPERM, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.E2BIG, errno.EROFS}


Stamp = tuple[int, int, int]
"""Inode, size in bytes and mtime in ns of a file of the target.

Without the device: another mount may have another number. A copy with the inode of the original has another ctime.
"""


class Record(NamedTuple):
    """The state of the target's files after a sync, the state of the source that it holds, and which files that are.

    These are digests. `since` and `until` are the first and the last ctime that the target's files can have had then,
    ns; none before the commit, after which the record is written again.
    """

    target: str
    source: str
    identity: str
    since: int = 0
    until: int = -1

    def fits(self, descriptors: Iterable[int]) -> bool:
        """True if the ctimes of all files are those of the sync."""
        return all(self.since <= os.fstat(each).st_ctime_ns <= self.until for each in descriptors)


def stamp_of(descriptor: int) -> Stamp:
    """Returns the stamp of a file: without ctime, which a rename and the record itself change."""
    found = os.fstat(descriptor)
    return found.st_ino, found.st_size, found.st_mtime_ns


def state_of_target(stamps: Iterable[Stamp]) -> str:
    """Returns a digest of the files of a target that changes with any write, and is another for any copy."""
    return _digest(sorted(stamps))


def state_of_source(image: Image, snapshot: str | None) -> str:
    """Returns a digest of an image and all layers below that changes with any write to one of their files."""
    return _digest([snapshot, *([layer.format_name, *_stamps(layer)] for layer in image.chain())])


def identity_of_source(image: Image, snapshot: str | None) -> str:
    """Returns a digest of an image that stays when a guest writes to it, and is another for any copy.

    It changes with any write to the layers below.
    """
    top = [(_place(file), linux.generation(file.descriptor)) for file in _files(image)]
    below = image.parent and state_of_source(image.parent, None)
    return _digest([snapshot, image.format_name, top, below])


def _stamps(layer: Image) -> Iterator[tuple[object, ...]]:
    for file in _files(layer):
        yield (*_place(file), *file.stamp[2:], None if _has_times(file) else os.urandom(_DIGEST))


def _has_times(file: File) -> bool:
    """True if any write to a file gives it another ctime; else its state is never known."""
    # A filesystem that is mounted from a block device writes to it without a new time. Whole seconds are those of a
    # filesystem that has no others. What a FUSE program says need not be true: nbdfuse always says when it began.
    if file.is_device or not file.stamp.ctime % 1_000_000_000:
        return False
    return not linux.is_fuse(file.descriptor)


def _place(file: File) -> tuple[bytes, int]:
    """Returns what names a file for good: a device number changes with the next mount."""
    try:
        return linux.filesystem_uuid(file.descriptor), file.stamp.inode
    except OSError:
        # Containers may deny the call.
        return str(file.stamp.device).encode(), file.stamp.inode


def _files(layer: Image) -> Iterable[File]:
    sources = [source.file if isinstance(source, Decoded) else source for source in layer.guest.sources]
    return {id(file): file for file in (layer.file, *sources) if isinstance(file, File)}.values()


def _digest(values: object) -> str:
    return blake2b(repr(values).encode("utf-8", "surrogateescape"), digest_size=_DIGEST).hexdigest()


def read(file: File) -> tuple[Record, ...]:
    """Returns the records of a target, of which at most one is of its present state; none of other users' vmconv."""
    try:
        value = os.getxattr(file.descriptor, SYNC_RECORD)
    except OSError as exc:
        if exc.errno in _NO_RECORD:
            return ()
        raise
    found = _parsed(value) if len(value) <= _MOST else ()
    if not found:
        warn(f"{file.name}: its record of the last sync is of another user or version of vmconv, and is ignored")
    return found


def last(own: File, files: Iterable[File], request: SyncRequest) -> Record | None:
    """Returns the record of the last sync. Raises `PlanError` if the target was modified since."""
    found = read(own)
    state = state_of_target(stamp_of(file.descriptor) for file in files)
    for record in found:
        if record.target == state:
            return record
    if found and not request.force:
        raise PlanError(
            f"{request.target}: was modified since its last sync, or is a copy of the file that was synced",
            hint="--force replaces what was written to it",
        )
    return None


def _parsed(value: bytes) -> tuple[Record, ...]:
    version, _, rest = value.partition(b" ")
    mark, _, body = rest.partition(b" ")
    if version != _VERSION:
        return ()
    with suppress(ValueError):
        if ownership.forged(None, blake2b(body, digest_size=ownership.SIZE).digest(), bytes.fromhex(mark.decode())):
            return ()
        rows: Any = json.loads(body)
        if isinstance(rows, list) and all(_is_record(row) for row in rows):
            return tuple(Record(*row) for row in rows)
    return ()


def _is_record(row: Any) -> bool:
    kinds = (str, str, str, int, int)
    return isinstance(row, list) and len(row) == len(kinds) and all(map(isinstance, row, kinds))


def write(descriptor: int, *records: Record) -> str | None:
    """Writes the records of a target into its own file; returns why that cannot be done, else None."""
    if not ownership.can_mark():
        return "no home directory for a key"
    body = json.dumps(records).encode()
    mark = ownership.mark(None, blake2b(body, digest_size=ownership.SIZE).digest())
    try:
        os.setxattr(descriptor, SYNC_RECORD, b" ".join([_VERSION, mark.hex().encode(), body]))
    except OSError as exc:
        if exc.errno not in _NO_ROOM:
            raise
        return f"the filesystem keeps no such attribute: {exc.strerror}"
    return None


def settle(descriptors: Sequence[int], record: Record) -> None:
    """Writes the record again, with the ctimes that the target's files have now; its own file is the last.

    Writing changes the ctime, so the record states a short time in which it did. That is over on return: any later
    change has another ctime. A file that changed meanwhile gets no ctimes, and so the next sync reads it.
    """
    own = descriptors[-1]
    with suppress(OSError):
        for span in _SPANS:
            times = [os.fstat(each).st_ctime_ns for each in descriptors]
            # Whole seconds are all that this filesystem has: a later change could have the same.
            if not times[-1] % 1_000_000_000:
                return
            until = times[-1] + span
            write(own, record._replace(since=min(times), until=until))
            now = os.fstat(own).st_ctime_ns
            if now <= until and record.target == state_of_target(map(stamp_of, descriptors)):
                _wait_until_past(until, now)
                return
        write(own, record)


def _wait_until_past(until: int, now: int) -> None:
    """Waits until no file gets a ctime up to `until` any more; `now` is the latest one."""
    # The clock of file times is late by a tick, or by more on a busy machine. Another machine's clock cannot be read.
    ends = time.monotonic_ns() + until - now + _MOST_LATE
    while time.clock_gettime_ns(_COARSE) <= until and time.monotonic_ns() < ends:
        time.sleep(0.001)
