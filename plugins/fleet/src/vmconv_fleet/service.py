"""What the API, the command line and the daemon call on a running node. Skeleton."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from vmconv_fleet.engine import Transport
from vmconv_fleet.records import Change, Record
from vmconv_fleet.replica import Problem
from vmconv_fleet.requests import Handler
from vmconv_fleet.signing import Signer, Trust
from vmconv_fleet.store import Reader, View


class NodeService:
    """A running node: everything here may be called on any thread."""

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
    ) -> None:
        """`patience_ms`: how long a start waits for a neighbour who may have newer own records than the database.

        0 for a node that has nobody to connect to; None, for ever, for one that joined and whose database is new.
        """
        raise NotImplementedError

    @property
    def node(self) -> str:
        """The node's id."""
        raise NotImplementedError

    @property
    def fleet(self) -> str:
        raise NotImplementedError

    @property
    def serving(self) -> bool:
        raise NotImplementedError

    def start(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Always returns; after it nothing is written any more."""
        raise NotImplementedError

    def view(self) -> Reader:
        """Returns the node's read-only view; one for all threads, not to be closed."""
        raise NotImplementedError

    def write(self, changes: Sequence[Change]) -> Future[list[Record]]:
        """Writes own records without a transaction: telemetry."""
        raise NotImplementedError

    def update(self, decide: Callable[[View], Sequence[Change]]) -> Future[list[Record]]:
        """Writes what `decide` returns: it runs on the replica's thread, sees the newest own state, and must be quick."""
        raise NotImplementedError

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
        """Asks the owner for a change; returns the request's id once the request is durable here.

        The same `id` again is the same request. NotReadyError: not durable within `timeout` seconds.
        """
        raise NotImplementedError

    def response(self, request: str, timeout: float | None = 0) -> Record | None:
        """Returns the response once it is there, None after `timeout` seconds."""
        raise NotImplementedError

    def withdraw(self, request: str) -> Future[None]:
        """Deletes a request of this node; its owner may have executed it already."""
        raise NotImplementedError

    def subscribe(self, callback: Callable[[list[Record]], None]) -> Callable[[], None]:
        """Calls back on the replica's thread after each commit: only enqueue there. Returns what ends it."""
        raise NotImplementedError

    def neighbours(self) -> list[str]:
        raise NotImplementedError

    def problems(self) -> list[Problem]:
        """Returns what an administrator has to know, the newest last."""
        raise NotImplementedError

    def counters(self) -> dict[str, int]:
        """Returns what the replica has counted since its start: for metrics."""
        raise NotImplementedError
