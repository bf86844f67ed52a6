"""Index tables: columns of the bodies of a kind, for queries. They are written with the records, and can be rebuilt."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from vmconv_fleet.replication.clock import MAX_CLOCK
from vmconv_fleet.replication.records import Record, restore

_BATCH = 256
MAX_INTEGER = (1 << 63) - 1

Body = Mapping[str, Any]
Row = tuple[Any, ...]


class InvalidColumnError(ValueError):
    """A column of a body is not valid."""


def text(body: Body, name: str, *, most: int = 255, needed: bool = False) -> str:
    """Returns a text of a body, empty if it is missing. Raises InvalidColumnError."""
    value = body.get(name)
    if value is None and not needed:
        return ""
    # SQLite's functions end texts at a zero.
    if not isinstance(value, str) or len(value) > most or "\0" in value or (needed and not value):
        raise InvalidColumnError(name)
    return value


def number(body: Body, name: str) -> int:
    """Returns a number of a body, 0 if it is missing. Raises InvalidColumnError."""
    value = body.get(name)
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value <= MAX_INTEGER:
        raise InvalidColumnError(name)
    return value


class Index(NamedTuple):
    """The index of a kind.

    `row` returns the values of `columns`. It raises InvalidColumnError for a body that is in no list, and nothing else
    for any body. `by` are the lists of columns that SQLite indexes. A new meaning of a column needs a new `revision`.
    All indexes also have the columns owner (a number), id, and clock: that of the record, or of an earlier record that
    its owner wrote later.
    """

    kind: str
    columns: Mapping[str, str]
    row: Callable[[Body], Row]
    by: Sequence[str] = ()
    revision: int = 1

    @property
    def table(self) -> str:
        return f"index_{self.kind}"

    def definition(self) -> str:
        """Returns the statements that create the table."""
        columns = "".join(f", {name} {kind} NOT NULL" for name, kind in self.columns.items())
        lines = [
            f"-- revision {self.revision}",
            f"CREATE TABLE {self.table} (owner INTEGER NOT NULL, id TEXT NOT NULL, clock INTEGER NOT NULL{columns},"
            " PRIMARY KEY (owner, id)) WITHOUT ROWID;",
        ]
        lines += [f"CREATE INDEX {self.table}_{n} ON {self.table} ({columns});" for n, columns in enumerate(self.by)]
        return "\n".join(lines)


def _verb(body: Body) -> str:
    """Returns the verb, cut: a request with a wrong one is refused, and not ignored."""
    verb = body.get("verb")
    return verb.partition("\0")[0][:255] if isinstance(verb, str) else ""


def _request(body: Body) -> Row:
    return text(body, "target", needed=True), _verb(body)


def _response(body: Body) -> Row:
    return text(body, "requester", needed=True), text(body, "request", needed=True)


def _transaction(body: Body) -> Row:
    return text(body, "requester"), text(body, "request"), _verb(body)


REQUESTS = (
    Index(
        "request",
        dict.fromkeys(("target", "verb"), "TEXT"),
        _request,
        by=("clock, owner, id", "target, owner, id"),
        revision=2,
    ),
    Index("response", {"requester": "TEXT", "request": "TEXT"}, _response, by=("owner, clock, id",), revision=2),
    Index(
        "transaction",
        dict.fromkeys(("requester", "request", "verb"), "TEXT"),
        _transaction,
        by=("clock, owner, id",),
        revision=2,
    ),
)
"""The indexes of the replica's own kinds."""


class Where(NamedTuple):
    """A condition in SQL on the columns of an index, and its arguments."""

    sql: str = "1"
    arguments: tuple[Any, ...] = ()

    def also(self, sql: str, *arguments: Any) -> Where:
        """Returns the condition and another one."""
        return Where(f"({self.sql}) AND ({sql})", (*self.arguments, *arguments))

    def joined(self, other: Where) -> Where:
        """Returns the condition that both hold."""
        return self.also(other.sql, *other.arguments)


ALL = Where()

ANSWERED = Where(
    "EXISTS (SELECT 1 FROM records a JOIN owners t ON a.owner = t.number"
    " WHERE t.owner = target AND a.kind = 'response' AND NOT a.deleted AND a.id = index_request.id || '.' ||"
    " (SELECT q.owner FROM owners q WHERE q.number = index_request.owner))"
)
"""Requests with a response, as far as it is known here."""

UNANSWERED = Where(f"NOT {ANSWERED.sql}")

UNASKED = Where(
    "NOT EXISTS (SELECT 1 FROM records a JOIN owners t ON a.owner = t.number"
    " WHERE t.owner = requester AND a.kind = 'request' AND NOT a.deleted AND a.id = request)"
)
"""Responses whose request is gone."""


class Indexes:
    """The indexes of a database, by kind."""

    def __init__(self, connection: sqlite3.Connection, indexes: Iterable[Index]) -> None:
        self._connection = connection
        self._indexes = {one.kind: one for one in (*REQUESTS, *indexes)}

    def prepare(self) -> None:
        """Creates the tables, and fills them from the records, if they are not those of this program."""
        definition = "\n".join(one.definition() for one in self._indexes.values())
        known = self._connection.execute("SELECT value FROM meta WHERE name = 'indexes'").fetchone()
        if known == (definition,):
            return
        query = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name GLOB 'index_*'"
        old = [name for (name,) in self._connection.execute(query)]
        drops = "".join(f'DROP TABLE "{name}";\n' for name in old)
        try:
            self._connection.executescript(f"BEGIN IMMEDIATE;\n{drops}{definition}")
            for (number,) in self._connection.execute("SELECT number FROM owners").fetchall():
                self.fill(number)
            self._connection.execute("INSERT OR REPLACE INTO meta VALUES ('indexes', ?)", (definition,))
            self._connection.execute("END")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def fill(self, number: int) -> None:
        """Indexes all stored records of an owner."""
        for kind in self._indexes:
            query = "SELECT wire FROM records WHERE kind = ? AND owner = ? AND NOT deleted ORDER BY seq"
            self.put(number, (restore(wire) for (wire,) in self._connection.execute(query, (kind, number))))

    def put(self, number: int, records: Iterable[Record]) -> None:
        """Indexes new versions of the records of an owner, in the order of their writing."""
        remaining: Iterator[Record] = (one for one in records if one.kind in self._indexes)
        while batch := list(islice(remaining, _BATCH)):
            for kind in {one.kind for one in batch}:
                # Only the last version of a record counts.
                self._put_kind(number, self._indexes[kind], {one.id: one for one in batch if one.kind == kind})

    def _put_kind(self, number: int, index: Index, records: Mapping[str, Record]) -> None:
        rows = {id: _row(index, one) for id, one in records.items()}
        clocks = self._in_order(number, index, list(records.values()))
        found = [(number, id, clocks[id], *row) for id, row in rows.items() if row is not None]
        if found:
            marks = ", ".join("?" * len(found[0]))
            self._connection.executemany(f"INSERT OR REPLACE INTO {index.table} VALUES ({marks})", found)
        gone = [(number, id) for id, row in rows.items() if row is None]
        if gone:
            self._connection.executemany(f"DELETE FROM {index.table} WHERE owner = ? AND id = ?", gone)

    def _in_order(self, number: int, index: Index, records: Sequence[Record]) -> dict[str, int]:
        """Returns the clocks of new records by id, and makes none of an owner later than what it wrote afterwards.

        Otherwise records written while a clock was wrong would come first for as long as they are kept.
        """
        clocks: dict[str, int] = {}
        latest = MAX_CLOCK
        for one in sorted(records, key=lambda one: one.seq, reverse=True):
            clocks[one.id] = latest = min(latest, one.clock)
        if any("clock" in columns.split(", ") for columns in index.by):
            query = f"UPDATE {index.table} SET clock = ? WHERE owner = ? AND clock > ?"
            self._connection.execute(query, (latest, number, latest))
        return clocks

    def clear(self, number: int) -> None:
        """Removes all rows of an owner."""
        for index in self._indexes.values():
            self._connection.execute(f"DELETE FROM {index.table} WHERE owner = ?", (number,))


def _row(index: Index, record: Record) -> Row | None:
    try:
        return None if record.deleted else index.row(record.body)
    except InvalidColumnError:
        return None
