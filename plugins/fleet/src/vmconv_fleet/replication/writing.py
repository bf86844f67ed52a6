"""The interface of a running node for the scanner and the job runner, and how their threads wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from vmconv_fleet.errors import ClosedError
from vmconv_fleet.replication.records import Change, Record
from vmconv_fleet.replication.store import ReplicaView

_STEP = 0.5


class Writes(Protocol):
    """The part of `NodeService` that reads everything and writes the node's own records."""

    @property
    def node(self) -> str: ...

    def view(self) -> ReplicaView: ...

    def update(self, decide: Callable[[ReplicaView], Sequence[Change]]) -> Future[list[Record]]: ...

    def subscribe(self, callback: Callable[[list[Record]], None]) -> Callable[[], None]: ...


def settled(future: Future[list[Record]], ending: threading.Event) -> list[Record]:
    """Returns the written records once they are durable. Raises ClosedError if `ending` is set before.

    A node does not write while it recovers its own records, and may have to stop all the same.
    """
    while True:
        try:
            return future.result(timeout=_STEP)
        except TimeoutError:
            if ending.is_set():
                raise ClosedError("the node ends") from None
