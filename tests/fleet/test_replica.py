"""The replica, message by message: what it accepts, what it refuses, and how its relatives were hurt."""

from __future__ import annotations

import json
import sqlite3
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest

from fleet.pairs import Fleet, Machine, copy_of, pair
from fleet.plain import PlainSigner, certificate, node_id, retirement
from vmconv_fleet.catalogue.joining import join
from vmconv_fleet.errors import MalformedError, NotReadyError
from vmconv_fleet.replication import messages, records, store
from vmconv_fleet.replication.clock import MAX_AHEAD_MS
from vmconv_fleet.replication.merging import merge
from vmconv_fleet.replication.messages import Digest, Live, Page, Pull, Summary
from vmconv_fleet.replication.problems import NodeProblem
from vmconv_fleet.replication.records import Change, Position, Record, seal


def _signed(signer: PlainSigner, record: Record, **changes: Any) -> bytes:
    payload = records.encode(record._replace(**changes))
    return seal(signer.sign(payload), payload)


def _agree(*machines: Machine) -> bool:
    views = [
        {owner: (position, machine.replica.store.state(owner)) for owner, position in positions.items()}
        for machine in machines
        for positions in [machine.replica.store.positions()]
    ]
    return all(view == views[0] for view in views)


def test_a_write_is_seen_by_a_neighbour() -> None:
    fleet, one, other = pair()
    one.write("thing", "t", {"value": 1})
    fleet.flow()
    assert other.body(one, "thing", "t") == {"value": 1}
    assert [record.id for record in other.news if record.kind == "thing"] == ["t"]


def test_a_deletion_is_seen_by_a_neighbour() -> None:
    fleet, one, other = pair()
    one.write("thing", "t", {"value": 1})
    one.write("thing", "t", None)
    fleet.flow()
    assert other.body(one, "thing", "t") is None
    assert [record.deleted for record in other.news if record.kind == "thing"] == [False, True]


def test_deleting_a_missing_record_writes_nothing() -> None:
    _, one, _ = pair()
    before = one.replica.store.position(one.id)
    assert one.replica.write([Change("thing", "t", None)]) == ([], [])
    assert one.replica.store.position(one.id) == before


def test_a_write_is_all_or_nothing() -> None:
    _, one, _ = pair()
    before = one.replica.store.position(one.id)
    with pytest.raises(MalformedError, match='kind "Not a kind"'):
        one.replica.write([Change("thing", "t", {}), Change("Not a kind", "t", {})])
    assert one.replica.store.position(one.id) == before
    assert one.replica.store.get(one.id, "thing", "t") is None


@pytest.mark.parametrize(
    "body",
    [
        {"filling": "x" * records.MAX_RECORD},
        {"number": float("nan")},
        {"number": float("inf")},
        {"half": "\ud800"},
        {"not json": object()},
        {"deep": json.loads("[" * 40 + "]" * 40)},
    ],
    ids=["large", "nan", "inf", "surrogate", "object", "deep"],
)
def test_an_owner_cannot_write_what_others_would_refuse(body: dict[str, Any]) -> None:
    """One poison record must not be able to stop its owner's log everywhere."""
    _, one, _ = pair()
    with pytest.raises(MalformedError):
        one.replica.write([Change("thing", "t", body)])


def test_lost_messages_are_pulled() -> None:
    fleet, one, other = pair()
    one.write("thing", "a", {"value": 1})
    fleet.drop()
    one.write("thing", "b", {"value": 2})
    fleet.flow(200)
    assert other.body(one, "thing", "a") == {"value": 1}
    assert _agree(one, other)


def test_the_last_message_is_missed_soon() -> None:
    fleet, one, other = pair()
    one.write("thing", "a", {"value": 1})
    fleet.drop()
    fleet.flow(400)
    assert other.body(one, "thing", "a") == {"value": 1}


def test_records_that_come_too_early_are_kept_until_the_others_have_come() -> None:
    fleet, one, other = pair()
    one.write("thing", "a", {"value": 1})
    ((_, _, first),) = fleet.drop()
    one.write("thing", "b", {"value": 2})
    fleet.flow()
    assert other.body(one, "thing", "b") is None
    other.replica.received(one.id, first)
    assert other.body(one, "thing", "a") == {"value": 1}
    one.write("thing", "c", {"value": 3})
    fleet.flow(100)
    assert _agree(one, other)


def test_news_pass_through_a_line() -> None:
    fleet = Fleet()
    line = [fleet.add(number) for number in range(5)]
    fleet.flow(100)
    for one, other in pairwise(line):
        fleet.link(one, other)
    fleet.flow(2000)
    line[0].write("thing", "t", {"value": 1})
    fleet.flow()
    assert line[4].body(line[0], "thing", "t") == {"value": 1}


def test_in_a_mesh_known_records_are_not_forwarded() -> None:
    fleet = Fleet()
    mesh = [fleet.add(number) for number in range(4)]
    fleet.flow(100)
    for number, one in enumerate(mesh):
        for other in mesh[:number]:
            fleet.link(one, other)
    fleet.flow(2000)
    mesh[0].write("thing", "t", {"value": 1})
    fleet.flow()
    assert [machine.counters["duplicates"] for machine in mesh] == [0, 0, 0, 0]


def test_a_ferry_brings_records_of_a_dead_owner() -> None:
    fleet, one, ferry = pair()
    one.write("thing", "t", {"value": 1})
    fleet.flow()
    fleet.cut(one, ferry)
    far = fleet.add(2)
    fleet.flow(100)
    fleet.link(ferry, far)
    fleet.flow(300)
    assert far.body(one, "thing", "t") == {"value": 1}


def test_a_snapshot_of_many_pages_is_seen_all_at_once() -> None:
    with patch.object(messages, "PAGE_BYTES", 2000):
        fleet, one, _ = pair()
        for number in range(50):
            one.write("thing", f"t{number}", {"value": number, "filling": "x" * 300})
        fleet.drop()
        late = fleet.add(2)
        counts = []
        late.replica.subscribe(lambda _: counts.append(len(late.replica.store.find("thing", one.id))))
        fleet.link(one, late)
        fleet.flow(2000)
    assert set(counts) <= {0, 50}
    assert len(late.replica.store.find("thing", one.id)) == 50
    assert late.counters["stray-pages"] == 0


def test_pages_of_two_histories_are_not_put_together() -> None:
    with patch.object(messages, "PAGE_BYTES", 1500), patch.object(messages, "WINDOW", 1):
        fleet, one, relay = pair()
        for number in range(20):
            one.write("thing", f"t{number}", {"filling": "x" * 300})
        fleet.flow()
        backup = copy_of(one.disk)
        for number in range(20):
            one.write("thing", f"t{number}", {"filling": "y" * 300})
        fleet.flow(100)
        fleet.cut(one, relay)
        again = fleet.add(0, disk=backup)
        fleet.flow(50)
        fleet.link(again, relay)
        fleet.flow(3000)
        late = fleet.add(2)
        fleet.flow(100)
        fleet.link(relay, late)
        sessions = late.replica._context.anti_entropy._sessions
        fleet.flow_until(lambda: one.id in sessions and sessions[one.id].begun)
        fleet.drop()
        fleet.send(again, merge(again.replica, again.handle({}), None, join).sends)
        fleet.flow(8000)
    assert late.problems() == []
    assert _agree(again, relay, late)


def _pull(fleet: Fleet, one: Machine, other: Machine) -> bytes:
    """Returns what the other asks when it hears how far the one is."""
    fleet.drop()
    fleet.time += 200
    position = one.replica.store.position(one.id)
    other.replica.received(one.id, messages.encode(Digest({one.id: Summary(position, "0" * 16)})))
    fleet.time += 100
    (pull,) = [message for _, message, _ in other.replica.tick() if message[0] == messages.PULL]
    return pull


def test_pages_of_an_earlier_state_do_not_follow_those_of_a_later_one() -> None:
    """Asked twice, a neighbour answers twice, and its records have moved in between."""
    with patch.object(messages, "PAGE_BYTES", 300):
        fleet, one, other = pair()
        for id in "abcd":
            one.write("thing", id, {"filling": "x" * 300})
        pull = _pull(fleet, one, other)
        earlier = one.replica.received(other.id, pull)
        one.write("thing", "b", {"filling": "y" * 300})
        later = one.replica.received(other.id, pull)
        assert len(earlier) == len(later) == 4
        for send in (earlier[0], later[1], earlier[3]):
            other.replica.received(one.id, send.message)
        assert other.counters["stray-pages"] == 1
        fleet.flow(5000)
    assert other.problems() == []
    assert _agree(one, other)


def test_pages_of_a_restarted_answer_do_not_follow_earlier_ones() -> None:
    with patch.object(messages, "PAGE_BYTES", 300), patch.object(messages, "WINDOW", 1):
        fleet, one, other = pair(grace=1000, floor=500)
        late = fleet.add(2)
        fleet.flow(100)
        for id in ("gone", "a", "b"):
            one.write("thing", id, {"filling": "x" * 300})
        fleet.flow()
        late.replica.connected(one.id)
        one.replica.connected(late.id)
        message = _pull(fleet, one, late)
        for _ in range(3):
            (page,) = one.replica.received(late.id, message)
            ((_, message, _),) = late.replica.received(one.id, page.message)
        asked = messages.decode(message)
        assert isinstance(asked, Pull)
        one.write("thing", "gone", None)
        one.write("thing", "c", {"filling": "x" * 300})
        fleet.flow(3000)
        assert not list(one.replica.store.deletions(one.id))
        with patch.object(messages, "WINDOW", 9):
            again = one.replica.received(late.id, message)
        pages = [messages.decode(send.message) for send in again]
        rest = [page for page in pages if isinstance(page, Page) and page.after >= asked.after]
        assert rest[0].after == asked.after
        for following in rest:
            late.replica.received(one.id, messages.encode(following))
        assert late.problems() == []
        fleet.link(one, late)
        fleet.flow(5000)
    assert _agree(one, other, late)


def test_a_pull_half_done_restarts_when_later_deletions_are_dropped() -> None:
    with patch.object(messages, "PAGE_BYTES", 300), patch.object(messages, "WINDOW", 1):
        fleet, one, other = pair(grace=1000, floor=500)
        one.write("thing", "gone", {"value": 1})
        fleet.flow()
        one.write("thing", "a", {"filling": "x" * 300})
        one.write("thing", "gone", None)
        one.write("thing", "b", {"filling": "x" * 300})
        (page,) = one.replica.received(other.id, _pull(fleet, one, other))
        (again,) = other.replica.received(one.id, page.message)
        fleet.time += 3000
        one.replica.tick()
        assert not list(one.replica.store.deletions(one.id))
        for send in one.replica.received(other.id, again.message):
            fleet.send(other, other.replica.received(one.id, send.message))
        fleet.flow(5000)
    assert other.problems() == []
    assert other.body(one, "thing", "gone") is None
    assert _agree(one, other)


def test_an_answer_that_does_not_follow_newer_records_is_requested_again() -> None:
    """A live record comes between its pages, one that its owner has lost since: with the rest it is no state."""
    with patch.object(messages, "PAGE_BYTES", 300):
        fleet, one, other = pair()
        backup = copy_of(one.disk)
        one.write("thing", "lost", {"value": 1})
        (lost,) = {message for _, _, message in fleet.drop()}
        fleet.cut(one, other)
        again = fleet.add(0, disk=backup)
        fleet.link(again, other)
        fleet.flow_until(lambda: again.replica.serving)
        for id in "abcd":
            again.write("thing", id, {"filling": "x" * 300})
        pages = again.replica.received(other.id, _pull(fleet, again, other))
        assert len(pages) > 1
        other.replica.received(again.id, pages[0].message)
        other.replica.received(again.id, lost)
        assert other.body(again, "thing", "lost") == {"value": 1}
        for page in pages[1:]:
            other.replica.received(again.id, page.message)
        assert other.body(again, "thing", "lost") == {"value": 1}
        fleet.flow(5000)
    assert other.problems() == ["fork"]
    assert other.body(again, "thing", "lost") == {"value": 1}
    fleet.send(again, merge(again.replica, again.handle({}), None, join).sends)
    fleet.flow(5000)
    assert again.body(again, "thing", "lost") == {"value": 1}
    assert _agree(again, other)


def test_a_late_joiner_continues_with_another_peer_when_its_source_dies() -> None:
    with patch.object(messages, "PAGE_BYTES", 1000):
        fleet, one, other = pair()
        for number in range(40):
            one.write("thing", f"t{number}", {"filling": "x" * 300})
        fleet.flow(100)
        late = fleet.add(2)
        fleet.link(one, late)
        late.fleet._deliver()
        fleet.send(late, late.replica.tick())
        fleet.cut(one, late)
        fleet.drop()
        fleet.link(other, late)
        fleet.flow(4000)
    assert _agree(one, other, late)


def test_a_position_before_the_floor_gets_a_snapshot() -> None:
    """Cassandra: what was deleted and forgotten must not come back from who has missed the deletion."""
    fleet, one, other = pair(grace=1000, floor=500)
    one.write("thing", "gone", {"value": 1})
    one.write("thing", "kept", {"value": 2})
    fleet.flow()
    fleet.cut(one, other)
    one.write("thing", "gone", None)
    fleet.flow(3000)
    assert one.replica.store.history(one.id).floor > 0
    assert not list(one.replica.store.deletions(one.id))
    fleet.link(one, other)
    fleet.flow(300)
    assert other.body(one, "thing", "gone") is None
    assert other.body(one, "thing", "kept") == {"value": 2}
    one.write("thing", "later", {"value": 3})
    fleet.flow()
    assert _agree(one, other)


def test_deletions_are_forgotten_at_the_same_state_everywhere() -> None:
    """As in chitchat #81, #121, #155: forgetting at different times brought dead state back."""
    fleet, one, other = pair(grace=1000, floor=500)
    one.write("thing", "t", {"value": 1})
    one.write("thing", "t", None)
    fleet.flow(3000)
    assert not list(one.replica.store.deletions(one.id))
    assert not list(other.replica.store.deletions(one.id))
    assert _agree(one, other)


def test_a_new_life_leaves_nothing_of_the_old_one() -> None:
    """As in chitchat #94: a generation change left old state."""
    fleet, one, other = pair()
    one.write("thing", "old", {"value": 1})
    backup = copy_of(one.disk)
    one.write("thing", "since", {"value": 1})
    fleet.flow()
    fleet.cut(one, other)
    again = fleet.add(0, disk=backup)
    fleet.flow(100)
    again.write("thing", "old", None)
    again.write("thing", "new", {"value": 2})
    fleet.link(again, other)
    fleet.flow(2000)
    assert other.body(again, "thing", "old") == {"value": 1}
    fleet.send(again, merge(again.replica, again.handle({}), None, join).sends)
    fleet.flow(2000)
    assert other.body(again, "thing", "old") is None
    assert other.body(again, "thing", "new") == {"value": 2}
    assert _agree(again, other)


def test_a_node_recovers_its_own_records_before_it_writes() -> None:
    fleet, one, other = pair()
    one.write("thing", "t", {"value": 1})
    fleet.flow()
    fleet.cut(one, other)
    again = fleet.add(0, patience=None)
    fleet.flow(10_000)
    with pytest.raises(NotReadyError):
        again.replica.write([Change("thing", "u", {})])
    fleet.link(again, other)
    fleet.flow(1000)
    assert again.replica.serving
    assert again.body(again, "thing", "t") == {"value": 1}
    assert "lost" not in again.problems()
    assert _agree(again, other)


def test_records_that_are_announced_and_never_sent_delay_a_start_and_do_not_prevent_it() -> None:
    fleet, liar = Fleet(), node_id(5)
    one = fleet.add(0, patience=3000)
    one.replica.connected(liar)
    digest = Digest({one.id: Summary(Position(1 << 50, 9), "0" * 16)}, True)
    one.replica.received(liar, messages.encode(digest))
    fleet.flow(29_900)
    assert not one.replica.serving
    fleet.flow(200)
    assert one.replica.serving


def _restored() -> tuple[Fleet, Machine, Machine, Machine]:
    """Returns a node with an old database, a member that was off since then, and one that has its later records."""
    fleet = Fleet()
    one, old, new = (fleet.add(number) for number in range(3))
    fleet.flow(100)
    for pair_ in ((one, old), (one, new), (old, new)):
        fleet.link(*pair_)
    fleet.flow(500)
    backup = one.disk.serialize()
    fleet.cut(one, old)
    fleet.cut(old, new)
    one.write("thing", "since", {"value": 1})
    fleet.flow(500)
    fleet.cut(one, new)
    disk = sqlite3.connect(":memory:", isolation_level=None)
    disk.deserialize(backup)
    return fleet, fleet.add(0, disk=disk, patience=None), old, new


def test_a_restored_node_writes_once_it_has_heard_from_all_members() -> None:
    fleet, again, old, new = _restored()
    fleet.flow(60_000)
    fleet.link(again, old)
    fleet.flow(600_000)
    assert (again.replica.serving, again.replica.is_restored, {*again.replica.awaited()}) == (False, True, {new.id})
    with pytest.raises(NotReadyError):
        again.replica.write([Change("thing", "t", {})])
    fleet.cut(again, old)
    fleet.link(again, new)
    fleet.flow(5000)
    assert (again.replica.serving, again.replica.is_restored) == (True, False)
    assert again.body(again, "thing", "since") == {"value": 1}
    again.write("thing", "t", {})
    fleet.link(again, old)
    fleet.flow(1000)
    assert _agree(again, old)
    assert _agree(again, new)
    assert again.problems() == old.problems() == new.problems() == []


def test_a_restored_node_does_not_wait_for_a_retired_member() -> None:
    fleet, again, old, new = _restored()
    fleet.send(old, old.replica.write([retirement(new.id)])[1])
    fleet.link(again, old)
    fleet.flow(5000)
    assert again.replica.serving


def test_a_restored_node_does_not_wait_for_members_that_are_given_up() -> None:
    fleet, again, old, new = _restored()
    again.replica.excuse([new.id], alone=False)
    fleet.flow(60_000)
    assert again.replica.awaited() == {old.id}
    fleet.link(again, old)
    fleet.flow(5000)
    assert again.replica.serving


def test_a_restored_node_that_knows_no_member_waits_for_any() -> None:
    """Its backup is of the time before the others joined."""
    fleet, _, other = pair()
    again = fleet.add(0, patience=None)
    fleet.flow(60_000)
    assert (again.replica.serving, again.replica.awaited()) == (False, frozenset())
    fleet.link(again, other)
    fleet.flow(5000)
    assert again.replica.serving
    alone = fleet.add(0, patience=None)
    alone.replica.excuse([], alone=True)
    fleet.flow(500)
    assert alone.replica.serving


def test_an_older_database_is_brought_up_to_date() -> None:
    fleet, one, other = pair()
    one.write("thing", "before", {"value": 1})
    backup = one.disk.serialize()
    one.write("thing", "after", {"value": 2})
    fleet.flow()
    fleet.cut(one, other)
    disk = sqlite3.connect(":memory:", isolation_level=None)
    disk.deserialize(backup)
    again = fleet.add(0, disk=disk, patience=5000)
    fleet.link(again, other)
    fleet.flow(1000)
    assert again.body(again, "thing", "after") == {"value": 2}
    assert _agree(again, other)


def test_an_epoch_is_never_used_again_even_by_a_clock_that_stands() -> None:
    epochs = set()
    disk = sqlite3.connect(":memory:", isolation_level=None)
    for _ in range(20):
        machine = Fleet().add(0, disk=disk)
        machine.fleet.flow(50)
        epochs.add(machine.replica.store.position(machine.id).epoch)
    assert len(epochs) == 20


def test_a_forged_record_is_refused_and_reported() -> None:
    fleet, one, other = pair()
    record = one.write("thing", "t", {"value": 1})
    fleet.drop()
    forged = _signed(PlainSigner(other.id), record, body={"value": 2})
    other.replica.received(one.id, messages.encode(Live([forged])))
    assert other.body(one, "thing", "t") is None
    assert other.problems() == ["forged"]


def test_a_record_with_the_key_of_another_owner_is_refused() -> None:
    fleet, one, other = pair()
    record = one.write("thing", "t", {"value": 1})
    fleet.drop()
    thief = fleet.add(2)
    misplaced = _signed(thief.signer, record, key_id=thief.signer.key_id)
    other.replica.received(one.id, messages.encode(Live([misplaced])))
    assert other.body(one, "thing", "t") is None
    assert other.problems() == ["forged"]


def test_a_replayed_record_changes_nothing() -> None:
    fleet, one, other = pair()
    first = one.write("thing", "t", {"value": 1})
    one.write("thing", "t", {"value": 2})
    fleet.flow()
    other.replica.received(one.id, messages.encode(Live([first.wire])))
    assert other.body(one, "thing", "t") == {"value": 2}
    assert other.counters["duplicates"] == 1


def test_a_page_with_records_of_another_owner_is_refused() -> None:
    fleet, one, other = pair()
    one.write("thing", "t", {"value": 1})
    fleet.drop()
    foreign = other.write("thing", "t", {"value": 2})
    fleet.drop()
    fleet.time += 100
    other.replica.received(one.id, messages.encode(Digest({one.id: Summary(Position(1 << 50, 9), "0" * 16)})))
    fleet.time += 100
    (pull,) = [messages.decode(message) for _, message, _ in other.replica.tick() if message[0] == messages.PULL]
    assert isinstance(pull, Pull)
    page = Page(
        one.id, pull.session, pull.after, pull.base, False, False, Position(1 << 50, 9), 0, [foreign.wire], pull.since
    )
    other.replica.received(one.id, messages.encode(page))
    assert other.problems() == ["malformed"]


def test_records_that_leave_something_out_are_no_state_and_are_refused() -> None:
    """Corrosion: a partial update. A relay that leaves a record out is noticed by the sum in the last one."""
    fleet, one, other = pair()
    base = one.replica.store.position(one.id)
    one.write("thing", "a", {"value": 1})
    last = one.write("thing", "b", {"value": 2})
    pull = messages.decode(_pull(fleet, one, other))
    assert isinstance(pull, Pull)
    page = Page(one.id, pull.session, base, base, False, False, last.position, 0, [last.wire], pull.since)
    other.replica.received(one.id, messages.encode(page))
    assert other.problems() == ["torn"]
    assert other.replica.store.position(one.id) == base
    fleet.flow(3000)
    assert _agree(one, other)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"l",
        b"?\x00\x00\x00\x02{}",
        b"l\x00\x00\x00\x02{}",
        b"l\xff\xff\xff\xff{}",
        b"l\x00\x00\x00\x02{}\x00\x00\x00\xffabc",
        b"l\x00\x00\x00\x02{}\x00\x00\x00\x05\x00[1]\x00",
        b"d\x00\x00\x00\x02{}",
        b'd\x00\x00\x00\x1a{"at": {"x": [1, 2, "3"]}}',
        b"p\x00\x00\x00\x02[]",
        b"g" + len(b"[" * 100_000).to_bytes(4, "big") + b"[" * 100_000,
        b"l" * (messages.MAX_MESSAGE + 1),
    ],
    ids=range(12),
)
def test_an_invalid_message_is_counted_and_dropped(message: bytes) -> None:
    _, one, other = pair()
    assert other.replica.received(one.id, message) == []
    assert other.problems() == ["malformed"]


def test_a_message_of_a_node_that_is_not_connected_is_dropped() -> None:
    _, one, other = pair()
    assert other.replica.received(node_id(7), b"anything") == []
    assert other.counters["strangers"] == 1
    assert one.problems() == other.problems() == []


def test_a_wild_clock_is_reported_and_not_followed() -> None:
    fleet, one, other = pair()
    one.offset = 3_600_000_000
    one.write("thing", "t", {"value": 1})
    fleet.flow()
    assert other.body(one, "thing", "t") == {"value": 1}
    assert other.problems() == ["clock"]
    assert other.write("thing", "t", {}).clock < one.wall() << 16


def test_a_clock_that_was_ahead_is_over_once_it_is_right_also_after_a_restart() -> None:
    fleet, one, other = pair()
    one.offset = 365 * 86_400_000
    one.write("thing", "t", {})
    fleet.flow()
    assert [problem.text.split(" is ")[1] for problem in other.replica.problems.all()] == [
        "365 days ahead of this node's: one of them"
    ]
    one.replica.disconnected(other.id)
    one = fleet.add(0, disk=one.disk)
    fleet.flow(100)
    fleet.link(one, other)
    fleet.flow(500)
    assert one.write("thing", "t", {}).clock >> 16 <= one.wall() + MAX_AHEAD_MS
    fleet.flow()
    assert other.problems() == []


def test_a_deletion_by_a_wrong_clock_does_not_keep_the_others() -> None:
    fleet, one, other = pair(grace=4000, floor=1500)
    one.write("thing", "t", {})
    one.offset = 365 * 86_400_000
    one.write("thing", "t", None)
    one.offset = 0
    fleet.flow(10_000)
    for machine in (one, other):
        assert machine.replica.store.history(one.id).floor > 0


def test_a_retired_node_is_dropped_everywhere_and_does_not_come_back() -> None:
    """As in chitchat #155: a dead node's state returned from who had forgotten it later. Its witness may go, too."""
    fleet, one, other = pair()
    third = fleet.add(2)
    fleet.flow(100)
    fleet.link(other, third)
    fleet.flow(1000)
    one.write("thing", "t", {"value": 1})
    fleet.flow(1000)
    fleet.cut(one, other)
    fleet.cut(other, third)
    other.write(*retirement(one.id))
    fleet.flow()
    assert one.id not in other.replica.store.positions()
    fleet.link(other, third)
    fleet.flow(1000)
    assert one.id not in third.replica.store.positions()
    third.write(*retirement(other.id))
    fleet.cut(other, third)
    fourth = fleet.add(3)
    fleet.link(third, fourth)
    fleet.link(one, fourth)
    fleet.flow(3000)
    assert sorted(fourth.replica.store.positions()) == sorted([third.id, fourth.id])
    assert not one.replica.serving
    assert "retired" in one.problems()


def test_a_retirement_counts_also_if_there_is_no_room_to_forward_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, one, other = pair()
    third = fleet.add(2)
    fleet.flow(100)
    fleet.link(other, third)
    fleet.flow(3000)
    assert third.id in one.replica.store.positions()
    monkeypatch.setattr(store, "MAX_NOTICES", 0)
    other.write(*retirement(third.id))
    fleet.flow(100)
    assert third.id not in {**one.replica.store.positions(), **other.replica.store.positions()}
    assert one.replica.store.notices() == []


def test_variants_of_a_revocation_that_an_earlier_version_kept_are_dropped() -> None:
    fleet, one, other = pair()
    one.write(*retirement(node_id(7)))
    fleet.flow(100)
    kept = other.replica.store.notices()
    record = one.write("revocation", "variant", {**(retirement(node_id(7)).body or {}), "n": 1})
    with other.replica.store.atomic():
        other.replica.store.note(b"variant", record.wire)
    assert len(other.replica.store.notices()) == len(kept) + 1
    again = Machine(fleet, 1, other.disk)
    assert again.replica.store.notices() == kept
    assert again.trust.retired(node_id(7))


def test_a_digest_does_not_grow_with_nodes_that_were_retired() -> None:
    """As in quickwit #6653."""
    fleet, one, other = pair()
    fleet.cut(one, other)
    other.write(*retirement(one.id))
    (digest,) = [messages.decode(message) for _, message, _ in other.replica.connected(node_id(5))]
    assert isinstance(digest, Digest)
    assert list(digest.at) == [other.id]


def test_another_certificate_is_learned_before_what_it_verifies() -> None:
    fleet, one, other = pair()
    one.write(*certificate(one.id, "second-key"))
    one.signer.key_id = "second-key"
    one.write("thing", "t", {"value": 1})
    late = fleet.add(2)
    fleet.flow(100)
    fleet.link(other, late)
    fleet.flow(1000)
    assert late.body(one, "thing", "t") == {"value": 1}
    assert late.problems() == other.problems() == []


def test_a_newer_schema_and_unknown_kinds_are_replicated_as_they_are() -> None:
    """Corrosion: a change of schema must not make a fleet rewrite its records."""
    fleet, one, other = pair()
    one.replica._own._schema = 99
    record = one.write("kind-of-the-future", "t", {"field": {"of": "the future"}})
    fleet.flow()
    seen = other.replica.store.get(one.id, "kind-of-the-future", "t")
    assert seen is not None
    assert (seen.schema, seen.wire) == (99, record.wire)


def test_a_misbehaving_neighbour_is_asked_less_often() -> None:
    """Corrosion: expired certificates without back-off."""
    fleet, one, other = pair()
    fleet.drop()
    pulls = []
    digest = messages.encode(Digest({one.id: Summary(Position(1 << 50, 9), "0" * 16)}))
    garbage = _signed(PlainSigner(node_id(9)), one.write("thing", "t", {}), epoch=1 << 50, seq=9)
    fleet.drop()
    for _ in range(1200):
        fleet.time += 50
        other.replica.received(one.id, digest)
        for _, message, _ in other.replica.tick():
            pull = messages.decode(message)
            if isinstance(pull, Pull):
                pulls.append(fleet.time)
                page = Page(
                    one.id, pull.session, pull.after, pull.base, False, False, pull.after, 0, [garbage], pull.since
                )
                other.replica.received(one.id, messages.encode(page))
    assert 3 <= len(pulls) <= 12
    assert other.problems() == ["forged"]


def test_later_records_are_not_observed_before_earlier_ones() -> None:
    """Requests are executed in their order, also those that come with a large answer and right after it."""
    fleet, one, other = pair()
    first, last = one.write("thing", "a", {}), one.write("thing", "b", {})
    fleet.flow()
    news = other.replica._context.feed
    seen: list[Record] = []
    news.observe(seen.extend)
    news.add([first])
    assert seen == [first]
    news.add_stored(one.id, first.seq)
    news.add([last])
    assert seen == [first]
    news.deliver()
    assert seen == [first, last, last]


def test_a_failing_subscriber_does_not_affect_the_others() -> None:
    fleet, one, other = pair()

    def fail(_: list[Record]) -> None:
        raise RuntimeError("a subscriber's own mistake")

    end = other.replica.subscribe(fail)
    one.write("thing", "t", {"value": 1})
    fleet.flow()
    assert other.body(one, "thing", "t") == {"value": 1}
    end()
    end()


def test_a_failed_commit_leaves_no_trace() -> None:
    _, one, _ = pair()
    before = one.replica.store.position(one.id)
    with pytest.raises(ZeroDivisionError), one.replica.batch():
        one.replica.write([Change("thing", "t", {"value": 1})])
        raise ZeroDivisionError
    assert one.replica.store.position(one.id) == before
    assert [record for record in one.news if record.kind == "thing"] == []
    one.write("thing", "t", {"value": 2})
    assert one.replica.serving


def test_live_messages_are_put_together_where_nothing_is_between_them() -> None:
    """A transaction that is too large for a message leaves a gap; what comes after it is a message of its own."""
    fleet, one, other = pair()
    sends = []
    for size in (1, 1, 20, 1, 1):
        sends += one.replica.write([Change("thing", f"t{number}", {"x": "x" * 20_000}) for number in range(size)])[1]
    together = messages.merged(sends)
    assert (len(sends), len(together)) == (4, 2)
    fleet.send(one, together)
    fleet.flow(1000)
    assert other.problems() == []
    assert _agree(one, other)


def test_many_records_that_came_too_early_are_taken_together() -> None:
    fleet, one, other = pair()
    one.write("thing", "first", {"value": 0})
    ((_, _, first),) = fleet.drop()
    for number in range(1200):
        one.write("thing", f"t{number}", {"value": number})
    fleet.flow()
    assert other.replica.store.find("thing") == []
    other.replica.received(one.id, first)
    assert len(other.replica.store.find("thing")) == 1201
    assert other.problems() == []


def test_a_neighbour_cannot_fill_the_memory_with_owners_that_do_not_exist() -> None:
    _, one, other = pair()
    for group in range(5):
        at = {node_id(1000 * group + number + 100): Summary(Position(1, 1), "0" * 16) for number in range(1000)}
        other.replica.received(one.id, messages.encode(Digest(at)))
    assert len(other.replica.neighbours[one.id]._positions) <= 4096
    assert len(other.replica._context.anti_entropy._wants) <= 4096
    assert one.body(one, "certificate", one.signer.key_id) is not None


def test_a_neighbour_that_tells_of_owners_that_do_not_exist_delays_no_pull() -> None:
    """It answers none of the pulls. Each takes seconds, and there were four at a time, from all neighbours together."""
    fleet, one, other = pair()
    liar, told = node_id(5), 0
    other.replica.connected(liar)
    for pulled in range(10):
        for _ in range(5):
            at = {node_id(told + 100 + number): Summary(Position(1, 1), "0" * 16) for number in range(1000)}
            told += len(at)
            other.replica.received(liar, messages.encode(Digest(at)))
        fleet.flow(500)
        one.write("thing", f"t{pulled}", {"value": pulled})
        fleet.drop()
        fleet.flow(2000)
        assert other.body(one, "thing", f"t{pulled}") == {"value": pulled}
    sessions = other.replica._context.anti_entropy._sessions.values()
    assert {session.peer for session in sessions} <= {liar, one.id}
    assert len(sessions) <= 5


def test_owners_that_one_neighbour_tells_of_leave_room_for_those_of_others() -> None:
    _, one, other = pair()
    for liar in (node_id(5), one.id):
        other.replica.connected(liar)
        for group in range(5):
            number = 10_000 * int(liar == one.id) + 1000 * group
            at = {node_id(number + each + 100): Summary(Position(1, 1), "0" * 16) for each in range(1000)}
            other.replica.received(liar, messages.encode(Digest(at)))
    assert len(other.replica._context.anti_entropy._wants) == 2 * 1024


def test_a_pull_answered_drop_by_drop_is_refused() -> None:
    """As long as it runs, nobody else is asked for the owner's records."""
    fleet, one, other = pair()
    for number in range(3):
        one.write("thing", f"t{number}", {"value": number})
    fleet.drop()
    other.replica.received(one.id, one.replica._publisher.digest(other.id).message)
    (pull,) = [found for _, message, _ in other.replica.tick() if isinstance(found := messages.decode(message), Pull)]
    store_ = one.replica.store
    (wire, *_), last = store_.after(one.id, pull.after.seq, 1)
    end = store_.position(one.id)
    assert last < end.seq
    page = Page(one.id, pull.session, pull.after, pull.base, True, True, end, 0, [wire], pull.since)
    other.replica.received(one.id, messages.encode(page))
    assert other.counters["malformed"] == 1
    assert one.id not in other.replica._context.anti_entropy._sessions
    fleet.flow(3000)
    assert other.body(one, "thing", "t2") == {"value": 2}


def test_a_page_that_leaves_something_out_belongs_to_no_pull() -> None:
    fleet, one, other = pair()
    for number in range(3):
        one.write("thing", f"t{number}", {"value": number})
    fleet.drop()
    other.replica.received(one.id, one.replica._publisher.digest(other.id).message)
    (pull,) = [found for _, message, _ in other.replica.tick() if isinstance(found := messages.decode(message), Pull)]
    behind = pull.after._replace(seq=pull.after.seq + 1)
    store_ = one.replica.store
    wires, _ = store_.after(one.id, behind.seq, 1 << 20)
    page = Page(one.id, pull.session, behind, pull.base, False, False, store_.position(one.id), 0, wires, pull.since)
    other.replica.received(one.id, messages.encode(page))
    assert (other.counters["stray-pages"], other.problems()) == (1, [])
    fleet.flow(3000)
    assert other.body(one, "thing", "t0") == {"value": 0}


def test_records_of_one_write_are_applied_as_they_come() -> None:
    fleet, one, other = pair()
    _, sends = one.replica.write([Change("thing", "a", {"value": 1}), Change("thing", "b", {"value": 2})])
    fleet.send(one, sends)
    fleet.flow()
    assert [other.body(one, "thing", id) for id in "ab"] == [{"value": 1}, {"value": 2}]
    assert other.problems() == []


def test_records_that_do_not_ascend_are_refused() -> None:
    _, one, other = pair()
    first, second = (one.write("thing", id, {}) for id in "ab")
    ascending = other.replica._context.verifier.ascending
    assert ascending(one.id, records.START, [first, second]) == [first, second]
    for wrong in ([second, first], [first, first], [second._replace(epoch=1), first]):
        with pytest.raises(MalformedError, match="follows"):
            ascending(one.id, first.position._replace(seq=first.seq - 1), wrong)


def test_a_forged_record_is_reported_as_one() -> None:
    fleet, one, other = pair()
    record = one.write("thing", "t", {})
    fleet.drop()
    other.replica.received(one.id, messages.encode(Live([_signed(PlainSigner(one.id, "no-key-of-it"), record)])))
    (problem,) = other.replica.problems.all()
    assert f"{one.id}/thing/t at {tuple(record.position)}: signature by key {record.key_id} is not" in problem.text


def test_repeated_problems_are_reported_less_often() -> None:
    _, one, other = pair()
    told: list[NodeProblem] = []
    other.replica.on_problem(told.append)
    for number in range(2000):
        other.replica.received(one.id, b"?" + number.to_bytes(4, "big") + b"{}")
    assert other.counters["malformed"] == 2000
    assert len(told) < 120
    assert len(other.problems()) <= 100
