"""Merging: what a node takes over from another history of its own, once its administrator has decided so.

Transactions are kept with the next numbers, so that no request is executed again. Of any other record, the catalogue
says which version counts: what has ended in one of the two has ended. Records of the process itself stay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from typing import Any

from vmconv_fleet.replication.messages import Send
from vmconv_fleet.replication.records import Change, Position, Record
from vmconv_fleet.replication.replica import Replica
from vmconv_fleet.replication.requests import Requests, executed
from vmconv_fleet.replication.retention import archive

_log = logging.getLogger(__name__)

BATCH = 256
OF_THE_PROCESS = frozenset({"epoch", "heartbeat", "node"})

Join = Callable[[Record, Record], Record]
"""Returns what counts of two versions of a record; the first one is that of this history."""


def later(one: Record, other: Record) -> Record:
    """Returns the version with the later clock."""
    return max(one, other, key=lambda record: record.clock)


def merge(replica: Replica, requests: Requests, path: str | None, join: Join = later) -> list[Send]:
    """Makes one history of those of this node, and writes the records of the others to the file `path`.

    Raises NotReadyError, and changes nothing, if they are not here yet.
    """
    strays = replica.strays()
    if path:
        archive(path, strays)
    with replica.batch():
        # A node that was forked when it recovered has not executed any request since.
        requests.remember_recovered()
        return [*replica.merge(strays), *adopt(replica, strays, requests.next_number(), join)]


def adopt(replica: Replica, strays: Iterable[Record], number: int, join: Join) -> list[Send]:
    """Writes what this node lacks of another history; `number` is that of the next transaction."""
    # There may be more than two histories. Each one has written in epochs of its own.
    newest = {(one.kind, one.id, one.epoch): one for one in strays if one.kind not in OF_THE_PROCESS}
    transactions = [one for one in newest.values() if one.kind == "transaction" and not one.deleted]
    sends: list[Send] = []
    for transaction in transactions:
        done = executed(transaction)
        if done is None:
            _log.warning("transaction %s of the other history is left out: it names no request", transaction.id)
        elif replica.store.executed(done[0]) is None:
            sends += _repeat(replica, transaction, number, *done)
            number += 1
    changes = list(_changes(replica, newest.values(), join))
    for first in range(0, len(changes), BATCH):
        sends += replica.write(changes[first : first + BATCH])[1]
    return sends


def _repeat(replica: Replica, transaction: Record, number: int, response: str, asked: Position) -> list[Send]:
    body = {**transaction.body, "number": number}
    sends = replica.write([Change("transaction", f"{number:012}", body)], txn=number)[1]
    replica.store.note_executed(response, number, transaction.clock, asked)
    return sends


def _changes(replica: Replica, strays: Iterable[Record], join: Join) -> Iterator[Change]:
    versions: dict[tuple[str, str], list[Record]] = {}
    for stray in strays:
        if stray.kind != "transaction":
            versions.setdefault((stray.kind, stray.id), []).append(stray)
    for (kind, id), theirs in versions.items():
        ours = replica.store.version(replica.node, kind, id)
        if kind == "response" and ours is not None:
            continue
        joined = reduce(join, [ours, *theirs] if ours else theirs)
        if ours is None or (joined.deleted, joined.body) != (ours.deleted, ours.body):
            yield Change(kind, id, None if joined.deleted else _adopted(replica, joined))


def _adopted(replica: Replica, record: Record) -> dict[str, Any]:
    body = dict(record.body)
    if "transaction" in body and record.kind == "response":
        body["transaction"] = replica.store.executed(record.id)
    return body
