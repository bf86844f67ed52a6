"""A database in memory with the records of several owners."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Any

from fleet.plain import PlainSigner, node_id
from vmconv_fleet.catalogue.indexes import INDEXES
from vmconv_fleet.catalogue.snapshot import Snapshot
from vmconv_fleet.replication.indexing import REQUESTS
from vmconv_fleet.replication.records import Record, decode, encode, seal
from vmconv_fleet.replication.store import Store

NODES = [node_id(number) for number in range(3)]


class Written:
    """A database in memory, and a writer of all owners."""

    def __init__(self, path: str = ":memory:") -> None:
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.store = Store(self.connection, NODES[0], indexes=INDEXES)

    def write(
        self, owner: str, *rows: tuple[str, str, Mapping[str, Any] | None], clock: int | None = None
    ) -> list[Record]:
        """Writes records of one owner: kind, id and body; None deletes."""
        records = self.made(owner, *rows, clock=clock)
        with self.store.group():
            self.store.extend(owner, records)
        return records

    def made(
        self, owner: str, *rows: tuple[str, str, Mapping[str, Any] | None], clock: int | None = None
    ) -> list[Record]:
        signer, seq = PlainSigner(owner), self.store.position(owner).seq
        found = []
        for number, (kind, id, body) in enumerate(rows, seq + 1):
            at = number << 16 if clock is None else clock
            draft = Record(owner, kind, id, 1, number, 1, at, body is None, 0, signer.key_id, 0, body or {}, b"")
            found.append(decode(seal(signer.sign(encode(draft)), encode(draft))))
        return found

    def snapshot(self) -> Snapshot:
        return Snapshot(self.store, NODES[0], 0, neighbours=(), retirements={})

    def indexed(self) -> list[Any]:
        """Returns the content of all indexes."""
        return [self.connection.execute(f"SELECT * FROM {one.table}").fetchall() for one in (*REQUESTS, *INDEXES)]
