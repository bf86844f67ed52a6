"""The interface of a running node for the API, the command line and the daemon."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from vmconv_fleet.errors import MalformedError, NotReadyError
from vmconv_fleet.replication.clock import wall_ms
from vmconv_fleet.replication.engine import Engine, Transport
from vmconv_fleet.replication.indexing import Index
from vmconv_fleet.replication.merging import Join, Overridden, later, merge
from vmconv_fleet.replication.messages import Send
from vmconv_fleet.replication.problems import NodeProblem, Observed
from vmconv_fleet.replication.records import Change, Record
from vmconv_fleet.replication.replica import Replica, Timing
from vmconv_fleet.replication.requests import RESERVED, Handler, Requests, response_id
from vmconv_fleet.replication.retention import Retention
from vmconv_fleet.replication.signing import CertifiedKey, Signer, Trust
from vmconv_fleet.replication.store import Reader, ReplicaView, Store
from vmconv_fleet.replication.verifier_pool import VerifierPool


class NodeService:
    """A running node. All methods may be called on any thread."""

    def __init__(
        self,
        *,
        fleet: str,
        database: str,
        signer: Signer,
        trust: Trust,
        transport: Transport,
        handlers: Mapping[str, Handler],
        schema: int,
        patience_ms: int | None,
        introduction: Sequence[Change] = (),
        indexes: Sequence[Index] = (),
        retention: Retention = Retention(),  # noqa: B008 - a value
        merged: str | None = None,
        join: Join = later,
    ) -> None:
        """`patience_ms`: how long a start waits for a neighbour that may have newer own records than the database.

        0 for a new node; None for one with a lost or restored database: it waits for all members.
        `introduction`: the node's certificate, written with its first record unless it is there. `merged`: a file for
        the records of histories that are merged into this node's, of whose versions `join` chooses.
        """
        self.fleet = fleet
        self._merged = merged
        self._join = join
        self.node = signer.owner
        self._verifier_pool = VerifierPool()
        store = Store.open(database, signer.owner, indexes=indexes)
        self._reader = store.reader()
        timing = Timing(patience=patience_ms)
        self._replica = Replica(
            store,
            signer,
            trust,
            wall_ms,
            schema=schema,
            timing=timing,
            verify_all=self._verifier_pool,
            introduction=introduction,
        )
        self._requests = Requests(self._replica, handlers, wall_ms, schema=schema, retention=retention)
        self._engine = Engine(self._replica, self._requests, transport)
        self._answered = threading.Condition()
        self._ended = False
        self._replica.subscribe(self._see)
        self._observed: list[Observed] = []

    @property
    def serving(self) -> bool:
        """Returns whether own records can be written."""
        return self._replica.serving

    @property
    def is_restored(self) -> bool:
        """Returns whether the database was lost or restored, and the node waits for all members before it writes."""
        return self._replica.is_restored

    def awaited(self) -> frozenset[str]:
        """Returns the known members that it still waits for then."""
        return self._replica.awaited()

    def excuse(self, without: Collection[str], *, alone: bool) -> Future[None]:
        """Stops waiting for these members, or for any at all."""
        return self._engine.call(lambda: self._replica.excuse(without, alone=alone))

    def resume(self, without: Collection[str], by: Mapping[str, Any], *, alone: bool) -> Future[str]:
        """Lets the history say who decided to wait no longer, once the node writes.

        The future is done once this request is durable.
        """
        arguments = {"without": sorted(without), "alone": alone}
        return self._engine.request(lambda requests: requests.submit(self.node, "resume", arguments, by))

    @property
    def is_forked(self) -> bool:
        """Returns whether this node has two histories, and writes nothing until they are merged."""
        return self._replica.is_forked

    def merge(self, by: Mapping[str, Any]) -> Future[list[Overridden]]:
        """Makes one history of those of this node. The history says who decided it.

        The future has what was overridden. It raises NotReadyError if the others are not here.
        """

        def merged() -> tuple[list[Overridden], list[Send]]:
            with self._replica.batch():
                sends, overridden = merge(self._replica, self._requests, self._merged, self._join)
                _, asked = self._requests.submit(self.node, "resume", {"merge": True}, by)
                return overridden, [*sends, *asked]

        return self._engine.act(merged)

    def start(self) -> None:
        self._engine.start()

    def close(self) -> None:
        """Stops the node. Always returns; nothing is written afterwards."""
        with self._answered:
            self._ended = True
            self._answered.notify_all()
        self._engine.close()
        self._verifier_pool.close()
        self._reader.close()

    def view(self) -> Reader:
        """Returns the read-only view of the node. All threads share it; do not close it."""
        return self._reader

    def write(self, changes: Sequence[Change]) -> Future[list[Record]]:
        """Writes own records without a transaction (telemetry). Waits until the node is serving."""
        return self._engine.write(_telemetry(changes))

    def update(self, decide: Callable[[ReplicaView], Sequence[Change]]) -> Future[list[Record]]:
        """Writes the changes that `decide` returns on the replica's thread, from the newest own state; it must be
        quick.
        """
        return self._engine.update(lambda view: _telemetry(decide(view)))

    def submit(
        self,
        target: str,
        verb: str,
        arguments: Mapping[str, Any],
        by: Mapping[str, Any],
        *,
        id: str | None = None,
        timeout: float | None = 10,
    ) -> str:
        """Requests a change from an owner; returns the request's id once the request is durable here.

        The same `id` again is the same request. Raises NotReadyError if it is not durable within `timeout` seconds.
        """
        future = self._engine.request(lambda requests: requests.submit(target, verb, arguments, by, id=id))
        return _result(future, timeout)

    def withdraw(self, request: str) -> Future[None]:
        """Deletes a request of this node; its owner may have executed it already."""
        return self._engine.request(lambda requests: (None, requests.withdraw(request)))

    def response(self, request: str, timeout: float | None = 0) -> Record | None:
        """Returns the response to a request of this node; None after `timeout` seconds, or when the node stops."""
        end = None if timeout is None else time.monotonic() + timeout
        with self._answered:
            while not self._ended:
                found = self._response(request)
                left = None if end is None else end - time.monotonic()
                if found is not None or (left is not None and left <= 0):
                    return found
                self._answered.wait(left)
        return None

    def subscribe(self, callback: Callable[[list[Record]], None]) -> Callable[[], None]:
        """Calls back on the replica's thread after each commit: only enqueue there. Returns an unsubscriber."""
        return self._replica.subscribe(callback)

    def neighbours(self) -> list[str]:
        """Returns the ids of the connected neighbours."""
        return self._replica.neighbours.ids()

    def retirements(self) -> Mapping[str, str]:
        """Returns the nodes that the authority has retired, and their names."""
        return self._replica.retirements()

    def certified_keys(self) -> Iterable[CertifiedKey]:
        """Returns all keys that the authority has certified for nodes, revoked ones too."""
        return self._replica.certified_keys()

    def names(self) -> Mapping[str, str]:
        """Returns the names that the authority has given to nodes; nodes of earlier versions have none."""
        return self._replica.names()

    def problems(self) -> list[NodeProblem]:
        """Returns the problems for the administrator, the newest last."""
        found = ((one, one.problem()) for one in tuple(self._observed))
        others = [NodeProblem(one.kind, text) for one, text in found if text is not None]
        return [*self._replica.problems.all(), *others]

    def observe(self, part: Observed) -> None:
        """Adds a part's problem and counters to those of the node."""
        self._observed.append(part)

    def counters(self) -> dict[str, int]:
        """Returns the counters of the replica and of the observed parts, for metrics."""
        others = {f"{one.name} {key}": n for one in tuple(self._observed) for key, n in one.counters.items()}
        return {**self._replica.problems.counters, **others}

    def _see(self, records: Sequence[Record]) -> None:
        if any(record.kind == "response" for record in records):
            with self._answered:
                self._answered.notify_all()

    def _response(self, request: str) -> Record | None:
        asked = self._reader.get(self.node, "request", request)
        target = None if asked is None else asked.body.get("target")
        if not isinstance(target, str):
            return None
        return self._reader.get(target, "response", response_id(self.node, request))


def _telemetry(changes: Sequence[Change]) -> Sequence[Change]:
    for change in changes:
        if change.kind in RESERVED:
            raise MalformedError(f"only requests write records of kind {change.kind!r}")
    return changes


def _result(future: Future[str], timeout: float | None) -> str:
    try:
        return future.result(timeout)
    except FutureTimeoutError as exc:
        future.cancel()
        raise NotReadyError(f"node did not write within {timeout} s", hint="it may still recover its records") from exc
