"""What a node deletes of its own records, so that its database stays bounded for years."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fleet.pairs import Fleet, Machine, pair
from fleet.plain import node_id
from vmconv_fleet.errors import ArchiveError, Refusal
from vmconv_fleet.jobs.policy import ENDED, kept_of
from vmconv_fleet.replication.database import open_writer
from vmconv_fleet.replication.records import Change
from vmconv_fleet.replication.requests import KEPT_MS, Context, IncomingRequest, Outcome, response_id
from vmconv_fleet.replication.retention import BATCH, DAY_MS, Keep, Retention
from vmconv_fleet.replication.store import Store

BY = {"user": "somebody"}


def _job(context: Context, request: IncomingRequest) -> Outcome:
    """Makes a job that has ended at once."""
    return Outcome([Change("job", request.id, {"state": "done", "ended_ms": context.now})], {})


def _fleet(keep: Keep, *, archive: str | None = None, **timing: Any) -> tuple[Fleet, Machine, Machine]:
    """Returns a fleet whose second machine keeps this much of what the first one asks for."""
    fleet, one, other = pair(**timing)
    retention = Retention(ENDED, lambda _view: keep, archive)
    for machine in (one, other):
        machine.handle({"job": _job}, retention=retention)
    return fleet, one, other


def _ask(fleet: Fleet, one: Machine, other: Machine, count: int, first: int = 0) -> None:
    assert one.requests is not None
    for number in range(first, first + count):
        fleet.send(one, one.requests.submit(other.id, "job", {}, BY, id=f"r{number:06}")[1])
        fleet.flow(10)


def _pass(fleet: Fleet, milliseconds: int) -> None:
    """Lets time pass on the wall clocks, and each machine clean until nothing is left."""
    for machine in fleet.machines.values():
        machine.offset += milliseconds
    for machine in fleet.machines.values():
        machine.write("heartbeat", machine.id, {})
    fleet.flow(10)
    for machine in (*fleet.machines.values(), *fleet.machines.values()):
        assert machine.requests is not None
        while sends := machine.requests.clean():
            fleet.send(machine, sends)
            fleet.flow(10)
    fleet.flow(100)


def _counts(machine: Machine, owner: Machine) -> dict[str, int]:
    kinds = ("job", "request", "response", "transaction")
    return {kind: len(machine.replica.store.find(kind, owner.id)) for kind in kinds}


def test_ended_records_are_deleted_by_age_and_the_numbers_go_on() -> None:
    fleet, one, other = _fleet(Keep(30 * DAY_MS, 1000))
    _ask(fleet, one, other, 5)
    _pass(fleet, 29 * DAY_MS)
    assert _counts(one, other) == {"job": 5, "request": 0, "response": 0, "transaction": 5}
    _pass(fleet, 2 * DAY_MS)
    # The last transaction stays, whatever its age.
    assert _counts(one, other) == {"job": 0, "request": 0, "response": 0, "transaction": 1}
    _ask(fleet, one, other, 1, 5)
    assert [one.body["number"] for one in one.replica.store.find("transaction", other.id)] == [5, 6]
    assert one.replica.store.state(other.id) == other.replica.store.state(other.id)


def test_ended_records_are_deleted_by_number_the_oldest_first() -> None:
    fleet, one, other = _fleet(Keep(30 * DAY_MS, 3))
    _ask(fleet, one, other, 8)
    _pass(fleet, 1000)
    counts = _counts(one, other)
    assert (counts["job"], counts["transaction"], _counts(one, one)["request"]) == (3, 3, 3)
    # A response stays as long as its request; of the others, as many as of every kind.
    assert counts["response"] == 3 + 3
    assert [record.id for record in one.replica.store.find("job", other.id)] == ["r000005", "r000006", "r000007"]


def test_open_jobs_and_unanswered_requests_stay() -> None:
    fleet, one, other = _fleet(Keep(8 * DAY_MS, 1))
    requests = other.requests
    assert requests is not None
    other.requests = None
    _ask(fleet, one, other, 3)
    for state in ("queued", "running"):
        other.write("job", state, {"state": state})
    assert one.requests is not None
    one.offset = other.offset = 400 * DAY_MS
    one.write("heartbeat", one.id, {})
    other.write("heartbeat", other.id, {})
    fleet.flow(10)
    assert one.requests.clean() == []
    assert requests.clean() == []
    assert one.problems() == other.problems() == []
    assert len(other.replica.store.find("job", other.id)) == 2


def test_years_of_work_leave_a_bounded_number_of_records() -> None:
    fleet, one, other = _fleet(Keep(30 * DAY_MS, 20), grace=DAY_MS, floor=1)
    rows = []
    for month in range(8):
        _ask(fleet, one, other, 30, 30 * month)
        _pass(fleet, 31 * DAY_MS)
        rows.append(max(machine.disk.execute("SELECT count(*) FROM records").fetchone()[0] for machine in (one, other)))
        assert other.disk.execute("SELECT count(*) FROM executed").fetchone()[0] <= 60
    # With the deletions that both still remember.
    assert max(rows[4:]) <= max(rows[:4]) < 300
    assert one.problems() == other.problems() == []


def test_a_request_from_before_the_memory_of_its_owner_is_refused() -> None:
    """It may have been executed. Its requester's database was restored from an old backup."""
    fleet, one, other = _fleet(Keep(8 * DAY_MS, 10))
    _ask(fleet, one, other, 2)
    old = one.replica.store.find("request")
    _pass(fleet, 10 * DAY_MS)
    _pass(fleet, KEPT_MS + DAY_MS)
    assert other.requests is not None
    assert one.replica.store.find("request") == []
    assert other.disk.execute("SELECT count(*) FROM executed").fetchone() == (0,)
    jobs = _counts(other, other)["job"]
    for record in old:
        other.requests._execute(record)
        answer = other.replica.store.get(other.id, "response", response_id(one.id, record.id))
        assert answer is not None
        assert not answer.body["ok"]
        assert "may have been executed" in answer.body["reason"]
    assert _counts(other, other)["job"] == jobs
    # A later one is executed, whatever its clock: that was wrong.
    one.offset = -300 * DAY_MS
    _ask(fleet, one, other, 1, 2)
    assert _counts(other, other)["job"] == jobs + 1


def test_an_id_that_comes_again_after_its_answer_was_deleted_is_not_executed_again() -> None:
    """Requester and owner have deleted request and answer; the owner remembers for as long as it keeps transactions."""
    fleet, one, other = _fleet(Keep(90 * DAY_MS, 1000))
    _ask(fleet, one, other, 1)
    _ask(fleet, one, other, 1, 5)
    _pass(fleet, KEPT_MS + DAY_MS)
    _pass(fleet, KEPT_MS + DAY_MS)
    assert _counts(one, one)["request"] == _counts(one, other)["response"] == 0
    for _ in range(2):
        _ask(fleet, one, other, 1)
    answer = one.replica.store.get(other.id, "response", response_id(one.id, "r000000"))
    assert answer is not None
    assert (answer.body["ok"], answer.body.get("reason")) == (
        False,
        "request r000000 was executed before, as transaction 1: use a new id",
    )
    assert _counts(one, other)["transaction"] == _counts(one, other)["job"] == 2
    # Forgotten by both, it is a new request.
    _pass(fleet, 100 * DAY_MS)
    _pass(fleet, KEPT_MS + DAY_MS)
    _ask(fleet, one, other, 1)
    assert one.replica.store.find("transaction", other.id)[-1].body["number"] == 3


def test_an_id_whose_request_was_deleted_before_its_answer_is_refused() -> None:
    fleet, one, other = _fleet(Keep(90 * DAY_MS, 1000))
    _ask(fleet, one, other, 1)
    assert one.requests is not None
    fleet.send(one, one.requests.withdraw("r000000"))
    fleet.flow(100)
    with pytest.raises(Refusal, match="request r000000 was answered before, and is deleted"):
        one.requests.submit(other.id, "job", {}, BY, id="r000000")
    assert _counts(one, other)["transaction"] == 1


def test_an_answer_that_is_lost_is_given_again_without_executing() -> None:
    """What was executed is remembered with the position of its request, also by an owner of an earlier version."""
    fleet, one, other = _fleet(Keep(90 * DAY_MS, 1000))
    for number, forgotten in enumerate((False, True)):
        _ask(fleet, one, other, 1, number)
        answer = response_id(one.id, f"r{number:06}")
        if forgotten:
            other.disk.execute("UPDATE executed SET epoch = 0, seq = 0")
        other.write("response", answer, None)
        assert other.requests is not None
        other.requests.reset()
        fleet.flow(100)
        found = one.replica.store.get(other.id, "response", answer)
        assert found is not None
        assert (found.body["ok"], found.body["transaction"]) == (True, number + 1)
    assert _counts(one, other)["transaction"] == 2


@pytest.mark.parametrize("jump", [400 * DAY_MS, 20_000 * DAY_MS], ids=["a year", "decades"])
def test_a_clock_that_was_ahead_for_hours_makes_no_request_refused(jump: int) -> None:
    """Not even those that were on their way all the time, nor after requests by clocks that were wrong too."""
    fleet, one, other = _fleet(Keep(8 * DAY_MS, 10))
    _ask(fleet, one, other, 2)
    one.offset += 300 * DAY_MS
    _ask(fleet, one, other, 1, 2)
    one.offset -= 300 * DAY_MS
    fleet.cut(one, other)
    assert one.requests is not None
    assert other.requests is not None
    one.requests.submit(other.id, "job", {}, BY, id="r000003")
    other.offset += jump // 2
    other.requests.submit(other.id, "job", {}, BY, id="own")
    other.requests.run()
    other.offset += jump // 2
    while other.requests.clean():
        pass
    assert other.disk.execute("SELECT count(*) FROM executed").fetchone() == (0,)
    other.offset -= jump
    fleet.link(one, other)
    fleet.flow(10_000)
    answer = other.replica.store.get(other.id, "response", response_id(one.id, "r000003"))
    assert answer is not None
    assert answer.body["ok"], answer.body


def test_nothing_is_deleted_by_a_clock_that_is_ahead_of_all_neighbours() -> None:
    fleet, one, other = _fleet(Keep(8 * DAY_MS, 10))
    _ask(fleet, one, other, 3)
    other.offset += 400 * DAY_MS
    assert other.requests is not None
    assert other.requests.clean() == []
    assert other.problems() == ["clock"]
    other.offset -= 400 * DAY_MS
    assert other.requests.clean() == []
    assert other.problems() == []
    # All clocks agree: the time has passed indeed.
    _pass(fleet, 30 * DAY_MS)
    assert _counts(other, other)["transaction"] == 1


def test_records_are_archived_before_they_are_deleted(tmp_path: Path) -> None:
    path = tmp_path / "archive.jsonl"
    fleet, one, other = _fleet(Keep(30 * DAY_MS, 2), archive=str(path))
    _ask(fleet, one, other, 5)
    before = {record.id: record.body for record in other.replica.store.find("transaction", other.id)}
    _pass(fleet, 1000)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    archived = {one["id"]: one["body"] for one in lines if one["kind"] == "transaction"}
    kept = {record.id: record.body for record in other.replica.store.find("transaction", other.id)}
    assert archived | kept == before
    assert len(archived) == 3
    assert path.stat().st_mode & 0o777 == 0o600


def test_nothing_is_deleted_that_cannot_be_archived(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    path = tmp_path / "archive.jsonl"
    os.symlink(target, path)
    fleet, one, other = _fleet(Keep(30 * DAY_MS, 2), archive=str(path))
    _ask(fleet, one, other, 5)
    assert other.requests is not None
    with pytest.raises(ArchiveError, match="old records stay"):
        other.requests.clean()
    assert _counts(other, other)["transaction"] == 5
    assert not target.exists()


def test_a_batch_is_bounded() -> None:
    fleet, _, other = _fleet(Keep(30 * DAY_MS, 1))
    changes = [Change("job", f"j{number}", {"state": "done", "ended_ms": 1}) for number in range(BATCH + 10)]
    fleet.send(other, other.replica.write(changes)[1])
    fleet.flow(100)
    assert other.requests is not None
    other.requests.clean()
    assert len(other.replica.store.find("job")) == 10


def test_the_policy_says_how_much_is_kept() -> None:
    _, one, _ = _fleet(Keep())
    assert kept_of(one.id, one.replica.store) == Keep(90 * DAY_MS, 10_000)
    one.write("policy", "conversion", {"keep_days": 7, "keep_records": 500})
    assert kept_of(one.id, one.replica.store) == Keep(7 * DAY_MS, 500)


def test_the_file_of_the_database_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    store = Store.open(str(path), node_id(0))
    connection = store._connection
    with store.group(), store.atomic():
        rows = ((key, os.urandom(4000).hex()) for key in range(1500))
        connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    large = path.stat().st_size
    with store.group(), store.atomic():
        connection.execute("DELETE FROM meta WHERE typeof(name) <> 'text' OR name <> 'node'")
    for _ in range(3):
        store.shrink()
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert path.stat().st_size < large / 2
    store.close()
    assert open_writer(str(path)).execute("PRAGMA integrity_check").fetchone() == ("ok",)
