"""The log of the node's own records, the only place that makes records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from vmconv_fleet.replication import epochs
from vmconv_fleet.replication.clock import HybridClock, is_ahead, milliseconds
from vmconv_fleet.replication.epochs import History
from vmconv_fleet.replication.records import (
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
from vmconv_fleet.replication.signing import Signer
from vmconv_fleet.replication.store import Store

EPOCH_CHANCE = 1 << 20


class OwnLog:
    """Writes records of this node: numbered without gaps, signed, and valid by the rules for everybody's records."""

    def __init__(self, store: Store, signer: Signer, clock: HybridClock, schema: int, random: Random) -> None:
        self._store = store
        self._signer = signer
        self._clock = clock
        self._schema = schema
        self._random = random

    def append(self, changes: Sequence[Change], now: int, txn: int) -> list[Record]:
        """Writes all changes; raises MalformedError and writes none if one is not valid. Deleting a missing record does
        nothing.
        """
        return self._write(changes, self._store.position(self._signer.owner), now, txn)

    def begin_epoch(self, now: int, beyond: int, merged: Sequence[tuple[int, int]] = ()) -> list[Record]:
        """Begins an epoch later than `beyond` and all own ones, and different from all earlier ones.

        The clock alone cannot ensure that: it may go back, and the database may be lost. So a random part is added.
        `merged`: the ends of other histories of this node that this one contains from now on.
        """
        position = self._store.position(self._signer.owner)
        epoch = max(position.epoch + 1, beyond + 1, now) + self._random.randrange(EPOCH_CHANCE)
        history = self._store.history(self._signer.owner).begun(epoch, position.seq + 1, merged)
        return self._write_history(history, Position(epoch, position.seq), now)

    def raise_floor(self, now: int, grace_ms: int) -> list[Record]:
        """Drops deletions older than `grace_ms` and publishes the new floor."""
        node = self._signer.owner
        floor = 0
        for record in self._store.deletions(node):
            # A deletion by a wrong clock must not keep the others. Dropping it early costs a replica a whole pull.
            if milliseconds(record.clock) > now - grace_ms and not is_ahead(record.clock, now):
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
        return self._write([Change(epochs.KIND, epochs.ID, history.body())], position, now, 0)

    def _write(self, changes: Sequence[Change], position: Position, now: int, txn: int) -> list[Record]:
        node = self._signer.owner
        state = self._store.state(node)
        payloads = []
        shares = self._store.shares(node, [change[:2] for change in changes])
        for kind, id, body in changes:
            share = shares.get((kind, id), 0)
            if body is None and not share:
                continue
            position = Position(position.epoch, position.seq + 1)
            state -= share
            payload = encode(self._draft(kind, id, body, position, state % STATE_MODULUS, now, txn))
            shares[kind, id] = share = 0 if body is None else fingerprint(payload)
            state += share
            payloads.append(payload)
        signatures = self._signer.sign_many(payloads) if payloads else []
        records = [decode(seal(*signed)) for signed in zip(signatures, payloads, strict=True)]
        if records:
            with self._store.atomic():
                self._store.extend(node, records, state % STATE_MODULUS)
        return records

    def _draft(
        self, kind: str, id: str, body: Mapping[str, Any] | None, position: Position, state: int, now: int, txn: int
    ) -> Record:
        return Record(
            owner=self._signer.owner,
            kind=kind,
            id=id,
            epoch=position.epoch,
            seq=position.seq,
            schema=self._schema,
            clock=self._clock.tick(now),
            deleted=body is None,
            txn=txn,
            key_id=self._signer.key_id,
            state=state,
            body=dict(body or {}),
            wire=b"",
        )


def sound(store: Store, owner: str) -> bool:
    """Returns whether the stored records of an owner have the state that its last record promises."""
    position = store.position(owner)
    wire = store.at(owner, position.seq)
    return position == START if wire is None else promised(restore(wire)) == store.state(owner)


def promised(record: Record) -> int:
    """Returns the owner's state after the record was written."""
    own = 0 if record.deleted else fingerprint(record.payload)
    return (record.state + own) % STATE_MODULUS
