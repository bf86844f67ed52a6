"""Merging: what a node takes over from another history of its own, once its administrator has decided so.

Transactions are kept with the next numbers, so that no request is executed again. Of any other record, the version with
the later clock counts: a token that was revoked in one of the two stays revoked. Records of the process itself stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vmconv_fleet.replication.messages import Send
from vmconv_fleet.replication.records import START, Change, Position, Record
from vmconv_fleet.replication.replica import Replica
from vmconv_fleet.replication.requests import Requests, answers
from vmconv_fleet.replication.retention import archive

BATCH = 256
OF_THE_PROCESS = frozenset({"epoch", "heartbeat", "node"})


def merge(replica: Replica, requests: Requests, path: str | None) -> list[Send]:
    """Makes one history of those of this node, and writes the records of the others to the file `path`.

    Raises NotReadyError, and changes nothing, if they are not here yet.
    """
    strays = replica.strays()
    if path:
        archive(path, strays)
    with replica.batch():
        # A node that was forked when it recovered has not executed any request since.
        requests.remember_recovered()
        return [*replica.merge(strays), *adopt(replica, strays, requests.next_number())]


def adopt(replica: Replica, strays: Iterable[Record], number: int) -> list[Send]:
    """Writes what this node lacks of another history; `number` is that of the next transaction."""
    newest = {(record.kind, record.id): record for record in strays if record.kind not in OF_THE_PROCESS}
    executed = [one for one in newest.values() if one.kind == "transaction" and not one.deleted]
    sends: list[Send] = []
    for transaction in executed:
        if replica.store.executed(answers(transaction)) is None:
            sends += _repeat(replica, transaction, number)
            number += 1
    changes = list(_changes(replica, newest.values()))
    for first in range(0, len(changes), BATCH):
        sends += replica.write(changes[first : first + BATCH])[1]
    return sends


def _repeat(replica: Replica, transaction: Record, number: int) -> list[Send]:
    body = {**transaction.body, "number": number}
    sends = replica.write([Change("transaction", f"{number:012}", body)], txn=number)[1]
    asked = Position(*transaction.body.get("position", START))
    replica.store.note_executed(answers(transaction), number, transaction.clock, asked)
    return sends


def _changes(replica: Replica, strays: Iterable[Record]) -> Iterator[Change]:
    store = replica.store
    for stray in strays:
        ours = store.version(replica.node, stray.kind, stray.id)
        is_answered = stray.kind == "response" and ours is not None
        if stray.kind == "transaction" or is_answered or (ours is not None and ours.clock >= stray.clock):
            continue
        body = dict(stray.body)
        if "transaction" in body and stray.kind == "response":
            body["transaction"] = store.executed(stray.id)
        yield Change(stray.kind, stray.id, None if stray.deleted else body)
