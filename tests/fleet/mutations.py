"""Mistakes that somebody could make in the replica, each as a patch of the production code.

    python tests/fleet/mutations.py       the table: which mistake, and how it was noticed

A simulator that finds nothing proves something only if it finds these. What the replica notices by itself, such as a
sum that does not agree, counts as noticed: no node of an honest fleet may ever report it.
"""

from __future__ import annotations

# ruff: noqa: ARG005 - a patch takes what it replaces takes
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from unittest.mock import patch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fleet import test_forks, test_replica, test_requests
from fleet.plain import PlainSigner, PlainTrust, node_id, signed_by_authority
from fleet.sim import simulate
from vmconv_fleet.replication import anti_entropy, clock, forks, merging, ownlog, receiver, requests
from vmconv_fleet.replication.anti_entropy import AntiEntropy
from vmconv_fleet.replication.clock import HybridClock
from vmconv_fleet.replication.epochs import History
from vmconv_fleet.replication.forks import Forks
from vmconv_fleet.replication.neighbours import NeighbourTable
from vmconv_fleet.replication.ownlog import OwnLog
from vmconv_fleet.replication.pending import Pending
from vmconv_fleet.replication.publisher import Publisher
from vmconv_fleet.replication.receiver import Receiver
from vmconv_fleet.replication.records import MAX_NUMBER, Change, Position, Record
from vmconv_fleet.replication.recovery import EpochRecovery
from vmconv_fleet.replication.replica import Replica
from vmconv_fleet.replication.requests import Requests
from vmconv_fleet.replication.store import Store
from vmconv_fleet.replication.verifier import Verifier

SEEDS = 120
"""Number of seeds within which a mistake must be found."""


class Mutation(NamedTuple):
    """A mistake: what is wrong, how to make it, and the test that finds it where the simulator seldom does."""

    name: str
    make: Callable[[], AbstractContextManager[Any]]
    test: Callable[[], None] | None = None


MUTATIONS: list[Mutation] = []


Mistake = Callable[[], Iterator[None]]


def mutation(name: str, test: Callable[[], None] | None = None) -> Callable[[Mistake], Mistake]:
    """Registers a mistake."""

    def register(function: Mistake) -> Mistake:
        MUTATIONS.append(Mutation(name, contextmanager(function), test))
        return function

    return register


def blind() -> AbstractContextManager[Any]:
    """Takes away the replica's own sums, which would notice most mistakes at once: the oracle has to."""
    stack = ExitStack()
    stack.enter_context(patch.object(anti_entropy, "sound", lambda store, owner: True))
    stack.enter_context(patch.object(receiver, "promised", lambda record: _Anything()))
    return stack


class _Anything:
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


@mutation("an epoch is used again after a start")
def epoch_again() -> Iterator[None]:
    def begin(self: OwnLog, now: int, beyond: int, merged: Sequence[tuple[int, int]] = ()) -> list[Record]:
        position = self._store.position(self._signer.owner)
        epoch = max(position.epoch, 1)
        history = self._store.history(self._signer.owner).begun(epoch, position.seq + 1, merged)
        return self._write_history(history, Position(epoch, position.seq), now)

    with patch.object(OwnLog, "begin_epoch", begin):
        yield


@mutation("an epoch is the next number, without clock and chance")
def epoch_counted() -> Iterator[None]:
    original = OwnLog.begin_epoch

    def begin(self: OwnLog, now: int, beyond: int, merged: Sequence[tuple[int, int]] = ()) -> list[Record]:
        self._random = Random(0)
        with patch.object(ownlog, "EPOCH_CHANCE", 1):
            return original(self, 0, 0, merged)

    with patch.object(OwnLog, "begin_epoch", begin):
        yield


@mutation("pages are taken as they come, not all at once")
def torn_pages() -> Iterator[None]:
    original = AntiEntropy.accept

    def take(self: AntiEntropy, session: Any, page: Any, wall: int, now: int) -> list[Record] | None:
        records = original(self, session, page, wall, now)
        if records is None:
            rows = list(self.rows(session, (), self._store.position(session.owner).seq))
            with self._store.atomic():
                self._store.extend(session.owner, rows)
        return records

    with blind(), patch.object(AntiEntropy, "accept", take):
        yield


@mutation("live records are accepted although some before them are missing")
def gaps() -> Iterator[None]:
    with blind(), patch.object(receiver, "_reaches", lambda first, position: True):
        yield


@mutation("live records of another epoch are accepted because their number is next")
def other_epoch() -> Iterator[None]:
    with blind(), patch.object(receiver, "_reaches", lambda first, position: first.seq <= position.seq + 1):
        yield


@mutation("only the sums are left: gaps are accepted unless they are noticed")
def gaps_noticed() -> Iterator[None]:
    original = Receiver._accept

    def accept(self: Receiver, peer: str, fresh: Any) -> Any:
        result = original(self, peer, fresh)
        if self._context.problems.counters["torn-live"]:
            self._context.problems.report("torn", "live records do not follow")
        return result

    with patch.object(receiver, "_reaches", lambda first, position: True), patch.object(Receiver, "_accept", accept):
        yield


@mutation("the floor is ignored: who has missed deletions gets what came after them")
def floor_ignored() -> Iterator[None]:
    with blind(), patch.object(History, "holds", History.passed):
        yield


@mutation("epochs are ignored: every earlier number is a part of the past")
def epochs_ignored() -> Iterator[None]:
    with blind(), patch.object(History, "holds", lambda self, position: position.seq >= self.floor):
        yield


@mutation("a snapshot leaves what it does not have (chitchat #94)")
def old_state_left() -> Iterator[None]:
    def extend(self: Store, owner: str, session: int) -> int:
        self.extend(owner, list(self.staged(session, 0)))
        return 0

    with (
        blind(),
        patch.object(Store, "clear", lambda self, owner: None),
        patch.object(Store, "replace_by_staged", extend),
    ):
        yield


@mutation("a deletion leaves no trace")
def no_tombstones() -> Iterator[None]:
    original = Store.extend

    def extend(self: Store, owner: str, records: Any, state: int | None = None) -> None:
        original(self, owner, records, state)
        self.purge(owner, MAX_NUMBER)

    with blind(), patch.object(Store, "extend", extend):
        yield


@mutation("pages of two histories are put together", test_replica.test_pages_of_two_histories_are_not_put_together)
def mixed_histories() -> Iterator[None]:
    original = Publisher.answer

    def answer(self: Publisher, peer: str, pull: Any) -> Any:
        if pull.seen != Position(0, 0):
            with patch.object(History, "holds", lambda self, position: True):
                return original(self, peer, pull)
        return original(self, peer, pull)

    with patch.object(Publisher, "answer", answer):
        yield


@mutation("a node serves without having recovered its own records")
def no_recovery() -> Iterator[None]:
    with (
        patch.object(EpochRecovery, "_may_serve", lambda self, now: True),
        patch.object(AntiEntropy, "want", _want_of_others),
    ):
        yield


def _want_of_others(self: AntiEntropy, owner: str, due: int, *, evidence: str | None = None) -> None:
    if owner != self._store.node:
        _WANT(self, owner, due, evidence=evidence)


_WANT = AntiEntropy.want


@mutation(
    "a restored node writes once it has heard from one member",
    test_replica.test_a_restored_node_writes_once_it_has_heard_from_all_members,
)
def heard_from_one() -> Iterator[None]:
    def awaited(self: EpochRecovery) -> frozenset[str]:
        return frozenset()

    with patch.object(EpochRecovery, "awaited", awaited):
        yield


@mutation(
    "a restored node that knows no member is alone",
    test_replica.test_a_restored_node_that_knows_no_member_waits_for_any,
)
def alone_by_default() -> Iterator[None]:
    original = EpochRecovery.__init__

    def init(self: EpochRecovery, *arguments: Any) -> None:
        original(self, *arguments)
        self._alone = True

    with patch.object(EpochRecovery, "__init__", init):
        yield


@mutation("a history replaces another one that it does not contain")
def past_wins() -> Iterator[None]:
    with patch.object(Receiver, "_continues", lambda self, session, records: True):
        yield


@mutation(
    "the rest of an answer is put on what came meanwhile",
    test_replica.test_an_answer_that_does_not_follow_newer_records_is_requested_again,
)
def on_top() -> Iterator[None]:
    original = Receiver._continues

    def goes_on(self: Receiver, session: Any, records: Any) -> bool:
        return not session.whole or original(self, session, records)

    with patch.object(Receiver, "_continues", goes_on):
        yield


@mutation(
    "a node does not notice that another process has written as it",
    test_forks.test_a_clone_that_writes_in_turn_is_noticed_though_it_knows_all,
)
def not_foreign() -> Iterator[None]:
    with (
        patch.object(Receiver, "_is_foreign", lambda self, position: False),
        patch.object(Receiver, "_keep_own", lambda self, session, records: []),
    ):
        yield


@mutation("two histories are no fork")
def no_fork() -> Iterator[None]:
    with patch.object(forks, "contradict", lambda one, other: False):
        yield


@mutation("a fork is kept from the others")
def fork_is_hidden() -> Iterator[None]:
    with patch.object(Publisher, "proofs", lambda self, peer, pairs: []):
        yield


@mutation("one history is taken for two", test_forks.test_records_of_one_history_prove_nothing)
def always_forked() -> Iterator[None]:
    with patch.object(History, "follows", lambda self, position: False):
        yield


@mutation("anybody proves a fork", test_forks.test_only_records_that_its_owner_signed_prove_a_fork)
def proved_by_anybody() -> Iterator[None]:
    with patch.object(Forks, "_counts", lambda self, pair: True):
        yield


@mutation(
    "a node with two histories continues to write",
    test_forks.test_a_node_that_wrote_with_an_old_database_has_forked_and_nothing_is_lost,
)
def forked_writes() -> Iterator[None]:
    with patch.object(EpochRecovery, "serving", property(lambda self: self.has_begun)):
        yield


@mutation("a merged history forgets what the other one has executed")
def nothing_adopted() -> Iterator[None]:
    with patch.object(merging, "adopt", lambda replica, strays, number, join: []):
        yield


@mutation(
    "a merge executes again what was recovered",
    test_forks.test_what_a_node_has_recovered_is_not_executed_again_by_merging,
)
def recovered_unnoted() -> Iterator[None]:
    with patch.object(Requests, "remember_recovered", lambda self: None):
        yield


@mutation("the transactions of a merged history keep their numbers")
def merged_numbers() -> Iterator[None]:
    original = merging._repeat

    def repeat(replica: Replica, transaction: Record, _number: int, *done: Any) -> Any:
        return original(replica, transaction, transaction.body["number"], *done)

    with patch.object(merging, "_repeat", repeat):
        yield


@mutation(
    "histories are merged although a member may have more",
    test_forks.test_histories_are_merged_only_once_they_are_here,
)
def merged_too_early() -> Iterator[None]:
    with patch.object(EpochRecovery, "refuse_to_merge", lambda self, proof, ends: None):
        yield


@mutation("signatures are not verified", test_replica.test_a_forged_record_is_refused_and_reported)
def unsigned() -> Iterator[None]:
    with patch.object(Verifier, "_genuine", lambda self, records: True):
        yield


@mutation("a key counts for every owner", test_replica.test_a_record_with_the_key_of_another_owner_is_refused)
def any_key() -> Iterator[None]:
    def verify(
        self: PlainTrust, owner: str, key_id: str, signed: Sequence[tuple[bytes, bytes]], position: Position
    ) -> bool:
        keys = [PlainSigner(signer, key_id) for signer in map(node_id, range(9))]
        return all(any(signature == key.sign(payload) for key in keys) for payload, signature in signed)

    with patch.object(PlainTrust, "verify", verify):
        yield


@mutation(
    "records are taken for whatever owner they come as",
    test_replica.test_a_page_with_records_of_another_owner_is_refused,
)
def misplaced() -> Iterator[None]:
    def ascending(self: Verifier, owner: str, after: Position, records: Any) -> list[Record]:
        return [record._replace(owner=owner) for record in records]

    with patch.object(Verifier, "ascending", ascending), patch.object(Verifier, "_genuine", lambda self, records: True):
        yield


@mutation("nothing is passed on")
def not_forwarded() -> Iterator[None]:
    with (
        patch.object(Publisher, "forward", lambda self, records, source: []),
        patch.object(Publisher, "notify_behind", lambda self, owner: []),
        patch.object(Publisher, "_summaries", _own_only),
    ):
        yield


def _own_only(self: Publisher, owners: Any) -> Any:
    return _SUMMARIES(self, [owner for owner in owners if owner == self._context.node])


_SUMMARIES = Publisher._summaries


def never(self: AntiEntropy) -> int:
    return anti_entropy.NEVER


@mutation("gaps are never asked for")
def never_pulled() -> Iterator[None]:
    with (
        patch.object(AntiEntropy, "start_due", lambda self, now: iter(())),
        patch.object(AntiEntropy, "next_due", never),
    ):
        yield


@mutation("a pull that is not answered is not tried again")
def no_retry() -> Iterator[None]:
    with patch.object(anti_entropy, "TIMEOUT_MS", 1 << 40):
        yield


@mutation("a request is executed without looking whether it has been answered")
def executed_twice() -> Iterator[None]:
    original = Store.get

    def get(self: Store, owner: str, kind: str, id: str) -> Record | None:
        return None if kind == "response" and owner == self.node else original(self, owner, kind, id)

    with patch.object(Store, "get", get), patch.object(Store, "executed", lambda self, response: None):
        yield


@mutation("transaction and response are two commits")
def two_commits() -> Iterator[None]:
    def transact(self: Requests, request: Any, outcome: Any) -> Any:
        number = self.next_number()
        body = {
            "number": number,
            "request": request.id,
            "requester": request.requester,
            "body": dict(outcome.body),
            "changes": [
                {
                    "kind": change.kind,
                    "id": change.id,
                    "before": requests._body(self._store.get(self._replica.node, change.kind, change.id)),
                    "after": change.body,
                }
                for change in outcome.changes
            ],
        }
        answer = {"request": request.id, "requester": request.requester, "ok": True, "body": {}, "transaction": number}
        second = [Change("response", requests.response_id(request.requester, request.id), answer)]
        sends = self._replica.write([Change("transaction", f"{number:012}", body), *outcome.changes], txn=number)[1]
        for statement in ("RELEASE change", "COMMIT", "BEGIN IMMEDIATE", "SAVEPOINT change"):
            self._store._transactions.connection.execute(statement)
        return [*sends, *self._replica.write(second, txn=number)[1]]

    with patch.object(Requests, "_transact", transact):
        yield


@mutation(
    "each requester's requests are executed in the order of their names",
    test_requests.test_each_requesters_requests_are_executed_in_their_order,
)
def out_of_order() -> Iterator[None]:
    original = Pending.see

    def see(self: Pending, records: Any) -> None:
        original(self, records)
        for queue in self._queues.values():
            queue.sort(key=lambda item: item[2])

    with patch.object(Pending, "see", see):
        yield


@mutation("transactions are numbered by the clock")
def numbered_by_clock() -> Iterator[None]:
    with patch.object(Requests, "next_number", lambda self: self._now() % 10**12):
        yield


@mutation("a response is written for the wrong request")
def wrong_response() -> Iterator[None]:
    original = requests.response_id

    def wrong(requester: str, request: str) -> str:
        return original(requester, request[:2])

    with patch.object(requests, "response_id", wrong):
        yield


@mutation("writes are sent before they are durable (NATS 2.12.1)")
def told_too_early() -> Iterator[None]:
    @contextmanager
    def batch(self: Replica) -> Iterator[None]:
        if self._grouped:
            yield
            return
        self._grouped = True
        try:
            with self.store.group():
                yield
                self._context.feed.deliver()
        finally:
            self._grouped = False

    with patch.object(Replica, "batch", batch):
        yield


@mutation("neighbours' neighbours are believed to hear everything")
def near_too_far() -> Iterator[None]:
    with (
        patch.object(NeighbourTable, "beyond", lambda self, source, owner: ()),
        patch.object(NeighbourTable, "ahead", lambda self, owner, position: [p for p in self.ids() if p == owner]),
    ):
        yield


@mutation("a clock never goes back, however wrong it was")
def clock_ahead_for_ever() -> Iterator[None]:
    def tick(self: HybridClock, now_ms: int) -> int:
        self.last = max(self.last + 1, now_ms << 16)
        return self.last

    with patch.object(HybridClock, "tick", tick):
        yield


@mutation("any clock is followed", test_replica.test_a_wild_clock_is_reported_and_not_followed)
def any_clock() -> Iterator[None]:
    with patch.object(clock, "is_ahead", lambda clock, now_ms: False):
        yield


@mutation(
    "a request by a wrong clock makes all later ones late",
    test_requests.test_a_request_by_a_wrong_clock_makes_no_other_late,
)
def late_for_ever() -> Iterator[None]:
    with patch.object(requests, "is_ahead", lambda clock, now_ms: False):
        yield


@mutation("any member retires another")
def any_word() -> Iterator[None]:
    original = Verifier.learn

    def learn(self: Verifier, records: Iterable[Record]) -> None:
        records = list(records)
        for record in records:
            if record.kind == "revocation" and not record.deleted:
                said = {name: value for name, value in record.body.items() if name != "ca"}
                self._trust.learn(record._replace(body=signed_by_authority(said)))
        original(self, records)

    with patch.object(Verifier, "learn", learn):
        yield


@mutation("a retired node's records are taken again (chitchat #155)")
def retired_returns() -> Iterator[None]:
    original = Store.clear

    def clear(self: Store, owner: str) -> None:
        return None if self.node < owner else original(self, owner)

    with patch.object(Store, "clear", clear):
        yield


def found_by(mistake: Mutation, seeds: int = SEEDS) -> str | None:
    """Returns how the simulator notices a mistake, None if it does not."""
    with mistake.make():
        if mistake.test is not None:
            try:
                mistake.test()
            except AssertionError:
                return mistake.test.__name__
            return None
        for seed in range(seeds):
            try:
                simulate(seed)
            except AssertionError as violation:
                return str(violation)
            except Exception as exc:
                return f"seed {seed}: {exc!r}"
    return None


def main() -> int:
    """Prints the table."""
    from fleet import mutations_merged  # noqa: F401 - registers its own
    from fleet.mutations_kept import MUTATIONS

    missed = 0
    for mistake in MUTATIONS:
        how = found_by(mistake)
        missed += how is None
        print(f"{mistake.name:76} {(how or 'NOT FOUND')[:150]}", flush=True)
    print(f"{len(MUTATIONS) - missed} of {len(MUTATIONS)} mistakes found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
