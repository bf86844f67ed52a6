"""A node with two histories: all nodes notice it, none of the two is lost, and its administrator makes one of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

from fleet.pairs import Fleet, Machine, copy_of, pair
from fleet.plain import PlainSigner, key_revocation, retirement
from vmconv.cli.main import main
from vmconv.plugin import AccessError
from vmconv_fleet.catalogue import overridden
from vmconv_fleet.catalogue.joining import join
from vmconv_fleet.catalogue.kinds import Principal
from vmconv_fleet.catalogue.overridden import overridden_in
from vmconv_fleet.catalogue.snapshot import Snapshot
from vmconv_fleet.cli.client import NodeClient, Reply
from vmconv_fleet.errors import MalformedError, NotReadyError, Refusal, StoreError
from vmconv_fleet.node.daemon import MERGED, Daemon
from vmconv_fleet.replication import epochs, forks, merging, messages, records, strays
from vmconv_fleet.replication.merging import merge
from vmconv_fleet.replication.messages import Notice
from vmconv_fleet.replication.records import Change, Record, decode, encode, seal
from vmconv_fleet.replication.requests import Context, IncomingRequest, Outcome, Requests, response_id
from vmconv_fleet.replication.retention import DAY_MS, Keep, Retention
from vmconv_fleet.testing import PATIENCE, Lab
from vmconv_fleet.trust.roles import rights_of

TOKEN = {"label": "anna", "role": "admin", "hash": "0" * 64, "created_ms": 1}


def _count(context: Context, request: IncomingRequest) -> Outcome:
    before = context.get(context.node, "count", "c")
    value = before.body["value"] + 1 if before else 1
    return Outcome([Change("count", "c", {"value": value, "last": request.id})], {"value": value})


HANDLERS = {"count": _count}


def _ask(fleet: Fleet, one: Machine, other: Machine, id: str) -> None:
    assert one.requests is not None
    fleet.send(one, one.requests.submit(other.id, "count", {}, {}, id=id)[1])


def _agree(*machines: Machine) -> bool:
    return all(one.replica.store.positions() == machines[0].replica.store.positions() for one in machines)


def _swap(fleet: Fleet, linked: Machine, other: Machine, peer: Machine) -> None:
    """Gives the link of a machine to another one with the same keys."""
    fleet.cut(linked, peer)
    fleet.machines[other.id] = other
    fleet.link(other, peer)
    fleet.flow(3000)


def _rolled_back() -> tuple[Fleet, Machine, Machine, Machine]:
    """Returns a node that writes with an old database, and two members: only the first one knows its later records."""
    fleet, one, other = pair()
    third = fleet.add(2)
    fleet.link(other, third)
    fleet.link(one, third)
    one.write("token", "0123456789ab", TOKEN)
    fleet.flow(1000)
    for machine in (one, other, third):
        machine.handle(HANDLERS)
    old = copy_of(one.disk)
    fleet.cut(one, third)
    fleet.cut(other, third)
    one.write("token", "0123456789ab", {**TOKEN, "revoked": True})
    _ask(fleet, other, one, "done")
    fleet.flow(1000)
    fleet.cut(one, other)
    again = fleet.add(0, disk=old)
    again.handle(HANDLERS)
    again.offset = 1000
    fleet.flow(500)
    again.write("thing", "mine", {"value": 1})
    return fleet, again, other, third


def _forked(*machines: Machine) -> bool:
    return all(
        machine.replica.store.forked() == {machines[0].id} and "fork" in machine.problems() for machine in machines
    )


def _refusal(machine: Machine) -> str | None:
    """Returns why the histories of a node cannot be merged."""
    try:
        machine.replica.strays()
    except NotReadyError as exc:
        return str(exc)
    return None


def test_a_node_that_wrote_with_an_old_database_has_forked_and_nothing_is_lost() -> None:
    fleet, again, other, third = _rolled_back()
    fleet.link(again, other)
    fleet.link(other, third)
    fleet.flow(3000)
    assert _forked(again, other, third)
    assert other.body(again, "token", "0123456789ab") == {**TOKEN, "revoked": True}
    assert again.body(again, "thing", "mine") == {"value": 1}
    assert not again.replica.serving
    with pytest.raises(NotReadyError, match="two histories"):
        again.replica.write([Change("thing", "t", {})])
    position = again.replica.store.position(again.id)
    fleet.flow(600_000)
    assert again.replica.store.position(again.id) == position
    assert _forked(again, other, third)


@pytest.mark.parametrize("behind", [0, 3_000_000], ids=["later", "earlier"])
def test_a_fork_is_noticed_whatever_the_order_of_the_two(behind: int) -> None:
    """With a clock that is behind, the second history has the earlier epochs."""
    fleet, one, other = pair()
    old = copy_of(one.disk)
    ahead = max(one.replica.store.position(one.id).epoch - one.wall(), 0)
    one.write("thing", "lost", {"value": 1})
    fleet.flow(500)
    fleet.cut(one, other)
    again = Machine(fleet, 0, disk=old)
    with again.replica.batch():
        again.replica._own._clock.last = 0
    again.offset = -(ahead + behind) if behind else 0
    fleet.machines[again.id] = again
    fleet.flow(500)
    again.write("thing", "mine", {"value": 2})
    fleet.link(again, other)
    fleet.flow(5000)
    assert _forked(again, other)
    assert other.body(one, "thing", "lost") == {"value": 1}
    assert again.body(again, "thing", "mine") == {"value": 2}


def test_merged_histories_have_all_of_both(tmp_path: Path) -> None:
    fleet, again, other, third = _rolled_back()
    fleet.link(again, third)
    _ask(fleet, third, again, "more")
    fleet.flow(1000)
    fleet.link(again, other)
    fleet.flow(3000)
    assert _forked(again, other, third)
    assert again.requests is not None
    fleet.send(again, merge(again.replica, again.requests, str(tmp_path / "merged.jsonl"), join).sends)
    fleet.flow(3000)
    assert again.replica.serving
    assert _agree(again, other, third)
    for machine in (again, other, third):
        assert machine.replica.store.forked() == frozenset()
        assert "fork" not in machine.problems()
        assert machine.body(again, "token", "0123456789ab") == {**TOKEN, "revoked": True}
        assert machine.body(again, "thing", "mine") == {"value": 1}
        done = machine.replica.store.find("transaction", again.id)
        assert [(one.body["number"], one.body["request"]) for one in done] == [(1, "more"), (2, "done")]
        answers = [
            machine.body(again, "response", response_id(*one)) for one in ((other.id, "done"), (third.id, "more"))
        ]
        assert [answer and answer["transaction"] for answer in answers] == [2, 1]
    kept = [json.loads(line) for line in (tmp_path / "merged.jsonl").read_text().splitlines()]
    assert {"token", "transaction", "response", "count"} <= {one["kind"] for one in kept}
    _ask(fleet, other, again, "next")
    fleet.flow(1000)
    assert [one.body["number"] for one in other.replica.store.find("transaction", again.id)] == [1, 2, 3]
    assert again.problems() == other.problems() == []


class FullDiskError(Exception):
    """What the database raises instead of committing."""


def _fail(machine: Machine, act: Callable[[], object]) -> None:
    """Does something whose commit fails."""
    with pytest.raises(FullDiskError), machine.replica.batch():
        act()
        raise FullDiskError


def test_a_merge_whose_commit_fails_leaves_the_history_as_it_was() -> None:
    fleet, again, other, third = _rolled_back()
    fleet.link(again, other)
    fleet.link(other, third)
    fleet.flow(3000)
    requests = again.requests
    assert requests is not None
    before = again.replica.store.position(again.id), again.replica.store.history(again.id)
    _fail(again, lambda: merge(again.replica, requests, None, join))
    fleet.flow(60_000)
    assert before == (again.replica.store.position(again.id), again.replica.store.history(again.id))
    assert again.replica.is_forked
    assert _forked(again, other, third)
    fleet.send(again, merge(again.replica, requests, None, join).sends)
    fleet.flow(3000)
    assert again.replica.serving
    assert _agree(again, other, third)


def test_a_merge_that_fails_within_a_commit_leaves_the_history_as_it_was() -> None:
    """Such as by a record that cannot be written again; the rest of the group is committed."""
    fleet, again, other, third = _rolled_back()
    fleet.link(again, other)
    fleet.link(other, third)
    fleet.flow(3000)
    requests = again.requests
    assert requests is not None
    before = again.replica.store.position(again.id), again.replica.store.others.all()
    again.news.clear()
    with again.replica.batch():
        with patch.object(merging, "_changes", side_effect=MalformedError("too large")), pytest.raises(MalformedError):
            merge(again.replica, requests, None, join)
        again.replica.received(other.id, messages.encode(Notice([])))
    assert before == (again.replica.store.position(again.id), again.replica.store.others.all())
    assert again.replica.is_forked
    assert not again.news
    fleet.flow(10_000)
    assert again.replica.store.position(again.id) == before[0]
    fleet.send(again, merge(again.replica, requests, None, join).sends)
    fleet.flow(3000)
    assert _agree(again, other, third)


def test_a_fork_is_found_again_if_the_commit_of_its_proof_has_failed() -> None:
    fleet, again, other, _ = _rolled_back()
    fleet.link(again, other)
    fleet.flow_until(lambda: again.id in other.replica._context.forks)
    fleet, again, other, _ = _rolled_back()
    fleet.link(again, other)
    failed = 0
    handle = other.replica._receiver.handle

    def full(peer: str, message: messages.Message) -> list[messages.Send]:
        nonlocal failed
        sends = handle(peer, message)
        if other.replica._context.forks.news and not failed:
            failed += 1
            raise StoreError("database: disk is full")
        return sends

    other.replica._receiver.handle = full  # type: ignore[method-assign]
    with pytest.raises(StoreError):
        fleet.flow(3000)
    assert not other.replica.store.forked()
    assert again.id not in other.replica._context.forks
    fleet.flow(60_000)
    assert _forked(again, other)


def test_a_restored_node_waits_on_if_the_commit_of_its_epoch_fails() -> None:
    fleet = Fleet()
    one = fleet.add(0, patience=None)
    _fail(one, lambda: one.replica._recovery.begin(0))
    assert one.replica.is_restored
    fleet.flow(5000)
    assert not one.replica.serving


def test_what_a_node_has_recovered_is_not_executed_again_by_merging() -> None:
    """Both histories have executed one request; the disk with the later one was lost and has been recovered."""
    fleet, one, other = pair()
    third = fleet.add(2)
    one.handle(HANDLERS)
    third.handle({})
    old = copy_of(one.disk)
    fleet.cut(one, other)
    fleet.link(other, third)
    fleet.flow(1000)
    _ask(fleet, third, one, "both")
    fleet.flow(1000)
    fleet.cut(other, third)
    fleet.link(one, other)
    fleet.flow(1000)
    fleet.cut(one, other)
    again = fleet.add(0, disk=old)
    again.handle(HANDLERS)
    again.offset = 1000
    fleet.link(again, third)
    fleet.flow(1000)
    fleet.cut(again, third)
    new = fleet.add(0)
    requests = new.handle(HANDLERS)
    fleet.link(new, third)
    fleet.flow(1000)
    fleet.link(new, other)
    fleet.flow(3000)
    assert _forked(new, other, third)
    fleet.send(new, merge(new.replica, requests, None, join).sends)
    fleet.flow(3000)
    assert _agree(new, other, third)
    done = other.replica.store.find("transaction", new.id)
    assert [(record.body["number"], record.body["request"]) for record in done] == [(1, "both")]


POLICY = {"max_parallel": 1, "administrators_of": ["a", "b"], "zero_copy": "require"}


@pytest.mark.parametrize(
    ("kind", "before", "first", "second", "merged"),
    [
        ("token", TOKEN, {**TOKEN, "revoked": True}, {**TOKEN, "label": "x"}, {**TOKEN, "revoked": True}),
        ("token", TOKEN, None, {**TOKEN, "label": "x"}, None),
        ("group", {"role": "admin"}, None, {"role": "viewer"}, None),
        ("group", {"role": "admin"}, {"role": "viewer"}, {"role": "operator"}, {"role": "viewer"}),
        ("group", {"role": "viewer"}, {"role": "admin"}, {"role": "operator"}, {"role": "operator"}),
        ("group", {"role": "admin"}, {"role": "root"}, {"role": "admin", "x": 1}, {"role": "viewer", "x": 1}),
        ("group", {"role": "admin"}, {"role": ["admin"]}, {"role": "admin", "x": 1}, {"role": "viewer", "x": 1}),
        (
            "group",
            {},
            {"role": "viewer", "datastores": {"n/a": "admin", "n/b": "operator"}},
            {"role": "viewer", "datastores": {"n/a": "operator", "n/c": "admin"}},
            {"role": "viewer", "datastores": {"n/a": "operator"}},
        ),
        ("group", {}, {"role": "viewer"}, {"role": "viewer", "datastores": {"n/a": "admin"}}, {"role": "viewer"}),
        (
            "token",
            TOKEN,
            {**TOKEN, "role": "operator"},
            {**TOKEN, "label": "x"},
            {**TOKEN, "label": "x", "role": "operator"},
        ),
        ("job", {"state": "queued"}, {"state": "done"}, {"state": "queued", "x": 1}, {"state": "done"}),
        ("job", {"state": "queued"}, {"state": "failed"}, {"state": "cancelled"}, {"state": "cancelled"}),
        ("job", {"state": "queued"}, {"state": "running"}, {"state": "queued", "x": 1}, {"state": "running"}),
        ("job", {"state": "queued"}, {"state": "planned"}, {"state": "running"}, {"state": "running"}),
        ("job", {}, {"state": "running", "dry_run": True}, {"state": "planned"}, {"state": "planned"}),
        ("job", {"state": "done"}, None, {"state": ["done"]}, None),
        (
            "job",
            {"state": "queued"},
            {"state": "queued", "cancel": True},
            {"state": "running"},
            {"state": "running", "cancel": True},
        ),
        ("job", {}, {"state": "planned", "dry_run": True}, {"state": "running"}, {"state": "planned", "dry_run": True}),
        ("policy", {}, POLICY, {"max_parallel": 2}, {**POLICY, "max_parallel": 2}),
        ("policy", {}, POLICY, {"administrators_of": ["b", "c"]}, {**POLICY, "administrators_of": ["b"]}),
        ("policy", {}, {"may_remove_source": False}, {"may_remove_source": True}, {}),
        ("thing", {}, {"value": 1}, {"value": 2}, {"value": 2}),
    ],
)
@pytest.mark.parametrize("is_owner", [False, True], ids=["of the other history", "of this history"])
def test_what_has_ended_in_one_history_has_ended(
    kind: str, before: Any, first: Any, second: Any, merged: Any, is_owner: bool
) -> None:
    """The second history wrote it later."""
    fleet, one, other = pair()
    one.write(kind, "r", before)
    fleet.flow(500)
    copy = Machine(fleet, 0, disk=copy_of(one.disk))
    ahead = copy if is_owner else one
    ahead.offset = 60_000
    copy.replica.tick()
    one.write(kind, "r", second if ahead is one else first)
    fleet.flow(500)
    copy.write(kind, "r", second if ahead is copy else first)
    _swap(fleet, one, copy, other)
    assert _forked(copy, other)
    fleet.send(copy, merge(copy.replica, copy.handle({}), None, join).sends)
    fleet.flow(3000)
    assert copy.body(copy, kind, "r") == other.body(copy, kind, "r") == merged


class Theft(NamedTuple):
    """A node, another machine with its keys, and a member that is linked to one of them in turn."""

    fleet: Fleet
    one: Machine
    thief: Machine
    third: Machine

    def tell(self) -> None:
        """Lets the node know what the thief has written."""
        self.fleet.cut(self.one, self.third)
        _swap(self.fleet, self.one, self.thief, self.third)
        _swap(self.fleet, self.thief, self.one, self.third)
        assert _forked(self.one, self.third)


@pytest.fixture
def theft() -> Theft:
    fleet, one, other = pair()
    thief = Machine(fleet, 0, disk=copy_of(one.disk))
    thief.replica.tick()
    one.write("thing", "one", {})
    fleet.flow(500)
    fleet.cut(one, other)
    third = fleet.add(2)
    _swap(fleet, one, thief, third)
    return Theft(fleet, one, thief, third)


def test_a_merge_says_what_it_has_overridden(theft: Theft) -> None:
    """Only what both have changed since they parted, and rights first; scans are repeated anyway."""
    one, thief = theft.one, theft.thief
    for machine, value in ((one, 1), (thief, 2)):
        machine.write("thing", "both", {"value": value, "same": 1})
        machine.write("thing", f"alone-{value}", {"value": value})
        machine.write("disk", "d", {"value": value})
        machine.write("token", "0123456789ab", {**TOKEN, "revoked": value == 1})
        machine.write("group", "g", {"group": "ops", "role": "admin"})
    thief.write("group", "g", None)
    theft.tell()
    lost = merge(one.replica, one.handle({}), None, join).overridden
    shown = overridden_in(lost)
    assert shown["overridden_count"] == len(shown["overridden"]) == 3
    token, group, thing = shown["overridden"]
    assert (token["kind"], token["name"], token["history"], token["fields"]) == ("token", "anna", "other", ["revoked"])
    assert (group["name"], group["history"], group["is_deleted"]) == ("ops", "this", True)
    assert (thing["id"], thing["fields"], thing["is_deletion"]) == ("both", ["value"], False)
    assert thing["history"] == ("this" if one.body(one, "thing", "both") == {"value": 2, "same": 1} else "other")
    assert len(overridden_in(lost * 100)["overridden"]) == overridden.MAX_LISTED


def test_an_answer_whose_transaction_the_other_history_has_deleted_names_none(theft: Theft) -> None:
    """Its number is that of another transaction in this history."""
    answer = {"request": "q", "requester": theft.third.id, "ok": True, "transaction": 1}
    theft.thief.write("response", f"q.{theft.third.id}", answer)
    theft.tell()
    one = theft.one
    merge(one.replica, one.handle({}), None, join)
    del answer["transaction"]
    assert one.body(one, "response", f"q.{theft.third.id}") == answer


def test_what_was_not_changed_here_since_they_parted_is_not_overridden() -> None:
    fleet, one, other = pair()
    one.write("token", "0123456789ab", TOKEN)
    fleet.flow(500)
    thief = Machine(fleet, 0, disk=copy_of(one.disk))
    thief.replica.tick()
    one.write("thing", "one", {})
    fleet.flow(500)
    fleet.cut(one, other)
    theft = Theft(fleet, one, thief, fleet.add(2))
    thief.write("token", "0123456789ab", {**TOKEN, "revoked": True})
    theft.tell()
    assert not merge(one.replica, one.handle({}), None, join).overridden
    assert one.body(one, "token", "0123456789ab") == {**TOKEN, "revoked": True}


def test_the_node_of_a_machine_merges_by_the_rules_of_the_catalogue(lab: Lab) -> None:
    """By the later clock, the revoked token would work again."""
    daemon = Daemon(lab.add())
    daemon.start()
    try:
        said = {**TOKEN, "revoked": True}
        changes = [Change("token", "0123456789ab", said)]
        (record,) = daemon.service.update(lambda _view: changes).result(PATIENCE)
        payload = encode(record._replace(clock=record.clock + 1, body=TOKEN))
        (signature,) = daemon._signer.sign_many([payload])
        other = decode(seal(signature, payload))

        def fork() -> None:
            assert daemon.service._replica._context.forks.keep((record, other), 0)
            daemon.service._replica.store.others.keep([other])

        daemon.service._engine.call(fork).result(PATIENCE)
        (lost,) = daemon.service.merge({"node": daemon.service.node}).result(PATIENCE)
        assert (lost.record.wire, lost.is_own) == (other.wire, False)
        kept = daemon.service.view().get(daemon.service.node, "token", "0123456789ab")
        assert kept is not None
        assert kept.body == said
        assert not daemon.service.is_forked
        assert os.path.getsize(daemon.config.path(MERGED))
    finally:
        daemon.close()


def test_the_command_lists_what_a_merge_has_overridden(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = {"kind": "token", "id": "t1", "name": "an\x1bna", "history": "other", "fields": ["revoked"]}
    states = ({"is_deletion": False, "is_deleted": False}, {"is_deletion": False, "is_deleted": True})
    found = [{**lost, **state} for state in (*states, {"is_deletion": True, "is_deleted": False})]
    answer = {"waits_for": [], "overridden": found, "overridden_count": 5}
    monkeypatch.setattr(NodeClient, "call", lambda *_arguments, **_named: Reply(200, answer))
    resume = ["node", "resume", "--merge", "--directory", lab.add().directory]
    assert main(resume) == 0
    said = capsys.readouterr().out
    assert "writes again" in said
    assert "an\\x1bna" in said
    assert [line.split()[-1] for line in said.splitlines()[3:6]] == ["revoked", "deleted", "deletion"]
    assert "and 2 more" in said
    assert main([*resume, "--output", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == answer


def _three() -> tuple[Fleet, Machine, Machine, list[Machine]]:
    """Returns a node, a member that is linked to it, and two copies of its machine, each with a member of its own."""
    fleet, one, other = pair()
    one.write("token", "0123456789ab", TOKEN)
    one.write("group", "g", {"role": "admin"})
    one.write("job", "j", {"state": "queued"})
    fleet.flow(500)
    copies = [Machine(fleet, 0, disk=copy_of(one.disk)) for _ in range(2)]
    witnesses = [fleet.add(number) for number in (2, 3)]
    for machine in (one, other, *copies, *witnesses):
        machine.handle(HANDLERS)
    fleet.cut(one, other)
    for number, (copy, witness) in enumerate(zip(copies, witnesses, strict=True)):
        copy.offset = 1000 * number
        fleet.machines[copy.id] = copy
        fleet.link(copy, witness)
        fleet.flow(1000)
        if number == 0:
            copy.write("token", "0123456789ab", {**TOKEN, "revoked": True})
        else:
            copy.write("group", "g", None)
        copy.write("thing", f"of-{number}", {})
        _ask(fleet, witness, copy, f"r{number}")
        fleet.flow(1000)
        fleet.cut(copy, witness)
    fleet.machines[one.id] = one
    fleet.link(one, other)
    one.write("job", "j", {"state": "done"})
    _ask(fleet, other, one, "own")
    fleet.flow(1000)
    return fleet, one, other, witnesses


def _check_all_three(*machines: Machine) -> None:
    for machine in machines:
        one = machines[0]
        assert machine.body(one, "token", "0123456789ab") == {**TOKEN, "revoked": True}
        assert machine.body(one, "group", "g") is None
        assert machine.body(one, "job", "j") == {"state": "done"}
        assert machine.body(one, "thing", "of-0") == machine.body(one, "thing", "of-1") == {}
        done = machine.replica.store.find("transaction", one.id)
        assert [record.body["number"] for record in done] == [1, 2, 3]
        assert {record.body["request"] for record in done} == {"own", "r0", "r1"}


def test_three_histories_become_one_with_all_that_has_ended() -> None:
    fleet, one, other, witnesses = _three()
    for witness in witnesses:
        fleet.link(one, witness)
    fleet.flow(5000)
    assert _forked(one, other, *witnesses)
    assert one.requests is not None
    fleet.send(one, merge(one.replica, one.requests, None, join).sends)
    fleet.flow(5000)
    _check_all_three(one, other, *witnesses)
    assert _agree(one, other, *witnesses)
    assert one.problems() == []


def test_a_third_history_that_comes_after_a_merge_forks_the_node_again() -> None:
    fleet, one, other, witnesses = _three()
    assert one.requests is not None
    for linked, witness in enumerate(witnesses, 1):
        fleet.link(one, witness)
        fleet.flow(5000)
        assert _forked(one, other, *witnesses[:linked])
        fleet.send(one, merge(one.replica, one.requests, None, join).sends)
        fleet.flow(5000)
    _check_all_three(one, other, *witnesses)
    assert _agree(one, other, *witnesses)


ODD = {"number": 1, "requester": "c" * 32, "request": "odd"}


@pytest.mark.parametrize(
    "body",
    [
        {"number": 1},
        {**ODD, "request": 7},
        {**ODD, "requester": ["c"]},
        {**ODD, "request": "\u00e9"},
        {**ODD, "position": [1]},
        {**ODD, "position": 5},
        {**ODD, "position": ["a", -1]},
        {**ODD, "position": [1 << 70, 1]},
    ],
)
def test_a_transaction_without_a_request_is_left_out(body: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A machine with stolen keys has written it."""
    fleet, one, other = pair()
    thief = Machine(fleet, 0, disk=copy_of(one.disk))
    thief.replica.tick()
    one.write("thing", "one", {})
    fleet.flow(500)
    thief.write("transaction", f"{1:012}", body)
    thief.write("thing", "thief", {})
    _swap(fleet, one, thief, other)
    third = fleet.add(2)
    fleet.link(third, thief)
    fleet.flow(3000)
    fleet.cut(third, thief)
    _swap(fleet, thief, one, third)
    assert _forked(one, other)
    fleet.send(one, merge(one.replica, one.handle(HANDLERS), None, join).sends)
    fleet.flow(3000)
    assert not one.replica.store.find("transaction", one.id)
    assert one.body(one, "thing", "thief") == {}
    assert "transaction 000000000001 of the other history is left out" in caplog.text


@pytest.mark.parametrize("deleter", ["first", "second", "neither"])
def test_histories_that_have_forgotten_deletions_are_not_merged(deleter: str) -> None:
    """A deletion is forgotten after the grace: then nothing says that the record of the other history is over."""
    rare: dict[str, Any] = {"grace": 4000, "floor": 1000}
    fleet, one, other = pair(**rare)
    one.write("group", "g", {"role": "admin"})
    one.write("thing", "old", {})
    one.write("thing", "old", None)
    fleet.flow(10_000)
    assert one.replica.store.history(one.id).floor
    copy = Machine(fleet, 0, disk=copy_of(one.disk), **rare)
    copy.replica.tick()
    one.write("thing", "one", {})
    if deleter == "first":
        one.write("group", "g", None)
        fleet.flow(10_000)
        one.write("thing", "one", {"value": 2})
    if deleter == "second":
        one.write("group", "g", {"role": "reader"})
    fleet.flow(1000)
    fleet.cut(one, other)
    fleet.machines[copy.id] = copy
    copy.write("group", "g", None if deleter == "second" else {"role": "reader"})
    fleet.flow(10_000 if deleter == "second" else 500)
    fleet.link(copy, other)
    fleet.flow(3000)
    assert _forked(copy, other)
    requests = copy.handle({})
    if deleter == "neither":
        fleet.send(copy, merge(copy.replica, requests, None, join).sends)
        fleet.flow(3000)
        assert other.body(copy, "group", "g") == {"role": "reader"}
        return
    said = "the other one has forgotten" if deleter == "first" else "this one has forgotten .*, which may be .*group g"
    with pytest.raises(Refusal, match=f"parted too long ago, after record .*: {said}") as refused:
        merge(copy.replica, requests, None, join)
    assert "let the authority retire the node" in str(refused.value.hint)
    assert copy.replica.is_forked


def test_histories_are_merged_only_once_they_are_here() -> None:
    fleet, again, other, third = _rolled_back()
    assert again.requests is not None
    assert _refusal(again) == "this node has one history: there is nothing to merge"
    # The third one has this history, and brings the proof that there is another one.
    for one, peer in ((again, third), (other, third), (again, third)):
        fleet.link(one, peer)
        fleet.flow(3000)
        fleet.cut(one, peer)
    fleet.link(again, third)
    fleet.flow(3000)
    assert _forked(again, third)
    assert other.id in (_refusal(again) or "")
    fleet.link(again, other)
    fleet.flow(3000)
    fleet.send(again, merge(again.replica, again.requests, None, join).sends)
    fleet.flow(3000)
    assert _agree(again, other, third)


def test_a_history_that_no_member_has_any_more_is_given_up() -> None:
    """It was written by this node alone, which has lost its disk since."""
    fleet, again, other, third = _rolled_back()
    fleet.link(again, other)
    fleet.flow(3000)
    fleet.cut(again, other)
    fleet.link(other, third)
    fleet.flow(1000)
    new = fleet.add(0, patience=None)
    fleet.link(new, other)
    fleet.flow(3000)
    assert _forked(new, other, third)
    assert third.id in (_refusal(new) or "")
    fleet.link(new, third)
    fleet.flow(3000)
    fleet.send(new, merge(new.replica, new.handle({}), None, join).sends)
    fleet.flow(3000)
    assert new.replica.serving
    assert new.body(new, "token", "0123456789ab") == {**TOKEN, "revoked": True}
    assert _agree(new, other, third)


def test_a_merged_history_that_goes_on_elsewhere_has_forked_again() -> None:
    """The other machine still runs."""
    fleet, one, other = pair()
    copy = Machine(fleet, 0, disk=copy_of(one.disk))
    copy.replica.tick()
    one.write("thing", "one", {"value": 1})
    fleet.flow(500)
    copy.write("thing", "copy", {"value": 2})
    _swap(fleet, one, copy, other)
    assert _forked(copy, other)
    copy.handle({})
    assert copy.requests is not None
    fleet.send(copy, merge(copy.replica, copy.requests, None, join).sends)
    fleet.flow(3000)
    assert not other.replica.store.forked()
    fleet.cut(copy, other)
    one.write("thing", "one", {"value": 3})
    _swap(fleet, copy, one, other)
    assert _forked(one, other)


def _cloned() -> tuple[Fleet, Machine, Machine, Machine]:
    """Returns a node, its clone that has met the others in its place, and these: one neighbour, and one behind it."""
    fleet, one, other = pair()
    far = fleet.add(2)
    fleet.flow(100)
    fleet.link(other, far)
    one.write("token", "0123456789ab", TOKEN)
    fleet.flow(1000)
    copy = Machine(fleet, 0, disk=copy_of(one.disk))
    copy.replica.tick()
    _swap(fleet, one, copy, other)
    _swap(fleet, copy, one, other)
    return fleet, one, other, far


def test_a_clone_that_writes_in_turn_is_noticed_though_it_knows_all() -> None:
    """The copy has begun its epoch behind all that the first machine has written, and that wrote no more meanwhile."""
    _, one, other, far = _cloned()
    assert _forked(one, other, far)
    assert not one.replica.serving


def test_all_nodes_show_a_fork_until_its_key_is_revoked() -> None:
    fleet, one, other, far = _cloned()
    far.write("node", far.id, {"name": "n03", "fleet": "f"})
    nodes = Snapshot(far.replica.store, far.id, far.wall(), neighbours=[one.id], retirements={}).nodes()
    assert {node.node: node.state for node in nodes}[far.id] == "here"
    assert one.id not in {node.node for node in nodes if node.state != "forked"}
    again = Machine(fleet, 2, disk=far.disk)
    assert "fork" in again.problems()
    other.write("revocation", one.signer.key_id, key_revocation(one.id, one.signer.key_id).body)
    fleet.flow(1000)
    for machine in (other, far):
        assert machine.replica.store.forked() == frozenset()
        assert "fork" not in machine.problems()


def test_a_fork_is_over_when_its_node_is_retired() -> None:
    fleet, one, other, far = _cloned()
    fleet.send(other, other.replica.write([retirement(one.id)])[1])
    fleet.flow(1000)
    for machine in (other, far):
        assert machine.replica.store.forked() == frozenset()
        assert "fork" not in machine.problems()


def test_requests_and_tokens_of_a_forked_node_are_refused() -> None:
    """A token that one of the two has revoked may be valid in the history of the other."""
    fleet, one, other = pair()
    far = fleet.add(2)
    fleet.flow(100)
    fleet.link(other, far)
    one.write("token", "0123456789ab", TOKEN)
    far.handle({"do": lambda *_: Outcome([], {})})
    copy = Machine(fleet, 0, disk=copy_of(one.disk))
    copy.replica.tick()
    one.write("thing", "one", {})
    fleet.flow(1000)
    copy.write("thing", "copy", {})
    for requester in (one, other):
        requester.handle({})
    _swap(fleet, one, copy, other)
    for machine in (other, far):
        by = Principal(node=other.id, token=f"{one.id}/0123456789ab", user="anna")
        assert machine.body(one, "token", "0123456789ab") is not None
        with pytest.raises(AccessError, match="has two histories"):
            rights_of(by, machine.replica.store, 0)
    # A version that does not know forks writes in spite of it.
    one.replica._context.forks._forked = frozenset()
    for requester in (one, other):
        assert requester.requests is not None
        fleet.send(requester, requester.requests.submit(far.id, "do", {}, {}, id="r")[1])
    _swap(fleet, copy, one, other)
    answers = {record.body["requester"]: record.body["ok"] for record in far.replica.store.find("response")}
    assert answers == {one.id: False, other.id: True}


def test_both_records_for_one_position_are_kept() -> None:
    """As after a virtual machine went back to a snapshot with its memory."""
    fleet, one, other = pair()
    position = one.replica.store.position(one.id)
    clone = Machine(fleet, 0, disk=copy_of(one.disk))
    clone.replica._recovery.epoch = position.epoch
    one.write("thing", "t", {"value": "original"})
    fleet.flow()
    _, sends = clone.replica.write([Change("thing", "t", {"value": "clone"})])
    fleet.send(other, other.replica.received(one.id, sends[0].message))
    assert "fork" in other.problems()
    assert {record.body["value"] for record in other.replica.store.forks()} == {"original", "clone"}
    fleet.flow(3000)
    assert _forked(one, other)
    assert other.body(one, "thing", "t") == {"value": "original"}


def _signed(signer: PlainSigner, record: Record, **changes: Any) -> Record:
    payload = records.encode(record._replace(**changes))
    return records.decode(seal(signer.sign(payload), payload))


def test_only_records_that_its_owner_signed_prove_a_fork() -> None:
    _, one, other = pair()
    record = one.write("thing", "t", {"value": 1})
    for signer, body, forked in (
        (PlainSigner(other.id), {"value": 2}, set()),
        (one.signer, {"value": 1}, set()),
        (one.signer, {"value": 2}, {one.id}),
    ):
        pair_ = record, _signed(signer, record, body=body)
        other.replica.received(one.id, messages.encode(Notice([half.wire for half in pair_])))
        assert other.replica.store.forked() == forked


def test_records_of_one_history_prove_nothing() -> None:
    fleet, one, other = pair()
    halves = [one.replica.store.get(one.id, epochs.KIND, epochs.ID)]
    halves += [one.write("thing", f"t{number}", {}) for number in range(3)]
    again = fleet.add(0, disk=one.disk)
    fleet.flow(500)
    halves += [again.replica.store.get(one.id, epochs.KIND, epochs.ID), again.write("thing", "t4", {})]
    for first in halves:
        for second in halves:
            assert first is not None and second is not None
            other.replica.received(one.id, messages.encode(Notice([first.wire, second.wire])))
    assert other.replica.store.forked() == frozenset()


def test_the_proof_of_an_earlier_version_counts() -> None:
    """Then a node accused itself, in the record of its epochs."""
    _, one, other = pair()
    history = one.replica.store.get(one.id, epochs.KIND, epochs.ID)
    assert history is not None
    theirs = _signed(
        one.signer, history, epoch=history.epoch + 5, body={"starts": [[history.epoch + 5, 1]], "floor": 0}
    )
    said = {"starts": [[history.epoch, 1], [history.epoch + 9, 2]], "floor": 0, "cloned": theirs.wire.hex()}
    accusing = _signed(one.signer, history, epoch=history.epoch + 9, seq=2, body=said)
    other.replica.received(one.id, messages.encode(Notice([accusing.wire])))
    assert other.replica.store.forked() == {one.id}


# How much is kept of another history


def test_telemetry_of_another_history_is_kept_once(theft: Theft) -> None:
    """A machine with stolen keys that runs for months writes its heartbeat all the time."""
    kept = theft.one.replica.store.others
    for number in range(3):
        kinds = ("heartbeat", "disk", "token")
        records = [theft.thief.write(kind, "0123456789ab", {**TOKEN, "n": number}) for kind in kinds]
        assert kept.keep(records) == kept.keep(records) == records[-1]
    found = [(stray.kind, stray.body["n"]) for stray in kept.all()]
    assert sorted(found) == [("disk", 2), ("heartbeat", 2), *(("token", n) for n in range(3))]
    assert not kept.dropped()


@pytest.mark.parametrize(("limit", "value"), [("MAX_RECORDS", 4), ("MAX_BYTES", 1000)])
def test_a_history_that_is_too_large_is_dropped_and_not_merged(
    theft: Theft, limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with stolen keys writes without end."""
    monkeypatch.setattr(strays, limit, value)
    for number in range(12):
        theft.thief.write("thing", f"t{number}", {"value": number})
    theft.tell()
    one = theft.one
    kept = len(one.replica.store.others.all())
    assert 0 < kept <= 5
    (problem,) = [problem.text for problem in one.replica.problems.all() if problem.kind == "strays"]
    assert f"{13 - kept} of its records were dropped" in problem
    with pytest.raises(Refusal, match="let the authority retire the node"):
        merge(one.replica, one.handle({}), None, join)
    assert one.replica.is_forked
    assert "strays" in Machine(theft.fleet, 0, disk=copy_of(one.disk)).problems()


def test_a_database_of_an_earlier_revision_keeps_its_strays(theft: Theft) -> None:
    theft.thief.write("thing", "thief", {})
    theft.tell()
    known = theft.one.replica.store.others.all()
    disk = copy_of(theft.one.disk)
    disk.executescript(
        "CREATE TABLE old (epoch INTEGER NOT NULL, seq INTEGER NOT NULL, wire BLOB NOT NULL,"
        " PRIMARY KEY (epoch, seq, wire)) WITHOUT ROWID; INSERT INTO old SELECT epoch, seq, wire FROM strays;"
        " DROP TABLE strays; ALTER TABLE old RENAME TO strays;"
    )
    again = Machine(theft.fleet, 0, disk=disk).replica.store.others
    assert again.all() == known != []
    again.keep(known)
    assert again.all() == known


def _prune(fleet: Fleet, machine: Machine, requests: Requests) -> None:
    """Lets a node delete all but its last transaction, and the responses to withdrawn requests."""
    fleet.flow(100)
    with patch("vmconv_fleet.replication.requests.KEPT_MS", 0):
        fleet.send(machine, requests.clean())
    fleet.flow(500)


@contextmanager
def _without_pages(machine: Machine, owner: Machine) -> Iterator[None]:
    """Loses the records of an owner on their way to a machine."""
    received = machine.replica.received

    def lossy(peer: str, message: bytes) -> list[messages.Send]:
        found = messages.decode(message)
        return [] if isinstance(found, messages.Page) and found.owner == owner.id else received(peer, message)

    with patch.object(machine.replica, "received", lossy):
        yield


FEW = Retention(keep=lambda _view: Keep(DAY_MS, 1))


def _pruned(withdrawn: str) -> tuple[Fleet, Machine, Machine, Machine]:
    """Returns a forked node, its requester, and a member that has not heard of a withdrawal.

    The other history of the node has executed the request `done`, and has deleted its transaction, and its response if
    the request is withdrawn. The node knows it, but not the withdrawal.
    """
    fleet, one, other = pair()
    third = fleet.add(2)
    requests = one.handle(HANDLERS, retention=FEW)
    other.handle({})
    fleet.link(other, third)
    fleet.flow(1000)
    old = copy_of(one.disk)
    fleet.cut(one, other)
    _ask(fleet, other, one, "done")
    fleet.flow(1000)
    fleet.cut(other, third)
    fleet.link(one, other)
    _ask(fleet, other, one, "last")
    fleet.flow(1000)
    assert [record.body["request"] for record in other.replica.store.find("transaction", one.id)] == ["done", "last"]
    assert other.requests is not None
    fleet.send(other, other.requests.withdraw(withdrawn))
    fleet.flow(500)
    _prune(fleet, one, requests)
    assert [record.body["request"] for record in other.replica.store.find("transaction", one.id)] == ["last"]
    fleet.cut(one, other)
    again = fleet.add(0, disk=old)
    again.handle(HANDLERS, retention=FEW)
    again.offset = 1000
    fleet.flow(500)
    again.write("thing", "mine", {"value": 1})
    fleet.link(other, third)
    with _without_pages(third, other):
        fleet.flow_until(lambda: third.replica.store.position(one.id) == other.replica.store.position(one.id))
    fleet.cut(other, third)
    assert third.body(other, "request", "done")
    fleet.link(again, third)
    with _without_pages(again, other):
        fleet.flow_until(lambda: _forked(again, third))
    fleet.flow(5000)
    again.replica.excuse([other.id], alone=False)
    return fleet, again, other, third


def test_a_request_that_the_other_history_has_executed_and_forgotten_is_not_executed_again() -> None:
    """Neither its transaction nor its response is left, and the request seems to wait."""
    fleet, again, other, third = _pruned("done")
    assert again.body(other, "request", "done")
    assert again.requests is not None
    fleet.send(again, merge(again.replica, again.requests, None, join).sends)
    fleet.flow(1000)
    assert again.replica.serving
    assert [one.body["request"] for one in third.replica.store.find("transaction", again.id)] == ["last"]
    answer = again.body(again, "response", response_id(other.id, "done"))
    assert answer
    assert not answer["ok"]
    assert answer["reason"] == "request done was answered before, and the answer is deleted: use a new id"
    fleet.link(again, other)
    fleet.flow(3000)
    _ask(fleet, other, again, "next")
    fleet.flow(1000)
    done = [one.body["request"] for one in other.replica.store.find("transaction", again.id)]
    assert done == ["last", "next"]


def test_an_id_whose_transaction_the_other_history_has_deleted_is_not_executed_again() -> None:
    fleet, again, other, _ = _pruned("none")
    requests = again.requests
    assert requests is not None
    fleet.send(again, merge(again.replica, requests, None, join).sends)
    fleet.link(again, other)
    fleet.flow(3000)
    answer = other.body(again, "response", response_id(other.id, "done"))
    assert answer
    assert answer["ok"]
    assert other.requests is not None
    fleet.send(other, other.requests.withdraw("done"))
    fleet.flow(500)
    _prune(fleet, again, requests)
    assert other.body(again, "response", response_id(other.id, "done")) is None
    _ask(fleet, other, again, "done")
    fleet.flow(1000)
    assert [one.body["request"] for one in other.replica.store.find("transaction", again.id)] == ["last"]
    answer = other.body(again, "response", response_id(other.id, "done"))
    assert answer
    assert "was answered before" in answer["reason"]


def test_a_node_without_its_database_does_not_execute_again_what_it_has_answered_and_deleted() -> None:
    """A member has its deletions, and a request whose withdrawal it has not heard of."""
    fleet, again, other, third = _pruned("done")
    fleet.cut(again, third)
    new = fleet.add(0)
    new.handle(HANDLERS)
    fleet.link(new, third)
    fleet.flow(3000)
    new.replica.excuse([other.id], alone=False)
    assert new.requests is not None
    fleet.send(new, merge(new.replica, new.requests, None, join).sends)
    fleet.flow(3000)
    assert [one.body["request"] for one in third.replica.store.find("transaction", new.id)] == ["last"]
    assert (new.body(new, "response", response_id(other.id, "done")) or {"ok": None})["ok"] is False


@pytest.mark.parametrize("said", ["00ff", "zz", "", 5, None])
def test_a_proof_of_an_earlier_version_that_is_none_proves_nothing(said: object) -> None:
    _, one, _ = pair()
    record = one.replica.store.get(one.id, "epoch", "history")
    assert record is not None
    assert list(forks._pairs([record._replace(body={**record.body, "cloned": said})])) == []
