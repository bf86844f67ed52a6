"""What a node keeps of the other histories of itself, until they are merged: the table `strays` of its database."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from vmconv_fleet.replication.database import store_error
from vmconv_fleet.replication.records import Record, restore

MAX_RECORDS = 100_000
MAX_BYTES = 128 << 20

TELEMETRY = frozenset({"capabilities", "datastore", "disk", "heartbeat", "node", "vm"})
"""Kinds that a node writes again and again by itself: of these, the newest version of each epoch is enough."""

_DROPPED = "strays-dropped"


class Strays:
    """The records; those beyond the limits are dropped and counted, so that stolen keys fill no disk."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def keep(self, records: Iterable[Record]) -> Record | None:
        """Keeps records, and returns the last one."""
        ((count, size),) = self._connection.execute("SELECT count(*), total(length(wire)) FROM strays")
        last, dropped = None, 0
        for last in records:
            count -= self._drop_older(last) if last.kind in TELEMETRY else 0
            if count >= MAX_RECORDS or size + len(last.wire) > MAX_BYTES:
                dropped += 1
            elif self._connection.execute(_KEEP, (*last.position, last.wire, last.kind, last.id)).rowcount > 0:
                count, size = count + 1, size + len(last.wire)
        if dropped:
            query = "INSERT OR REPLACE INTO meta VALUES (?, ?)"
            self._connection.execute(query, (_DROPPED, max(dropped, self.dropped())))
        return last

    def _drop_older(self, record: Record) -> int:
        """Drops earlier versions of a record in its epoch; returns their number."""
        query = "DELETE FROM strays WHERE kind = ? AND id = ? AND epoch = ? AND seq < ?"
        return self._connection.execute(query, (record.kind, record.id, record.epoch, record.seq)).rowcount

    def dropped(self) -> int:
        """Returns how many records at least were dropped."""
        row = self._connection.execute("SELECT value FROM meta WHERE name = ?", (_DROPPED,)).fetchone()
        return int(row[0]) if row else 0

    def all(self) -> list[Record]:
        """Returns the records in their order."""
        try:
            rows = self._connection.execute("SELECT wire FROM strays ORDER BY epoch, seq, wire").fetchall()
        except sqlite3.Error as exc:
            raise store_error("database", exc) from exc
        return [restore(wire) for (wire,) in rows]

    def clear(self) -> None:
        self._connection.execute("DELETE FROM strays")


_KEEP = "INSERT OR IGNORE INTO strays (epoch, seq, wire, kind, id) VALUES (?, ?, ?, ?, ?)"
