"""What a replica tells: its news, how far it is, and pages for those who ask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vmconv_fleet.replication import messages
from vmconv_fleet.replication.context import Shared
from vmconv_fleet.replication.messages import Digest, Live, Notice, Page, Pull, Send, Standing
from vmconv_fleet.replication.records import START, Record, restore

SOON_MS = 100
FEW = 8
"""With more neighbours than this, whole digests are told less often: there are more who tell them."""


class Teller:
    """Makes messages, and knows when digests are due.

    Live messages may be lost, so each burst of them is followed by a digest of the owners in it.
    """

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._tail: dict[str, int] = {}
        self._next = shared.monotonic() + shared.timing.digest

    def digest_soon(self) -> None:
        """Lets all hear a digest in a moment: who the neighbours are has changed."""
        self._next = min(self._next, self._shared.monotonic() + int(SOON_MS * self._crowd()))

    def digest(self, peer: str | None) -> Send:
        """Returns the digest of everything, for a neighbour or for all."""
        shared = self._shared
        near = frozenset(shared.neighbours.ids())
        at = self._standings(shared.store.positions())
        return Send(peer, messages.encode(Digest(at, True, near, shared.store.notices_hash())))

    def next_due(self) -> int:
        """Returns when the next digest is due."""
        return min(self._next, *self._tail.values()) if self._tail else self._next

    def due(self, now: int) -> list[Send]:
        """Returns the digests whose time has come."""
        if now >= self._next:
            self._next = now + int(self._shared.timing.digest * self._crowd())
            self._tail.clear()
            return [self.digest(None)]
        owners = [owner for owner, due in self._tail.items() if due <= now]
        for owner in owners:
            del self._tail[owner]
        return [Send(None, messages.encode(Digest(self._standings(owners))))] if owners else []

    def publish(self, records: Sequence[Record]) -> list[Send]:
        """Tells all neighbours what this node has written in one transaction."""
        if not records:
            return []
        self._shared.news.add(records)
        message = messages.live(records)
        self._follow_up(records[0].owner, at_once=message is None)
        return [] if message is None else [Send(None, message, messages.span(records))]

    def pass_on(self, records: Sequence[Record], source: str) -> list[Send]:
        """Tells those who do not hear it from its owner, or from who has passed it on, what has just been taken."""
        owner = records[0].owner
        targets = list(self._shared.neighbours.beyond(source, owner))
        message = messages.live(records) if targets else None
        if targets:
            self._follow_up(owner, at_once=message is None)
        return [] if message is None else [Send(target, message, messages.span(records)) for target in targets]

    def catch_up(self, owner: str) -> list[Send]:
        """Tells those who are behind how far an owner's records are here."""
        behind = self._shared.neighbours.behind(owner, self._shared.store.position(owner))
        message = messages.encode(Digest(self._standings([owner]))) if behind else b""
        return [Send(peer, message) for peer in behind]

    def evidence(self, records: Iterable[Record]) -> list[Send]:
        """Tells all of the two halves of a fork."""
        return [Send(None, messages.encode(Live([record.wire]))) for record in records]

    def notices(self, peer: str | None, wires: Sequence[bytes]) -> list[Send]:
        """Tells revocations, in as many messages as it takes."""
        sends, group = [], []
        for number, wire in enumerate(wires, 1):
            group.append(wire)
            if number == len(wires) or sum(map(len, group)) >= messages.PAGE_BYTES:
                sends.append(Send(peer, messages.encode(Notice(group))))
                group = []
        return sends

    def answer(self, peer: str, pull: Pull) -> list[Send]:
        """Answers with a window of pages, or with nothing where nothing is newer."""
        store, owner = self._shared.store, pull.owner
        position = store.position(owner)
        if max(pull.after, pull.seen) > position or pull.after == position or self._shared.trust.retired(owner):
            self._shared.problems.count("pulls-in-vain")
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

    def _crowd(self) -> float:
        """Returns how much less often digests of everything are told because many tell them."""
        return max(1.0, len(self._shared.neighbours) / FEW)

    def _follow_up(self, owner: str, *, at_once: bool) -> None:
        now = self._shared.monotonic()
        due = now if at_once else now + self._shared.timing.tail
        self._tail[owner] = min(due, self._tail.get(owner, due))

    def _standings(self, owners: Iterable[str]) -> dict[str, Standing]:
        store = self._shared.store
        return {owner: Standing(store.position(owner), messages.abridged(store.state(owner))) for owner in owners}
