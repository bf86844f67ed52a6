"""Cloned nodes: two machines that write with the keys of one.

The proof is an `epoch/history` record with the field `cloned`, by which a node says of itself that another process
writes as it. A process says so only if it knows: it was shown a record with its own signature that it has not written,
by a writer that knew of an epoch begun by this process. Two processes must then have run at the same time. A node
restored from an older backup has two histories too, but the process that wrote the first one does not run any more.

A proof counts until the authority has revoked its key or retired the node. All nodes keep it, whichever history wins.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import blake2b

from vmconv_fleet.replication import epochs
from vmconv_fleet.replication.problems import ProblemLog
from vmconv_fleet.replication.records import MAX_NUMBER, Position, Record, decode
from vmconv_fleet.replication.signing import Trust
from vmconv_fleet.replication.store import CLONED, Store

MAX_PROOF = 32 << 10
"""Bytes of a proof."""

_END = Position(MAX_NUMBER, MAX_NUMBER)


class Clones:
    """Keeps proofs of clones and says whose records are not trusted."""

    def __init__(self, store: Store, trust: Trust, problems: ProblemLog) -> None:
        self._store = store
        self._trust = trust
        self._problems = problems
        self._reported: dict[str, str] = {}
        self.news: list[Record] = []
        """New proofs, to be forwarded; the forwarder removes them."""

    def learn(self, records: Iterable[Record]) -> None:
        """Keeps the proofs among records, which need not be verified yet."""
        found = [record for record in records if _is_proof(record) and self._counts(record)]
        if not found:
            return
        with self._store.atomic():
            new = [record for record in found if self._store.note(_name(record), record.wire)]
        if new:
            self.news += new
            self.refresh()

    def refresh(self) -> None:
        """Drops the proofs that do not count any more, and reports the others."""
        proofs = [record for record in map(decode, self._store.notices()) if _is_proof(record)]
        over = [record for record in proofs if not self._counts(record)]
        forked = {record.owner for record in self._store.forks() if self._counts(record)}
        cloned = forked | {record.owner for record in proofs if self._counts(record)}
        text = json.dumps(sorted(cloned))
        if over or text != (self._store.load(CLONED) or "[]"):
            with self._store.atomic():
                for record in over:
                    self._store.remove_notice(_name(record))
                self._store.save(CLONED, text)
        for owner in self._reported.keys() - cloned:
            self._problems.forget("cloned", self._reported.pop(owner))
            self._problems.forget("fork", fork_text(owner))
        for owner in sorted(cloned - self._reported.keys()):
            self._reported[owner] = (
                f"two machines write with the keys of node {owner}: its requests and tokens are refused until the "
                "authority revokes the key or retires the node"
            )
            self._problems.report("cloned", self._reported[owner])
        for owner in sorted(forked):
            self._problems.report("fork", fork_text(owner))

    def _counts(self, record: Record) -> bool:
        """Returns whether the owner has signed a record with a key that is still accepted."""
        signed = [(record.payload, record.signature)]
        return not self._trust.retired(record.owner) and self._trust.verify(record.owner, record.key_id, signed, _END)


def fork_text(owner: str) -> str:
    """Returns the text of a fork's problem: one for each owner, so that none can hide the problems of others."""
    return f"{owner} has signed two records for one position"


def _is_proof(record: Record) -> bool:
    return record.kind == epochs.KIND and epochs.CLONED in record.body and len(record.wire) <= MAX_PROOF


def _name(record: Record) -> bytes:
    """Returns the name of a proof: one for each key, so that a node cannot fill the tables of others."""
    return blake2b(f"cloned {record.owner} {record.key_id}".encode(), digest_size=16).digest()
