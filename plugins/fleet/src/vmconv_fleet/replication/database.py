"""Tables of the database, connections, and nested transactions."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

from vmconv_fleet.errors import StoreError

VERSION = 3
"""Version 2 has index tables, clocks of executed requests, and a file that shrinks; version 3 also their positions."""

WAL_BYTES = 16 << 20
"""The size that the write-ahead log keeps."""

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE owners (
    number INTEGER PRIMARY KEY, owner TEXT NOT NULL UNIQUE, epoch INTEGER NOT NULL, seq INTEGER NOT NULL,
    state TEXT NOT NULL
);
CREATE TABLE records (
    owner INTEGER NOT NULL REFERENCES owners (number), kind TEXT NOT NULL, id TEXT NOT NULL,
    epoch INTEGER NOT NULL, seq INTEGER NOT NULL, deleted INTEGER NOT NULL, wire BLOB NOT NULL
);
CREATE UNIQUE INDEX records_by_key ON records (kind, owner, id);
CREATE UNIQUE INDEX records_by_position ON records (owner, seq);
CREATE INDEX deletions ON records (owner, seq) WHERE deleted;
CREATE TABLE executed (
    response TEXT PRIMARY KEY, number INTEGER NOT NULL, clock INTEGER NOT NULL DEFAULT 0,
    epoch INTEGER NOT NULL DEFAULT 0, seq INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE INDEX executed_by_clock ON executed (clock);
CREATE TABLE notices (content BLOB PRIMARY KEY, wire BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE quarantine (
    number INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, owner TEXT NOT NULL,
    epoch INTEGER NOT NULL, seq INTEGER NOT NULL, wire BLOB NOT NULL, UNIQUE (owner, epoch, seq, wire)
);
"""

STAGED = """
CREATE TEMPORARY TABLE IF NOT EXISTS staged (
    session INTEGER NOT NULL, kind TEXT NOT NULL, id TEXT NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL,
    deleted INTEGER NOT NULL, wire BLOB NOT NULL, PRIMARY KEY (session, kind, id)
);
CREATE INDEX IF NOT EXISTS temp.staged_by_position ON staged (session, seq);
"""


STRAYS = """
CREATE TABLE IF NOT EXISTS strays (
    epoch INTEGER NOT NULL, seq INTEGER NOT NULL, wire BLOB NOT NULL, kind TEXT, id TEXT,
    PRIMARY KEY (epoch, seq, wire)
) WITHOUT ROWID;
"""
_STRAYS_BY_KEY = "CREATE INDEX IF NOT EXISTS strays_by_key ON strays (kind, id, epoch);"
"""Made at each start: earlier versions ignore it."""


_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def store_error(where: str, exc: sqlite3.Error) -> StoreError:
    """Returns the error to raise for a failure of SQLite; one of a damaged file says what helps."""
    # The lower byte is the primary code. Errors of Python's module have none.
    damaged = getattr(exc, "sqlite_errorcode", 0) & 0xFF in _DAMAGED
    hint = "end the node, move its store.sqlite* away, run it again: it takes its records from the other members"
    return StoreError(f"{where}: {exc}", hint=hint if damaged else None)


def open_writer(path: str) -> sqlite3.Connection:
    """Opens or creates the database for its only writer."""
    try:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
        # Before the first page is written; later it takes effect with VACUUM.
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
    except sqlite3.Error as exc:
        raise store_error(path, exc) from exc
    return connection


def open_reader(path: str) -> sqlite3.Connection:
    """Opens the database read-only."""
    try:
        connection = sqlite3.connect(
            path, isolation_level=None, check_same_thread=False, cached_statements=64, timeout=30
        )
        connection.execute("PRAGMA query_only = ON")
        connection.create_function("fits", 2, _fits, deterministic=True)
    except sqlite3.Error as exc:
        raise store_error(path, exc) from exc
    return connection


def prepare(connection: sqlite3.Connection, node: str) -> None:
    """Creates the tables if there are none, and brings those of an older version up to date.

    Raises StoreError if the database belongs to another node or is of a newer version.
    """
    connection.create_function("fits", 2, _fits, deterministic=True)
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise StoreError(
                f"database has version {version}, and this vmconv-fleet knows versions up to {VERSION}",
                hint="install the newer vmconv-fleet again; a downgrade would lose what it does not know",
            )
        if version == 0:
            connection.executescript(f"BEGIN;{_TABLES}PRAGMA user_version = {VERSION};COMMIT;")
            connection.execute("INSERT INTO meta VALUES ('node', ?)", (node,))
        connection.executescript(STAGED)
        connection.executescript(STRAYS)
        if "kind" not in {name for _, name, *_ in connection.execute("PRAGMA table_info(strays)")}:
            connection.executescript("ALTER TABLE strays ADD COLUMN kind TEXT; ALTER TABLE strays ADD COLUMN id TEXT;")
        connection.executescript(_STRAYS_BY_KEY)
        (owner,) = connection.execute("SELECT value FROM meta WHERE name = 'node'").fetchone() or (None,)
        if owner == node and 0 < version < VERSION:
            _migrate(connection, version)
    except sqlite3.Error as exc:
        raise store_error("database", exc) from exc
    if owner != node:
        raise StoreError(f"database belongs to node {owner}, not to {node}")


_STEPS = {
    # Requests that were executed before count as executed now: they are remembered for as long as new ones.
    1: "ALTER TABLE executed ADD COLUMN clock INTEGER NOT NULL DEFAULT 0;"
    "CREATE INDEX executed_by_clock ON executed (clock);"
    "UPDATE executed SET clock = coalesce((SELECT value FROM meta WHERE name = 'executed-clock'), 0);",
    2: "ALTER TABLE executed ADD COLUMN epoch INTEGER NOT NULL DEFAULT 0;"
    "ALTER TABLE executed ADD COLUMN seq INTEGER NOT NULL DEFAULT 0;",
}
"""What brings a database of a version to the next one."""


def _migrate(connection: sqlite3.Connection, version: int) -> None:
    """Brings a database of an older version up to date; the caller fills the indexes.

    A crash before the last statement leaves a database of the old version, whose next start does it again.
    """
    if version == 1:
        # For the file that shrinks.
        connection.execute("VACUUM")
    steps = "".join(_STEPS[step] for step in range(version, VERSION))
    connection.executescript(f"BEGIN;{steps}PRAGMA user_version = {VERSION};COMMIT;")


def _fits(text: str, pattern: str) -> bool:
    """Returns whether a text matches a pattern of a shell: the function `fits` in SQL."""
    return fnmatchcase(text, pattern)


class Transactions:
    """Begins with the first write and commits at the end of the outermost block; an inner block is all or nothing."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self._grouped = False
        self._begun = False

    @contextmanager
    def group(self) -> Iterator[None]:
        """Commits all writes of the block together, at its end."""
        if self._grouped:
            yield
            return
        self._grouped = True
        try:
            yield
        except BaseException:
            self._end("ROLLBACK")
            raise
        else:
            self._end("COMMIT")
        finally:
            self._grouped = self._begun = False

    @contextmanager
    def atomic(self) -> Iterator[None]:
        """Applies all writes of the block or none."""
        with self.group():
            if not self._begun:
                self.connection.execute("BEGIN IMMEDIATE")
                self._begun = True
            self.connection.execute("SAVEPOINT change")
            try:
                yield
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK TO change")
                    self.connection.execute("RELEASE change")
                raise
            else:
                self.connection.execute("RELEASE change")

    def _end(self, how: str) -> None:
        if not self._begun:
            return
        try:
            self.connection.execute(how)
        finally:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
