"""The audit of a fleet: each request, with its caller and its result, as far as this node's replica has it.

A transaction is kept longer than its request, so an executed request is read from its transaction. Requests that were
refused, or not answered, are read from their own records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from heapq import merge
from typing import Any

from vmconv_fleet.catalogue.secrets import shown
from vmconv_fleet.catalogue.snapshot import Snapshot
from vmconv_fleet.replication.clock import COUNTER_BITS, MAX_CLOCK, milliseconds
from vmconv_fleet.replication.indexing import Where
from vmconv_fleet.replication.records import Record

Entry = dict[str, Any]

PAGE = 500


def audited(snapshot: Snapshot, since_ms: int, until_ms: int) -> Iterator[Entry]:
    """Yields the entries of [`since_ms`, `until_ms`) in the order of their times.

    The time of an executed request is that of its execution, and that of another one when it was made.
    """
    executed = (_of_transaction(snapshot, one) for one in _between(snapshot, "transaction", since_ms, until_ms))
    others = (_of_request(snapshot, one) for one in _between(snapshot, "request", since_ms, until_ms))
    yield from merge(executed, filter(None, others), key=lambda entry: int(entry["at_ms"]))


def _between(snapshot: Snapshot, kind: str, since_ms: int, until_ms: int) -> Iterator[Record]:
    first, end = (min(moment << COUNTER_BITS, MAX_CLOCK) for moment in (since_ms, until_ms))
    where, after = Where("clock >= ? AND clock < ?", (first, end)), None
    while True:
        page = snapshot.page(kind, where, order=("clock",), after=after, limit=PAGE)
        yield from page.records
        after = page.next
        if after is None:
            return


def _of_transaction(snapshot: Snapshot, record: Record) -> Entry:
    body = record.body
    request = snapshot.view.get(str(body.get("requester", "")), "request", str(body.get("request", "")))
    changes = [{"kind": one.get("kind"), "id": one.get("id")} for one in body.get("changes", ())]
    executed = {"result": "executed", "transaction": body.get("number"), "changes": changes}
    asked = {"arguments": shown(request.body.get("arguments", {}))} if request else {}
    return {
        **_who(snapshot, record, body, record.owner, str(body.get("requester", "")), str(body.get("request", ""))),
        **asked,
        **executed,
    }


def _of_request(snapshot: Snapshot, record: Record) -> Entry | None:
    """Returns the entry of a request; None if its transaction has one."""
    body, target = record.body, str(record.body.get("target", ""))
    response = snapshot.response_of(record)
    result: Entry = {"result": "unanswered"}
    if response is not None and response.body.get("ok"):
        number = response.body.get("transaction")
        if snapshot.view.get(target, "transaction", f"{number or 0:012}") is not None:
            return None
        result = {"result": "executed", "transaction": number}
    elif response is not None:
        result = {"result": "refused", "reason": str(response.body.get("reason", ""))}
    asked = {"arguments": shown(body.get("arguments", {}))}
    return {**_who(snapshot, record, body, target, record.owner, record.id), **asked, **result}


def _who(
    snapshot: Snapshot, record: Record, body: Mapping[str, Any], target: str, requester: str, request: str
) -> Entry:
    by = body.get("by") or {}
    return {
        "at_ms": milliseconds(record.clock),
        "user": by.get("user", ""),
        "token": by.get("token"),
        "address": by.get("address"),
        "from": requester,
        "from_name": snapshot.name(requester),
        "verb": body.get("verb", ""),
        "target": target,
        "target_name": snapshot.name(target),
        "request": request,
    }
