"""The replica's database: one writer, and readers that see committed records."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from itertools import islice
from typing import Any, NamedTuple

from vmconv_fleet.errors import StoreError
from vmconv_fleet.replication.database import Transactions, open_reader, open_writer, prepare, store_error
from vmconv_fleet.replication.epochs import ID, KIND, History, history_of
from vmconv_fleet.replication.indexing import ALL, Index, Indexes, Where
from vmconv_fleet.replication.records import START, STATE_MODULUS, Position, Record, fingerprint, payload_of, restore
from vmconv_fleet.replication.strays import Strays

BATCH = 256
QUERY_S = 10.0
_STEPS = 100_000
_FREE_PAGES = 2000
MAX_NOTICES = 4096

FORKED = "cloned"
"""The value with the ids of nodes with two histories; it has the name of earlier versions."""


Place = tuple[Any, ...]
"""Where a record is in a list: the values of the columns that order it."""

Listed = tuple[Record, Place]


class ReplicaView:
    """Reads live records of all owners."""

    _connection: sqlite3.Connection

    def get(self, owner: str, kind: str, id: str) -> Record | None:
        """Returns the live record; None if there is none."""
        rows = self._rows(f"{_LIVE} {_OF} AND id = ?", kind, owner, id)
        return restore(rows[0][0]) if rows else None

    def find(self, kind: str, owner: str | None = None) -> list[Record]:
        """Returns the live records of a kind, each owner's by id."""
        if owner is None:
            rows = self._rows(f"{_LIVE} ORDER BY owner, id", kind)
        else:
            rows = self._rows(f"{_LIVE} {_OF} ORDER BY id", kind, owner)
        return [restore(wire) for (wire,) in rows]

    def records(self, kind: str, *, owner: str | None = None, after: Sequence[Any] = (), limit: int) -> list[Listed]:
        """Returns live records of any kind by owner and id, each with its place; those behind the place `after`."""
        whose = _OF if owner is not None else ""
        beyond = "AND (owner, id) > (?, ?)" if after else ""
        rows = self._rows(
            f"SELECT wire, owner, id FROM records WHERE kind = ? AND NOT deleted {whose} {beyond}"
            " ORDER BY owner, id LIMIT ?",
            *(kind, *([owner] if owner is not None else []), *after, limit),
        )
        return [(restore(wire), tuple(place)) for wire, *place in rows]

    def listed(
        self,
        kind: str,
        where: Where = ALL,
        *,
        order: Sequence[str] = (),
        descending: bool = False,
        after: Sequence[Any] = (),
        limit: int = -1,
    ) -> list[Listed]:
        """Returns live records of an indexed kind by `order` (columns of its index), owner and id, each with its place.

        `after`: only those behind this place, which need not exist any more.
        """
        columns = (*order, "owner", "id")
        names = ", ".join(columns)
        if after:
            sign = "<" if descending else ">"
            where = where.also(f"({names}) {sign} ({', '.join('?' * len(columns))})", *after)
        down = " DESC" if descending else ""
        rows = self._rows(
            f"SELECT r.wire, i.* FROM (SELECT {names} FROM index_{kind} WHERE {where.sql}"
            f" ORDER BY {', '.join(name + down for name in columns)} LIMIT ?) i"
            " JOIN records r ON r.kind = ? AND r.owner = i.owner AND r.id = i.id"
            f" ORDER BY {', '.join(f'i.{name}{down}' for name in columns)}",
            *where.arguments,
            limit,
            kind,
        )
        return [(restore(wire), tuple(place)) for wire, *place in rows]

    def tally(self, kind: str, where: Where = ALL, *, by: Sequence[str] = (), sums: Sequence[str] = ()) -> list[Any]:
        """Returns rows of the `by` columns of an index, the number of its rows with them, and sums of their columns.

        The owner in `by` is the owner's id. Without `by` there is one row.
        """
        group = f" GROUP BY {', '.join(by)}" if by else ""
        owner = f"(SELECT o.owner FROM owners o WHERE o.number = index_{kind}.owner)"
        names = [owner if name == "owner" else name for name in by]
        what = ", ".join([*names, "count(*)", *(f"total({name})" for name in sums)])
        return self._rows(f"SELECT {what} FROM index_{kind} WHERE {where.sql}{group}", *where.arguments)

    def count(self, kind: str, owner: str, where: Where = ALL) -> int:
        """Returns the number of an owner's records in an index."""
        own = where.also("owner = (SELECT o.number FROM owners o WHERE o.owner = ?)", owner)
        count: int = self.tally(kind, own)[0][0]
        return count

    def numbers(self) -> dict[str, int]:
        """Returns the number of each owner in the columns of indexes."""
        return dict(self._rows("SELECT owner, number FROM owners"))

    def positions(self) -> dict[str, Position]:
        """Returns the position of this replica in each owner's records."""
        return {owner: Position(*at) for owner, *at in self._rows("SELECT owner, epoch, seq FROM owners WHERE seq > 0")}

    def forks(self) -> list[Record]:
        """Returns the proofs of forks: two records of each owner."""
        rows = self._rows("SELECT wire FROM quarantine ORDER BY owner, number")
        return [restore(wire) for (wire,) in rows]

    def forked(self) -> frozenset[str]:
        """Returns the nodes with two histories: their requests and tokens are refused."""
        return frozenset(json.loads(self.load(FORKED) or "[]"))

    def load(self, name: str) -> Any:
        """Returns a value of this node; None if there is none."""
        rows = self._rows("SELECT value FROM meta WHERE name = ?", name)
        return rows[0][0] if rows else None

    def _rows(self, query: str, *arguments: Any) -> list[Any]:
        try:
            return self._connection.execute(query, arguments).fetchall()
        except sqlite3.Error as exc:
            raise store_error("database", exc) from exc


_LIVE = "SELECT wire FROM records WHERE kind = ? AND NOT deleted"
_OF = "AND owner = (SELECT number FROM owners WHERE owner = ?)"


class Reader(ReplicaView):
    """A ReplicaView with a read-only connection, for any number of threads."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _rows(self, query: str, *arguments: Any) -> list[Any]:
        with self._lock:
            # A query of one caller must not keep all others waiting.
            until = time.monotonic() + QUERY_S
            try:
                self._connection.set_progress_handler(lambda: time.monotonic() > until, _STEPS)
            except sqlite3.ProgrammingError as exc:
                # The node ends.
                raise store_error("database", exc) from exc
            return super()._rows(query, *arguments)


class _Owner(NamedTuple):
    number: int
    position: Position
    state: int


class Store(ReplicaView):
    """The writer, on the replica's thread. As a ReplicaView it also sees uncommitted records."""

    def __init__(
        self, connection: sqlite3.Connection, node: str, path: str | None = None, *, indexes: Iterable[Index] = ()
    ) -> None:
        """Raises StoreError if the database belongs to another node, is damaged, or is of a newer version."""
        prepare(connection, node)
        self._indexes = Indexes(connection, indexes)
        self._indexes.prepare()
        self.node = node
        self._connection = connection
        self._path = path
        self._transactions = Transactions(connection)
        self.others = Strays(connection)
        self._owners: dict[str, _Owner] = {}
        self._load()

    @classmethod
    def open(cls, path: str, node: str, *, indexes: Iterable[Index] = ()) -> Store:
        """Opens or creates the database of a node."""
        connection = open_writer(path)
        try:
            return cls(connection, node, path, indexes=indexes)
        except BaseException:
            connection.close()
            raise

    def reader(self) -> Reader:
        if self._path is None:
            raise StoreError("database is not in a file, which readers need")
        return Reader(open_reader(self._path))

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def group(self) -> Iterator[None]:
        """Commits all writes of the block together, at its end. Raises StoreError if nothing was committed."""
        try:
            with self._transactions.group():
                yield
        except BaseException as exc:
            self._load()
            if isinstance(exc, sqlite3.Error):
                raise store_error("database", exc) from exc
            raise

    @contextmanager
    def atomic(self) -> Iterator[None]:
        """Applies all writes of the block or none."""
        with self.group():
            before = self._owners.copy()
            try:
                with self._transactions.atomic():
                    yield
            except BaseException:
                self._owners = before
                raise

    def positions(self) -> dict[str, Position]:
        return {owner: known.position for owner, known in self._owners.items() if known.position.seq}

    def position(self, owner: str) -> Position:
        known = self._owners.get(owner)
        return known.position if known else START

    def state(self, owner: str) -> int:
        """Returns the owner's state: the sum of the fingerprints of its live records."""
        known = self._owners.get(owner)
        return known.state if known else 0

    def shares(self, owner: str, names: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int]:
        """Returns the share in the state of each of these kinds and ids that has a live record."""
        known = self._owners.get(owner)
        return self._shares(known.number, names, known.position.seq + 1) if known else {}

    def history(self, owner: str) -> History:
        return history_of(self.get(owner, KIND, ID))

    def at(self, owner: str, seq: int) -> bytes | None:
        """Returns the wire of the record with this seq, if it is still the newest of its key."""
        known = self._owners.get(owner)
        rows = self._rows("SELECT wire FROM records WHERE owner = ? AND seq = ?", known.number, seq) if known else []
        return rows[0][0] if rows else None

    def after(self, owner: str, seq: int, size: int) -> tuple[list[bytes], int]:
        """Returns wires in order after `seq`, about `size` bytes of them, and the seq of the last one."""
        known = self._owners.get(owner)
        wires: list[bytes] = []
        if known is not None:
            rows = self._connection.execute(
                "SELECT seq, wire FROM records WHERE owner = ? AND seq > ? ORDER BY seq", (known.number, seq)
            )
            for number, wire in rows:
                seq = number
                wires.append(wire)
                size -= len(wire)
                if size <= 0:
                    break
            rows.close()
        return wires, seq

    def certificates(self, owner: str) -> list[bytes]:
        """Returns certificates that help to verify the owner's records, by any writer."""
        known = self._owners.get(owner)
        if known is None:
            return []
        newest = self.at(owner, known.position.seq)
        key = restore(newest).key_id if newest else ""
        query = "SELECT wire FROM records WHERE kind = 'certificate' AND NOT deleted AND (owner = ? OR id = ?) LIMIT 16"
        return [wire for (wire,) in self._rows(query, known.number, key)]

    def extend(self, owner: str, records: Iterable[Record], state: int | None = None) -> None:
        """Adds records in order after the stored ones; `state` is the resulting state, if known."""
        number, position, before = self._owners.get(owner) or self._meet(owner)
        remaining = iter(records)
        while batch := list(islice(remaining, BATCH)):
            # sqlite3 would look for an adapter of bool.
            rows = [
                (number, record.kind, record.id, record.epoch, record.seq, int(record.deleted), record.wire)
                for record in batch
            ]
            if state is not None:
                self._connection.executemany(_PUT, rows)
            elif self._connection.executemany(_ADD, rows).rowcount == len(rows):
                # None of them replaces another record: no need to read the stored ones.
                before = _after(before, batch, {})
            else:
                names = [(record.kind, record.id) for record in batch]
                before = _after(before, batch, self._shares(number, names, batch[0].seq))
                self._connection.executemany(_PUT, rows)
            self._indexes.put(number, batch)
            position = batch[-1].position
        self._set(owner, _Owner(number, position, before % STATE_MODULUS if state is None else state))

    def clear(self, owner: str) -> None:
        """Removes all records of an owner, as if it were unknown."""
        known = self._owners.get(owner)
        if known is not None:
            self._connection.execute("DELETE FROM records WHERE owner = ?", (known.number,))
            self._indexes.clear(known.number)
            self._set(owner, _Owner(known.number, START, 0))

    def purge(self, owner: str, floor: int) -> None:
        """Drops deletions up to the owner's floor."""
        number = self._owners[owner].number
        self._connection.execute("DELETE FROM records WHERE deleted AND owner = ? AND seq <= ?", (number, floor))

    def deletions(self, owner: str) -> Iterator[Record]:
        """Yields the remembered deletions of an owner, the oldest first."""
        known = self._owners.get(owner)
        query = "SELECT wire FROM records WHERE deleted AND owner = ? ORDER BY seq"
        rows = self._connection.execute(query, (known.number,)) if known else ()
        return (restore(wire) for (wire,) in rows)

    def last_id(self, owner: str, kind: str) -> str | None:
        """Returns the greatest id of a kind."""
        known = self._owners.get(owner)
        query = "SELECT id FROM records WHERE kind = ? AND owner = ? ORDER BY id DESC LIMIT 1"
        rows = self._rows(query, kind, known.number) if known else []
        return rows[0][0] if rows else None

    def executed(self, response: str) -> int | None:
        """Returns the number of the transaction that this response answers with, however old."""
        rows = self._rows("SELECT number FROM executed WHERE response = ?", response)
        return rows[0][0] if rows else None

    def executed_at(self, response: str) -> Position:
        """Returns the position of the executed request that this response answers, START if unknown."""
        rows = self._rows("SELECT epoch, seq FROM executed WHERE response = ?", response)
        return Position(*rows[0]) if rows else START

    def note_executed(self, response: str, number: int, clock: int, position: Position = START) -> None:
        """Remembers an executed request: its answer, its transaction, its clock and its position, START if unknown."""
        query = "INSERT OR REPLACE INTO executed (response, number, clock, epoch, seq) VALUES (?, ?, ?, ?, ?)"
        self._connection.execute(query, (response, number, clock, *position))

    def forget_executed_before(self, clock: int) -> dict[str, Position]:
        """Forgets requests older than a clock; returns the latest position among them of each requester.

        Those of an older version, without a position, are never forgotten.
        """
        latest: dict[str, Position] = {}
        old = "FROM executed WHERE clock < ? AND epoch > 0"
        for response, epoch, seq in self._rows(f"SELECT response, epoch, seq {old}", clock):
            requester = response.rpartition(".")[2]
            latest[requester] = max(Position(epoch, seq), latest.get(requester, START))
        if latest:
            self._connection.execute(f"DELETE {old}", (clock,))
        return latest

    def shrink(self) -> None:
        """Gives free pages of the file back, some at a time, if many are free. Not within a group."""
        with suppress(sqlite3.Error):
            ((free,),) = self._connection.execute("PRAGMA freelist_count")
            ((pages,),) = self._connection.execute("PRAGMA page_count")
            if free > max(_FREE_PAGES, pages // 4):
                # `execute` would stop after the first page: the statement has no columns.
                self._connection.executescript(f"PRAGMA incremental_vacuum({_FREE_PAGES});")

    def forget_executed(self) -> None:
        self._connection.execute("DELETE FROM executed")

    def stage(self, session: int, records: Iterable[Record]) -> None:
        """Stages records that must not be visible yet, until the connection closes."""
        rows = (
            (session, record.kind, record.id, record.epoch, record.seq, record.deleted, record.wire)
            for record in records
        )
        self._connection.executemany("INSERT OR REPLACE INTO temp.staged VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def replace_by_staged(self, owner: str, session: int) -> int:
        """Replaces all records of an owner by the staged ones; returns their number."""
        number = (self._owners.get(owner) or self._meet(owner)).number
        self._connection.execute("DELETE FROM records WHERE owner = ?", (number,))
        count = self._connection.execute(_REPLACE, (number, session)).rowcount
        self._indexes.clear(number)
        self._indexes.fill(number)
        rows = self._connection.execute("SELECT wire FROM records WHERE owner = ? AND NOT deleted", (number,))
        state = sum(fingerprint(payload_of(wire)) for (wire,) in rows) % STATE_MODULUS
        query = "SELECT epoch, seq FROM records WHERE owner = ? ORDER BY seq DESC LIMIT 1"
        ((epoch, seq),) = self._rows(query, number)
        self._set(owner, _Owner(number, Position(epoch, seq), state))
        return count

    def staged(self, session: int, after: int) -> Iterator[Record]:
        """Yields the staged records behind a seq, in order."""
        query = "SELECT wire FROM temp.staged WHERE session = ? AND seq > ? ORDER BY seq"
        return (restore(wire) for (wire,) in self._connection.execute(query, (session, after)))

    def unstage(self, session: int) -> None:
        self._connection.execute("DELETE FROM temp.staged WHERE session = ?", (session,))

    def notices(self) -> list[bytes]:
        """Returns the wires of all revocations, one for each."""
        return [wire for (wire,) in self._rows("SELECT wire FROM notices ORDER BY content")]

    def notices_hash(self) -> str:
        """Returns a hash of all revocations, and of the owners with a proof of a fork."""
        content = b"".join(content for (content,) in self._rows("SELECT content FROM notices ORDER BY content"))
        owners = "".join(owner for (owner,) in self._rows("SELECT DISTINCT owner FROM quarantine ORDER BY owner"))
        return blake2b(content + owners.encode(), digest_size=16).hexdigest()

    def note(self, content: bytes, wire: bytes) -> bool | None:
        """Keeps a revocation; returns whether it is new, and None if there are too many."""
        ((count,),) = self._rows("SELECT count(*) FROM notices")
        query = "INSERT OR IGNORE INTO notices VALUES (?, ?)"
        return self._connection.execute(query, (content, wire)).rowcount > 0 if count < MAX_NOTICES else None

    def remove_notice(self, wire: bytes) -> None:
        self._connection.execute("DELETE FROM notices WHERE wire = ?", (wire,))

    def quarantine(self, pair: tuple[Record, Record], at_ms: int) -> bool:
        """Keeps the proof of an owner's fork; returns False if there is one, so that no owner fills the table."""
        rows = [(at_ms, record.owner, *record.position, record.wire) for record in pair]
        if self._rows("SELECT 1 FROM quarantine WHERE owner = ? LIMIT 1", pair[0].owner):
            return False
        query = "INSERT INTO quarantine (at_ms, owner, epoch, seq, wire) VALUES (?, ?, ?, ?, ?)"
        self._connection.executemany(query, rows)
        return True

    def proofs(self) -> dict[str, tuple[Record, Record]]:
        """Returns the proof of each owner's fork."""
        found: dict[str, list[Record]] = {}
        for record in self.forks():
            found.setdefault(record.owner, []).append(record)
        # Earlier versions kept up to 16 records of an owner, each beside its counterpart.
        return {owner: (records[0], records[1]) for owner, records in found.items() if len(records) > 1}

    def release(self, owner: str) -> None:
        """Drops the proof of an owner's fork."""
        self._connection.execute("DELETE FROM quarantine WHERE owner = ?", (owner,))

    def version(self, owner: str, kind: str, id: str) -> Record | None:
        """Returns the newest version of a record, also its deletion as long as that is remembered."""
        rows = self._rows(f"SELECT wire FROM records WHERE kind = ? {_OF} AND id = ?", kind, owner, id)
        return restore(rows[0][0]) if rows else None

    def save(self, name: str, value: int | str) -> None:
        self._connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def _load(self) -> None:
        rows = self._rows("SELECT owner, number, epoch, seq, state FROM owners")
        self._owners = {owner: _Owner(number, Position(*at), int(state, 16)) for owner, number, *at, state in rows}

    def _meet(self, owner: str) -> _Owner:
        self._connection.execute("INSERT INTO owners (owner, epoch, seq, state) VALUES (?, 0, 0, '0')", (owner,))
        ((number,),) = self._rows("SELECT number FROM owners WHERE owner = ?", owner)
        return _Owner(number, START, 0)

    def _set(self, owner: str, known: _Owner) -> None:
        query = "UPDATE owners SET epoch = ?, seq = ?, state = ? WHERE number = ?"
        self._connection.execute(query, (*known.position, f"{known.state:x}", known.number))
        self._owners[owner] = known

    def _shares(self, number: int, names: Iterable[tuple[str, str]], below: int) -> dict[tuple[str, str], int]:
        """Returns the shares of records below a seq."""
        kinds: dict[str, list[str]] = {}
        for kind, id in names:
            kinds.setdefault(kind, []).append(id)
        return {
            (kind, id): fingerprint(payload_of(wire))
            for kind, ids in kinds.items()
            for id, wire in self._connection.execute(_SOME, (kind, number, json.dumps(ids), below))
        }


def _after(state: int, records: Sequence[Record], shares: dict[tuple[str, str], int]) -> int:
    """Returns the state after these records; `shares` are the shares of the records that they replace."""
    for record in records:
        name = record.kind, record.id
        before = shares.get(name, 0)
        shares[name] = after = 0 if record.deleted else fingerprint(payload_of(record.wire))
        state += after - before
    return state


_SOME = """
SELECT id, wire FROM records WHERE kind = ? AND owner = ? AND id IN (SELECT value FROM json_each(?)) AND NOT deleted
AND +seq < ?
"""
_REPLACE = """
INSERT INTO records SELECT ?, kind, id, epoch, seq, deleted, wire FROM temp.staged WHERE session = ? ORDER BY seq
"""
_ADD = "INSERT OR IGNORE INTO records VALUES (?, ?, ?, ?, ?, ?, ?)"
_PUT = """
INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (kind, owner, id) DO UPDATE
SET epoch = excluded.epoch, seq = excluded.seq, deleted = excluded.deleted, wire = excluded.wire
"""
