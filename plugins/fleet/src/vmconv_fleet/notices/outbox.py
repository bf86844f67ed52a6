"""The events that wait for their delivery, on disk: a restart loses none."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from vmconv_fleet.errors import StoreError

FILE = "webhooks.sqlite"
MAX_WAITING = 1000
"""The most events that wait for one webhook; the oldest are dropped."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS message (
    hook TEXT NOT NULL, id TEXT NOT NULL, body BLOB NOT NULL, created_ms INTEGER NOT NULL, due_ms INTEGER NOT NULL,
    attempts INTEGER NOT NULL, PRIMARY KEY (hook, id)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS message_due ON message (hook, due_ms, created_ms);
CREATE TABLE IF NOT EXISTS place (hook TEXT PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID;
"""


class Message(NamedTuple):
    id: str
    body: bytes
    created_ms: int
    due_ms: int
    attempts: int


class Outbox:
    """A database of its own: the replica's commits do not wait for it. For one thread."""

    def __init__(self, directory: str) -> None:
        path = os.path.join(directory, FILE)
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        try:
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode = WAL")
            # What a power cut takes is sent again, or read from the records again.
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.executescript(_SCHEMA)
        except sqlite3.Error as exc:
            raise StoreError(f"{path}: {exc}") from exc

    def close(self) -> None:
        self._connection.close()

    def hooks(self) -> dict[str, int]:
        """Returns the seq of the last record that each webhook has been given."""
        return dict(self._connection.execute("SELECT hook, seq FROM place"))

    def begin(self, hook: str, seq: int) -> None:
        """Notes that a new webhook gets the records behind this one."""
        self._connection.execute("INSERT OR IGNORE INTO place VALUES (?, ?)", (hook, seq))

    def forget(self, hook: str) -> None:
        with self._transaction():
            self._connection.execute("DELETE FROM message WHERE hook = ?", (hook,))
            self._connection.execute("DELETE FROM place WHERE hook = ?", (hook,))

    def add(self, hook: str, messages: Sequence[tuple[str, bytes, int]], seq: int) -> int:
        """Adds messages (id, body, time) of records up to `seq`, durably together; returns how many were dropped."""
        with self._transaction():
            # Due at once: the time of a record may be ahead of this machine's clock.
            rows = [(hook, id_, body, at_ms) for id_, body, at_ms in messages]
            self._connection.executemany("INSERT OR IGNORE INTO message VALUES (?, ?, ?, ?, 0, 0)", rows)
            self._connection.execute("UPDATE place SET seq = max(seq, ?) WHERE hook = ?", (seq, hook))
            surplus = max(0, self.waiting(hook) - MAX_WAITING)
            oldest = "SELECT id FROM message WHERE hook = ? ORDER BY created_ms, id LIMIT ?"
            self._connection.execute(f"DELETE FROM message WHERE hook = ? AND id IN ({oldest})", (hook, hook, surplus))
        return surplus

    def waiting(self, hook: str) -> int:
        return int(self._connection.execute("SELECT count(*) FROM message WHERE hook = ?", (hook,)).fetchone()[0])

    def first(self, hook: str) -> Message | None:
        """Returns the message that is due first."""
        query = (
            "SELECT id, body, created_ms, due_ms, attempts FROM message WHERE hook = ?"
            " ORDER BY due_ms, created_ms, id LIMIT 1"
        )
        row = self._connection.execute(query, (hook,)).fetchone()
        return None if row is None else Message(*row)

    def remove(self, hook: str, message: str) -> None:
        self._connection.execute("DELETE FROM message WHERE hook = ? AND id = ?", (hook, message))

    def retry(self, hook: str, message: str, due_ms: int) -> None:
        update = "UPDATE message SET due_ms = ?, attempts = attempts + 1 WHERE hook = ? AND id = ?"
        self._connection.execute(update, (due_ms, hook, message))

    def _transaction(self) -> _Transaction:
        return _Transaction(self._connection)


class _Transaction:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_exc: object) -> None:
        try:
            if kind is None:
                self._connection.execute("COMMIT")
        finally:
            # On a full disk SQLite has ended the transaction itself.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
