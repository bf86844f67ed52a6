"""Problems: counted, and reported to the administrator."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

KEPT = 100

_log = logging.getLogger(__name__)


class NodeProblem(NamedTuple):
    """A problem for the administrator.

    | kind | meaning |
    | --- | --- |
    | fork | an owner has signed two records for one position: both are kept, see `ReplicaView.forks` |
    | cloned | another process writes as this node, or its clock was set back and its database lost |
    | lost | neighbours have records of this node that its database lacks; they are superseded |
    | forged | a neighbour sent a record without a valid signature of its owner |
    | torn | a neighbour sent records that do not form a state of their owner |
    | malformed | a neighbour sent an invalid message or record |
    | clock | an owner's clock is far ahead of this node's |
    | retired | this node has been retired by the fleet's authority |
    | internal | a defect of vmconv; details are in the log |
    | crowded | strangers take the places of a listening socket |
    """

    kind: str
    text: str


class Observed(Protocol):
    """A part of a node outside of the replica that has counters and problems of its own."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str:
        """Returns the kind of its problem."""

    @property
    def counters(self) -> Mapping[str, int]: ...

    def problem(self) -> str | None:
        """Returns what is wrong now."""


class ProblemLog:
    """Counts all problems and keeps the last KEPT different ones."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self._last: tuple[NodeProblem, ...] = ()
        self._callbacks: list[Callable[[NodeProblem], None]] = []

    def subscribe(self, callback: Callable[[NodeProblem], None]) -> None:
        self._callbacks.append(callback)

    def count(self, name: str) -> None:
        self.counters[name] += 1

    def report(self, kind: str, text: str) -> None:
        """Counts a problem and reports it unless it is known; frequent kinds are reported less and less often."""
        self.counters[kind] += 1
        problem, count = NodeProblem(kind, text), self.counters[kind]
        if problem in self._last:
            return
        self._last = (*self._last[1 - KEPT :], problem)
        if count > KEPT and count & (count - 1):
            return
        _log.warning("%s: %s", kind, text)
        for callback in self._callbacks:
            callback(problem)

    def all(self) -> list[NodeProblem]:
        """Returns the reported problems, the newest last."""
        return list(self._last)
