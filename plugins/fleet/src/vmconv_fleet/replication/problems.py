"""Problems: counted, and reported to the administrator."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

KEPT = 100

_log = logging.getLogger(__name__)


class NodeProblem(NamedTuple):
    """Something an administrator has to know.

    | kind | what has happened |
    | --- | --- |
    | fork | an owner has signed two records for one position: both are kept, see `ReplicaView.forks` |
    | cloned | somebody else writes as this node, or its clock has gone back and its database was lost |
    | lost | neighbours have records of this node that its database has not; they are superseded |
    | forged | a neighbour sent a record that its owner has not signed, or not so |
    | torn | a neighbour sent records that together are no state their owner was in |
    | malformed | a neighbour sent what is no message or no record |
    | clock | an owner's clock is far ahead of this node's |
    | retired | this node has been retired by the fleet's authority |
    | internal | vmconv has a mistake; details are in the log |
    """

    kind: str
    text: str


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
        """Counts a problem and reports it unless it is known; a frequent kind is reported ever less often."""
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
