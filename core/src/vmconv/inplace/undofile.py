"""The undo file: the old container without its payload, which is where it was as long as nobody writes to the new one.

    magic | stamp of the new container | length of the body, its digest | body: JSON, ranges | zstandard: old bytes

The stamp is known last, when nothing more is done to the file, so it has a place and a digest of its own.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from stat import S_IMODE
from typing import NamedTuple

import numpy as np

from vmconv.errors import ImageError
from vmconv.inplace.calls import Calls
from vmconv.inplace.journal import Ranges, refuse_paths
from vmconv.sources import File

MAGIC = b"vmconv: what it takes to undo a conversion in place; vmconv undo\n".ljust(128, b"\0")
STAMP_OFFSET = len(MAGIC)
_STAMP = struct.Struct("<QQ32s32s")
_HEAD = struct.Struct("<Q32s")
_DIGEST = 32
_BODY_OFFSET = STAMP_OFFSET + _STAMP.size + _HEAD.size
_MAX_BODY = 256 << 20
_PIECE = 1 << 20


class Stamp(NamedTuple):
    """What tells whether somebody wrote to the new container: its size, when it was changed last, ns, and a digest of
    its metadata.
    """

    size: int
    mtime: int
    digest: bytes

    @classmethod
    def of(cls, descriptor: int, metadata: Ranges) -> Stamp:
        """Returns the stamp of a file as it is; reads these ranges of it."""
        found = hashlib.blake2b(digest_size=_DIGEST)
        for offset, length in metadata.tolist():
            for at in range(offset, offset + length, _PIECE):
                found.update(os.pread(descriptor, min(_PIECE, offset + length - at), at))
        status = os.fstat(descriptor)
        return cls(status.st_size, status.st_mtime_ns, found.digest())

    def encode(self) -> bytes:
        """Returns the stamp as it is written at `STAMP_OFFSET`."""
        body = struct.pack("<QQ32s", *self)
        return body + _digest(body)


class Sibling(NamedTuple):
    """A small file that was removed with the source: a descriptor."""

    name: str
    mode: int
    size: int

    @classmethod
    def of(cls, file: File) -> Sibling:
        return cls(os.path.basename(os.path.realpath(file.path)), S_IMODE(os.fstat(file.descriptor).st_mode), file.size)


class Undo(NamedTuple):
    """How to make the file `source` of the file `target`.

    The old bytes are those of `ranges`, then those of the `siblings`. `made` are files that came with the target.
    `metadata` are the ranges of the target that were written.
    """

    source: str
    target: str
    source_format: str
    size: int
    mtime: int
    ranges: Ranges
    siblings: tuple[Sibling, ...]
    made: tuple[str, ...]
    metadata: Ranges

    def head(self) -> bytes:
        """Returns the file up to the old bytes, with room for the stamp."""
        import json

        fields = {name: value for name, value in self._asdict().items() if not isinstance(value, np.ndarray)}
        tables = (self.ranges, self.metadata)
        text = json.dumps({**fields, "tables": [len(table) for table in tables]}).encode("ascii")
        body = struct.pack("<Q", len(text)) + text + b"".join(table.astype("<i8").tobytes() for table in tables)
        return b"".join([MAGIC, bytes(_STAMP.size), _HEAD.pack(len(body), _digest(body)), body])


def write(descriptor: int, undo: Undo, pieces: Iterable[tuple[File, int, int]], calls: Calls) -> None:
    """Writes an undo file without its stamp, and makes it durable; `pieces` are `(file, offset, length)`."""
    import zstandard

    head = undo.head()
    calls.write(descriptor, head, 0)
    at = len(head)
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj()

    def packed() -> Iterator[bytes]:
        yield from map(compressor.compress, _read(pieces))
        yield compressor.flush()

    for data in filter(None, packed()):
        calls.write(descriptor, data, at)
        at += len(data)
    calls.sync(descriptor)


def _read(pieces: Iterable[tuple[File, int, int]]) -> Iterator[bytes]:
    for file, offset, length in pieces:
        for at in range(offset, offset + length, _PIECE):
            yield file.read(at, min(_PIECE, offset + length - at))


def read_stamp(path: str) -> Stamp:
    """Returns the stamp of an undo file; raises `ImageError` where it is damaged, or was never written."""
    with open(path, "rb") as file:
        head = file.read(_BODY_OFFSET)
    if len(head) < _BODY_OFFSET:
        raise ImageError(f"{path}: is not an undo file")
    size, mtime, digest, check = _STAMP.unpack_from(head, STAMP_OFFSET)
    if _digest(head[STAMP_OFFSET : STAMP_OFFSET + _STAMP.size - _DIGEST]) != check:
        raise ImageError(f"{path}: stamp at {STAMP_OFFSET:#x}: its digest does not fit")
    return Stamp(size, mtime, digest)


def read(path: str) -> Undo:
    """Returns what an undo file says, the stamp apart; raises `ImageError` where it is damaged."""
    with open(path, "rb") as file:
        head = file.read(_BODY_OFFSET)
        if len(head) < _BODY_OFFSET or not head.startswith(MAGIC):
            raise ImageError(f"{path}: is not an undo file")
        length, digest = _HEAD.unpack_from(head, STAMP_OFFSET + _STAMP.size)
        body = file.read(min(length, _MAX_BODY))
    if len(body) != length or _digest(body) != digest:
        raise ImageError(f"{path}: body at {_BODY_OFFSET:#x}: its digest does not fit")
    try:
        undo = _parse(body)
    except (ValueError, LookupError, TypeError, struct.error) as exc:
        raise ImageError(f"{path}: is not an undo file of this version: {exc}") from exc
    refuse_paths(path, undo.source, undo.target, *undo.made, *(sibling.name for sibling in undo.siblings))
    return undo


def _parse(body: bytes) -> Undo:
    import json

    (text,) = struct.unpack_from("<Q", body)
    fields = json.loads(body[8 : 8 + text])
    at, tables = 8 + text, []
    for count in fields.pop("tables"):
        tables.append(np.frombuffer(body, dtype="<i8", count=2 * count, offset=at).reshape(-1, 2))
        at += 16 * count
    fields["siblings"] = tuple(Sibling(*each) for each in fields["siblings"])
    fields["made"] = tuple(fields["made"])
    return Undo(**fields, ranges=tables[0], metadata=tables[1])


@contextmanager
def unpacked(path: str, undo: Undo) -> Iterator[Callable[[int], bytes]]:
    """Yields what returns the next so many old bytes; raises `ImageError`, at the end at the latest, for other ones."""
    import zstandard

    with open(path, "rb") as file:
        file.seek(len(undo.head()))
        stream = zstandard.ZstdDecompressor().stream_reader(file)

        def following(count: int) -> bytes:
            parts, have = [], 0
            while have < count and (data := stream.read(count - have)):
                parts.append(data)
                have += len(data)
            if have < count:
                raise ImageError(f"{path}: old bytes: end {count - have} bytes too early")
            return b"".join(parts)

        try:
            yield following
            # The digest of the stream is at its end.
            if stream.read(1):
                raise ImageError(f"{path}: old bytes: there are more than its ranges hold")
        except zstandard.ZstdError as exc:
            raise ImageError(f"{path}: old bytes: {exc}") from exc


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST).digest()
