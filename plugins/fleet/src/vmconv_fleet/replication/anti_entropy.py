"""Anti-entropy: pulls missing records of an owner from a neighbour, page by page.

Pages are kept aside until the answer is complete. The answer is then applied in one transaction, so that no reader sees
a state that the owner never had.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

from vmconv_fleet.errors import FleetError, MalformedError
from vmconv_fleet.replication import messages
from vmconv_fleet.replication.messages import Page, Pull
from vmconv_fleet.replication.neighbours import MAX_OWNERS, NeighbourTable
from vmconv_fleet.replication.ownlog import sound
from vmconv_fleet.replication.problems import ProblemLog
from vmconv_fleet.replication.records import START, Position, Record, decode
from vmconv_fleet.replication.store import Store
from vmconv_fleet.replication.verifier import Verifier

SESSIONS = 4
"""The most pulls from one neighbour at a time, so that one that does not answer delays no pull from others."""

MAX_SESSIONS = 32
MAX_TOLD = 1024
"""The most owners to pull of which only one and the same neighbour has told."""

TIMEOUT_MS = 1000
TRIES = 5
"""The number of times that a page is requested. Each retry waits twice as long."""

TRIES_AT_FIRST = 2
PATIENCE = 2
"""The number of sessions in a row that may time out before a neighbour is asked less often."""

BACKOFF_MS = 500
MAX_BACKOFF_MS = 60_000
NEVER = 1 << 62
SHORTEST = 8
"""The part of a page that each one but the last has at least: else a neighbour could take years for an owner's records,
which are asked of nobody else meanwhile."""

KEPT = 1 << 20
"""Bytes of an answer that are kept in memory; larger answers are staged in the database."""

SMALL = 512
"""Up to this many records are passed to subscribers from memory, more are read from the database."""


class TornError(FleetError):
    """Records that do not form a state of their owner."""


class _Want(NamedTuple):
    """A scheduled pull; `teller` is the neighbour that told of an owner without records here."""

    due: int
    evidence: str | None
    teller: str | None


class PullSession:
    """One pull of an owner's records from one neighbour; `after` is the position reached so far.

    `base` is the position where the pages begin; from START (`whole`) they replace the local records. `seen` is the
    neighbour's own position.
    """

    def __init__(self, owner: str, peer: str, number: int, after: Position, want: _Want) -> None:
        self.owner = owner
        self.peer = peer
        self.number = number
        self.after = self.base = self.since = after
        self.evidence = want.evidence
        self.teller = want.teller
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
        """Returns whether a page has arrived."""
        return self.staged or bool(self.kept)

    def restart(self) -> None:
        self.after = self.base = self.since = self.seen = START
        self.kept = []
        self.staged = False

    def pull(self) -> Pull:
        return Pull(self.owner, self.number, self.after, self.base, self.since, self.seen)


class AntiEntropy:
    """The sessions of a replica, the owners to pull, and the neighbours that failed recently."""

    def __init__(
        self, store: Store, verifier: Verifier, neighbours: NeighbourTable, problems: ProblemLog, random: Random
    ) -> None:
        self._store = store
        self._verifier = verifier
        self._neighbours = neighbours
        self._problems = problems
        self._random = random
        self._wants: dict[str, _Want] = {}
        self._told: Counter[str | None] = Counter()
        # Owners whose pulls wait until a neighbour has answered another one.
        self._blocked: set[str] = set()
        self._sessions: dict[str, PullSession] = {}
        self._failures: dict[tuple[str, str], tuple[int, int]] = {}

    def want(self, owner: str, due: int, *, evidence: str | None = None, teller: str | None = None) -> None:
        """Schedules a pull of the owner's newer records at `due`; with `evidence`, of all records from that peer.

        `teller` is the neighbour that told of it. One neighbour makes room for few owners without records here.
        """
        known = self._wants.get(owner)
        if owner in self._sessions:
            return
        if known is not None:
            self._wants[owner] = known._replace(due=min(due, known.due), evidence=evidence or known.evidence)
            return
        teller = teller if self._store.position(owner) == START else None
        if len(self._wants) < MAX_OWNERS and (teller is None or self._told[teller] < MAX_TOLD):
            self._schedule(owner, _Want(due, evidence, teller))

    def _schedule(self, owner: str, want: _Want) -> None:
        self._wants[owner] = want
        self._told[want.teller] += 1

    def _unschedule(self, owner: str) -> _Want | None:
        want = self._wants.pop(owner, None)
        self._blocked.discard(owner)
        if want is not None:
            self._told[want.teller] -= 1
            if not self._told[want.teller]:
                del self._told[want.teller]
        return want

    def wants(self, owner: str, now: int) -> bool:
        """Returns whether a pull of the owner's records runs or is due."""
        want = self._wants.get(owner)
        return owner in self._sessions or (want is not None and want.due <= now)

    def is_busy(self, owner: str) -> bool:
        """Returns whether a pull of the owner's records runs or is scheduled, so that `want` may change nothing."""
        return owner in self._wants or owner in self._sessions

    def forget(self, owner: str) -> None:
        self._unschedule(owner)
        self._sessions.pop(owner, None)
        self._blocked.clear()

    def reset(self) -> None:
        """Drops all sessions, because their staged records are gone."""
        self._sessions.clear()
        self._blocked.clear()

    def next_due(self) -> int:
        """Returns when `start_due` has something to do."""
        deadlines = [session.deadline for session in self._sessions.values()]
        if len(self._sessions) < MAX_SESSIONS:
            deadlines += [want.due for owner, want in self._wants.items() if owner not in self._blocked]
        return min(deadlines, default=NEVER)

    def start_due(self, now: int) -> Iterator[tuple[str, Pull]]:
        """Yields `(peer, pull)` for new sessions and for retries with another peer."""
        for late in [session for session in self._sessions.values() if session.deadline <= now]:
            self._problems.count("pull-timeouts")
            if late.tries < (TRIES if late.begun else TRIES_AT_FIRST) and late.peer in self._neighbours:
                yield late.peer, self.ask(late, now)
            else:
                self.fail(late, now, patience=PATIENCE)
        for owner in [owner for owner, want in self._wants.items() if want.due <= now and owner not in self._blocked]:
            if len(self._sessions) >= MAX_SESSIONS:
                break
            session = self._start(owner, self._wants[owner], now)
            if session is not None:
                yield session.peer, self.ask(session, now)

    def session(self, peer: str, page: Page) -> PullSession | None:
        """Returns the session of a page; None unless the page is the next one of a session."""
        session = self._sessions.get(page.owner)
        if session is None or (session.peer, session.number) != (peer, page.session):
            return None
        if page.base == page.after == START:
            if session.staged:
                self._store.unstage(session.number)
            session.restart()
        # A page of an earlier state may lack records that have moved behind the reader since. Where the neighbour
        # restarted, its pages may lack records that were deleted after the first page.
        same = (page.base, page.after) == (session.base, session.after) and session.since in (START, page.since)
        return session if same and page.seen >= session.seen else None

    def accept(self, session: PullSession, page: Page, wall: int, now: int) -> list[Record] | None:
        """Verifies a page and returns the records if it is the last page; None: `ask` requests the next one.

        Raises MalformedError or ForgedError if the page is not valid.
        """
        if page.certificates > len(page.wires):
            raise MalformedError(f"page of {len(page.wires)} records has {page.certificates} certificates")
        records = self._verifier.ascending(session.owner, session.after, map(decode, page.wires[page.certificates :]))
        self._verifier.learn(map(decode, page.wires[: page.certificates]))
        self._verifier.admit(records, wall)
        if not page.more:
            return records
        if (size := sum(map(len, page.wires[page.certificates :]))) < messages.PAGE_BYTES // SHORTEST:
            raise MalformedError(f"page of {size} bytes announces more pages")
        self._keep(session, records)
        session.after = records[-1].position
        session.seen = page.seen
        session.since = page.seen if session.since == START else session.since
        session.tries = 0
        session.deadline = now + TIMEOUT_MS
        return None

    def finish(self, session: PullSession, records: Sequence[Record]) -> int:
        """Applies a complete answer and returns the number of changed records.

        Raises TornError, and changes nothing, if the records do not form a state of their owner.
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
                raise TornError(f"records of {owner} up to {at} are not a state of the owner")
            store.purge(owner, store.history(owner).floor)
        return count

    def rows(self, session: PullSession, records: Sequence[Record], after: int = 0) -> Iterator[Record]:
        """Yields the records of a complete answer behind a seq, in order."""
        if session.staged:
            yield from self._store.staged(session.number, after)
        yield from (record for record in (*session.kept, *records) if record.seq > after)

    def end(self, session: PullSession) -> None:
        """Ends a successful session."""
        self._failures.pop((session.peer, session.owner), None)
        self._close(session)

    def fail(self, session: PullSession, now: int, *, patience: int = 0) -> None:
        """Ends a failed session. Its peer is not asked again for a while; other peers are asked at once."""
        if len(self._failures) >= MAX_OWNERS:
            self._failures = {key: failed for key, failed in self._failures.items() if failed[1] > now}
        count = self._failures.get((session.peer, session.owner), (0, 0))[0] + 1
        pause = min(BACKOFF_MS << min(count, 20), MAX_BACKOFF_MS) * self._random.uniform(0.5, 1.0)
        self._failures[session.peer, session.owner] = count, now + int(pause) * (count > patience)
        self._close(session)
        self.want(session.owner, now, evidence=session.evidence, teller=session.teller)

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

    def _start(self, owner: str, want: _Want, now: int) -> PullSession | None:
        """Begins the scheduled pull, unless it is not possible, or not yet."""
        evidence = want.evidence
        position = START if evidence else self._store.position(owner)
        if self._verifier.retired(owner):
            peers = []
        elif evidence is not None:
            peers = [evidence] if evidence in self._neighbours else []
        else:
            peers = self._neighbours.ahead(owner, position)
        able = [peer for peer in peers if self._failures.get((peer, owner), (0, 0))[1] <= now]
        free = [peer for peer in able if self._asked(peer) < SESSIONS]
        if able and not free:
            self._blocked.add(owner)
            return None
        self._unschedule(owner)
        if not able:
            if peers:
                due = min(self._failures[peer, owner][1] for peer in peers)
                self._schedule(owner, want._replace(due=due))
            return None
        session = PullSession(owner, self._random.choice(free), self._random.randrange(1, 1 << 48), position, want)
        self._sessions[owner] = session
        return session

    def _asked(self, peer: str) -> int:
        """Returns the number of pulls from a neighbour."""
        return sum(session.peer == peer for session in self._sessions.values())

    def ask(self, session: PullSession, now: int) -> Pull:
        """Returns the next request of a session."""
        session.tries += 1
        session.deadline = now + (TIMEOUT_MS << session.tries - 1)
        return session.pull()

    def _close(self, session: PullSession) -> None:
        if session.staged:
            self._store.unstage(session.number)
        self._sessions.pop(session.owner, None)
        self._blocked.clear()
