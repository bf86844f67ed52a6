"""Requests and responses: executed once, in order, and answered whatever happens."""

from __future__ import annotations

import sqlite3
from typing import Any

import pytest

from fleet.pairs import Fleet, Machine, pair
from vmconv_fleet.errors import FleetError, MalformedError, Refusal
from vmconv_fleet.replication.records import MAX_RECORD, Change, Record
from vmconv_fleet.replication.requests import BURST, KEPT_MS, Context, IncomingRequest, Outcome, Requests, response_id

BY = {"user": "somebody"}


def _set(context: Context, request: IncomingRequest) -> Outcome:
    before = context.get(context.node, "setting", "s")
    value = [*(before.body["values"] if before else []), request.arguments["value"]]
    return Outcome([Change("setting", "s", {"values": value})], {"count": len(value)})


def _refuse(context: Context, request: IncomingRequest) -> Outcome:
    raise Refusal("not on a Tuesday")


def _break(context: Context, request: IncomingRequest) -> Outcome:
    raise ZeroDivisionError


def _large(context: Context, request: IncomingRequest) -> Outcome:
    return Outcome([Change("setting", "s", {"filling": "x" * (MAX_RECORD // 2)})], {"filling": "x" * (MAX_RECORD // 2)})


def _forge(context: Context, request: IncomingRequest) -> Outcome:
    return Outcome([Change(request.arguments["kind"], "000000000001", {})])


HANDLERS = {"set": _set, "refuse": _refuse, "break": _break, "large": _large, "forge": _forge}


def _ask(fleet: Fleet, one: Machine, other: Machine, value: Any, *, verb: str = "set", id: str | None = None) -> str:
    requests = one.requests or one.handle(HANDLERS)
    id, sends = requests.submit(other.id, verb, {"value": value}, BY, id=id)
    fleet.send(one, sends)
    return id


def _answer(one: Machine, other: Machine, id: str) -> Record | None:
    return one.replica.store.get(other.id, "response", response_id(one.id, id))


def _transactions(machine: Machine) -> list[Record]:
    return machine.replica.store.find("transaction", machine.id)


def _handling() -> tuple[Fleet, Machine, Machine]:
    fleet, one, other = pair()
    one.handle(HANDLERS)
    other.handle(HANDLERS)
    return fleet, one, other


def test_a_request_by_a_wrong_clock_makes_no_other_late() -> None:
    fleet, one, other = _handling()
    for wrong in (one, other):
        wrong.offset = 365 * 86_400_000
        asked = _ask(fleet, one, other, 1)
        fleet.flow()
        wrong.offset = 0
        again = _ask(fleet, one, other, 2)
        fleet.flow()
        for id in (asked, again):
            answer = _answer(one, other, id)
            assert answer is not None
            assert (answer.body["ok"], answer.body["late"]) == (True, False)
    for order, value in ((1, 3), (0, 4)):
        # As before, a request is late if one with a later clock was executed.
        one.offset = order * 60_000
        id = _ask(fleet, one, other, value)
        fleet.flow()
    assert (answer := _answer(one, other, id)) is not None and answer.body["late"] is False


def test_a_request_is_executed_and_answered_by_its_target() -> None:
    fleet, one, other = _handling()
    id = _ask(fleet, one, other, 7)
    fleet.flow()
    answer = _answer(one, other, id)
    assert answer is not None
    assert answer.body == {
        "request": id,
        "requester": one.id,
        "ok": True,
        "body": {"count": 1},
        "transaction": 1,
        "late": False,
    }
    assert one.body(other, "setting", "s") == {"values": [7]}


def test_a_transaction_states_its_changes_and_its_caller() -> None:
    fleet, one, other = _handling()
    _ask(fleet, one, other, 1)
    id = _ask(fleet, one, other, 2)
    fleet.flow()
    transaction = one.replica.store.get(other.id, "transaction", "000000000002")
    assert transaction is not None
    body = dict(transaction.body)
    assert body.pop("at_ms") == pytest.approx(other.wall(), abs=1000)
    request = one.replica.store.get(one.id, "request", id)
    assert request is not None
    assert tuple(body.pop("position")) == request.position
    assert body == {
        "number": 2,
        "schema_revision": 1,
        "request": id,
        "requester": one.id,
        "verb": "set",
        "by": BY,
        "late": False,
        "body": {"count": 2},
        "changes": [{"kind": "setting", "id": "s", "before": {"values": [1]}, "after": {"values": [1, 2]}}],
    }
    setting = one.replica.store.get(other.id, "setting", "s")
    assert setting is not None
    assert (transaction.txn, setting.txn) == (2, 2)


def test_a_request_to_oneself_goes_the_same_way() -> None:
    fleet, one, _ = _handling()
    id = _ask(fleet, one, one, 1)
    fleet.flow(50)
    assert _answer(one, one, id) is not None
    assert [record.id for record in _transactions(one)] == ["000000000001"]


@pytest.mark.parametrize(
    ("verb", "reason"),
    [
        ("refuse", "not on a Tuesday"),
        ("break", "internal error: see the node's log"),
        ("large", "record of"),
        ("unheard-of", "verb 'unheard-of' is unknown to this node"),
        ("x" * 100_000, "verb 'xxx"),
    ],
    ids=["refusal", "mistake", "large", "unknown", "long"],
)
def test_a_refused_request_is_answered_and_changes_nothing(verb: str, reason: str) -> None:
    fleet, one, other = _handling()
    id = _ask(fleet, one, other, 1, verb=verb)
    following = _ask(fleet, one, other, 2)
    fleet.flow()
    answer = _answer(one, other, id)
    assert answer is not None
    assert answer.body["ok"] is False
    assert answer.body["reason"].startswith(reason)
    assert len(_transactions(other)) == 1
    assert _answer(one, other, following) is not None


@pytest.mark.parametrize("kind", ["epoch", "request", "response", "transaction"])
def test_a_handler_cannot_write_what_the_system_itself_writes(kind: str) -> None:
    fleet, one, other = _handling()
    id, sends = one.handle(HANDLERS).submit(other.id, "forge", {"kind": kind}, BY)
    fleet.send(one, sends)
    fleet.flow()
    answer = _answer(one, other, id)
    assert answer is not None
    assert answer.body["reason"] == f"records of kind {kind!r} are not written by handlers"


def test_each_requesters_requests_are_executed_in_their_order() -> None:
    fleet, one, other = _handling()
    requests, other.requests = other.requests, None
    for value in range(30):
        _ask(fleet, one, other, value, id=f"{(value * 7919) % 1000:04}")
    fleet.flow()
    other.requests = requests
    fleet.flow(1000)
    assert one.body(other, "setting", "s") == {"values": list(range(30))}


def test_requests_of_several_are_executed_in_the_order_of_their_clocks() -> None:
    fleet, one, other = _handling()
    third = fleet.add(2)
    fleet.flow(100)
    fleet.link(third, other)
    fleet.flow(500)
    requests, other.requests = other.requests, None
    for value in range(6):
        fleet.time += 10
        _ask(fleet, (one, third)[value % 2], other, value)
    fleet.flow()
    other.requests = requests
    fleet.flow(1000)
    assert other.body(other, "setting", "s") == {"values": list(range(6))}
    assert [record.body["late"] for record in _transactions(other)] == [False] * 6


def test_a_late_request_is_executed_and_marked() -> None:
    fleet, one, other = _handling()
    third = fleet.add(2)
    third.handle(HANDLERS)
    fleet.flow(100)
    early = _ask(fleet, third, other, "early")
    fleet.flow(100)
    _ask(fleet, one, other, "in time")
    fleet.flow(100)
    fleet.link(third, other)
    fleet.flow(1000)
    answer = _answer(third, other, early)
    assert answer is not None
    assert answer.body["late"] is True
    assert other.body(other, "setting", "s") == {"values": ["in time", "early"]}


def test_the_same_id_is_the_same_request() -> None:
    fleet, one, other = _handling()
    assert _ask(fleet, one, other, 1, id="mine") == _ask(fleet, one, other, 1, id="mine") == "mine"
    fleet.flow()
    assert one.body(other, "setting", "s") == {"values": [1]}


def test_a_response_to_another_requester_is_not_accepted() -> None:
    fleet, one, other = _handling()
    third = fleet.add(2)
    fleet.flow(100)
    fleet.link(third, other)
    fleet.flow(500)
    _ask(fleet, third, other, "thief", id="mine")
    fleet.flow()
    _ask(fleet, one, other, "mine", id="mine")
    fleet.flow(500)
    assert one.body(other, "setting", "s") == {"values": ["thief", "mine"]}


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("target", "f" * 32),
        ("verb", "refuse"),
        ("arguments", {"value": 2}),
        ("arguments", {}),
        ("by", {"user": "eve"}),
        ("by", {**BY, "token": "x"}),
    ],
)
def test_a_request_id_is_good_for_one_request_of_one_caller(field: str, other: Any) -> None:
    _, one, there = _handling()
    assert one.requests is not None
    first: dict[str, Any] = {
        "target": there.id,
        "verb": "set",
        "arguments": {"value": 1},
        "by": {**BY, "address": "10.0.0.1"},
    }
    one.requests.submit(**first, id="r1")
    assert one.requests.submit(**{**first, "by": {**BY, "address": "10.0.0.2"}}, id="r1") == ("r1", [])
    with pytest.raises(Refusal, match=f"request r1 was sent before with .*{'caller' if field == 'by' else field}"):
        one.requests.submit(**{**first, field: other}, id="r1")


def test_a_request_id_has_a_limit() -> None:
    _, one, other = _handling()
    assert one.requests is not None
    with pytest.raises(MalformedError, match="91 characters, not 90"):
        one.requests.submit(other.id, "set", {}, BY, id="x" * 91)


def test_a_request_that_was_withdrawn_in_time_is_not_executed() -> None:
    fleet, one, other = _handling()
    fleet.cut(one, other)
    id = _ask(fleet, one, other, 1)
    assert one.requests is not None
    one.requests.withdraw(id)
    fleet.link(one, other)
    fleet.flow(1000)
    assert _transactions(other) == []


def test_pending_requests_are_executed_after_a_start() -> None:
    fleet, one, other = _handling()
    other.requests = None
    id = _ask(fleet, one, other, 1)
    fleet.flow(100)
    again = _restarted(fleet, one, other)
    fleet.flow(1000)
    assert _answer(one, again, id) is not None


def test_a_request_is_answered_again_and_never_executed_again() -> None:
    """The requester's database is an older one: its request is there again after its response was cleaned away."""
    fleet, one, other = _handling()
    id = _ask(fleet, one, other, 1, id="mine")
    fleet.flow(100)
    first = _answer(one, other, id)
    assert first is not None
    fleet.send(other, other.replica.write([Change("response", first.id, None)])[1])
    again = _restarted(fleet, one, other)
    fleet.flow(1000)
    second = _answer(one, again, id)
    assert second is not None
    assert second.seq > first.seq
    assert {**second.body, "late": False} == {**first.body, "late": False}
    assert len(_transactions(again)) == 1


def test_recovered_transactions_are_remembered_as_executed() -> None:
    """The owner's database is lost, and its responses have been cleaned away: its neighbours have its transactions."""
    fleet, one, other = _handling()
    id = _ask(fleet, one, other, 1)
    fleet.flow(100)
    first = _answer(one, other, id)
    assert first is not None
    fleet.send(other, other.replica.write([Change("response", first.id, None)])[1])
    fleet.flow(100)
    fleet.cut(one, other)
    again = fleet.add(1, patience=None)
    again.handle(HANDLERS)
    fleet.link(one, again)
    fleet.flow(2000)
    assert _answer(one, again, id) is not None
    assert len(_transactions(again)) == 1
    _ask(fleet, one, again, 2)
    fleet.flow()
    assert [record.body["number"] for record in _transactions(again)] == [1, 2]


def test_many_requests_leave_room_for_other_work() -> None:
    fleet, one, other = _handling()
    other.requests = None
    for value in range(BURST + 1):
        _ask(fleet, one, other, value)
    fleet.flow(1000)
    requests = other.handle(HANDLERS)
    requests.run()
    assert len(_transactions(other)) == BURST
    assert requests.waiting()


def test_old_requests_are_cleaned_away_and_their_responses_after_them() -> None:
    fleet, one, other = _handling()
    _ask(fleet, one, other, 1)
    fleet.flow(100)
    assert one.requests is not None
    assert other.requests is not None
    assert one.requests.clean() == other.requests.clean() == []
    one.offset = other.offset = KEPT_MS + 10_000
    one.write("heartbeat", one.id, {})
    other.write("heartbeat", other.id, {})
    fleet.flow(10)
    assert other.requests.clean() == []
    fleet.send(one, one.requests.clean())
    fleet.flow()
    fleet.send(other, other.requests.clean())
    fleet.flow()
    assert one.replica.store.find("request") == one.replica.store.find("response") == []
    assert len(_transactions(other)) == 1


def test_requests_of_a_failed_commit_are_executed_again() -> None:
    fleet, one, other = _handling()
    requests, other.requests = other.requests, None
    id = _ask(fleet, one, other, 1)
    fleet.flow(100)
    assert requests is not None
    with pytest.raises(FleetError), other.replica.batch():
        requests.run()
        raise FleetError("the disk is full")
    requests.reset()
    other.requests = requests
    fleet.flow(100)
    assert _answer(one, other, id) is not None
    assert [record.body["number"] for record in _transactions(other)] == [1]


def test_a_request_is_executed_by_the_commit_that_stores_it() -> None:
    fleet, one, other = _handling()
    requests = other.requests
    assert requests is not None
    id = _ask(fleet, one, other, 1)
    ((source, _, message),) = fleet.drop()
    with pytest.raises(FleetError), other.replica.batch():
        other.replica.received(source, message)
        assert requests.run()
        raise FleetError("the disk is full")
    requests.reset()
    assert requests.run() == []
    assert _transactions(other) == []
    known = len(other.news)
    with other.replica.batch():
        sends = [*other.replica.received(source, message), *requests.run()]
        assert other.news[known:] == []
    assert [record.kind for record in other.news[known:]] == ["request", "transaction", "setting", "response"]
    fleet.send(other, sends)
    fleet.flow(100)
    assert _answer(one, other, id) is not None
    assert [record.body["number"] for record in _transactions(other)] == [1]


def test_a_request_that_makes_no_sense_is_refused() -> None:
    """Bodies come from other nodes: nothing in them has to be of the right type."""
    fleet, one, other = _handling()
    for id, body in (
        ("a", {"target": other.id}),
        ("b", {"target": other.id, "verb": ["set"], "arguments": 3, "by": "me"}),
        ("c", {"target": [other.id], "verb": "set"}),
    ):
        one.write("request", id, body)
    fleet.flow()
    assert {record.body["ok"] for record in one.replica.store.find("response", other.id)} == {False}
    assert _transactions(other) == []


def _restarted(fleet: Fleet, one: Machine, other: Machine) -> Machine:
    """Returns a new process of a machine, on its disk, linked again."""
    fleet.cut(one, other)
    disk = sqlite3.connect(":memory:", isolation_level=None)
    disk.deserialize(other.disk.serialize())
    again = Machine(fleet, 1, disk=disk, patience=1000)
    fleet.machines[again.id] = again
    again.requests = Requests(again.replica, HANDLERS, again.wall)
    fleet.link(one, again)
    return again
