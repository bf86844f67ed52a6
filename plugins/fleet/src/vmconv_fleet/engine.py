"""The thread that owns the replica. Skeleton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from vmconv_fleet.records import Change, Record

T = TypeVar("T")


class Events(Protocol):
    """What a transport tells; may be called on any thread, returns at once and raises nothing."""

    def connected(self, peer: str) -> None: ...

    def disconnected(self, peer: str) -> None: ...

    def received(self, peer: str, message: bytes) -> None: ...


class Transport(Protocol):
    """Links to neighbours. A peer's id is what its certificate says, never what it says itself."""

    def start(self, events: Events) -> None:
        """Begins; `connected` is called for each neighbour that is there or comes."""

    def send(self, peer: str | None, message: bytes) -> None:
        """Sends to a neighbour, or to all (None); never blocks for long, may lose messages, raises nothing."""

    def close(self) -> None:
        """Ends; no event is told after it has returned."""


class Engine:
    """Runs a replica and its requests on a thread of its own, with group commit of what is waiting."""

    def start(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Ends transport and thread, closes the store; always returns. Pending futures get ClosedError."""
        raise NotImplementedError

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Runs the function on the replica's thread; the result is there once what it wrote is durable."""
        raise NotImplementedError

    def write(self, changes: Sequence[Change]) -> Future[list[Record]]:
        """Writes own records without a transaction number; waits until the replica is serving."""
        raise NotImplementedError

    def update(self, decide: Callable[[Any], Sequence[Change]]) -> Future[list[Record]]:
        """Writes what `decide(store view)` returns, called on the replica's thread; waits until it is serving."""
        raise NotImplementedError
