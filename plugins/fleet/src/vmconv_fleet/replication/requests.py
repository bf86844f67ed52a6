"""Requests and responses, as records of the replica.

A request is a record of the requester, a response a record of the target. A request that is executed becomes a
transaction, with a number without gaps. Transaction, changed records and response are written as one.

    kind         id                     body, see `catalogue.kinds`
    request      chosen by the requester target, verb, arguments, by
    transaction  its number, 12 digits   number, request, requester, verb, by, at_ms, late, changes (before and after)
    response     request.requester       request, requester, ok, reason | body, transaction, late

A request is answered once its response exists. If only the transaction exists, the response is written again, and the
request is not executed again.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

from vmconv.plugin import VmconvError
from vmconv_fleet.errors import MalformedError, Refusal
from vmconv_fleet.replication.clock import COUNTER_BITS, MAX_AHEAD_MS, is_ahead, milliseconds
from vmconv_fleet.replication.indexing import ALL, ANSWERED, UNANSWERED, UNASKED, Where
from vmconv_fleet.replication.messages import Send
from vmconv_fleet.replication.pending import Pending
from vmconv_fleet.replication.records import MAX_NUMBER, START, Change, Position, Record, restore
from vmconv_fleet.replication.replica import Replica
from vmconv_fleet.replication.retention import BATCH, Retention, archive, deletions, overdue
from vmconv_fleet.replication.signing import CertifiedKey

MAX_ID = 90
BURST = 64
"""The most requests that are executed in a row."""

KEPT_MS = 7 * 24 * 3600 * 1000
"""The time for which a request is kept after its response, and the response after the request."""

_HORIZON = "executed-horizon"
"""The position, of each requester, of the latest request whose execution was forgotten.

Not a clock: one that was wrong for an hour would make this node refuse what it has not executed.
"""

UNKNOWN = 0
"""The number of a transaction that is deleted, of a request whose answer is known or was deleted too."""

_AHEAD = "the clock of this node is ahead of all its neighbours': it deletes no old records until that is over"

MAX_REASON = 1000

_OTHER = {"by": "another caller", "target": "another target", "verb": "another verb", "arguments": "other arguments"}
"""The fields in which requests of one id are alike, and what a difference is called."""

RESERVED = frozenset({"epoch", "request", "response", "transaction"})
"""Kinds that neither handlers nor telemetry write."""

_log = logging.getLogger(__name__)


class IncomingRequest(NamedTuple):
    """A request as its handler sees it. `by` is the caller as the requester states it."""

    id: str
    requester: str
    verb: str
    arguments: Mapping[str, Any]
    by: Mapping[str, Any]
    clock: int
    late: bool
    position: Position = START


class Outcome(NamedTuple):
    """A handler's decision: changes of own records, and `body` for the response."""

    changes: Sequence[Change] = ()
    body: Mapping[str, Any] = {}


class Context(Protocol):
    """A handler's view: the newest state, including own uncommitted records."""

    @property
    def node(self) -> str: ...

    @property
    def now(self) -> int:
        """Wall clock, ms."""

    def get(self, owner: str, kind: str, id: str) -> Record | None: ...

    def find(self, kind: str, owner: str | None = None) -> list[Record]: ...

    def count(self, kind: str, where: Where = ALL) -> int:
        """Returns the number of own records in an index."""

    def positions(self) -> dict[str, Position]: ...

    def forked(self) -> frozenset[str]: ...

    def certified_keys(self) -> Iterable[CertifiedKey]: ...


Handler = Callable[[Context, IncomingRequest], Outcome]
"""A handler decides quickly and without side effects, on the replica's thread. Raises Refusal to change nothing.

Any other VmconvError refuses with its message; any other exception refuses with "internal error" and is logged.
"""


class _Context:
    def __init__(self, replica: Replica, now: int) -> None:
        store = replica.store
        self.node = store.node
        self.now = now
        self.get = store.get
        self.find = store.find
        self.positions = store.positions
        self.forked = store.forked
        self.certified_keys = replica.certified_keys
        self._store = store

    def count(self, kind: str, where: Where = ALL) -> int:
        return self._store.count(kind, self.node, where)


def response_id(requester: str, request: str) -> str:
    """Returns the id of the response to a request, unique by requester."""
    return f"{request}.{requester}"


class Requests:
    """Submits requests of this node and executes requests to it, on the replica's thread."""

    def __init__(
        self,
        replica: Replica,
        handlers: Mapping[str, Handler],
        now: Callable[[], int],
        *,
        schema: int = 1,
        retention: Retention = Retention(),  # noqa: B008 - a value
    ) -> None:
        self._replica = replica
        self._store = replica.store
        self._handlers = handlers
        self._now = now
        self._schema = schema
        self._retention = retention
        self._pending = Pending(replica.node)
        # Before the commit: requests and their responses share it.
        replica.observe(self._see)
        self.reset()

    def reset(self) -> None:
        """Collects unanswered requests from the database: at the start, in a new epoch, after a failed commit."""
        self._pending = Pending(self._replica.node)
        mine = UNANSWERED.also("target = ?", self._replica.node)
        for record, _ in self._store.listed("request", mine):
            self._pending.see([record])

    def submit(
        self, target: str, verb: str, arguments: Mapping[str, Any], by: Mapping[str, Any], *, id: str | None = None
    ) -> tuple[str, list[Send]]:
        """Writes a request. The same id again is the same request and writes nothing.

        Raises Refusal if the request with this id is another one, another caller's, or one that was deleted.
        """
        id = secrets.token_hex(8) if id is None else id
        if len(id) > MAX_ID:
            raise MalformedError(f"request id of {len(id)} characters, not {MAX_ID} at most")
        body = {"target": target, "verb": verb, "arguments": dict(arguments), "by": dict(by)}
        known = self._store.get(self._replica.node, "request", id)
        if known is not None:
            _refuse_unless_same(id, known.body, body)
            return id, []
        if self._store.get(target, "response", response_id(self._replica.node, id)) is not None:
            # The request is deleted, so nothing says whether this is the same one.
            raise Refusal(f"request {id} was answered before, and is deleted", hint="use a new id")
        return id, self._replica.write([Change("request", id, body)])[1]

    def withdraw(self, id: str) -> list[Send]:
        """Deletes a request; its target may have executed it already."""
        return self._replica.write([Change("request", id, None)])[1]

    def clean(self) -> list[Send]:
        """Deletes own records that are over and old or too many, a batch at most; nothing is left once it writes none.

        These are answered requests of this node, responses to deleted requests, transactions, and other ended records.
        """
        if not self._replica.serving:
            return []
        now, keep = self._now(), self._retention.keep(self._store)
        if self._is_ahead_of_all(now):
            self._replica.problems.report("clock", _AHEAD)
            return []
        self._replica.problems.forget("clock", _AHEAD)
        self._forget_executed(now - max(keep.age_ms, KEPT_MS))
        gone = list(islice(self._over(now, keep.number), BATCH))
        if gone and self._retention.archive:
            archive(self._retention.archive, gone)
        return self._replica.write(deletions(gone))[1] if gone else []

    def _is_ahead_of_all(self, now: int) -> bool:
        """Returns whether the newest records of all neighbours are from long ago: this node's clock may be wrong."""
        wires = (self._store.at(peer, self._store.position(peer).seq) for peer in self._replica.neighbours.ids())
        clocks = [restore(wire).clock for wire in wires if wire is not None]
        return bool(clocks) and all(milliseconds(clock) < now - MAX_AHEAD_MS for clock in clocks)

    def _over(self, now: int, count: int) -> Iterator[Record]:
        yield from self._old("request", ANSWERED, now, count)
        yield from self._old("response", UNASKED, now, count)
        yield from overdue(self._store, self._retention, now)

    def _old(self, kind: str, where: Where, now: int, count: int) -> Iterator[Record]:
        """Yields own records, the oldest first, that are older than KEPT_MS, or more than `count`."""
        own = where.also("owner = ?", self._store.numbers().get(self._replica.node, -1))
        surplus = max(0, self._store.tally(kind, own)[0][0] - count)
        for place, (record, _) in enumerate(self._store.listed(kind, own, order=("clock",), limit=BATCH)):
            if place >= surplus and milliseconds(record.clock) >= now - KEPT_MS:
                return
            yield record

    def _forget_executed(self, before: int) -> None:
        """Forgets which requests were executed before a moment; requests as old as these are refused from now on."""
        for requester, position in self._store.forget_executed_before(before << COUNTER_BITS).items():
            if position > self._horizon(requester):
                self._store.save(f"{_HORIZON} {requester}", json.dumps(position))

    def _horizon(self, requester: str) -> Position:
        known = self._store.load(f"{_HORIZON} {requester}")
        return START if known is None else Position(*json.loads(known))

    def _see(self, records: Sequence[Record]) -> None:
        if any(record.kind == "epoch" and record.owner == self._replica.node for record in records):
            self.reset()
        else:
            self._pending.see(records)

    def waiting(self) -> bool:
        """Returns whether there is a request to execute."""
        return bool(self._pending) and self._replica.serving

    def run(self) -> list[Send]:
        """Executes up to BURST requests: each requester's in order, across requesters by (clock, requester)."""
        sends: list[Send] = []
        if not self.waiting():
            return sends
        with self._replica.batch():
            self.remember_recovered()
            for _ in range(BURST):
                record = self._pending.next(self._store)
                if record is None:
                    break
                sends += self._execute(record)
        return sends

    def remember_recovered(self) -> None:
        """Notes the requests that recovered transactions have executed, once after each recovery."""
        if not self._store.load("recovered"):
            return
        with self._store.atomic():
            self._store.forget_executed()
            for record in self._store.find("transaction", self._replica.node):
                done = executed(record)
                if done is not None:
                    self._store.note_executed(done[0], int(record.id), record.clock, done[1])
            self.remember_answered(self._store.find("response", self._replica.node))
            self.remember_answered(self._store.deletions(self._replica.node))
            self._store.save("recovered", 0)

    def remember_answered(self, records: Iterable[Record]) -> None:
        """Notes the requests that responses say to be executed and whose transactions are deleted.

        A deleted response may have been a refusal: then the request, which is over as well, is refused again.
        """
        for record in records:
            is_over = record.kind == "response" and (record.deleted or record.body.get("ok") is True)
            if is_over and self._store.executed(record.id) is None:
                requester = record.id.rpartition(".")[2]
                self._store.note_executed(record.id, UNKNOWN, record.clock, self._store.position(requester))

    def _execute(self, record: Record) -> list[Send]:
        response = response_id(record.owner, record.id)
        node = self._replica.node
        if self._store.get(node, "response", response) is not None:
            return []
        number = self._store.executed(response)
        if number == UNKNOWN:
            reason = f"request {record.id} was answered before, and the answer is deleted: use a new id"
            return self._respond(record, {"ok": False, "reason": reason})
        if number is not None and record.position != self._store.executed_at(response) != START:
            reason = f"request {record.id} was executed before, as transaction {number}: use a new id"
            return self._respond(record, {"ok": False, "reason": reason})
        if number is not None:
            return self._respond(record, {"ok": True, **self._done(number)})
        if record.position <= self._horizon(record.owner):
            reason = "the request is older than what this node remembers, and may have been executed: ask again"
            return self._respond(record, {"ok": False, "reason": reason})
        if record.owner != node and record.owner in self._store.forked():
            return self._respond(record, {"ok": False, "reason": "the requester has two histories"})
        now = self._now()
        last = self._store.load("executed-clock") or 0
        if is_ahead(last, now):
            # It is from a time when this node's clock was wrong.
            last = 0
        request = _request(record, late=record.clock < last)
        try:
            with self._store.atomic():
                sends = self._transact(request, self._decide(request))
                if not is_ahead(record.clock, now):
                    self._store.save("executed-clock", max(last, record.clock))
        except VmconvError as exc:
            return self._respond(record, {"ok": False, "reason": str(exc)[:MAX_REASON], "late": request.late})
        return sends

    def _decide(self, request: IncomingRequest) -> Outcome:
        handler = self._handlers.get(request.verb)
        if handler is None:
            raise Refusal(f"verb {request.verb!r} is unknown to this node")
        try:
            outcome = handler(_Context(self._replica, self._now()), request)
        except VmconvError:
            raise
        except Exception as exc:
            _log.exception("handler of %r failed", request.verb)
            raise Refusal("internal error: see the node's log") from exc
        for change in outcome.changes:
            if change.kind in RESERVED:
                raise Refusal(f"records of kind {change.kind!r} are not written by handlers")
        return outcome

    def _transact(self, request: IncomingRequest, outcome: Outcome) -> list[Send]:
        node, number = self._replica.node, self.next_number()
        before = {change[:2]: self._store.get(node, *change[:2]) for change in outcome.changes}
        changes = [
            {
                "kind": change.kind,
                "id": change.id,
                "before": _body(before[change[:2]]),
                "after": None if change.body is None else dict(change.body),
            }
            for change in outcome.changes
        ]
        transaction = {
            "number": number,
            "schema_revision": self._schema,
            "request": request.id,
            "requester": request.requester,
            "position": list(request.position),
            "verb": request.verb,
            "by": dict(request.by),
            "at_ms": self._now(),
            "late": request.late,
            "body": dict(outcome.body),
            "changes": changes,
        }
        response = response_id(request.requester, request.id)
        answer = {
            "request": request.id,
            "requester": request.requester,
            "ok": True,
            "body": dict(outcome.body),
            "transaction": number,
            "late": request.late,
        }
        written = [Change("transaction", f"{number:012}", transaction), *outcome.changes]
        _, sends = self._replica.write([*written, Change("response", response, answer)], txn=number)
        # A clock that is ahead would make the execution remembered for as long.
        clock = min(request.clock, self._now() << COUNTER_BITS)
        self._store.note_executed(response, number, clock, request.position)
        return sends

    def _respond(self, record: Record, answer: Mapping[str, Any]) -> list[Send]:
        body = {"request": record.id, "requester": record.owner, **answer}
        return self._replica.write([Change("response", response_id(record.owner, record.id), body)])[1]

    def _done(self, number: int) -> dict[str, Any]:
        transaction = self._store.get(self._replica.node, "transaction", f"{number:012}")
        body = transaction.body if transaction is not None else {}
        return {"transaction": number, "body": body.get("body", {}), "late": body.get("late", False)}

    def next_number(self) -> int:
        """Returns the number of the next transaction."""
        last = self._store.last_id(self._replica.node, "transaction")
        return 1 if last is None else int(last) + 1


def _refuse_unless_same(id: str, known: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    for field, other in _OTHER.items():
        if _compared(field, known.get(field)) != _compared(field, asked[field]):
            raise Refusal(f"request {id} was sent before with {other}", hint="use a new id")


def _compared(field: str, value: Any) -> Any:
    """Returns a field as it is compared: a caller that connects from another address is the same caller."""
    return {key: one for key, one in value.items() if key != "address"} if field == "by" else value


def _body(record: Record | None) -> dict[str, Any] | None:
    return None if record is None else dict(record.body)


def executed(transaction: Record) -> tuple[str, Position] | None:
    """Returns the id of the response to the request that a transaction has executed, and the request's position.

    None for a transaction that no node writes by itself: a machine with stolen keys may have written it.
    """
    requester, request = (transaction.body.get(name) for name in ("requester", "request"))
    position = transaction.body.get("position", START)
    if not (isinstance(requester, str) and isinstance(request, str) and (requester + request).isascii()):
        return None
    if not isinstance(position, Sequence) or len(position) != len(START):
        return None
    if any(type(number) is not int or not 0 <= number <= MAX_NUMBER for number in position):
        return None
    return response_id(requester, request), Position(*position)


def _request(record: Record, late: bool) -> IncomingRequest:
    """Returns the request of a record. Missing or mistyped fields are empty, which handlers refuse."""
    body = record.body
    verb, arguments, by = body.get("verb"), body.get("arguments"), body.get("by")
    return IncomingRequest(
        id=record.id,
        requester=record.owner,
        verb=verb if isinstance(verb, str) else "",
        arguments=arguments if isinstance(arguments, dict) else {},
        by=by if isinstance(by, dict) else {},
        clock=record.clock,
        late=late,
        position=record.position,
    )
