"""Mistakes in what is kept, deleted and indexed, as patches of the production code; see `mutations`."""

from __future__ import annotations

# ruff: noqa: ARG005 - a patch takes what it replaces takes
from collections.abc import Iterable, Iterator
from typing import Any
from unittest.mock import patch

from fleet import test_engine, test_indexes, test_requests, test_retention, test_supervision
from fleet.mutations import MUTATIONS, blind, mutation
from vmconv_fleet.node.heartbeat import HeartbeatWriter
from vmconv_fleet.replication import requests, retention
from vmconv_fleet.replication.engine import Engine
from vmconv_fleet.replication.indexing import Indexes, Where
from vmconv_fleet.replication.ownlog import OwnLog
from vmconv_fleet.replication.records import MAX_NUMBER, Position, Record
from vmconv_fleet.replication.requests import Requests
from vmconv_fleet.replication.retention import DAY_MS, Ended
from vmconv_fleet.replication.store import Store

__all__ = ["MUTATIONS"]


@mutation(
    "records are deleted by a clock that is ahead",
    test_retention.test_nothing_is_deleted_by_a_clock_that_is_ahead_of_all_neighbours,
)
def deleted_by_clock() -> Iterator[None]:
    with patch.object(Requests, "_is_ahead_of_all", lambda self, now: False):
        yield


def _a_jump_of_a_year() -> None:
    test_engine.test_cleaning_waits_after_a_jump_of_the_clock(400 * DAY_MS)


@mutation("cleaning does not wait after a jump of the clock", _a_jump_of_a_year)
def cleans_at_once() -> Iterator[None]:
    with patch.object(Engine, "_notice_jump", lambda self, lead, now: None):
        yield


@mutation("an answer is deleted before its request")
def answer_deleted() -> Iterator[None]:
    with patch.object(requests, "UNASKED", Where()):
        yield


@mutation(
    "an id that comes again is answered with what it had done before",
    test_retention.test_an_id_that_comes_again_after_its_answer_was_deleted_is_not_executed_again,
)
def answered_again() -> Iterator[None]:
    with patch.object(Store, "executed_at", lambda self, response: Position(0, 0)):
        yield


@mutation("heartbeats queue while none can be written", test_supervision.test_a_heartbeat_waits_for_the_one_before)
def heartbeats_queue() -> Iterator[None]:
    original = HeartbeatWriter._beat

    def beat(self: HeartbeatWriter) -> float:
        self._written = None
        return original(self)

    with patch.object(HeartbeatWriter, "_beat", beat):
        yield


@mutation(
    "what was executed long ago is forgotten without a trace",
    test_retention.test_a_request_from_before_the_memory_of_its_owner_is_refused,
)
def no_horizon() -> Iterator[None]:
    with patch.object(Requests, "_horizon", lambda self, requester: Position(0, 0)):
        yield


def _a_clock_ahead_for_hours() -> None:
    test_retention.test_a_clock_that_was_ahead_for_hours_makes_no_request_refused(400 * DAY_MS)


@mutation("a clock decides which requests are too old", _a_clock_ahead_for_hours)
def horizon_by_clock() -> Iterator[None]:
    latest = 0

    def forget(self: Store, clock: int) -> dict[str, Position]:
        nonlocal latest
        ((found,),) = self._rows("SELECT max(clock) FROM executed WHERE clock < ?", clock)
        latest = max(latest, found or 0)
        return original(self, clock)

    def execute(self: Requests, record: Record) -> Any:
        past = Position(MAX_NUMBER, MAX_NUMBER) if record.clock <= latest else Position(0, 0)
        with patch.object(Requests, "_horizon", lambda self, requester: past):
            return run(self, record)

    original, run = Store.forget_executed_before, Requests._execute
    with patch.object(Store, "forget_executed_before", forget), patch.object(Requests, "_execute", execute):
        yield


@mutation(
    "the last transaction is deleted, and its number used again",
    test_retention.test_ended_records_are_deleted_by_age_and_the_numbers_go_on,
)
def last_number_lost() -> Iterator[None]:
    original = retention.overdue

    def overdue_too(store: Store, *arguments: Any) -> Iterator[Record]:
        with patch.object(Store, "last_id", lambda self, owner, kind: None):
            found = list(original(store, *arguments))
        return iter(found)

    with patch.object(requests, "overdue", overdue_too):
        yield


@mutation(
    "the newest of too many are deleted", test_retention.test_ended_records_are_deleted_by_number_the_oldest_first
)
def newest_deleted() -> Iterator[None]:
    original = Store.listed

    def listed(self: Store, kind: str, *arguments: Any, **options: Any) -> Any:
        return original(self, kind, *arguments, **{**options, "descending": True})

    with patch.object(Store, "listed", listed):
        yield


@mutation("open jobs are deleted", test_retention.test_open_jobs_and_unanswered_requests_stay)
def open_deleted() -> Iterator[None]:
    with patch.object(test_retention, "ENDED", (Ended("job", Where(), "ended_ms"),)):
        yield


@mutation("unanswered requests are deleted", test_retention.test_open_jobs_and_unanswered_requests_stay)
def unanswered_deleted() -> Iterator[None]:
    with patch.object(requests, "ANSWERED", Where()):
        yield


@mutation(
    "responses are deleted before their requests",
    test_requests.test_old_requests_are_cleaned_away_and_their_responses_after_them,
)
def response_first() -> Iterator[None]:
    with patch.object(requests, "UNASKED", Where()):
        yield


@mutation("deletions are remembered for ever", test_retention.test_years_of_work_leave_a_bounded_number_of_records)
def floor_stays() -> Iterator[None]:
    with patch.object(OwnLog, "raise_floor", lambda self, now, grace_ms: []):
        yield


@mutation("deletions are dropped, and their floor is not published")
def floor_secret() -> Iterator[None]:
    def drop(self: OwnLog, now: int, grace_ms: int) -> list[Record]:
        self._store.purge(self._signer.owner, self._store.position(self._signer.owner).seq)
        return []

    with blind(), patch.object(OwnLog, "raise_floor", drop):
        yield


_INDEXED = test_indexes.test_what_is_deleted_or_dropped_leaves_the_indexes


@mutation("an index keeps the rows of deleted records", _INDEXED)
def index_keeps() -> Iterator[None]:
    original = Indexes.put

    def put(self: Indexes, number: int, records: Iterable[Record]) -> None:
        original(self, number, [one for one in records if not one.deleted])

    with patch.object(Indexes, "put", put):
        yield


@mutation("an index keeps the rows of what a snapshot has replaced", _INDEXED)
def index_not_cleared() -> Iterator[None]:
    with patch.object(Indexes, "clear", lambda self, number: None):
        yield


def _history_after_a_jump() -> None:
    test_indexes.test_a_clock_that_was_wrong_leaves_nothing_at_the_top_of_the_history(False)


@mutation("a clock that was wrong orders the history", _history_after_a_jump)
def history_by_clock() -> Iterator[None]:
    with patch.object(
        Indexes, "_in_order", lambda self, number, index, records: {one.id: one.clock for one in records}
    ):
        yield
