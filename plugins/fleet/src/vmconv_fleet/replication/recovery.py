"""The epochs of a node: it writes once it has recovered its own records from its neighbours, in a new epoch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from vmconv_fleet.errors import NotReadyError
from vmconv_fleet.replication.anti_entropy import NEVER
from vmconv_fleet.replication.context import ReplicaContext
from vmconv_fleet.replication.forks import Pair, settles
from vmconv_fleet.replication.ownlog import OwnLog
from vmconv_fleet.replication.records import MAX_NUMBER, START, Record

LIMIT = 10
"""The multiple of its patience that a node waits for records that neighbours announce but do not send."""

_LEAST_PATIENCE_MS = 3000


class EpochRecovery:
    """Decides when this node may begin an epoch, and whether it may write."""

    def __init__(self, context: ReplicaContext, own: OwnLog) -> None:
        self._context = context
        self._own = own
        self.epoch = 0
        """The epoch that this process has begun; a failed commit sets it back."""
        self._limit = LIMIT * max(context.timing.patience or 0, _LEAST_PATIENCE_MS)
        self._settled = self._started = context.monotonic()
        # Replaced, never changed: other threads read them.
        self._heard: frozenset[str] = frozenset()
        self._excused: frozenset[str] = frozenset()
        self._alone = False

    @property
    def has_begun(self) -> bool:
        """Returns whether this process has begun an epoch that is in the database, not one of a failed commit."""
        return self.epoch != 0 and self._context.store.position(self._context.node).epoch == self.epoch

    @property
    def serving(self) -> bool:
        """Returns whether the node may write: it has begun an epoch, and has one history."""
        return self.has_begun and self._context.node not in self._context.forks

    @property
    def is_restored(self) -> bool:
        """Returns whether the database may lack own records, and the node waits for all members. On any thread."""
        return self._context.timing.patience is None and not self.epoch

    def awaited(self) -> frozenset[str]:
        """Returns the known members that have not been heard since the start. May be called on any thread."""
        trust = self._context.trust
        members = {node for node in trust.members() if not trust.retired(node)}
        return frozenset(members - {self._context.node, *self._heard, *self._excused})

    def excuse(self, nodes: Iterable[str], *, alone: bool) -> None:
        """Stops waiting for members, whose later records of this node are lost; `alone`: for any member at all."""
        self._excused |= frozenset(nodes)
        self._alone = self._alone or alone

    def refuse_to_merge(self, proof: Pair, ends: Mapping[int, int]) -> None:
        """Raises NotReadyError if a member may have more of the other histories of this node, which `ends` have."""
        context = self._context
        history = context.store.history(context.node).begun(MAX_NUMBER, MAX_NUMBER, ends.items())
        reported = context.neighbours.reported()
        theirs = {one: context.neighbours[one].position(context.node) for one in reported}
        ahead = {one for one, position in theirs.items() if position != START and not history.follows(position)}
        if ahead - self._excused:
            raise NotReadyError("the other history of this node is being fetched: try again")
        members = {node for node in context.trust.members() if not context.trust.retired(node)}
        unknown = members - {context.node, *reported, *self._excused}
        if unknown and (self.is_restored or not settles(history, proof)):
            names = ", ".join(sorted(unknown))
            raise NotReadyError(f"the other history of this node is not here: these members may have it: {names}")

    def settle(self) -> None:
        """Waits for more neighbours after one has connected."""
        self._settled = self._context.monotonic() + self._context.timing.settle

    def begin(self, beyond: int, merged: Sequence[tuple[int, int]] = ()) -> list[Record]:
        """Begins an epoch and returns the written records."""
        written = self._own.begin_epoch(self._context.now(), beyond, merged)
        self.epoch = written[-1].epoch
        self._context.forks.refresh()
        return written

    def next_due(self) -> int:
        """Returns when the next epoch is due, as far as that depends on time alone."""
        context = self._context
        if self.has_begun or context.node in context.forks or context.trust.retired(context.node):
            return NEVER
        now, patience = context.monotonic(), context.timing.patience
        if self._may_serve(now):
            return now
        waits = (self._settled, self._started + (patience or 0), self._started + self._limit)
        return min((wait for wait in waits if wait > now), default=NEVER)

    def begin_due(self, now: int) -> list[Record]:
        """Begins an epoch if one is due and returns the written records."""
        if now < self.next_due():
            return []
        return self.begin(0)

    def _may_serve(self, now: int) -> bool:
        context = self._context
        waited, patience = now - self._started, context.timing.patience
        ahead = {*context.neighbours.ahead(context.node, context.store.position(context.node))}
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
