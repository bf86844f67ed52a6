"""Catching up: asking a neighbour for what is missing of an owner's records, page by page.

What comes is kept aside until it is complete and then taken whole, in one transaction: between two states of an owner
there is none that anybody may see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

from vmconv_fleet.errors import FleetError, MalformedError
from vmconv_fleet.replication.messages import Page, Pull
from vmconv_fleet.replication.neighbours import MAX_OWNERS, NeighbourTable
from vmconv_fleet.replication.ownlog import sound
from vmconv_fleet.replication.problems import ProblemLog
from vmconv_fleet.replication.records import START, Position, Record, decode
from vmconv_fleet.replication.store import Store
from vmconv_fleet.replication.verifier import Verifier

SESSIONS = 4
TIMEOUT_MS = 1000
TRIES = 5
"""So often the same page is asked for, each time with twice the patience; and less where nothing has come yet."""

TRIES_AT_FIRST = 2
PATIENCE = 2
"""So many sessions in a row may fail for lack of answers before a neighbour is asked less often."""

BACKOFF_MS = 500
MAX_BACKOFF_MS = 60_000
NEVER = 1 << 62
KEPT = 1 << 20
"""So many bytes of an answer are kept in memory; when there are more, all of it is staged in the database."""

SMALL = 512
"""So many records or fewer are told to subscribers as they are, more from the database."""


class TornError(FleetError):
    """Records together are no state that their owner was in."""


class PullSession:
    """One owner's records, asked of one neighbour; `after` is how far the pages have come.

    `base` is where they begin; with START (`whole`) they replace what is there. `seen` is how far the neighbour was.
    """

    def __init__(self, owner: str, peer: str, number: int, after: Position, evidence: str | None) -> None:
        self.owner = owner
        self.peer = peer
        self.number = number
        self.after = self.base = self.since = after
        self.evidence = evidence
        self.seen = START
        self.kept: list[Record] = []
        self.staged = False
        self.deadline = 0
        self.tries = 0

    @property
    def whole(self) -> bool:
        return self.base == START

    @property
    def begun(self) -> bool:
        """Whether a page of it has come."""
        return self.staged or bool(self.kept)

    def begin_anew(self) -> None:
        self.after = self.base = self.since = self.seen = START
        self.kept = []
        self.staged = False

    def pull(self) -> Pull:
        return Pull(self.owner, self.number, self.after, self.base, self.since, self.seen)


class _Want(NamedTuple):
    due: int
    evidence: str | None


class AntiEntropy:
    """All sessions of a replica, what it wants, and whom not to ask for a while."""

    def __init__(
        self, store: Store, verifier: Verifier, neighbours: NeighbourTable, problems: ProblemLog, random: Random
    ) -> None:
        self._store = store
        self._verifier = verifier
        self._neighbours = neighbours
        self._problems = problems
        self._random = random
        self._wants: dict[str, _Want] = {}
        self._sessions: dict[str, PullSession] = {}
        self._failures: dict[tuple[str, str], tuple[int, int]] = {}

    def want(self, owner: str, due: int, *, evidence: str | None = None) -> None:
        """Asks for what the owner has more, from whoever has it, at the time `due`; `evidence`: all, from this peer."""
        known = self._wants.get(owner)
        if owner in self._sessions or (known is None and len(self._wants) >= MAX_OWNERS):
            return
        if known is not None:
            due, evidence = min(due, known.due), evidence or known.evidence
        self._wants[owner] = _Want(due, evidence)

    def wants(self, owner: str, now: int) -> bool:
        """Whether the owner's records are being asked for, or will be as soon as possible."""
        want = self._wants.get(owner)
        return owner in self._sessions or (want is not None and want.due <= now)

    def forget(self, owner: str) -> None:
        self._wants.pop(owner, None)
        self._sessions.pop(owner, None)

    def reset(self) -> None:
        """Gives up all sessions: what was staged is not there any more."""
        self._sessions.clear()

    def next_due(self) -> int:
        """Returns when `start_due` has something to do."""
        deadlines = [session.deadline for session in self._sessions.values()]
        if len(self._sessions) < SESSIONS:
            deadlines += [want.due for want in self._wants.values()]
        return min(deadlines, default=NEVER)

    def start_due(self, now: int) -> Iterator[tuple[str, Pull]]:
        """Yields what to ask whom: new sessions, and those whose answer has not come again, of somebody else."""
        for late in [session for session in self._sessions.values() if session.deadline <= now]:
            self._problems.count("pull-timeouts")
            if late.tries < (TRIES if late.begun else TRIES_AT_FIRST) and late.peer in self._neighbours:
                yield late.peer, self.ask(late, now)
            else:
                self.fail(late, now, patience=PATIENCE)
        for owner in [owner for owner, want in self._wants.items() if want.due <= now]:
            if len(self._sessions) >= SESSIONS:
                break
            session = self._start(owner, self._wants.pop(owner).evidence, now)
            if session is not None:
                yield session.peer, self.ask(session, now)

    def session(self, peer: str, page: Page) -> PullSession | None:
        """Returns the session that a page belongs to, if it is the next page of one."""
        session = self._sessions.get(page.owner)
        if session is None or (session.peer, session.number) != (peer, page.session):
            return None
        if page.base == page.after == START:
            if session.staged:
                self._store.unstage(session.number)
            session.begin_anew()
        # After a page of a later state, one of an earlier state may lack what has moved behind it in between; and where
        # the answerer has begun anew, the rest may lack what was deleted after the first page that has come.
        same = (page.base, page.after) == (session.base, session.after) and session.since in (START, page.since)
        return session if same and page.seen >= session.seen else None

    def take(self, session: PullSession, page: Page, wall: int, now: int) -> list[Record] | None:
        """Verifies a page; returns its records if it is the last one, None if `ask` has to ask for another.

        MalformedError, ForgedError: it is not what it should be.
        """
        if page.certificates > len(page.wires):
            raise MalformedError(f"page of {len(page.wires)} records has {page.certificates} certificates")
        records = self._verifier.ascending(session.owner, session.after, map(decode, page.wires[page.certificates :]))
        self._verifier.learn(map(decode, page.wires[: page.certificates]))
        self._verifier.admit(records, wall)
        if not page.more:
            return records
        if not records:
            raise MalformedError("page without records says that there are more")
        self._keep(session, records)
        session.after = records[-1].position
        session.seen = page.seen
        session.since = page.seen if session.since == START else session.since
        session.tries = 0
        session.deadline = now + TIMEOUT_MS
        return None

    def finish(self, session: PullSession, records: Sequence[Record]) -> int:
        """Takes the complete answer; returns how many records it has changed.

        TornError: it is no state of its owner; nothing was changed.
        """
        owner, store = session.owner, self._store
        with store.atomic():
            if session.whole and session.staged:
                store.stage(session.number, records)
                count = store.replace_by_staged(owner, session.number)
            else:
                if session.whole:
                    store.clear(owner)
                count = self._extend(session, records)
            if not sound(store, owner):
                at = tuple(store.position(owner))
                raise TornError(f"records of {owner} up to {at} are no state that it was in")
            store.purge(owner, store.history(owner).floor)
        return count

    def rows(self, session: PullSession, records: Sequence[Record], after: int = 0) -> Iterator[Record]:
        """Yields all records of a complete answer that come after a seq, in order."""
        if session.staged:
            yield from self._store.staged(session.number, after)
        yield from (record for record in (*session.kept, *records) if record.seq > after)

    def end(self, session: PullSession) -> None:
        """Ends a session that has succeeded."""
        self._failures.pop((session.peer, session.owner), None)
        self._close(session)

    def fail(self, session: PullSession, now: int, *, patience: int = 0) -> None:
        """Ends a session without success: its peer is not asked again for a while, others at once."""
        if len(self._failures) >= MAX_OWNERS:
            self._failures = {key: failed for key, failed in self._failures.items() if failed[1] > now}
        count = self._failures.get((session.peer, session.owner), (0, 0))[0] + 1
        pause = min(BACKOFF_MS << min(count, 20), MAX_BACKOFF_MS) * self._random.uniform(0.5, 1.0)
        self._failures[session.peer, session.owner] = count, now + int(pause) * (count > patience)
        self._close(session)
        self.want(session.owner, now, evidence=session.evidence)

    def _keep(self, session: PullSession, records: Sequence[Record]) -> None:
        session.kept += records
        if session.staged or sum(len(record.wire) for record in session.kept) > KEPT:
            self._store.stage(session.number, session.kept)
            session.staged = True
            session.kept = []

    def _extend(self, session: PullSession, records: Sequence[Record]) -> int:
        count = 0

        def counted() -> Iterator[Record]:
            nonlocal count
            for record in self.rows(session, records, self._store.position(session.owner).seq):
                count += 1
                yield record

        self._store.extend(session.owner, counted())
        return count

    def _start(self, owner: str, evidence: str | None, now: int) -> PullSession | None:
        if self._verifier.retired(owner):
            return None
        position = START if evidence else self._store.position(owner)
        if evidence is not None:
            peers = [evidence] if evidence in self._neighbours else []
        else:
            peers = self._neighbours.ahead(owner, position)
        able = [peer for peer in peers if self._failures.get((peer, owner), (0, 0))[1] <= now]
        if not able:
            if peers:
                self._wants[owner] = _Want(min(self._failures[peer, owner][1] for peer in peers), evidence)
            return None
        session = PullSession(owner, self._random.choice(able), self._random.randrange(1, 1 << 48), position, evidence)
        self._sessions[owner] = session
        return session

    def ask(self, session: PullSession, now: int) -> Pull:
        """Returns what to ask for next."""
        session.tries += 1
        session.deadline = now + (TIMEOUT_MS << session.tries - 1)
        return session.pull()

    def _close(self, session: PullSession) -> None:
        if session.staged:
            self._store.unstage(session.number)
        self._sessions.pop(session.owner, None)
