"""What a replica does with the messages of its neighbours."""

from __future__ import annotations

from collections.abc import Sequence

from vmconv_fleet.errors import FleetError, MalformedError
from vmconv_fleet.replication import epochs, messages
from vmconv_fleet.replication.antientropy import SMALL, Session, TornError
from vmconv_fleet.replication.context import Shared
from vmconv_fleet.replication.epochs import history_of
from vmconv_fleet.replication.messages import Digest, Live, Message, Notice, Page, Pull, Send, Standing
from vmconv_fleet.replication.ownlog import promised, sound
from vmconv_fleet.replication.publisher import Teller
from vmconv_fleet.replication.records import START, Position, Record, decode
from vmconv_fleet.replication.recovery import Recovery
from vmconv_fleet.replication.reorder import Early, Held
from vmconv_fleet.replication.verifier import ForgedError, consecutive


class Reception:
    """Takes messages, one at a time. MalformedError, ForgedError: it is not what it should be, and changed nothing."""

    def __init__(self, shared: Shared, teller: Teller, recovery: Recovery) -> None:
        self._shared = shared
        self._teller = teller
        self._recovery = recovery
        self._held = Held()

    def take(self, peer: str, message: Message) -> list[Send]:
        """Returns what to send because of a message."""
        match message:
            case Live(wires):
                return self._live(peer, wires)
            case Digest():
                return self._digest(peer, message)
            case Pull():
                return self._teller.answer(peer, message)
            case Page():
                return self._page(peer, message)
            case Notice(wires):
                self._shared.gate.learn(decode(wire) for wire in wires)
                return []

    def _live(self, peer: str, wires: Sequence[bytes]) -> list[Send]:
        """Takes live records, and those that had come before them and are next now."""
        first = decode(wires[0])
        before = self._shared.store.position(first.owner)
        sends = self._next(peer, first, wires)
        taken = self._shared.store.position(first.owner) != before
        return [*sends, *self._release(first.owner)] if taken else sends

    def _next(self, peer: str, first: Record, wires: Sequence[bytes]) -> list[Send]:
        shared, owner = self._shared, first.owner
        if shared.trust.retired(owner):
            shared.problems.count("of-retired")
            return []
        position = shared.store.position(owner)
        if owner == shared.node or not _reaches(first, position):
            return self._early(peer, first, wires)
        records = shared.gate.ascending(owner, START, (first, *map(decode, wires[1:])))
        if not consecutive(records):
            raise MalformedError(f"live records of {owner} have gaps")
        shared.neighbours[peer].hear(owner, records[-1].position)
        fresh = records if first.position > position else [one for one in records if one.position > position]
        sends = self._known(records[: len(records) - len(fresh)])
        return [*sends, *self._accept(peer, fresh)] if fresh else sends

    def _early(self, peer: str, first: Record, wires: Sequence[bytes]) -> list[Send]:
        """Keeps what does not follow what is here, and asks for what is between; or it is this node's own."""
        shared, owner = self._shared, first.owner
        if first.position <= shared.store.position(owner):
            return self._known([first])
        shared.neighbours[peer].hear(owner, first.position)
        shared.catchup.want(owner, shared.monotonic())
        if owner != shared.node:
            self._held.keep(first, Early(peer, wires))
        return []

    def _known(self, records: Sequence[Record]) -> list[Send]:
        """Looks at records that are not new: known otherwise, they are a fork, if their owner signed them."""
        shared = self._shared
        if records:
            shared.problems.count("duplicates")
        other = [record for record in records if shared.forks.counterpart(record)]
        if not other:
            return []
        shared.gate.admit(other, shared.now())
        if other[0].owner == shared.node:
            self._recovery.supersede(other[-1].position)
        return self._teller.evidence(shared.forks.keep(other, shared.now()))

    def _accept(self, peer: str, fresh: Sequence[Record]) -> list[Send]:
        """Takes records that are next, and passes them on."""
        shared, owner = self._shared, fresh[0].owner
        shared.gate.admit(fresh, shared.now())
        try:
            with shared.store.atomic():
                shared.store.extend(owner, fresh)
                if promised(fresh[-1]) != shared.store.state(owner):
                    raise TornError(f"live records of {owner} do not follow what is here")
                if any(record.kind == epochs.KIND for record in fresh):
                    shared.store.purge(owner, shared.store.history(owner).floor)
        except TornError:
            shared.problems.count("torn-live")
            shared.catchup.want(owner, shared.monotonic(), evidence=peer)
            return []
        shared.news.add(fresh)
        return self._teller.pass_on(fresh, peer)

    def _release(self, owner: str) -> list[Send]:
        """Takes what had come too early and is next now."""
        sends: list[Send] = []
        while (early := self._held.following(owner, self._shared.store.position(owner))) is not None:
            if early.peer not in self._shared.neighbours:
                continue
            try:
                sends += self._next(early.peer, decode(early.wires[0]), early.wires)
            except (MalformedError, ForgedError) as exc:
                self._shared.problems.report(exc.kind, f"from {early.peer}: {exc}")
        return sends

    def _digest(self, peer: str, digest: Digest) -> list[Send]:
        shared, now = self._shared, self._shared.monotonic()
        neighbour = shared.neighbours[peer]
        neighbour.hear_all(digest.at, digest.whole)
        due = now if digest.whole else now + shared.timing.tail // 2
        for owner, standing in digest.at.items():
            self._compare(peer, owner, standing, due)
        if not digest.whole:
            return []
        neighbour.told, neighbour.near = True, digest.near
        sends = []
        if digest.notices != shared.store.notices_hash():
            sends += self._teller.notices(peer, shared.store.notices())
        behind = any(neighbour.position(owner) < position for owner, position in shared.store.positions().items())
        if behind and now - neighbour.answered >= shared.timing.digest // 5 * max(1, len(shared.neighbours) // 4):
            neighbour.answered = now
            sends.append(self._teller.digest(peer))
        return sends

    def _compare(self, peer: str, owner: str, theirs: Standing, due: int) -> None:
        shared = self._shared
        ours = shared.store.position(owner)
        if owner == shared.node:
            ours = max(ours, self._recovery.settled)
        if theirs.position < ours or shared.trust.retired(owner):
            return
        if theirs.position > ours:
            shared.catchup.want(owner, due)
        elif self._contradicts(owner, theirs) and shared.forks.unexamined(peer, owner, theirs):
            shared.catchup.want(owner, due, evidence=peer)

    def _contradicts(self, owner: str, theirs: Standing) -> bool:
        return theirs.state != messages.abridged(self._shared.store.state(owner))

    def _page(self, peer: str, page: Page) -> list[Send]:
        catchup = self._shared.catchup
        session = catchup.session(peer, page)
        if session is None:
            self._shared.problems.count("stray-pages")
            return []
        if self._shared.gate.retired(session.owner):
            catchup.forget(session.owner)
            return []
        now = self._shared.monotonic()
        try:
            records = catchup.take(session, page, self._shared.now(), now)
            if records is None:
                return [Send(peer, messages.encode(catchup.ask(session, now)))] if page.ask else []
            if not session.whole and not self._goes_on(session, records):
                # A live record came while the pages did, and its owner has lost it since: the rest does not follow it.
                catchup.end(session)
                catchup.want(session.owner, now)
                return []
            sends = self._complete(session, records)
        except TornError as exc:
            catchup.fail(session, now)
            self._shared.problems.report("torn", f"from {peer}: {exc}")
            return []
        except FleetError:
            catchup.fail(session, now)
            raise
        catchup.end(session)
        return [*sends, *self._release(session.owner)]

    def _complete(self, session: Session, records: Sequence[Record]) -> list[Send]:
        """Takes a complete answer if it is newer than what is here, or if what is here is no state of its owner."""
        shared, owner = self._shared, session.owner
        last = records[-1].position if records else session.after
        ours = shared.store.position(owner)
        halves = []
        if session.whole and ours != START:
            halves = shared.forks.keep(shared.catchup.rows(session, records), shared.now())
        sends = self._teller.evidence(halves)
        if owner == shared.node and (self._recovery.serving or not self._goes_on(session, records)):
            if halves or last > ours:
                self._recovery.supersede(last)
            return sends
        newer = last > ours and (last.epoch > ours.epoch or not halves)
        if newer or (last == ours and not halves and not sound(shared.store, owner)):
            self._replace(session, records)
            sends += self._teller.catch_up(owner)
        return sends

    def _goes_on(self, session: Session, records: Sequence[Record]) -> bool:
        """Whether a complete answer goes on from what is here, so that nothing that was written here is lost by it."""
        ours = self._shared.store.position(session.owner)
        if ours in (START, session.base):
            return True
        rows = self._shared.catchup.rows(session, records)
        history = next((row for row in rows if row.kind == epochs.KIND), None)
        # Where only what is new was asked for, no history means that no epoch has begun since.
        return (history is None and not session.whole) or history_of(history).follows(ours)

    def _replace(self, session: Session, records: Sequence[Record]) -> None:
        shared, owner = self._shared, session.owner
        after = START if session.whole else shared.store.position(owner)
        with shared.store.atomic():
            count = shared.catchup.finish(session, records)
            if owner == shared.node:
                shared.store.save("recovered", 1)
        if count <= SMALL and not session.staged:
            shared.news.add(list(shared.catchup.rows(session, records, after.seq)))
        else:
            shared.news.add_all(owner, after.seq)


def _reaches(first: Record, position: Position) -> bool:
    """Whether records that begin with this one leave no gap after the position."""
    return first.position <= position or (first.epoch == position.epoch and first.seq == position.seq + 1)
