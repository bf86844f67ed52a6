"""What must be true of a fleet, told by somebody who has seen everything, with no code of the replica."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vmconv_fleet.replication.records import Position, Record, restore
from vmconv_fleet.replication.replica import Replica
from vmconv_fleet.replication.requests import response_id
from vmconv_fleet.replication.store import Store


class Violation(BaseException):
    """An invariant is violated; no exception that the code under test would catch."""


class Oracle:
    """All states that owners were in, and all that they have executed."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._states: dict[tuple[str, Position], int] = {}
        self._wires: dict[tuple[str, Position], bytes] = {}
        self._acknowledged: dict[str, Position] = {}
        self._executed: dict[tuple[str, str, str], list[int]] = {}
        self._order: dict[tuple[str, str], int] = {}
        self._losses: Counter[str] = Counter()
        self._written: dict[str, list[tuple[Sequence[Record], int]]] = {}
        self._model: dict[str, dict[tuple[str, str], bytes]] = {}
        self._seen: dict[tuple[str, str], set[tuple[str, str]]] = {}
        self._executions: dict[bytes, tuple[str, str]] = {}
        self._pruned: dict[str, dict[int, tuple[str, str]]] = {}
        """The deleted transactions of each owner, and what they have executed."""

    def attach(self, replica: Replica) -> None:
        """Watches what the replica of an owner writes, commit by commit."""
        log, node = replica._own, replica.node
        self._written[node] = []
        self._model.pop(node, None)
        for name in ("append", "begin_epoch", "raise_floor"):
            setattr(log, name, self._watching(replica, getattr(log, name)))
        replica.subscribe(lambda _: self._committed(replica))

    def detach(self, replica: Replica) -> None:
        """The node is dead: what it had not committed has never been."""
        position = Position(
            *(_row(replica.store, "SELECT epoch, seq FROM owners WHERE owner = ?", replica.node) or (0, 0))
        )
        if position < self._acknowledged.get(replica.node, position):
            raise Violation(f"acknowledged writes of {replica.node[:4]} are lost")
        written = self._written.pop(replica.node)
        self._keep(replica, [item for item in written if item[0][-1].position <= position])

    def lose(self, node: str) -> None:
        """The node's disk has lost something."""
        self._losses[node] += 1
        self._acknowledged.pop(node, None)
        self._seen = {pair: seen for pair, seen in self._seen.items() if pair[0] != node}

    def may_have_forked(self, node: str) -> bool:
        """A node has two histories only if its disk has lost something."""
        return self._losses[node] > 0

    def remember(self, replica: Replica, owner: str) -> None:
        """What an owner has executed must not disappear from a view of it: not even when it has another history."""
        rows = replica.store._connection.execute(_TRANSACTIONS, (owner,))
        found = {self._execution(wire) for (wire,) in rows}
        before = self._seen.get((replica.node, owner), set()) - {*self._pruned.get(owner, {}).values()}
        if lost := before - found:
            raise Violation(f"{replica.node[:4]} has lost the transaction of {owner[:4]} for {min(lost)[1]}")
        self._seen[replica.node, owner] = found

    def _execution(self, wire: bytes) -> tuple[str, str]:
        if wire not in self._executions:
            body = restore(wire).body
            self._executions[wire] = body["requester"], body["request"]
        return self._executions[wire]

    def look(self, replica: Replica, owner: str) -> None:
        """A view must be exactly a state that its owner was in."""
        position = replica.store.position(owner)
        if position.seq and self._states.get((owner, position)) != _state(_stored(replica.store, owner)):
            raise Violation(
                f"view of {owner[:4]} at {replica.node[:4]} is at {position} no state that its owner was in"
            )

    def unanswered(self, store: Store, alive: Sequence[str]) -> str | None:
        """Returns a request without a response."""
        for request in store.find("request"):
            target = request.body["target"]
            if target in alive and store.get(target, "response", response_id(request.owner, request.id)) is None:
                return f"request {request.id} of {request.owner[:4]} to {target[:4]} has no response"
        return None

    def check_requests(self, store: Store, alive: Sequence[str]) -> None:
        """One transaction for each request at most, numbers without a gap, each answer to its request, nothing lost."""
        for owner in alive:
            transactions = store.find("transaction", owner)
            numbers = [record.body["number"] for record in transactions]
            pruned = self._pruned.get(owner, {})
            if len({*numbers}) < len(numbers) or _has_gaps({*numbers, *pruned}, max(numbers, default=0)):
                raise Violation(f"transactions of {owner[:4]} are numbered {numbers}, deleted {sorted(pruned)}")
            if not self._losses[owner] and (again := pruned.keys() & {*numbers}):
                raise Violation(f"transaction {min(again)} of {owner[:4]} is deleted, and lives")
            asked = Counter((record.body["requester"], record.body["request"]) for record in transactions)
            twice = [request for request, count in asked.items() if count > 1]
            if twice:
                raise Violation(f"{owner[:4]} has two transactions for {twice[0]}")
            self._check_answers(store, owner, {record.body["number"]: record.body for record in transactions})
        self.counts["transactions"] += sum(len(store.find("transaction", owner)) for owner in alive)

    def _check_answers(self, store: Store, owner: str, transactions: Mapping[Any, Any]) -> None:
        for response in store.find("response", owner):
            body = response.body
            self.counts["responses"] += 1
            if body["ok"]:
                number, pruned = body.get("transaction"), self._pruned.get(owner, {})
                done = transactions.get(number)
                # A response that a merge has taken over without its transaction, which was deleted, has no number.
                asked = (body["requester"], body["request"])
                if done is None and (number in pruned or (number is None and asked in pruned.values())):
                    continue
                if done is None or (done["requester"], done["request"]) != (body["requester"], body["request"]):
                    raise Violation(f"response {response.id} of {owner[:4]} names a transaction of something else")

    def _watching(self, replica: Replica, method: Any) -> Any:
        def watched(*arguments: Any, **options: Any) -> Any:
            if replica.node not in self._model:
                self._model[replica.node] = _stored(replica.store, replica.node)
            records = method(*arguments, **options)
            if records:
                model = self._model[replica.node]
                for record in records:
                    if record.deleted:
                        self._delete(record, model.pop((record.kind, record.id), None))
                    else:
                        model[record.kind, record.id] = record.wire
                self._written[replica.node].append((records, _state(model)))
            return records

        return watched

    def _delete(self, record: Record, before: bytes | None) -> None:
        self.counts[f"deletions of {record.kind}"] += 1
        if record.kind == "transaction" and before is not None:
            self._pruned.setdefault(record.owner, {})[int(record.id)] = self._execution(before)

    def _committed(self, replica: Replica) -> None:
        written, self._written[replica.node] = self._written[replica.node], []
        self._keep(replica, written)

    def _keep(self, replica: Replica, written: Sequence[tuple[Sequence[Record], int]]) -> None:
        owner = replica.node
        for records, state in written:
            for record in records:
                known = self._wires.setdefault((owner, record.position), record.wire)
                if known != record.wire:
                    raise Violation(f"{owner[:4]} has written two records at {record.position}")
                if record.kind == "transaction" and not record.deleted:
                    self._transacted(replica.store, owner, record)
            self._states[owner, records[-1].position] = state
            self._acknowledged[owner] = records[-1].position
            self.counts["states"] += 1

    def _transacted(self, store: Store, owner: str, record: Record) -> None:
        requester, request = record.body["requester"], record.body["request"]
        losses = self._losses[owner]
        executed = self._executed.setdefault((owner, requester, request), [])
        if losses in executed and not (losses and _forgotten(store, owner, record)):
            raise Violation(f"{owner[:4]} has executed {request} of {requester[:4]} twice")
        executed.append(losses)
        self.counts["executions again after loss of disk"] += len(executed) > 1
        self._ordered(owner, requester, record)

    def _ordered(self, owner: str, requester: str, record: Record) -> None:
        if self._losses[owner] or self._losses[requester]:
            return
        (change,) = record.body["changes"]
        order = record.body["body"]["order"]
        if order <= self._order.get((owner, requester), -1):
            raise Violation(f"{owner[:4]} has executed {record.body['request']} of {requester[:4]} out of order")
        self._order[owner, requester] = order
        before = change["before"]["value"] if change["before"] else 0
        if change["after"]["value"] != before + 1:
            raise Violation(f"{owner[:4]} changed {before} to {change['after']['value']}")


_TRANSACTIONS = (
    "SELECT wire FROM records WHERE kind = 'transaction' AND NOT deleted"
    " AND owner = (SELECT number FROM owners WHERE owner = ?)"
)


def _forgotten(store: Store, owner: str, record: Record) -> bool:
    """Whether the owner's history has no other transaction for the same request.

    A node that has lost its disk may continue alone, and then find neighbours with the lost records: these
    are its history from then on, not its writes meanwhile.
    """
    asked = record.body["requester"], record.body["request"]
    others = (one for one in store.find("transaction", owner) if one.position != record.position)
    return all((one.body["requester"], one.body["request"]) != asked for one in others)


def _stored(store: Store, owner: str) -> dict[tuple[str, str], bytes]:
    query = (
        "SELECT kind, id, wire FROM records WHERE NOT deleted AND owner = (SELECT number FROM owners WHERE owner = ?)"
    )
    return {(kind, id): wire for kind, id, wire in store._connection.execute(query, (owner,))}


def _row(store: Store, query: str, *arguments: Any) -> Any:
    return store._connection.execute(query, arguments).fetchone()


def _state(records: dict[tuple[str, str], bytes]) -> int:
    return hash(frozenset(records.items()))


def _has_gaps(numbers: set[int], newest: int) -> bool:
    """True unless all numbers from 1 up to the newest are there; a mistake may make that one huge."""
    return len({number for number in numbers if 0 < number < newest}) < newest - 1
