"""The epochs of a node: it writes once it has recovered its own records from its neighbours, in a new epoch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from vmconv_fleet.replication.anti_entropy import NEVER
from vmconv_fleet.replication.context import ReplicaContext
from vmconv_fleet.replication.epochs import history_of
from vmconv_fleet.replication.ownlog import OwnLog
from vmconv_fleet.replication.records import MAX_NUMBER, START, Position, Record

LIMIT = 10
"""The multiple of its patience that a node waits for records that neighbours announce but do not send."""

_LEAST_PATIENCE_MS = 3000
_PAUSE_MS = 1000
_MAX_SHOWN = 8 << 10
"""Bytes of another writer's record that are shown to all."""


class EpochRecovery:
    """Decides when this node may begin an epoch."""

    def __init__(self, context: ReplicaContext, own: OwnLog) -> None:
        self._context = context
        self._own = own
        self._epoch = 0
        self._beyond = 0
        # The epochs of this process: it is not restored with the database.
        self._begun: deque[int] = deque(maxlen=64)
        self._cloned: str | None = None
        self._limit = LIMIT * max(context.timing.patience or 0, _LEAST_PATIENCE_MS)
        self._next = self._settled = self._started = context.monotonic()
        # Replaced, never changed: other threads read them.
        self._heard: frozenset[str] = frozenset()
        self._excused: frozenset[str] = frozenset()
        self._alone = False

    @property
    def serving(self) -> bool:
        """Returns whether the node has begun an epoch that is in the database, not one of a failed commit."""
        return self._epoch != 0 and self._context.store.position(self._context.node).epoch == self._epoch

    @property
    def settled(self) -> Position:
        """The position up to which neighbours' records of this node are already superseded."""
        return Position(self._beyond, MAX_NUMBER) if self._beyond >= self._epoch else START

    @property
    def is_restored(self) -> bool:
        """Returns whether the database may lack own records, and the node waits for all members. On any thread."""
        return self._context.timing.patience is None and not self._epoch

    def awaited(self) -> frozenset[str]:
        """Returns the known members that have not been heard since the start. May be called on any thread."""
        trust = self._context.trust
        members = {node for node in trust.members() if not trust.retired(node)}
        return frozenset(members - {self._context.node, *self._heard, *self._excused})

    def excuse(self, nodes: Iterable[str], *, alone: bool) -> None:
        """Stops waiting for members, whose later records of this node are lost; `alone`: for any member at all."""
        self._excused |= frozenset(nodes)
        self._alone = self._alone or alone

    def settle(self) -> None:
        """Waits for more neighbours after one has connected."""
        self._settled = self._context.monotonic() + self._context.timing.settle

    def supersede(self, position: Position, history: Record | None = None, *, forked: bool = False) -> None:
        """Notes a signed record of this node that its database lacks: the next epoch has to be later.

        `history` is the record of epochs that belongs to it. `forked`: it has the position of another record.
        """
        self._beyond = max(self._beyond, position.epoch)
        known = tuple(self._context.store.position(self._context.node))
        found = f"neighbours have records of this node at {tuple(position)}, it is at {known}"
        self._context.problems.report("lost", found)
        # Whoever has written it has seen an epoch of this process, and it was not this process.
        followed = history is not None and not history_of(history).knows().isdisjoint(self._begun)
        if forked or (followed and position.epoch not in self._begun):
            wire = history.wire if history is not None else b""
            self._cloned = wire.hex() if len(wire) <= _MAX_SHOWN else ""

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
        """Begins an epoch if one is due and returns the written records."""
        if now < self.next_due():
            return []
        self._next = now + _PAUSE_MS
        written = self._own.begin_epoch(self._context.now(), self._beyond, self._cloned)
        self._epoch = written[-1].epoch
        self._begun.append(self._epoch)
        self._context.clones.learn(written)
        return written

    def _may_serve(self, now: int) -> bool:
        context = self._context
        waited, patience = now - self._started, context.timing.patience
        ahead = {*context.neighbours.ahead(context.node, max(self.settled, context.store.position(context.node)))}
        reported = context.neighbours.reported()
        self._heard |= reported - ahead
        if ahead - self._excused or context.anti_entropy.wants(context.node, now):
            return patience is not None and waited >= self._limit
        if patience is None:
            # A database of the fleet's first days knows no other members.
            return not self.awaited() and bool(self._heard or self._alone) and now >= self._settled
        if reported and len(reported) == len(context.neighbours):
            return now >= self._settled
        return waited >= patience
