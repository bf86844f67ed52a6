"""The verifier: checks all records of other owners."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from itertools import groupby, pairwise

from vmconv_fleet.errors import FleetError, MalformedError
from vmconv_fleet.replication.clock import HybridClock, describe_ms, is_ahead, milliseconds
from vmconv_fleet.replication.problems import ProblemLog
from vmconv_fleet.replication.records import Position, Record, decode
from vmconv_fleet.replication.signing import SIGNATURE, Trust
from vmconv_fleet.replication.store import Store

VerifyAll = Callable[[Callable[[Sequence[Record]], bool], Sequence[Sequence[Record]]], Iterable[bool]]
"""Calls a predicate for each group of records, possibly on several threads; `map` is one."""

_SELF_EVIDENT = frozenset({"certificate", "retirement", "revocation"})
"""Kinds of records about other nodes. The authority's signature in the body counts, not that of the owner."""


class ForgedError(FleetError):
    """A record that its owner did not sign."""

    kind = "forged"


class Verifier:
    """Decodes and verifies received records."""

    def __init__(
        self,
        store: Store,
        trust: Trust,
        clock: HybridClock,
        problems: ProblemLog,
        verify_all: VerifyAll,
    ) -> None:
        self._store = store
        self._trust = trust
        self._clock = clock
        self._problems = problems
        self._verify_all = verify_all
        self._off: dict[str, str] = {}
        self.revocations: list[Record] = []
        """New revocations, signed by the authority, to be forwarded; the forwarder removes them."""
        self.has_revoked = False
        """Whether there were new ones, also such as are not forwarded; the replica resets it."""

    def retired(self, owner: str) -> bool:
        """Returns whether the owner is retired, and its records refused."""
        return self._trust.retired(owner)

    def learn_stored(self) -> None:
        """Loads what the authority signed, as far as it is stored, into the trust."""
        for wire in self._store.notices():
            record = decode(wire)
            if not self._trust.learn(record) and record.kind == "revocation":
                # An earlier version accepted other forms of it.
                with self._store.atomic():
                    self._store.remove_notice(wire)
        for kind in sorted(_SELF_EVIDENT):
            for record in self._store.find(kind):
                self._trust.learn(record)

    def ascending(self, owner: str, after: Position, records: Iterable[Record]) -> list[Record]:
        """Returns the records. Raises MalformedError unless they belong to the owner and ascend from the position."""
        result = []
        epoch, seq = after
        for record in records:
            if record.owner != owner:
                raise MalformedError(f"record of {record.owner} among those of {owner}")
            if record.epoch < epoch or record.seq <= seq:
                raise MalformedError(f"record at {tuple(record.position)} of {owner} follows {(epoch, seq)}")
            epoch, seq = record.epoch, record.seq
            result.append(record)
        return result

    def admit(self, records: Sequence[Record], now: int) -> None:
        """Learns from the records and verifies them. Raises ForgedError if one is not signed by its owner."""
        self.learn(records)
        groups = _signed_together(records)
        for group, genuine in zip(groups, self._verify_all(self._genuine, groups), strict=True):
            if not genuine:
                first, more = group[0], f" and {len(group) - 1} more" if len(group) > 1 else ""
                where = f"{first.owner}/{first.kind}/{first.id} at {tuple(first.position)}{more}"
                raise ForgedError(f"{where}: signature by key {first.key_id} is not accepted")
        for record in records:
            self._clock.observe(record.clock, now)
        if records:
            self._judge_clock(records[-1], now)

    def _judge_clock(self, newest: Record, now: int) -> None:
        """Reports the owner whose newest record is too far ahead, until one is not."""
        before = self._off.pop(newest.owner, None)
        if is_ahead(newest.clock, now):
            ahead = describe_ms(milliseconds(newest.clock) - now)
            text = f"the clock of {newest.owner} is {ahead} ahead of this node's: one of them is wrong"
            self._off[newest.owner] = text
            self._problems.report("clock", text)
            if before == text:
                return
        if before:
            self._problems.forget("clock", before)

    def learn(self, records: Iterable[Record]) -> None:
        """Learns what the authority signed."""
        for record in records:
            if record.kind not in _SELF_EVIDENT or record.deleted or not self._trust.learn(record):
                continue
            if record.kind == "revocation":
                with self._store.atomic():
                    is_new = self._store.note(_content(record), record.wire)
                if is_new:
                    self.revocations.append(record)
                # It counts too if there are too many to be forwarded.
                self.has_revoked |= is_new is not False

    def _genuine(self, records: Sequence[Record]) -> bool:
        last = records[-1]
        signed = [(record.payload, record.signature) for record in records]
        return self._trust.verify(last.owner, last.key_id, signed, last.position)


def _signed_together(records: Iterable[Record]) -> list[list[Record]]:
    """Returns the records in groups of one signature each, in order."""
    groups = groupby(records, lambda record: (record.owner, record.key_id, record.signature[:SIGNATURE]))
    return [list(group) for _, group in groups]


def consecutive(records: Sequence[Record]) -> bool:
    """Returns whether the records are numbered without gaps, in one epoch."""
    return all(one.epoch == other.epoch and one.seq + 1 == other.seq for one, other in pairwise(records))


def _content(record: Record) -> bytes:
    body = json.dumps(record.body, sort_keys=True, separators=(",", ":")).encode()
    return blake2b(body, digest_size=16).digest()
