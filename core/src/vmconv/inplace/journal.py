"""The journal of a change in place: the data to roll it back, and the steps left after the commit.

    magic | length of the body, its digest, a mark | body: JSON, ranges, old bytes | the digest, once committed

It is durable before anything changes, and is removed last. The second digest is the commit record: without it recovery
rolls back. Every field is checked when read (`vmconv.inplace.codec`).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vmconv.errors import ImageError
from vmconv.inplace import codec
from vmconv.inplace.codec import DIGEST, MAX_BODY, Fields, Ranges, Tables, digest_of
from vmconv.inplace.names import JOURNAL, WORKING, beside
from vmconv.system import linux

MAGIC = b"vmconv: a conversion in place is under way; vmconv recover\n".ljust(64, b"\0")
_HEAD = struct.Struct("<64sQ32s32s")
BODY_OFFSET = _HEAD.size
MAX_SIZE = BODY_OFFSET + MAX_BODY + DIGEST
"""Bytes of a journal."""

_TABLES = {"saved": 2, "holes": 2, "dead": 2, "pieces": 3, "later": 2}
"""The tables of a body and their columns."""

NOTHING: Ranges = np.empty((0, 2), dtype=np.int64)
NOTHING_PLACED: Ranges = np.empty((0, 3), dtype=np.int64)


class Leftover(NamedTuple):
    """A file of the source to remove with it. Size and mtime tell it from a later file of that name."""

    name: str
    size: int
    mtime: int

    @classmethod
    def of(cls, name: str, status: os.stat_result) -> Leftover:
        return cls(name, status.st_size, status.st_mtime_ns)


class Journal(NamedTuple):
    """A change of one file; all names are in one directory.

    `source` is the old name, `target` the new one. Back: `saved` ranges get their `old` bytes (concatenated), `holes`
    are punched, size and mtime become `old_size` and `old_mtime`. Forward: `dead` ranges are punched, the size becomes
    `new_size`, `made` files are renamed to their final names, `leftovers` are removed, and `mtime` is set if given.

    `undo` is one of `made` and receives the stamp of the result. `replace`: existing files of these names are replaced.
    Unless `carried`, the target is one of `made` and the source is only removed. `owner` is the user ID of all these
    files; None in old journals, and if any owner is allowed.

    `pieces` are the rows `(physical, length, offset)` of payload to shift: its place on storage and its new offset in
    the file. Afterwards `later` ranges get their `new` bytes (concatenated).
    """

    source: str
    target: str
    old_size: int = 0
    new_size: int = 0
    old_mtime: int = 0
    saved: Ranges = NOTHING
    old: bytes | memoryview = b""
    holes: Ranges = NOTHING
    dead: Ranges = NOTHING
    pieces: Ranges = NOTHING_PLACED
    later: Ranges = NOTHING
    new: bytes | memoryview = b""
    made: tuple[str, ...] = ()
    leftovers: tuple[Leftover, ...] = ()
    undo: str | None = None
    mtime: int | None = None
    replace: bool = False
    carried: bool = True
    owner: int | None = None

    @property
    def names(self) -> set[str]:
        """Names by which recovery finds this journal."""
        return {self.source, self.target, *self.made, *(leftover.name for leftover in self.leftovers)}

    def encode(self, mark: Callable[[bytes], bytes]) -> bytes:
        """Returns the bytes of the journal; `mark` turns its digest into the owner's mark, 32 bytes."""
        values: dict[str, Any] = {
            name: value for name, value in self._asdict().items() if name not in (*_TABLES, "old", "new")
        }
        tables = {name: getattr(self, name) for name in _TABLES}
        shapes = {name: table.shape for name, table in tables.items()}
        body = b"".join([codec.encode({**values, "tables": shapes}, tables.values()), self.old, self.new])
        return sealed(body, mark)


def sealed(body: bytes, mark: Callable[[bytes], bytes], magic: bytes = MAGIC) -> bytes:
    """Returns a body behind its header."""
    digest = digest_of(body)
    return _HEAD.pack(magic, len(body), digest, mark(digest)) + body


def commit_record(encoded: bytes) -> bytes:
    """Returns the bytes that commit an encoded journal when appended."""
    digest: bytes = _HEAD.unpack_from(encoded)[2]
    return digest


class Head(NamedTuple):
    """The header of a journal; `digest` and `mark` authenticate it."""

    length: int
    digest: bytes
    mark: bytes


class Found(NamedTuple):
    """A journal that was read."""

    journal: Journal
    committed: bool


def read_head(descriptor: int, path: str, magic: bytes = MAGIC) -> Head | None:
    """Returns the head of a journal, None if it is torn.

    Raises `ImageError` if the file is no journal.
    """
    data = linux.read_at(descriptor, _HEAD.size, 0)
    # A sector that never reached storage reads as zero.
    if not data[: len(magic)].strip(b"\0"):
        return None
    if not data.startswith(magic):
        raise ImageError(f"{path}: magic at 0x0: {data[:16]!r} is not that of a journal")
    if len(data) < _HEAD.size:
        return None
    _, length, digest, mark = _HEAD.unpack(data)
    if length > MAX_BODY:
        raise ImageError(f"{path}: length of the body at {len(magic):#x}: {length} bytes, {MAX_BODY} at most")
    return Head(length, digest, mark)


def read_body(descriptor: int, head: Head) -> tuple[bytes, bool] | None:
    """Returns the body behind a head and whether it is committed; None if it is torn."""
    if os.fstat(descriptor).st_size < _HEAD.size + head.length:
        return None
    body = linux.read_at(descriptor, head.length, _HEAD.size)
    if len(body) < head.length or digest_of(body) != head.digest:
        return None
    # A short read must not make a change that was committed one that was not.
    return body, linux.read_at(descriptor, DIGEST, _HEAD.size + head.length) == head.digest


def read(descriptor: int, path: str, head: Head, entry: str) -> Found | None:
    """Returns the journal in the file named `entry`, None if it is torn."""
    there = read_body(descriptor, head)
    if there is None:
        return None
    body, committed = there
    journal = _parse(memoryview(body), path)
    if beside(journal.source, JOURNAL) != entry:
        raise ImageError(
            f"{path}: source at {_HEAD.size:#x}: {journal.source!r} has another journal, "
            f"{beside(journal.source, JOURNAL)}"
        )
    return Found(journal, committed)


def parse(encoded: bytes, path: str) -> Journal:
    """Returns an encoded journal as recovery would read it. Raises `ImageError` if that fails."""
    return _parse(memoryview(encoded)[_HEAD.size :], path)


def _parse(body: memoryview, path: str) -> Journal:
    given, tables = codec.decode(path, body, _HEAD.size)
    old_size, new_size = given.number("old_size", codec.MAX_OFFSET), given.number("new_size", codec.MAX_OFFSET)
    found: dict[str, Any] = {}
    for name, rows in given.counts("tables", _TABLES).items():
        found[name] = _table(tables, name, rows, {"saved": old_size, "holes": old_size}.get(name, new_size), old_size)
    journal = Journal(old_size=old_size, new_size=new_size, **found, **_files(given), **_times(given))
    return _with_bytes(journal, tables)


def _table(tables: Tables, name: str, rows: int, most: int, old_size: int) -> Ranges:
    if name == "pieces":
        return _pieces(tables, rows, most)
    # Dead ranges may lie behind the new end.
    return tables.ranges(name, rows, max(most, old_size) if name == "dead" else most)


def _pieces(tables: Tables, rows: int, most: int) -> Ranges:
    begin = tables.offset + tables.at
    found = tables.table("pieces", rows, 3)
    what = f"{tables.path}: pieces"
    codec.refuse_rows(what, begin, found, found[:, 0], found[:, 1], codec.MAX_OFFSET)
    codec.refuse_rows(what, begin, found, found[:, 2], found[:, 1], most)
    return found


def _files(given: Fields) -> dict[str, Any]:
    """Returns the names of a journal. Raises `ImageError` if one leaves the directory or is the journal's own."""
    source = given.name("source", ())
    own = {beside(source, JOURNAL), beside(source, WORKING)}
    made = given.names("made", own)
    undo = given.take("undo")
    if undo is not None and undo not in made:
        given.refuse("undo", undo, "one of the files that are made")
    leftovers = tuple(_leftover(given, each, own) for each in given.items("leftovers"))
    given.apart("leftovers", [each.name for each in leftovers])
    target, carried = given.name("target", own), given.flag("carried")
    if carried == (target in made):
        given.refuse(
            "target", target, "a file that is made" if not carried else "another file than those that are made"
        )
    return {
        "source": source,
        "target": target,
        "made": made,
        "undo": undo,
        "leftovers": leftovers,
        "replace": given.flag("replace"),
        "carried": carried,
    }


def _leftover(given: Fields, value: object, own: set[str]) -> Leftover:
    if not isinstance(value, list) or len(value) != 3:
        given.refuse("leftovers", value, "a name, a size and a time")
    return Leftover(
        given.checked_name("leftovers", value[0], own),
        given.checked_number("leftovers", value[1], codec.MAX_OFFSET),
        given.checked_number("leftovers", value[2], codec.MAX_TIME, -codec.MAX_TIME),
    )


def _times(given: Fields) -> dict[str, Any]:
    """Returns times and owner, the last fields of a journal."""
    mtime = given.take("mtime")
    # Older journals have no owner.
    owner = given.take("owner") if given.has("owner") else None
    found = {
        "old_mtime": given.number("old_mtime", codec.MAX_TIME, -codec.MAX_TIME),
        "mtime": None if mtime is None else given.checked_number("mtime", mtime, codec.MAX_TIME, -codec.MAX_TIME),
        "owner": None if owner is None else given.checked_number("owner", owner, codec.MAX_OWNER),
    }
    given.end()
    return found


def _with_bytes(journal: Journal, tables: Tables) -> Journal:
    """Returns the journal with the bytes behind its tables: `old`, then `new`."""
    old, new = int(journal.saved[:, 1].sum()), int(journal.later[:, 1].sum())
    left = len(tables.body) - tables.at
    if old + new != left:
        raise ImageError(
            f"{tables.path}: bytes at {tables.offset + tables.at:#x}: there are {left}, its ranges are {old + new}"
        )
    rest = tables.body[tables.at :]
    return journal._replace(old=rest[:old], new=rest[old:])
