"""The payload of a disk as objects: those that hold it already, and pieces of what is not in the store yet.

A piece is the payload in 64 MiB of the guest's address space. It is named by the hash of its content: what was sent
before is found again, whatever file it comes from, also after a publication that was interrupted.
"""

from __future__ import annotations

import threading
from hashlib import md5, sha256
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vmconv.plugin import Columns, Extents, File, Kind, RemoteFile, Stamp, in_order, spread
from vmconv_swift.names import ObjectName
from vmconv_swift.remote import SwiftObject
from vmconv_swift.zeros import is_zeros

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmconv.plugin import Column, Source
    from vmconv_swift.client import Client
    from vmconv_swift.manifest import Leaf

PIECE = 64 << 20
"""Bytes of the guest's address space in one piece."""
SMALLEST = 1 << 20
"""Bytes of the smallest object that manifests refer to: Swift delays requests for ranges of smaller ones."""
PREFIX = "payload/"
_STEP = 4 << 20


class StoreFile(File):
    """Bytes that are an object of the store, or will be one: what a manifest can refer to."""

    is_remote = True

    def __init__(self, name: str, size: int) -> None:
        self.path = self.name = name
        self.descriptor = -1
        self.size = size
        self.is_device = False
        self.settled = True
        # Unique, because files are compared by device and inode.
        self.stamp = Stamp(0, id(self), size, 0, 0)

    def real_path(self) -> str:
        return self.path

    def sync(self) -> None:
        pass

    def data_ranges(self, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
        limit = self.size if end is None else min(end, self.size)
        return [(start, limit)] if start < limit else []

    def stored(self) -> int:
        return self.size

    def changed(self) -> bool:
        # Objects are named with their ETags, and whoever reads the files of a piece knows whether they change.
        return False

    def close(self) -> None:
        pass


class LeafFile(StoreFile):
    """An object that holds payload."""

    def __init__(self, client: Client, leaf: Leaf) -> None:
        super().__init__(client.shown(leaf.where), leaf.size)
        self.where, self.etag = leaf.where, leaf.etag
        self._client = client

    def read(self, offset: int, length: int) -> bytes:
        return self._client.read_range(self.where, self.etag, offset, length) if length else b""


class Piece(StoreFile):
    """Payload that becomes an object of `container`; `table` leads to its bytes. Behind them it is zero.

    `foreign` is the container that holds the payload now, if any does. `there` is True if the store has the object.
    """

    def __init__(self, container: str, table: Extents, foreign: str | None) -> None:
        super().__init__("payload", max(table.size, SMALLEST))
        self.table, self.foreign = table, foreign
        self.there = False
        self._lock = threading.Lock()
        content, check = sha256(), md5(usedforsecurity=False)
        for at in range(0, self.size, _STEP):
            data = self.read(at, min(_STEP, self.size - at))
            content.update(data)
            check.update(data)
        self.etag = check.hexdigest()
        self.where = ObjectName(container, PREFIX + content.hexdigest())

    def read(self, offset: int, length: int) -> bytes:
        inside = max(0, min(length, self.table.size - offset))
        data = self.table.read(offset, inside) if inside else b""
        return data + bytes(length - inside)

    def look(self, client: Client) -> None:
        """Finds out whether the store has it."""
        found = client.head(self.where)
        # What would expire is sent again, and stays then.
        self.there = found is not None and (found.etag, found.size, found.expires) == (self.etag, self.size, False)


class Staged(NamedTuple):
    """A disk whose payload is in `StoreFile`s only."""

    table: Extents
    pieces: tuple[Piece, ...]


def staged(table: Extents, client: Client, own: str, may_refer: Callable[[Leaf], bool]) -> Staged:
    """Returns a disk with its payload in objects that `may_refer` accepts, and in pieces for the container `own`.

    Reads all payload that is not in such objects, to know whether it has been sent before.
    """
    leaves: dict[Leaf, LeafFile] = {}
    for source in table.sources:
        if isinstance(source, RemoteFile) and isinstance(source.remote, SwiftObject):
            remote = source.remote
            if remote.client.cloud.endpoint == client.cloud.endpoint:
                table = table.through(source, _through(source, remote, client, leaves, may_refer))
    kept, moved = _split(table)
    if not len(moved.start):
        return Staged(_pruned(table), ())
    cuts = _cut(moved, table)
    made = in_order(lambda part: _piece(part, cuts, table, own, client), range(len(cuts.begin)))
    pieces = tuple(made)
    index = np.int32(len(table.sources)) + cuts.piece
    rows = Columns(cuts.start, np.full(len(cuts.start), Kind.DATA, dtype=np.uint8), index.astype(np.int32), cuts.at)
    both = Columns.join([kept, rows])
    order = np.argsort(both.start, kind="stable")
    return Staged(_pruned(Extents(table.size, both.take(order), (*table.sources, *pieces))), pieces)


def _through(
    source: File, remote: SwiftObject, client: Client, leaves: dict[Leaf, LeafFile], may_refer: Callable[[Leaf], bool]
) -> Extents:
    """Returns the table of a large object: its leaves, or itself where nothing may refer to what is there."""
    rows: list[tuple[int, Kind, Source | None, int]] = []
    at = 0
    for leaf, offset, length in remote.windows:
        if leaf and is_zeros(leaf.etag, leaf.size):
            rows.append((at, Kind.ZERO, None, 0))
        elif leaf and may_refer(leaf):
            rows.append((at, Kind.DATA, leaves.setdefault(leaf, LeafFile(client, leaf)), offset))
        else:
            rows.append((at, Kind.DATA, source, at))
        at += length
    return Extents.of(rows, source.size)


def _split(table: Extents) -> tuple[Columns, Columns]:
    """Returns the rows that stay as they are, and those whose payload has to be in pieces."""
    in_store = np.array([isinstance(source, LeafFile) for source in table.sources] + [False])
    moved = (table.kind == Kind.DATA) & ~in_store[table.source]
    return table.columns.take(~moved), table.columns.take(moved)


class _Cuts(NamedTuple):
    """Rows cut where blocks of the guest's address space end, as parallel columns.

    `at` is the offset of a row in its piece. `begin` and `end` are the first row of each piece, and the one after it.
    """

    start: Column
    length: Column
    source: Column
    offset: Column
    piece: Column
    at: Column
    begin: Column
    end: Column


def _cut(rows: Columns, table: Extents) -> _Cuts:
    length = table.length[table.row_at(rows.start)]
    first, last = rows.start // PIECE, (rows.start + length - 1) // PIECE
    row, place = spread(last - first + 1)
    block = first[row] + place
    start = np.maximum(rows.start[row], block * PIECE)
    end = np.minimum((rows.start + length)[row], (block + 1) * PIECE)
    begins = np.append(True, block[1:] != block[:-1])
    begin = np.flatnonzero(begins)
    piece = np.cumsum(begins) - 1
    before = np.cumsum(end - start) - (end - start)
    at = before - before[begin][piece]
    offset = rows.offset[row] + start - rows.start[row]
    source = rows.source[row].astype(np.int64)
    return _Cuts(start, end - start, source, offset, piece, at, begin, np.append(begin[1:], len(start)))


def _piece(number: int, cuts: _Cuts, table: Extents, own: str, client: Client) -> Piece:
    part = slice(int(cuts.begin[number]), int(cuts.end[number]))
    size = int(cuts.length[part].sum())
    columns = Columns(
        cuts.at[part].copy(),
        np.full(len(cuts.at[part]), Kind.DATA, dtype=np.uint8),
        cuts.source[part].astype(np.int32),
        cuts.offset[part].copy(),
    )
    found = Extents(size, columns, table.sources)
    made = Piece(own, found, _foreign(table.sources, cuts.source[part]))
    made.look(client)
    return made


def _foreign(sources: Sequence[Source], used: Column) -> str | None:
    """Returns the container that holds the first of these sources, if it is in the store."""
    for number in dict.fromkeys(used.tolist()):
        source = sources[number]
        if isinstance(source, RemoteFile) and isinstance(source.remote, SwiftObject):
            return source.remote.where.container
    return None


def _pruned(table: Extents) -> Extents:
    """Returns the table without sources that no row uses."""
    used = sorted(set(table.source[table.kind == Kind.DATA].tolist()))
    renumber = np.full(len(table.sources) + 1, -1, dtype=np.int32)
    renumber[used] = np.arange(len(used), dtype=np.int32)
    columns = table.columns._replace(source=renumber[table.source])
    return Extents(table.size, columns, [table.sources[number] for number in used])
