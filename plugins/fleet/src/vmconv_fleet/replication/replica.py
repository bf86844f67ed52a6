"""The replica: a state machine without sockets, threads or a clock."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import Random, SystemRandom

from vmconv_fleet.errors import MalformedError, NotReadyError, Refusal, StoreError
from vmconv_fleet.replication import messages
from vmconv_fleet.replication.anti_entropy import NEVER, AntiEntropy
from vmconv_fleet.replication.change_feed import ChangeFeed
from vmconv_fleet.replication.clock import HybridClock
from vmconv_fleet.replication.context import ReplicaContext, Timing
from vmconv_fleet.replication.forks import Forks
from vmconv_fleet.replication.messages import Send
from vmconv_fleet.replication.neighbours import NeighbourTable
from vmconv_fleet.replication.ownlog import OwnLog
from vmconv_fleet.replication.problems import NodeProblem, ProblemLog
from vmconv_fleet.replication.publisher import Publisher
from vmconv_fleet.replication.receiver import Receiver
from vmconv_fleet.replication.records import Change, Record, restore
from vmconv_fleet.replication.recovery import EpochRecovery
from vmconv_fleet.replication.signing import CertifiedKey, Signer, Trust
from vmconv_fleet.replication.store import Store
from vmconv_fleet.replication.verifier import ForgedError, Verifier, VerifyAll

__all__ = ["NodeProblem", "Replica", "Send", "Timing"]

_log = logging.getLogger(__name__)


class Replica:
    """The node's copy of all records, and the log of its own.

    All methods run on one thread. `received`, `connected`, `disconnected`, `tick` and `write` are each one durable
    transaction; their messages may be sent only after they have returned. Within `with batch():` they are one
    transaction, and nothing may be sent before the block has ended.
    """

    def __init__(
        self,
        store: Store,
        signer: Signer,
        trust: Trust,
        now: Callable[[], int],
        *,
        monotonic: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000,
        schema: int = 1,
        timing: Timing = Timing(),  # noqa: B008 - a value
        verify_all: VerifyAll = map,
        introduction: Sequence[Change] = (),
        random: Random | None = None,
    ) -> None:
        """`now` is the wall clock, which may jump; `monotonic` does not. Both in milliseconds.

        `introduction` is written with the first record of an epoch unless it is there: the certificate that others need
        to verify anything. `random` makes tests repeatable.
        """
        random = random or SystemRandom()
        node, problems, neighbours = signer.owner, ProblemLog(), NeighbourTable()
        clock = HybridClock()
        verifier = Verifier(store, trust, clock, problems, verify_all)
        context = ReplicaContext(
            node=node,
            store=store,
            trust=trust,
            verifier=verifier,
            neighbours=neighbours,
            anti_entropy=AntiEntropy(store, verifier, neighbours, problems, random),
            forks=Forks(store, trust, problems),
            feed=ChangeFeed(store),
            problems=problems,
            timing=timing,
            now=now,
            monotonic=monotonic,
        )
        self.node = node
        self.store = store
        self.problems = problems
        self.neighbours = neighbours
        self._context = context
        self._own = OwnLog(store, signer, clock, schema, random)
        self._introduction = introduction
        self._publisher = Publisher(context)
        self._recovery = EpochRecovery(context, self._own)
        self._receiver = Receiver(context, self._publisher, self._recovery)
        self._grouped = False
        self._next_floor = monotonic()
        verifier.learn_stored()
        context.forks.load()
        self._drop_retired()
        newest = store.at(node, store.position(node).seq)
        if newest is not None:
            clock.last = restore(newest).clock

    @property
    def serving(self) -> bool:
        """Returns whether the node may write: it has recovered its own records from its neighbours."""
        return self._recovery.serving and not self._context.trust.retired(self.node)

    @property
    def is_restored(self) -> bool:
        """Returns whether the node waits for all members before it writes. May be called on any thread."""
        return self._recovery.is_restored

    @property
    def is_forked(self) -> bool:
        """Returns whether this node has two histories, and writes nothing. May be called on any thread."""
        return self.node in self._context.forks

    def awaited(self) -> frozenset[str]:
        """Returns the known members that it still waits for then. May be called on any thread."""
        return self._recovery.awaited()

    def excuse(self, nodes: Iterable[str], *, alone: bool) -> None:
        """Stops waiting for these members, or for any member at all: the administrator's decision."""
        self._recovery.excuse(nodes, alone=alone)

    def retirements(self) -> Mapping[str, str]:
        """Returns the retired nodes and their names. May be called on any thread."""
        return self._context.trust.retirements()

    def certified_keys(self) -> Iterable[CertifiedKey]:
        """Returns all keys that the authority has certified. May be called on any thread."""
        return self._context.trust.certified_keys()

    def names(self) -> Mapping[str, str]:
        """Returns the names that the authority has given to nodes. May be called on any thread."""
        return self._context.trust.names()

    def subscribe(self, callback: Callable[[list[Record]], None]) -> Callable[[], None]:
        """Calls back after each commit with the written and received records, deletions included; returns an
        unsubscriber.

        After a replacement of all records of an owner, the callback gets all live ones.
        """
        return self._context.feed.subscribe(callback)

    def observe(self, callback: Callable[[list[Record]], None]) -> None:
        """Calls back before the commit, which may still fail, so that consequences can be durable with it."""
        self._context.feed.observe(callback)

    def on_problem(self, callback: Callable[[NodeProblem], None]) -> None:
        self.problems.subscribe(callback)

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Runs the block as one durable transaction. Raises StoreError if nothing of it was done."""
        if self._grouped:
            yield
            return
        self._grouped = True
        epoch = self._recovery.epoch
        try:
            with self.store.group():
                yield
        except BaseException:
            self._undo(epoch)
            raise
        finally:
            self._grouped = False
        self._context.feed.deliver()

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Runs the block within `batch`: if it fails, nothing of it is done, and what else the batch does stays."""
        epoch, news = self._recovery.epoch, self._context.feed.mark()
        try:
            with self.store.atomic():
                yield
        except BaseException:
            self._recovery.epoch = epoch
            self._context.feed.forget(news)
            self._context.forks.undo()
            raise

    def _undo(self, epoch: int) -> None:
        """Forgets what a transaction has changed in memory that the database has not done."""
        self._context.feed.forget()
        self._context.anti_entropy.reset()
        self._recovery.epoch = epoch
        self._context.forks.undo()

    def write(self, changes: Sequence[Change], *, txn: int = 0) -> tuple[list[Record], list[Send]]:
        """Writes own records, all or none.

        Raises NotReadyError before `serving`, and MalformedError for an invalid change.
        """
        if not self.serving:
            raise NotReadyError(
                "node cannot write: it recovers its own records after its start, has two histories, or was retired"
            )
        with self.batch():
            records = self._own.append(changes, self._context.now(), txn)
            self._context.verifier.learn(records)
            return records, [*self._publisher.publish(records), *self._forward_notices()]

    def strays(self) -> list[Record]:
        """Returns the records of the other histories of this node, in their order.

        Raises NotReadyError if it has not forked, or if a member may have more of them; Refusal if some were dropped.
        """
        proof, strays = self.store.proofs().get(self.node), self.store.others.all()
        if proof is None:
            raise NotReadyError("this node has one history: there is nothing to merge")
        if problem := self._context.forks.report_dropped():
            raise Refusal(problem)
        self._recovery.refuse_to_merge(proof, _ends(strays))
        return strays

    def merge(self, strays: Sequence[Record]) -> list[Send]:
        """Begins an epoch whose history contains the others of this node, of which these are the records."""
        proof, history, ends = self.store.proofs()[self.node], self.store.history(self.node), _ends(strays)
        for record in proof:
            # If no member has it any more, it was lost with a disk.
            if not history.follows(record.position) or proof[0].position == proof[1].position:
                ends[record.epoch] = max(record.seq, ends.get(record.epoch, 0))
        with self.batch():
            begun = self._recovery.begin(max(ends), sorted(ends.items()))
            self.store.others.clear()
            return [*self._publisher.publish(self._introduced(begun)), *self._forward_notices()]

    def connected(self, peer: str) -> list[Send]:
        """Notes a new neighbour; returns the whole digest for it."""
        if peer == self.node:
            self.problems.report("cloned", "a neighbour has the id of this node")
            return []
        self.neighbours.connect(peer)
        self._context.forks.forget_examined(peer)
        self._recovery.settle()
        self._publisher.schedule_digest()
        return [self._publisher.digest(peer)]

    def disconnected(self, peer: str) -> list[Send]:
        self.neighbours.disconnect(peer)
        self._publisher.schedule_digest()
        return []

    def received(self, peer: str, message: bytes) -> list[Send]:
        """Handles a message from a neighbour, whose id the transport guarantees.

        Raises nothing for invalid messages; raises StoreError if the own database failed.
        """
        if peer not in self.neighbours:
            self.problems.count("strangers")
            return []
        with self.batch():
            try:
                sends = self._receiver.handle(peer, messages.decode(message))
                return [*sends, *self._forward_notices()]
            except (MalformedError, ForgedError) as exc:
                self.problems.report(exc.kind, f"from {peer}: {exc}")
            except (StoreError, sqlite3.Error):
                raise
            except Exception:
                _log.exception("a message of kind %r from %s could not be handled", message[:1], peer)
                self.problems.report("internal", f"a message from {peer} could not be handled")
        return []

    def due(self) -> int:
        """Returns when, on the monotonic clock, `tick` has something to do. Any other call may make it earlier."""
        parts = (
            self._publisher.next_due(),
            self._context.anti_entropy.next_due(),
            self._recovery.next_due(),
            self._floor_due(),
        )
        return min(parts)

    def tick(self) -> list[Send]:
        """Does the work that is due. Call it at `due()`; calling it earlier is harmless."""
        now = self._context.monotonic()
        with self.batch():
            sends = self._publisher.publish(self._introduced(self._recovery.begin_due(now)))
            sends += [Send(peer, messages.encode(pull)) for peer, pull in self._context.anti_entropy.start_due(now)]
            sends += self._publisher.due(now)
            if now >= self._floor_due():
                self._next_floor = now + self._context.timing.floor
                written = self._own.raise_floor(self._context.now(), self._context.timing.grace)
                sends += self._publisher.publish(written)
            return [*sends, *self._forward_notices()]

    def _introduced(self, begun: list[Record]) -> list[Record]:
        """Returns the first record of a new epoch, if any, and the introduction if it was missing."""
        missing = [change for change in self._introduction if self.store.get(self.node, *change[:2]) is None]
        if not begun or not missing:
            return begun
        introduced = self._own.append(missing, self._context.now(), 0)
        self._context.verifier.learn(introduced)
        return [*begun, *introduced]

    def _floor_due(self) -> int:
        return self._next_floor if self.serving else NEVER

    def _forward_notices(self) -> list[Send]:
        """Forwards new revocations and proofs of forks to all neighbours, and drops the records of retired nodes."""
        revocations, self._context.verifier.revocations = self._context.verifier.revocations, []
        if self._context.verifier.has_revoked:
            self._context.verifier.has_revoked = False
            self._drop_retired()
            self._context.forks.refresh()
        proofs, self._context.forks.news = self._context.forks.news, []
        revoked = self._publisher.notices(None, [record.wire for record in revocations])
        return [*revoked, *self._publisher.proofs(None, proofs)]

    def _drop_retired(self) -> None:
        if self._context.trust.retired(self.node):
            self.problems.report(
                "retired", "this node has been retired by the fleet's authority: it can no longer write"
            )
        for owner in self.store.positions():
            if owner != self.node and self._context.trust.retired(owner):
                with self.store.atomic():
                    self.store.clear(owner)
                self._context.anti_entropy.forget(owner)


def _ends(records: Iterable[Record]) -> dict[int, int]:
    """Returns the last seq of each epoch, of records in their order."""
    return {record.epoch: record.seq for record in records}
