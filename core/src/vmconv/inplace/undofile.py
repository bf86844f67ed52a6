"""The undo file: the old container without its payload, which stays in place until a write to the new container.

    magic | stamp of the new container | length of the body, its digest, a mark | body: JSON, ranges
    | zstandard: old bytes

The stamp is written last, after all other changes of the new container, so it has its own place and digest. Files of
vmconv 0.1 have another magic and no mark. Every field is checked when read (`vmconv.inplace.codec`).
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from stat import S_IMODE
from typing import Any, NamedTuple

from vmconv.errors import ImageError
from vmconv.inplace import codec
from vmconv.inplace.codec import DIGEST, MAX_BODY, PIECE, Fields, Ranges, Tables, digest_of
from vmconv.inplace.syscalls import Syscalls
from vmconv.model.sources import File
from vmconv.system import linux

_OLD_MAGIC = b"vmconv: what it takes to undo a conversion in place; vmconv undo\n".ljust(128, b"\0")
MAGIC = _OLD_MAGIC[:-1] + b"\2"
STAMP_OFFSET = len(MAGIC)
_STAMP = struct.Struct("<QQ32s32s")
_HEAD_OFFSET = STAMP_OFFSET + _STAMP.size
_HEAD = struct.Struct("<Q32s32s")
_OLD_HEAD = struct.Struct("<Q32s")

_MAX_WINDOW = 8 << 20
"""Limit of the decompressor's window, bytes: four times that of files of vmconv."""


class Stamp(NamedTuple):
    """The state of the new container, to detect writes: its size, its mtime in ns, and a digest of its metadata."""

    size: int
    mtime: int
    digest: bytes

    @classmethod
    def of(cls, descriptor: int, metadata: Ranges) -> Stamp:
        """Returns the stamp of a file; reads its ranges `metadata`."""
        found = hashlib.blake2b(digest_size=DIGEST)
        for offset, length in metadata.tolist():
            for at in range(offset, offset + length, PIECE):
                found.update(linux.read_at(descriptor, min(PIECE, offset + length - at), at))
        status = os.fstat(descriptor)
        return cls(status.st_size, status.st_mtime_ns, found.digest())

    def encode(self) -> bytes:
        """Returns the bytes for `STAMP_OFFSET`."""
        body = struct.pack("<QQ32s", *self)
        return body + digest_of(body)


class Sibling(NamedTuple):
    """A small file that was removed with the source, such as a descriptor."""

    name: str
    mode: int
    size: int

    @classmethod
    def of(cls, name: str, file: File) -> Sibling:
        return cls(name, S_IMODE(os.fstat(file.descriptor).st_mode) & 0o777, file.size)


class Undo(NamedTuple):
    """The data to restore the file `source` from the file `target`.

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

    def head(self, mark: Callable[[bytes], bytes]) -> bytes:
        """Returns the file up to the old bytes, with room for the stamp; `mark` makes the owner's mark of a digest."""
        values = {name: value for name, value in self._asdict().items() if name not in ("ranges", "metadata")}
        tables = (self.ranges, self.metadata)
        body = codec.encode({**values, "tables": [len(table) for table in tables]}, tables)
        digest = digest_of(body)
        return b"".join([MAGIC, bytes(_STAMP.size), _HEAD.pack(len(body), digest, mark(digest)), body])

    @property
    def restored(self) -> int:
        """The number of bytes to write to restore the old container."""
        return int(self.ranges[:, 1].sum()) + sum(sibling.size for sibling in self.siblings)


def write(descriptor: int, head: bytes, pieces: Iterable[tuple[File, int, int]], calls: Syscalls) -> None:
    """Writes an undo file without its stamp, and makes it durable; `pieces` are `(file, offset, length)`."""
    import zstandard

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
        for at in range(offset, offset + length, PIECE):
            yield file.read(at, min(PIECE, offset + length - at))


# -- reading


class Head(NamedTuple):
    """The header of an undo file: its body lies at `offset`; `mark` is None for a file of vmconv 0.1."""

    offset: int
    length: int
    digest: bytes
    mark: bytes | None


def read_head(descriptor: int, path: str) -> Head:
    """Returns the head of an undo file. Raises `ImageError` for any other file."""
    data = linux.read_at(descriptor, _HEAD_OFFSET + _HEAD.size, 0)
    mark: bytes | None = None
    if len(data) >= _HEAD_OFFSET + _HEAD.size and data.startswith(MAGIC):
        length, digest, mark = _HEAD.unpack_from(data, _HEAD_OFFSET)
        offset = _HEAD_OFFSET + _HEAD.size
    elif len(data) >= _HEAD_OFFSET + _OLD_HEAD.size and data.startswith(_OLD_MAGIC):
        length, digest = _OLD_HEAD.unpack_from(data, _HEAD_OFFSET)
        offset = _HEAD_OFFSET + _OLD_HEAD.size
    else:
        raise ImageError(f"{path}: magic at 0x0: {data[:16]!r} is not that of an undo file")
    most = min(MAX_BODY, os.fstat(descriptor).st_size - offset)
    if length > most:
        raise ImageError(f"{path}: length of the body at {_HEAD_OFFSET:#x}: {length} bytes, {most} at most")
    return Head(offset, length, digest, mark)


def read_stamp(descriptor: int, path: str) -> Stamp:
    """Returns the stamp of an undo file. Raises `ImageError` if it is damaged or was never written."""
    data = linux.read_at(descriptor, _STAMP.size, STAMP_OFFSET)
    if len(data) < _STAMP.size or digest_of(data[:-DIGEST]) != data[-DIGEST:]:
        raise ImageError(f"{path}: stamp at {STAMP_OFFSET:#x}: its digest does not match")
    size, mtime, digest, _ = _STAMP.unpack(data)
    return Stamp(size, mtime, digest)


def read(descriptor: int, path: str, head: Head, entry: str) -> Undo:
    """Returns the undo file named `entry`, without its stamp. Raises `ImageError` if it is damaged."""
    body = linux.read_at(descriptor, head.length, head.offset)
    if len(body) != head.length or digest_of(body) != head.digest:
        raise ImageError(f"{path}: body at {head.offset:#x}: its digest does not match")
    given, tables = codec.decode(path, memoryview(body), head.offset)
    return _parse(given, tables, entry)


def _parse(given: Fields, tables: Tables, entry: str) -> Undo:
    own = {entry}
    size = given.number("size", codec.MAX_OFFSET)
    siblings = tuple(_sibling(given, each, own) for each in given.items("siblings"))
    source, target = given.name("source", own), given.name("target", own)
    made = given.names("made", own)
    given.apart("siblings", [source, *(sibling.name for sibling in siblings)])
    given.apart("made", [target, *made])
    source_format, mtime = given.format("source_format"), given.number("mtime", codec.MAX_TIME, -codec.MAX_TIME)
    counts = given.items("tables", 2)
    if len(counts) != 2:
        given.refuse("tables", counts, "the rows of two tables")
    rows = [given.checked_number("tables", count, MAX_BODY // 16) for count in counts]
    given.end()
    ranges = tables.ranges("ranges", rows[0], size)
    metadata = tables.ranges("metadata", rows[1], codec.MAX_OFFSET)
    if tables.at != len(tables.body):
        left = len(tables.body) - tables.at
        raise ImageError(f"{tables.path}: body at {tables.offset:#x}: has {left} bytes behind its tables, 0 at most")
    return Undo(source, target, source_format, size, mtime, ranges, siblings, made, metadata)


def _sibling(given: Fields, value: object, own: set[str]) -> Sibling:
    if not isinstance(value, list) or len(value) != 3:
        given.refuse("siblings", value, "a name, a mode and a size")
    mode = value[1]
    if type(mode) is not int or not 0 <= mode <= 0o777:
        given.refuse("siblings", mode, f"a mode from 0 to {0o777} (0777)")
    return Sibling(
        given.checked_name("siblings", value[0], own),
        mode,
        given.checked_number("siblings", value[2], codec.MAX_OFFSET),
    )


@contextmanager
def unpacked(descriptor: int, path: str, head: Head) -> Iterator[Callable[[int], bytes]]:
    """Yields a function that returns the next `count` old bytes.

    Raises `ImageError`, at the latest at the end of the block, if the old bytes are damaged.
    """
    import zstandard

    # The decompressor calls only `read`.
    source: Any = _Bytes(descriptor, head.offset + head.length)
    stream = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).stream_reader(source)

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
            raise ImageError(f"{path}: old bytes: are longer than the ranges")
    except zstandard.ZstdError as exc:
        raise ImageError(f"{path}: old bytes: {exc}") from exc


class _Bytes:
    """Reads a file from an offset on, for the decompressor; raises every error, including EAGAIN."""

    def __init__(self, descriptor: int, offset: int) -> None:
        self._descriptor = descriptor
        self._offset = offset

    def read(self, count: int) -> bytes:
        data = os.pread(self._descriptor, count, self._offset)
        self._offset += len(data)
        return data
