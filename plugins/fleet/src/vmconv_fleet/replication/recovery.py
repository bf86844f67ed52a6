"""When a node may write: after it has recovered what its neighbours have of its own records, in a new epoch."""

from __future__ import annotations

from vmconv_fleet.replication.anti_entropy import NEVER
from vmconv_fleet.replication.context import ReplicaContext
from vmconv_fleet.replication.ownlog import OwnLog
from vmconv_fleet.replication.records import MAX_NUMBER, START, Position, Record

LIMIT = 10
"""So many times its patience a node waits for records that neighbours say they have, and do not give."""

_LEAST_PATIENCE_MS = 3000
_PAUSE_MS = 1000
_CLONED = 3


class EpochRecovery:
    """The epochs of this node."""

    def __init__(self, context: ReplicaContext, own: OwnLog) -> None:
        self._context = context
        self._own = own
        self._epoch = 0
        self._beyond = 0
        self._superseded = 0
        self._limit = LIMIT * max(context.timing.patience or 0, _LEAST_PATIENCE_MS)
        self._next = self._settled = self._started = context.monotonic()

    @property
    def serving(self) -> bool:
        """Whether the node is in an epoch of its own: what the database has, and not what a failed commit said."""
        return self._epoch != 0 and self._context.store.position(self._context.node).epoch == self._epoch

    @property
    def settled(self) -> Position:
        """Beyond this position, neighbours' records of the node would be news; those before have been superseded."""
        return Position(self._beyond, MAX_NUMBER) if self._beyond >= self._epoch else START

    def settle(self) -> None:
        """Waits for more neighbours: one has just come."""
        self._settled = self._context.monotonic() + self._context.timing.settle

    def supersede(self, position: Position) -> None:
        """Takes note of a signed record of this node that its database has not: a new epoch has to be beyond it."""
        self._beyond = max(self._beyond, position.epoch)
        self._superseded += 1
        kind = "lost" if self._superseded < _CLONED else "cloned"
        known = tuple(self._context.store.position(self._context.node))
        found = f"neighbours have records of this node at {tuple(position)}, it is at {known}"
        self._context.problems.report(kind, found)

    def next_due(self) -> int:
        """Returns when the next epoch is due, as far as that depends on time alone."""
        if self.serving:
            return self._next if self._beyond >= self._epoch else NEVER
        if self._context.trust.retired(self._context.node):
            return NEVER
        now, patience = self._context.monotonic(), self._context.timing.patience
        if self._may_serve(now):
            return now
        waits = (self._settled, self._started + (patience or 0), self._started + self._limit)
        return min((wait for wait in waits if wait > now), default=NEVER)

    def begin_due(self, now: int) -> list[Record]:
        """Begins an epoch if one is due; returns what that has written."""
        if now < self.next_due():
            return []
        self._next = now + _PAUSE_MS
        written = self._own.begin_epoch(self._context.now(), self._beyond)
        self._epoch = written[-1].epoch
        return written

    def _may_serve(self, now: int) -> bool:
        context = self._context
        waited, patience = now - self._started, context.timing.patience
        ahead = context.neighbours.ahead(context.node, max(self.settled, context.store.position(context.node)))
        if ahead or context.anti_entropy.wants(context.node, now):
            return waited >= self._limit
        if len(context.neighbours) and context.neighbours.all_told():
            return now >= self._settled
        return patience is not None and waited >= patience
