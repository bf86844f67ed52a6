"""Merging: what a node takes over from another history of its own, once its administrator has decided so.

Transactions are kept with the next numbers, so that no request is executed again. Of any other record, the catalogue
says which version counts: what has ended in one of the two has ended. Records of the process itself stay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple, NoReturn

from vmconv_fleet.errors import Refusal
from vmconv_fleet.replication.epochs import KIND, History, history_of
from vmconv_fleet.replication.messages import Send
from vmconv_fleet.replication.records import MAX_NUMBER, Change, Position, Record
from vmconv_fleet.replication.replica import Replica
from vmconv_fleet.replication.requests import Requests, executed
from vmconv_fleet.replication.retention import archive
from vmconv_fleet.replication.strays import TELEMETRY

_log = logging.getLogger(__name__)

BATCH = 256
_NAMED = 5
OF_THE_PROCESS = frozenset({"epoch", "heartbeat", "node"})

Join = Callable[[Record, Record], Record]
"""Returns what counts of two versions of a record; the first one is that of this history."""


def later(one: Record, other: Record) -> Record:
    """Returns the version with the later clock."""
    return max(one, other, key=lambda record: record.clock)


class Overridden(NamedTuple):
    """The version of a record that does not count after a merge, and what does; `is_own`: it is of this history."""

    record: Record
    kept: Record
    is_own: bool


class Merge(NamedTuple):
    """The messages of a merge, and what it has overridden: records that both histories have changed."""

    sends: list[Send]
    overridden: list[Overridden]


def merge(replica: Replica, requests: Requests, path: str | None, join: Join = later) -> Merge:
    """Makes one history of those of this node, and writes the records of the others to the file `path`.

    Raises NotReadyError, and changes nothing, if they are not here yet; Refusal if merging may bring deleted records
    back.
    """
    strays = replica.strays()
    parted = _refuse_forgotten(replica, strays)
    if path:
        archive(path, strays)
    with replica.batch(), replica.attempt():
        # A node that was forked when it recovered has not executed any request since.
        requests.remember_recovered()
        lost = list(overridden(replica, strays, parted, join))
        sends = [*replica.merge(strays), *adopt(replica, strays, requests.next_number(), join)]
        # The other history may have deleted their transactions, because they were old or too many.
        requests.remember_answered(strays)
        return Merge(sends, lost)


def _refuse_forgotten(replica: Replica, strays: Sequence[Record]) -> int:
    """Returns the seq at which the histories have parted.

    Raises Refusal if one of them has forgotten what it deleted after that.
    """
    ours = replica.store.history(replica.node)
    parted = min((_parted(ours, stray) for stray in strays), default=MAX_NUMBER)
    floor = max((history_of(stray).floor for stray in strays if stray.kind == KIND), default=0)
    unknown = [stray for stray in strays if _is_unknown(replica, stray)] if ours.floor > parted else []
    if floor > parted:
        _refuse(f"the other one has forgotten what it deleted up to its record {floor}", parted)
    if unknown:
        first = ", ".join(f"{one.kind} {one.id}" for one in unknown[:_NAMED])
        more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
        found = f"this one has forgotten what it deleted up to its record {ours.floor}, which may be {first}{more}"
        _refuse(found, parted)
    return parted


def _refuse(found: str, parted: int) -> NoReturn:
    raise Refusal(
        f"the histories of this node parted too long ago, after record {parted}: {found}; merging would bring it back",
        hint="let the authority retire the node (vmconv fleet retire NODE), join again, and make its tokens and groups",
    )


def _parted(ours: History, stray: Record) -> int:
    """Returns the seq at which another history parted from this one, or an earlier one, as far as a record tells it."""
    starts = dict(ours.starts)
    if stray.kind == KIND:
        return ours.shared(history_of(stray))
    if ours.passed(stray.position):
        return starts[stray.epoch] - 1
    same = starts.get(stray.epoch)
    return MAX_NUMBER if same is None else ours.shared(History(((stray.epoch, same),)))


def _is_unknown(replica: Replica, stray: Record) -> bool:
    """Returns whether this history has no version of a record, or has forgotten its deletion."""
    is_kept = stray.kind in OF_THE_PROCESS or stray.kind in ("transaction", "response")
    return not is_kept and not stray.deleted and replica.store.version(replica.node, stray.kind, stray.id) is None


def overridden(replica: Replica, strays: Iterable[Record], parted: int, join: Join) -> Iterator[Overridden]:
    """Yields the versions that do not count of records that both histories have written since they parted."""
    for ours, theirs in _versions(replica, _newest(strays)):
        if ours is None or ours.seq <= parted or ours.kind in (*TELEMETRY, "response"):
            continue
        joined = reduce(join, theirs, ours)
        for one in (ours, *theirs):
            if not _same(one, joined):
                yield Overridden(one, joined, one is ours)


def adopt(replica: Replica, strays: Iterable[Record], number: int, join: Join) -> list[Send]:
    """Writes what this node lacks of another history; `number` is that of the next transaction."""
    newest = _newest(strays)
    transactions = [one for one in newest if one.kind == "transaction" and not one.deleted]
    sends: list[Send] = []
    for transaction in transactions:
        done = executed(transaction)
        if done is None:
            _log.warning("transaction %s of the other history is left out: it names no request", transaction.id)
        elif replica.store.executed(done[0]) is None:
            sends += _repeat(replica, transaction, number, *done)
            number += 1
    changes = list(_changes(replica, newest, join))
    for first in range(0, len(changes), BATCH):
        sends += replica.write(changes[first : first + BATCH])[1]
    return sends


def _repeat(replica: Replica, transaction: Record, number: int, response: str, asked: Position) -> list[Send]:
    body = {**transaction.body, "number": number}
    sends = replica.write([Change("transaction", f"{number:012}", body)], txn=number)[1]
    replica.store.note_executed(response, number, transaction.clock, asked)
    return sends


def _newest(strays: Iterable[Record]) -> list[Record]:
    """Returns the newest version of each record in each epoch.

    There may be more than two histories. Each one has written in epochs of its own.
    """
    return list({(one.kind, one.id, one.epoch): one for one in strays if one.kind not in OF_THE_PROCESS}.values())


def _changes(replica: Replica, strays: Iterable[Record], join: Join) -> Iterator[Change]:
    for ours, theirs in _versions(replica, strays):
        if theirs[0].kind == "response" and ours is not None:
            continue
        joined = reduce(join, [ours, *theirs] if ours else theirs)
        if ours is None or not _same(joined, ours):
            yield Change(joined.kind, joined.id, None if joined.deleted else _adopted(replica, joined))


def _versions(replica: Replica, strays: Iterable[Record]) -> Iterator[tuple[Record | None, list[Record]]]:
    """Yields this history's version of each record, and those of the others."""
    versions: dict[tuple[str, str], list[Record]] = {}
    for stray in strays:
        if stray.kind != "transaction":
            versions.setdefault((stray.kind, stray.id), []).append(stray)
    for name, theirs in versions.items():
        yield replica.store.version(replica.node, *name), theirs


def _same(one: Record, other: Record) -> bool:
    return (one.deleted, one.body) == (other.deleted, other.body)


def _adopted(replica: Replica, record: Record) -> dict[str, Any]:
    body = dict(record.body)
    if "transaction" in body and record.kind == "response":
        number = replica.store.executed(record.id)
        # None: the other history has deleted its transaction because it was old, and this one has other numbers.
        body = {**body, "transaction": number} if number else {k: v for k, v in body.items() if k != "transaction"}
    return body
