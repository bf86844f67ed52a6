"""The events of a node: what of its own records is worth a notice."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from vmconv_fleet.replication.clock import milliseconds
from vmconv_fleet.replication.records import Record

TYPES = (
    *(f"job.{state}" for state in ("queued", "planned", "running", "done", "failed", "cancelled")),
    "transaction.executed",
    "datastore.problem",
    "datastore.well",
    "node.problem",
    "node.well",
)

DEFAULT = ("job.done", "job.failed", "job.cancelled", "*.problem", "*.well")
"""The patterns of a webhook that names none."""

KINDS = frozenset({"job", "transaction", "datastore", "heartbeat"})
"""The kinds of records that make events."""

_OVER = ("done", "failed", "cancelled")
_JOB = ("source", "file", "datastore", "target_datastore", "format", "disk", "vm", "state", "seconds", "error", "hint")
_TRANSACTION = ("number", "verb", "request", "requester", "late")
_MAX_TEXT = 1000
_MAX_CHANGES = 100


class Event(NamedTuple):
    """An event. `id` is the same if it is sent again; `seq` is that of its record."""

    id: str
    type: str
    at_ms: int
    data: Mapping[str, Any]
    seq: int


def fits(type_: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(type_, pattern) for pattern in patterns)


class Events:
    """Turns the node's own records, in their order, into events: changes of states, not each version of a record.

    It remembers states in memory only. So a problem that lasts is an event again after a restart.
    """

    def __init__(self) -> None:
        self._states: dict[tuple[str, str], Any] = {}

    def of(self, record: Record) -> Iterator[Event]:
        if record.kind not in KINDS:
            return
        if record.deleted:
            self._states.pop((record.kind, record.id), None)
            return
        for number, (type_, data) in enumerate(getattr(self, f"_of_{record.kind}")(record)):
            identifier = f"evt_{record.owner}_{record.epoch}_{record.seq}_{number}"
            node = {"node": record.owner, "id": record.id}
            yield Event(identifier, type_, milliseconds(record.clock), node | data, record.seq)

    def _of_job(self, record: Record) -> Iterator[tuple[str, dict[str, Any]]]:
        key, state = (record.kind, record.id), str(record.body.get("state") or "queued")
        known = self._states.get(key)
        if state in _OVER:
            self._states.pop(key, None)
        else:
            self._states[key] = state
        if state == known:
            return
        plan = record.body.get("plan") or {}
        amounts = {name: plan[name] for name in ("shared", "copied", "written") if name in plan}
        yield f"job.{state}", _chosen(record.body, _JOB) | amounts | _by(record.body)

    def _of_transaction(self, record: Record) -> Iterator[tuple[str, dict[str, Any]]]:
        changes = [{"kind": one["kind"], "id": one["id"]} for one in record.body.get("changes", ())[:_MAX_CHANGES]]
        yield "transaction.executed", _chosen(record.body, _TRANSACTION) | _by(record.body) | {"changes": changes}

    def _of_datastore(self, record: Record) -> Iterator[tuple[str, dict[str, Any]]]:
        problem = record.body.get("problem")
        return self._problems(record, [str(problem)] if problem else [])

    def _of_heartbeat(self, record: Record) -> Iterator[tuple[str, dict[str, Any]]]:
        return self._problems(record, [str(one) for one in record.body.get("problems", ())])

    def _problems(self, record: Record, problems: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the problems that are new, or that the last one is over."""
        key, what = (record.kind, record.id), "node" if record.kind == "heartbeat" else record.kind
        known = self._states.get(key, ())
        self._states[key] = {_uncounted(text) for text in problems}
        for text in problems:
            if _uncounted(text) not in known:
                yield f"{what}.problem", {"problem": text[:_MAX_TEXT]}
        if known and not problems:
            yield f"{what}.well", {}


def _uncounted(text: str) -> str:
    """Returns the text of a problem without numbers: one that is counted further is not a new one."""
    return re.sub(r"\d+|\bonce\b", "#", text).replace("# times in a row", "#")


def _chosen(body: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    found = {name: body[name] for name in names if body.get(name) is not None}
    return {name: value[:_MAX_TEXT] if isinstance(value, str) else value for name, value in found.items()}


def _by(body: Mapping[str, Any]) -> dict[str, Any]:
    by = body.get("by")
    return {"by": _chosen(by, ("user", "token", "node", "address"))} if isinstance(by, dict) else {}
