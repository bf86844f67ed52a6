"""Forks: a node with two histories, neither of which contains the other.

Two machines write with its keys, or it wrote with an older database than the one that others know. The signed histories
cannot tell which. A fork is proved by two records with the owner's signature: two at one position, or one that a later
history of the owner leaves out. All nodes keep one proof for each owner, whatever they have of its records, and forward
it. It counts until a history of the owner contains both, which its administrator decides, or until the authority
revokes a key or retires the node.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import combinations

from vmconv_fleet.errors import MalformedError
from vmconv_fleet.replication import epochs
from vmconv_fleet.replication.epochs import History, history_of
from vmconv_fleet.replication.messages import Summary
from vmconv_fleet.replication.problems import ProblemLog
from vmconv_fleet.replication.records import MAX_NUMBER, Position, Record, decode, payload_of, restore
from vmconv_fleet.replication.signing import Trust
from vmconv_fleet.replication.store import FORKED, Store
from vmconv_fleet.replication.strays import MAX_BYTES, MAX_RECORDS

Pair = tuple[Record, Record]

_KNOWN = 1000
_END = Position(MAX_NUMBER, MAX_NUMBER)


class Forks:
    """Keeps the proofs, and says whose records are not trusted."""

    def __init__(self, store: Store, trust: Trust, problems: ProblemLog) -> None:
        self._store = store
        self._trust = trust
        self._problems = problems
        self._examined: set[tuple[str, str, Summary]] = set()
        # Replaced, never changed: other threads read it.
        self._forked: frozenset[str] = frozenset()
        self.news: list[Pair] = []
        """New proofs, to be forwarded; the forwarder removes them."""

    def __contains__(self, owner: object) -> bool:
        return owner in self._forked

    def unexamined(self, peer: str, owner: str, theirs: Summary) -> bool:
        """Returns whether this state of a neighbour's copy was not examined before."""
        if len(self._examined) >= _KNOWN:
            self._examined.clear()
        before = len(self._examined)
        self._examined.add((peer, owner, theirs))
        return len(self._examined) > before

    def forget_examined(self, peer: str) -> None:
        """Examines the copies of a neighbour again, because it has connected again: an answer may be incomplete."""
        self._examined = {one for one in self._examined if one[0] != peer}

    def counterpart(self, record: Record) -> Record | None:
        """Returns the stored record of the same position with other content."""
        wire = self._store.at(record.owner, record.seq)
        if wire is None or payload_of(wire) == record.payload:
            return None
        ours = restore(wire)
        return ours if ours.epoch == record.epoch else None

    def learn(self, records: Iterable[Record], at_ms: int) -> None:
        """Keeps the proofs among the records of a notice, which need not be verified yet."""
        for pair in _pairs(records):
            self.keep(pair, at_ms)

    def keep(self, pair: Pair, at_ms: int) -> bool:
        """Keeps a proof; returns whether it is one."""
        if not contradict(*pair) or not self._counts(pair):
            return False
        with self._store.atomic():
            new = self._store.quarantine(pair, at_ms)
        if new:
            self.news.append(pair)
            self.refresh()
        return True

    def load(self) -> None:
        """Loads the stored proofs, also those of an earlier version."""
        self._translate()
        self.refresh()
        self.report_dropped()

    def refresh(self) -> None:
        """Drops the proofs that do not count any more, and reports the others."""
        proofs = self._store.proofs()
        over = [owner for owner, pair in proofs.items() if not self._counts(pair)]
        forked = frozenset(proofs.keys() - {*over})
        text = json.dumps(sorted(forked))
        if over or text != (self._store.load(FORKED) or "[]"):
            with self._store.atomic():
                for owner in over:
                    self._store.release(owner)
                self._store.save(FORKED, text)
        self._report(forked)

    def report_dropped(self) -> str | None:
        """Reports and returns that records of the other histories of this node were not kept; None if all were."""
        dropped = self._store.others.dropped()
        if not dropped:
            return None
        text = (
            f"another history of this node is too large: {dropped} of its records were dropped, because {MAX_RECORDS} "
            f"or {MAX_BYTES >> 20} MiB are kept; it cannot be merged: let the authority retire the node (vmconv "
            "fleet retire), and join again"
        )
        self._problems.forget("strays")
        self._problems.report("strays", text)
        return text

    def undo(self) -> None:
        """Returns to what the database has, after a failed commit."""
        self.news.clear()
        self._examined.clear()
        self._report(self._store.forked())

    def _report(self, forked: frozenset[str]) -> None:
        for owner in self._forked - forked:
            self._problems.forget("fork", fork_text(owner))
        for owner in sorted(forked - self._forked):
            self._problems.report("fork", fork_text(owner))
        self._forked = forked

    def _translate(self) -> None:
        """Turns the proofs of an earlier version, which are among the notices, into pairs."""
        old = [record for record in map(decode, self._store.notices()) if record.kind == epochs.KIND]
        if old:
            with self._store.atomic():
                for record in old:
                    self._store.remove_notice(record.wire)
                    for pair in _pairs([record]):
                        self._store.quarantine(pair, 0)

    def _counts(self, pair: Pair) -> bool:
        """Returns whether the owner's signatures are accepted, and no history of it contains both records."""
        (owner,) = {record.owner for record in pair}
        if self._trust.retired(owner) or settles(self._store.history(owner), pair):
            return False
        signed = ((record.key_id, [(record.payload, record.signature)]) for record in pair)
        return all(self._trust.verify(owner, key, what, _END) for key, what in signed)


def contradict(one: Record, other: Record) -> bool:
    """Returns whether two records of one owner prove a fork."""
    if one.owner != other.owner:
        return False
    if one.position == other.position:
        return one.payload != other.payload
    earlier, later = sorted((one, other), key=lambda record: record.position)
    history = history_of(later) if later.kind == epochs.KIND else History()
    return bool(history.starts) and not history.follows(earlier.position)


def settles(history: History, pair: Pair) -> bool:
    """Returns whether a history contains both records of a proof."""
    one, other = (record.position for record in pair)
    if one == other:
        return history.has_merged(one)
    return history.follows(one) and history.follows(other)


def fork_text(owner: str) -> str:
    """Returns the text of a fork's problem: one for each owner, so that none can hide the problems of others."""
    return (
        f"node {owner} has two histories: two machines are this node, or it wrote with an old database; its requests "
        "and tokens are refused until vmconv node resume --merge on it, or until the authority retires it"
    )


def _pairs(records: Iterable[Record]) -> Iterator[Pair]:
    """Yields the records that may prove a fork: the two of a notice, or one of an earlier version with the other."""
    found = [record for record in records if record.kind not in ("revocation", "certificate", "retirement")]
    if len(found) == 2:
        yield from combinations(found, 2)
    for record in found:
        said = record.body.get("cloned")
        if record.kind == epochs.KIND and isinstance(said, str) and said:
            try:
                yield decode(bytes.fromhex(said)), record
            except (ValueError, MalformedError):
                continue
