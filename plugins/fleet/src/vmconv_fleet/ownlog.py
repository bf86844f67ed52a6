"""The log of the node's own records: the only place where records are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from vmconv_fleet import epochs
from vmconv_fleet.clock import HybridClock, milliseconds
from vmconv_fleet.epochs import History
from vmconv_fleet.records import (
    START,
    STATE_MODULUS,
    Change,
    Position,
    Record,
    decode,
    encode,
    fingerprint,
    restore,
    seal,
)
from vmconv_fleet.signing import Signer
from vmconv_fleet.store import Store

EPOCH_CHANCE = 1 << 20


class OwnLog:
    """Writes records of the node: numbered without a gap, signed, each valid by the rules that all others apply."""

    def __init__(self, store: Store, signer: Signer, clock: HybridClock, schema: int, random: Random) -> None:
        self._store = store
        self._signer = signer
        self._clock = clock
        self._schema = schema
        self._random = random

    def append(self, changes: Sequence[Change], now: int, txn: int) -> list[Record]:
        """Writes all of the changes or, with a MalformedError, none; deletes nothing that is not there."""
        node, written = self._signer.owner, []
        with self._store.atomic():
            for record in self._follow(changes, now, txn):
                written.append(record)
                self._store.extend(node, (record,))
        return written

    def begin_epoch(self, now: int, beyond: int) -> list[Record]:
        """Begins an epoch later than every one that is known of the node, and no one that it ever had.

        The clock alone does not promise that: it goes back, and what is known can be lost. So chance decides, too.
        """
        position = self._store.position(self._signer.owner)
        epoch = max(position.epoch + 1, beyond + 1, now) + self._random.randrange(EPOCH_CHANCE)
        history = self._store.history(self._signer.owner).begun(epoch, position.seq + 1)
        return self._write_history(history, Position(epoch, position.seq), now)

    def raise_floor(self, now: int, grace_ms: int) -> list[Record]:
        """Forgets deletions older than `grace_ms`, and publishes that it has."""
        node = self._signer.owner
        floor = 0
        for record in self._store.deletions(node):
            if milliseconds(record.clock) > now - grace_ms:
                break
            floor = record.seq
        if not floor:
            return []
        history = self._store.history(node)._replace(floor=floor)
        with self._store.atomic():
            written = self._write_history(history, self._store.position(node), now)
            self._store.purge(node, floor)
        return written

    def _write_history(self, history: History, position: Position, now: int) -> list[Record]:
        node = self._signer.owner
        with self._store.atomic():
            change = Change(epochs.KIND, epochs.ID, history.body())
            record = self._make(change, position, self._store.state(node), now, 0)
            self._store.extend(node, (record,))
        return [record]

    def _follow(self, changes: Sequence[Change], now: int, txn: int) -> Iterator[Record]:
        node = self._signer.owner
        for change in changes:
            if change.body is None and self._store.get(node, change.kind, change.id) is None:
                continue
            yield self._make(change, self._store.position(node), self._store.state(node), now, txn)

    def _make(self, change: Change, position: Position, state: int, now: int, txn: int) -> Record:
        node, kind, id = self._signer.owner, change.kind, change.id
        others = (state - self._store.share(node, kind, id)) % STATE_MODULUS
        record = Record(
            owner=node,
            kind=kind,
            id=id,
            epoch=position.epoch,
            seq=position.seq + 1,
            schema=self._schema,
            clock=self._clock.tick(now),
            deleted=change.body is None,
            txn=txn,
            key_id=self._signer.key_id,
            state=others,
            body=dict(change.body or {}),
            wire=b"",
        )
        payload = encode(record)
        return decode(seal(self._signer.sign(payload), payload))


def sound(store: Store, owner: str) -> bool:
    """Whether what is stored of an owner is what its last record promises."""
    position = store.position(owner)
    wire = store.at(owner, position.seq)
    return position == START if wire is None else promised(restore(wire)) == store.state(owner)


def promised(record: Record) -> int:
    """Returns the state that the record's owner had when it had written it."""
    own = 0 if record.deleted else fingerprint(record.wire)
    return (record.state + own) % STATE_MODULUS
