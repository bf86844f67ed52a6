"""Outgoing messages of a replica: own changes, digests, and pages for neighbours that pull."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vmconv_fleet.replication import messages
from vmconv_fleet.replication.context import ReplicaContext
from vmconv_fleet.replication.messages import Digest, Notice, Page, Pull, Send, Summary
from vmconv_fleet.replication.records import START, Record, restore

SOON_MS = 100
FEW = 8
"""With more neighbours than this, whole digests are sent less often, because more nodes send them."""


class Publisher:
    """Makes messages, and schedules digests.

    Live messages may be lost, so a digest of their owners follows each burst.
    """

    def __init__(self, context: ReplicaContext) -> None:
        self._context = context
        self._tail: dict[str, int] = {}
        self._next = context.monotonic() + context.timing.digest

    def schedule_digest(self) -> None:
        """Schedules a whole digest soon, because the neighbours have changed."""
        self._next = min(self._next, self._context.monotonic() + int(SOON_MS * self._crowding()))

    def digest(self, peer: str | None) -> Send:
        """Returns the whole digest, for one neighbour or for all."""
        context = self._context
        near = frozenset(context.neighbours.ids())
        at = self._summaries(context.store.positions())
        return Send(peer, messages.encode(Digest(at, True, near, context.store.notices_hash())))

    def next_due(self) -> int:
        """Returns when the next digest is due."""
        return min(self._next, *self._tail.values()) if self._tail else self._next

    def due(self, now: int) -> list[Send]:
        """Returns the digests that are due."""
        if now >= self._next:
            self._next = now + int(self._context.timing.digest * self._crowding())
            self._tail.clear()
            return [self.digest(None)]
        owners = [owner for owner, due in self._tail.items() if due <= now]
        for owner in owners:
            del self._tail[owner]
        return [Send(None, messages.encode(Digest(self._summaries(owners))))] if owners else []

    def publish(self, records: Sequence[Record]) -> list[Send]:
        """Announces the records of one transaction of this node to all neighbours."""
        if not records:
            return []
        self._context.feed.add(records)
        message = messages.live(records)
        self._schedule_tail(records[0].owner, at_once=message is None)
        return [] if message is None else [Send(None, message, messages.span(records))]

    def forward(self, records: Sequence[Record], source: str) -> list[Send]:
        """Forwards records to the neighbours that are linked to neither their owner nor their source."""
        owner = records[0].owner
        targets = list(self._context.neighbours.beyond(source, owner))
        message = messages.live(records) if targets else None
        if targets:
            self._schedule_tail(owner, at_once=message is None)
        return [] if message is None else [Send(target, message, messages.span(records)) for target in targets]

    def notify_behind(self, owner: str) -> list[Send]:
        """Sends a digest of one owner to the neighbours that are behind."""
        behind = self._context.neighbours.behind(owner, self._context.store.position(owner))
        message = messages.encode(Digest(self._summaries([owner]))) if behind else b""
        return [Send(peer, message) for peer in behind]

    def proofs(self, peer: str | None, pairs: Iterable[tuple[Record, Record]]) -> list[Send]:
        """Sends proofs of forks, each in a message of its own."""
        return [Send(peer, messages.encode(Notice([record.wire for record in pair]))) for pair in pairs]

    def notices(self, peer: str | None, wires: Sequence[bytes]) -> list[Send]:
        """Sends revocations, split into messages."""
        sends, group = [], []
        for number, wire in enumerate(wires, 1):
            group.append(wire)
            if number == len(wires) or sum(map(len, group)) >= messages.PAGE_BYTES:
                sends.append(Send(peer, messages.encode(Notice(group))))
                group = []
        return sends

    def answer(self, peer: str, pull: Pull) -> list[Send]:
        """Answers a pull with a window of pages; with nothing if there is nothing newer."""
        store, owner = self._context.store, pull.owner
        position = store.position(owner)
        if max(pull.after, pull.seen) > position or pull.after == position or self._context.trust.retired(owner):
            self._context.problems.count("pulls-in-vain")
            return []
        history = store.history(owner)
        if pull.seen == START:
            known = history.holds(pull.after)
        else:
            known = history.holds(pull.seen) and pull.since.seq >= history.floor
        certificates = [] if known and pull.seen != START else store.certificates(owner)
        base, after = (pull.base, pull.after) if known else (START, START)
        since = pull.since if known and pull.since != START else position
        pages: list[Send] = []
        while len(pages) < messages.WINDOW and after.seq < position.seq:
            wires, last = store.after(owner, after.seq, messages.PAGE_BYTES)
            page = Page(
                owner,
                pull.session,
                after,
                base=base,
                more=last < position.seq,
                ask=len(pages) == messages.WINDOW - 1,
                seen=position,
                certificates=len(certificates),
                wires=[*certificates, *wires],
                since=since,
            )
            pages.append(Send(peer, messages.encode(page)))
            after, certificates = restore(wires[-1]).position, []
        return pages

    def _crowding(self) -> float:
        """Returns the factor by which whole digests are sent less often in a large neighbourhood."""
        return max(1.0, len(self._context.neighbours) / FEW)

    def _schedule_tail(self, owner: str, *, at_once: bool) -> None:
        now = self._context.monotonic()
        due = now if at_once else now + self._context.timing.tail
        self._tail[owner] = min(due, self._tail.get(owner, due))

    def _summaries(self, owners: Iterable[str]) -> dict[str, Summary]:
        store = self._context.store
        return {owner: Summary(store.position(owner), messages.abridged(store.state(owner))) for owner in owners}
