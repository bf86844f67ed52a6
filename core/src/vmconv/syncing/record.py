"""The record of a sync, an extended attribute of the target: which state of the source it holds.

It is evidence, so it is believed only with the mark of this user's vmconv (`vmconv.io.ownership`), and only while size,
mtime and inode of the target's files are those of the record: after any write, and in any copy, it says nothing.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

from vmconv.errors import warn
from vmconv.io import ownership
from vmconv.model.sources import Decoded, File
from vmconv.system import linux

if TYPE_CHECKING:
    from vmconv.model.image import Image

ATTRIBUTE = "user.vmconv.sync"
_VERSION = b"1"
_DIGEST = 16
_MOST = 4096
"""Bytes of an attribute: ext4 keeps all attributes of a file in one block."""

_NO_RECORD = linux.NOT_SUPPORTED | {errno.ENODATA, errno.EPERM, errno.EACCES, errno.ERANGE}
_NO_ROOM = linux.NOT_SUPPORTED | {errno.EPERM, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.E2BIG, errno.EROFS}


class Record(NamedTuple):
    """The state of the target's files after a sync, and the state of the source that it holds; both are digests."""

    target: str
    source: str


def state_of_target(files: Iterable[File]) -> str:
    """Returns a digest of the files of a target that changes with any write, and is another for any copy."""
    # Renames and the record itself change the ctime.
    stamps = [os.fstat(file.descriptor) for file in files]
    return _digest(sorted((each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns) for each in stamps))


def state_of_source(image: Image, snapshot: str | None) -> str:
    """Returns a digest of an image and all layers below that changes with any write to one of their files."""
    return _digest([snapshot, *([layer.format_name, *_stamps(layer)] for layer in image.chain())])


def _stamps(layer: Image) -> Iterator[tuple[int, ...]]:
    sources = [source.file if isinstance(source, Decoded) else source for source in layer.guest.sources]
    files = {id(file): file for file in (layer.file, *sources) if isinstance(file, File)}
    return (tuple(file.stamp) for file in files.values())


def _digest(values: object) -> str:
    return blake2b(repr(values).encode("utf-8", "surrogateescape"), digest_size=_DIGEST).hexdigest()


def read(file: File) -> Record | None:
    """Returns the record of a target; None if there is none of this user's vmconv."""
    try:
        value = os.getxattr(file.descriptor, ATTRIBUTE)
    except OSError as exc:
        if exc.errno in _NO_RECORD:
            return None
        raise
    found = _parsed(value) if len(value) <= _MOST else None
    if found is None:
        warn(f"{file.name}: its record of the last sync is not of this user's vmconv, and is ignored")
    return found


def _parsed(value: bytes) -> Record | None:
    version, _, rest = value.partition(b" ")
    mark, _, body = rest.partition(b" ")
    if version != _VERSION:
        return None
    with suppress(ValueError):
        if ownership.forged(None, blake2b(body, digest_size=ownership.SIZE).digest(), bytes.fromhex(mark.decode())):
            return None
        fields: Any = json.loads(body)
        if isinstance(fields, dict) and all(isinstance(fields.get(name), str) for name in Record._fields):
            return Record(**{name: fields[name] for name in Record._fields})
    return None


def write(files: list[File], source: str) -> str | None:
    """Writes the record of a target, whose own file is the last; returns why it cannot be written, else None."""
    if not ownership.can_mark():
        return "no home directory for a key"
    body = json.dumps(Record(state_of_target(files), source)._asdict()).encode()
    mark = ownership.mark(None, blake2b(body, digest_size=ownership.SIZE).digest())
    try:
        os.setxattr(files[-1].descriptor, ATTRIBUTE, b" ".join([_VERSION, mark.hex().encode(), body]))
    except OSError as exc:
        if exc.errno not in _NO_ROOM:
            raise
        return f"the filesystem keeps no such attribute: {exc.strerror}"
    return None
