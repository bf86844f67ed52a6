"""Retention: what a node deletes of its own records once they are old, or more than are kept.

Deletions are replicated like any others, and forgotten with the owner's floor. An archive gets the records before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from vmconv_fleet.errors import ArchiveError
from vmconv_fleet.replication.clock import milliseconds
from vmconv_fleet.replication.indexing import Where
from vmconv_fleet.replication.records import Change, Record
from vmconv_fleet.replication.store import ReplicaView, Store

DAY_MS = 24 * 3600 * 1000

BATCH = 256
"""The most records that are deleted by one transaction of the database."""


class Ended(NamedTuple):
    """Records of a kind that have ended: `where` chooses them, `since` is the column with the time of the end in ms."""

    kind: str
    where: Where
    since: str


class Keep(NamedTuple):
    """How long ended records are kept, and how many of a kind."""

    age_ms: int = 90 * DAY_MS
    number: int = 10_000


class Retention(NamedTuple):
    """The rules of a node. `archive` is a file of JSON lines; without it, deleted records are gone."""

    ended: Sequence[Ended] = ()
    keep: Callable[[ReplicaView], Keep] = lambda _view: Keep()
    archive: str | None = None


_TRANSACTIONS = Ended("transaction", Where(), "clock")


def overdue(store: Store, retention: Retention, now: int) -> Iterator[Record]:
    """Yields ended records to delete, of each kind the oldest first. The newest of a kind is never among them."""
    keep = retention.keep(store)
    number = store.numbers().get(store.node, -1)
    for kind, where, since in (_TRANSACTIONS, *retention.ended):
        own = where.also("owner = ?", number)
        surplus = max(0, store.tally(kind, own)[0][0] - max(keep.number, 1))
        found = store.listed(kind, own, order=(since,), limit=BATCH)
        for place, (record, (at, *_)) in enumerate(found):
            ended_ms = milliseconds(at) if since == "clock" else at
            if place >= surplus and ended_ms >= now - keep.age_ms:
                break
            # The last transaction has the number that the next one continues.
            if kind == "transaction" and record.id == store.last_id(store.node, kind):
                break
            yield record


def archive(path: str, records: Sequence[Record]) -> None:
    """Appends records to a file, durably. Raises ArchiveError if it cannot be written.

    A node that ends before the deletion writes them again.
    """
    lines = [
        json.dumps(
            {
                "owner": one.owner,
                "kind": one.kind,
                "id": one.id,
                "position": f"{one.epoch}.{one.seq}",
                "written_ms": milliseconds(one.clock),
                "body": one.body,
            }
        )
        for one in records
    ]
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(descriptor, "a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
    except OSError as exc:
        raise ArchiveError(f"{path}: old records stay, because they cannot be archived: {exc.strerror}") from exc


def deletions(records: Sequence[Record]) -> list[Change]:
    return [Change(one.kind, one.id, None) for one in records]
