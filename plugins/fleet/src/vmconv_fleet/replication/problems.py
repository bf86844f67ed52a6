"""Problems: counted, and reported to the administrator."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

KEPT = 100
FORGOTTEN_S = 600.0
"""Seconds after which a problem that was not reported again is over."""
LASTING = frozenset(("cloned", "fork", "retired", "strays"))
"""Kinds that are over only when somebody acts."""

_log = logging.getLogger(__name__)


class NodeProblem(NamedTuple):
    """A problem for the administrator.

    | kind | meaning |
    | --- | --- |
    | fork | an owner has two histories: neither is lost, see `ReplicaView.forks`; its requests and tokens are refused |
    | strays | another history of this node has more records than are kept: it cannot be merged |
    | cloned | a neighbour has the id of this node |
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
    """Counts all problems and keeps the last KEPT different ones until they are over."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.counters: Counter[str] = Counter()
        self._clock = clock
        # Replaced, never changed: other threads read it.
        self._last: dict[NodeProblem, float] = {}
        self._callbacks: list[Callable[[NodeProblem], None]] = []

    def subscribe(self, callback: Callable[[NodeProblem], None]) -> None:
        self._callbacks.append(callback)

    def count(self, name: str) -> None:
        self.counters[name] += 1

    def report(self, kind: str, text: str) -> None:
        """Counts a problem and reports it unless it is known; frequent kinds are reported less and less often."""
        self.counters[kind] += 1
        problem, count, now = NodeProblem(kind, text), self.counters[kind], self._clock()
        is_known = self._last.get(problem, now - FORGOTTEN_S) > now - FORGOTTEN_S
        others = [item for item in self._last.items() if item[0] != problem]
        if len(others) >= KEPT:
            # What others can cause at will must not hide what lasts.
            gone = next((item for item in others if item[0].kind not in LASTING), others[0])
            others.remove(gone)
        self._last = dict([*others, (problem, now)])
        if is_known:
            return
        if count > KEPT and count & (count - 1):
            return
        _log.warning("%s: %s", kind, text)
        for callback in self._callbacks:
            callback(problem)

    def forget(self, kind: str, text: str | None = None) -> None:
        """Drops the problems of a kind, or one of them, because they are over."""
        over = {one for one in self._last if one.kind == kind and text in (None, one.text)}
        if over:
            self._last = {problem: at for problem, at in self._last.items() if problem not in over}

    def all(self) -> list[NodeProblem]:
        """Returns the problems that last, and those reported in the last `FORGOTTEN_S` seconds, the newest last."""
        oldest = self._clock() - FORGOTTEN_S
        return [problem for problem, at in self._last.items() if at >= oldest or problem.kind in LASTING]
