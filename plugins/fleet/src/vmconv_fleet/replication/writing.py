"""What the scanner and the job runner need of a running node, and how their threads wait for it."""

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
    """Returns what was written, once it is durable; raises `ClosedError` when whoever waits is to end before.

    A node that still recovers its own records does not write yet, and may have to end all the same.
    """
    while True:
        try:
            return future.result(timeout=_STEP)
        except TimeoutError:
            if ending.is_set():
                raise ClosedError("the node ends") from None
