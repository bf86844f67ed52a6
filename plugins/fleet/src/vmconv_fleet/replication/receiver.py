"""Incoming messages of a replica."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial

from vmconv_fleet.errors import FleetError, MalformedError
from vmconv_fleet.replication import epochs, messages
from vmconv_fleet.replication.anti_entropy import SMALL, PullSession, TornError
from vmconv_fleet.replication.context import ReplicaContext
from vmconv_fleet.replication.epochs import history_of
from vmconv_fleet.replication.messages import Digest, Live, Message, Notice, Page, Pull, Send, Summary
from vmconv_fleet.replication.ownlog import promised, sound
from vmconv_fleet.replication.publisher import Publisher
from vmconv_fleet.replication.records import START, Position, Record, decode, restore
from vmconv_fleet.replication.recovery import EpochRecovery
from vmconv_fleet.replication.reorder_buffer import EarlyMessage, ReorderBuffer
from vmconv_fleet.replication.verifier import ForgedError, consecutive


class Receiver:
    """Handles messages, one at a time. Raises MalformedError or ForgedError, and changes nothing, for an invalid
    message.
    """

    def __init__(self, context: ReplicaContext, publisher: Publisher, recovery: EpochRecovery) -> None:
        self._context = context
        self._publisher = publisher
        self._recovery = recovery
        self._buffer = ReorderBuffer()

    def handle(self, peer: str, message: Message) -> list[Send]:
        """Returns the messages to send in response."""
        match message:
            case Live(wires):
                return self._live(peer, wires)
            case Digest():
                return self._digest(peer, message)
            case Pull():
                return self._publisher.answer(peer, message)
            case Page():
                return self._page(peer, message)
            case Notice(wires):
                records = [decode(wire) for wire in wires]
                self._context.verifier.learn(records)
                self._context.forks.learn(records, self._context.now())
                return []

    def _live(self, peer: str, wires: Sequence[bytes]) -> list[Send]:
        """Applies live records, and buffered ones that are next after them."""
        first = decode(wires[0])
        before = self._context.store.position(first.owner)
        sends = self._apply(peer, first, wires)
        taken = self._context.store.position(first.owner) != before
        return [*sends, *self._release(first.owner)] if taken else sends

    def _apply(self, peer: str, first: Record, wires: Sequence[bytes]) -> list[Send]:
        context, owner = self._context, first.owner
        if context.trust.retired(owner):
            context.problems.count("of-retired")
            return []
        position = context.store.position(owner)
        if owner == context.node or not _reaches(first, position):
            return self._buffer_early(peer, first, wires)
        records = context.verifier.ascending(owner, START, (first, *map(decode, wires[1:])))
        if not consecutive(records):
            raise MalformedError(f"live records of {owner} have gaps")
        context.neighbours[peer].note_position(owner, records[-1].position)
        fresh = records if first.position > position else [one for one in records if one.position > position]
        sends = self._examine_known(records[: len(records) - len(fresh)])
        return [*sends, *self._accept(peer, fresh)] if fresh else sends

    def _buffer_early(self, peer: str, first: Record, wires: Sequence[bytes]) -> list[Send]:
        """Buffers live records behind a gap and schedules a pull; or they are this node's own."""
        context, owner = self._context, first.owner
        if first.position <= context.store.position(owner):
            return self._examine_known([first])
        context.neighbours[peer].note_position(owner, first.position)
        if owner != context.node:
            context.anti_entropy.want(owner, context.monotonic(), teller=peer)
            self._buffer.keep(first, EarlyMessage(peer, wires))
        else:
            # If this process has begun to write, another one has written them.
            evidence = peer if self._recovery.has_begun else None
            context.anti_entropy.want(owner, context.monotonic(), evidence=evidence)
        return []

    def _examine_known(self, records: Sequence[Record]) -> list[Send]:
        """Looks for forks among records that are not new."""
        context = self._context
        if records:
            context.problems.count("duplicates")
        other = [record for record in records if context.forks.counterpart(record)]
        if not other:
            return []
        context.verifier.admit(other, context.now())
        self._keep_halves(other)
        return []

    def _keep_halves(self, records: Iterable[Record]) -> bool:
        """Keeps the first record that contradicts a stored one as a proof; returns whether there is one."""
        forks, now = self._context.forks, self._context.now()
        halves = ((forks.counterpart(record), record) for record in records)
        return any(forks.keep((ours, theirs), now) for ours, theirs in halves if ours is not None)

    def _accept(self, peer: str, fresh: Sequence[Record]) -> list[Send]:
        """Applies the next records of an owner and forwards them."""
        context, owner = self._context, fresh[0].owner
        context.verifier.admit(fresh, context.now())
        try:
            with context.store.atomic():
                context.store.extend(owner, fresh)
                if promised(fresh[-1]) != context.store.state(owner):
                    raise TornError(f"live records of {owner} do not follow the local ones")
                if any(record.kind == epochs.KIND for record in fresh):
                    context.store.purge(owner, context.store.history(owner).floor)
        except TornError:
            context.problems.count("torn-live")
            context.anti_entropy.want(owner, context.monotonic(), evidence=peer)
            return []
        context.feed.add(fresh)
        return self._publisher.forward(fresh, peer)

    def _release(self, owner: str) -> list[Send]:
        """Applies buffered records that are next now."""
        sends: list[Send] = []
        while (early := self._buffer.following(owner, self._context.store.position(owner))) is not None:
            if early.peer not in self._context.neighbours:
                continue
            try:
                sends += self._apply(early.peer, decode(early.wires[0]), early.wires)
            except (MalformedError, ForgedError) as exc:
                self._context.problems.report(exc.kind, f"from {early.peer}: {exc}")
        return sends

    def _digest(self, peer: str, digest: Digest) -> list[Send]:
        context, now = self._context, self._context.monotonic()
        neighbour = context.neighbours[peer]
        neighbour.note_digest(digest.at, digest.whole)
        due = now if digest.whole else now + context.timing.tail // 2
        for owner, summary in digest.at.items():
            self._compare(peer, owner, summary, due)
        if not digest.whole:
            return []
        neighbour.reported, neighbour.near = True, digest.near
        sends = []
        if digest.notices != context.store.notices_hash():
            sends += self._publisher.notices(peer, context.store.notices())
            sends += self._publisher.proofs(peer, context.store.proofs().values())
        behind = any(neighbour.position(owner) < position for owner, position in context.store.positions().items())
        if behind and now - neighbour.answered >= context.timing.digest // 5 * max(1, len(context.neighbours) // 4):
            neighbour.answered = now
            sends.append(self._publisher.digest(peer))
        return sends

    def _compare(self, peer: str, owner: str, theirs: Summary, due: int) -> None:
        context = self._context
        ours = context.store.position(owner)
        if context.trust.retired(owner):
            return
        if owner == context.node and self._is_foreign(theirs.position):
            self._examine(peer, owner, theirs, due)
        elif theirs.position > ours and owner not in context.forks:
            context.anti_entropy.want(owner, due, teller=peer)
        elif theirs.position > ours or (theirs.position == ours and self._contradicts(owner, theirs)):
            self._examine(peer, owner, theirs, due)

    def _examine(self, peer: str, owner: str, theirs: Summary, due: int) -> None:
        """Schedules a pull of all that a neighbour has of an owner, once for each of its states."""
        context = self._context
        if not context.anti_entropy.is_busy(owner) and context.forks.unexamined(peer, owner, theirs):
            context.anti_entropy.want(owner, due, evidence=peer)

    def _is_foreign(self, position: Position) -> bool:
        """Returns whether a neighbour's position in this node's records is none that the node has been at."""
        ours = self._context.store.position(self._context.node)
        if position in (START, ours) or (position > ours and not self._recovery.has_begun):
            return False
        return position > ours or not self._context.store.history(self._context.node).follows(position)

    def _contradicts(self, owner: str, theirs: Summary) -> bool:
        return theirs.state != messages.abridged(self._context.store.state(owner))

    def _page(self, peer: str, page: Page) -> list[Send]:
        anti_entropy = self._context.anti_entropy
        session = anti_entropy.session(peer, page)
        if session is None:
            self._context.problems.count("stray-pages")
            return []
        if self._context.verifier.retired(session.owner):
            anti_entropy.forget(session.owner)
            return []
        now = self._context.monotonic()
        try:
            records = anti_entropy.accept(session, page, self._context.now(), now)
            if records is None:
                return [Send(peer, messages.encode(anti_entropy.ask(session, now)))] if page.ask else []
            if not session.whole and not self._continues(session, records):
                # A live record arrived during the pull, and its owner has lost it since: the answer does not continue
                # from it.
                anti_entropy.end(session)
                anti_entropy.want(session.owner, now)
                return []
            sends = self._complete(session, records)
        except TornError as exc:
            # Its history has forked within an epoch, or a neighbour has spoiled the answer.
            session.evidence = peer
            anti_entropy.fail(session, now)
            self._context.problems.report("torn", f"from {peer}: {exc}")
            return []
        except FleetError:
            anti_entropy.fail(session, now)
            raise
        anti_entropy.end(session)
        return [*sends, *self._release(session.owner)]

    def _complete(self, session: PullSession, records: Sequence[Record]) -> list[Send]:
        """Applies a complete answer if it is newer than the local records, or if these are no state of their owner.

        It is not applied if it does not contain the local records: then the owner has forked.
        """
        context, owner = self._context, session.owner
        last = records[-1].position if records else session.after
        ours = context.store.position(owner)
        forked = False
        if session.whole and ours != START:
            forked = self._keep_halves(context.anti_entropy.rows(session, records))
        if owner == context.node and (forked or self._recovery.has_begun or not self._continues(session, records)):
            return self._keep_own(session, records)
        if last > ours and not (forked or self._continues(session, records)):
            forked = self._keep_fork(session, records)
        if not forked and (last > ours or (last == ours and not sound(context.store, owner))):
            self._replace(session, records)
            return self._publisher.notify_behind(owner)
        return []

    def _keep_fork(self, session: PullSession, records: Sequence[Record]) -> bool:
        """Keeps the proof that an answer does not contain the local records; returns whether there is one."""
        store, forks, now = self._context.store, self._context.forks, self._context.now()
        last = deque(self._context.anti_entropy.rows(session, records), maxlen=1)
        theirs = [row for row in (self._history(session, records), *last) if row is not None]
        wire = store.at(session.owner, store.position(session.owner).seq)
        ours = [store.get(session.owner, epochs.KIND, epochs.ID), None if wire is None else restore(wire)]
        pairs = ((one, other) for one in ours if one is not None for other in theirs)
        return any(forks.keep(pair, now) for pair in pairs)

    def _keep_own(self, session: PullSession, records: Sequence[Record]) -> list[Send]:
        """Keeps records of this node that this process has not written, and proves the fork."""
        context = self._context
        history, position = context.store.history(context.node), context.store.position(context.node)
        rows = partial(context.anti_entropy.rows, session, records)
        with context.store.atomic():
            last = context.store.others.keep(
                row for row in rows() if not history.follows(row.position) or context.forks.counterpart(row)
            )
            if last is None and self._recovery.has_begun:
                last = context.store.others.keep(row for row in rows() if row.position > position)
        if last is None:
            return []
        context.forks.report_dropped()
        if context.node in context.forks or self._keep_fork(session, records) or not self._recovery.has_begun:
            return []
        # Their history contains this one, but another process has written it: the next epoch says that they part here.
        begun = self._recovery.begin(last.epoch)
        context.forks.keep((last, begun[0]), context.now())
        return self._publisher.publish(begun)

    def _continues(self, session: PullSession, records: Sequence[Record]) -> bool:
        """Returns whether a complete answer continues from the local records, so that none of them is lost."""
        ours = self._context.store.position(session.owner)
        if ours in (START, session.base):
            return True
        history = self._history(session, records)
        # An incremental answer without a history record means that no epoch has begun.
        return (history is None and not session.whole) or history_of(history).follows(ours)

    def _history(self, session: PullSession, records: Sequence[Record]) -> Record | None:
        """Returns the owner's record of its epochs in a complete answer, if it has one."""
        rows = self._context.anti_entropy.rows(session, records)
        return next((row for row in rows if row.kind == epochs.KIND), None)

    def _replace(self, session: PullSession, records: Sequence[Record]) -> None:
        context, owner = self._context, session.owner
        after = START if session.whole else context.store.position(owner)
        with context.store.atomic():
            count = context.anti_entropy.finish(session, records)
            if owner == context.node:
                context.store.save("recovered", 1)
            context.forks.refresh()
        if count <= SMALL and not session.staged:
            context.feed.add(list(context.anti_entropy.rows(session, records, after.seq)))
        else:
            context.feed.add_stored(owner, after.seq)


def _reaches(first: Record, position: Position) -> bool:
    """Returns whether records that begin with this one leave no gap after the position."""
    return first.position <= position or (first.epoch == position.epoch and first.seq == position.seq + 1)
