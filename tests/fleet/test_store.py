"""The database: what is durable, what is refused, what others see of it."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fleet.plain import PlainSigner, node_id
from vmconv_fleet.errors import MalformedError, StoreError
from vmconv_fleet.replication.clock import MAX_AHEAD_MS, HybridClock, milliseconds
from vmconv_fleet.replication.database import open_reader, open_writer
from vmconv_fleet.replication.epochs import MAX_EPOCHS, History, history_of
from vmconv_fleet.replication.records import (
    MAX_RECORD,
    START,
    STATE_MODULUS,
    Key,
    Position,
    Record,
    decode,
    encode,
    fingerprint,
    restore,
    seal,
)
from vmconv_fleet.replication.store import Reader, Store

NODE = node_id(0)
SIGNER = PlainSigner(NODE)


def _record(seq: int, id: str = "t", *, epoch: int = 1, deleted: bool = False, kind: str = "thing") -> Record:
    body = {} if deleted else {"seq": seq}
    draft = Record(NODE, kind, id, epoch, seq, 1, 5, deleted, 0, SIGNER.key_id, 0, body, b"")
    return decode(seal(SIGNER.sign(encode(draft)), encode(draft)))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(str(tmp_path / "store.sqlite"), NODE)
    yield store
    store.close()


def _extend(store: Store, *records: Record) -> None:
    with store.atomic():
        store.extend(NODE, records)


def test_written_records_survive_a_restart(tmp_path: Path) -> None:
    path = str(tmp_path / "store.sqlite")
    store = Store.open(path, NODE)
    _extend(store, _record(1, "a"), _record(2, "b"))
    state = store.state(NODE)
    store.close()
    again = Store.open(path, NODE)
    assert again.position(NODE) == Position(1, 2)
    assert again.state(NODE) == state != 0
    assert [record.id for record in again.find("thing")] == ["a", "b"]
    again.close()


def test_commits_are_synced(store: Store) -> None:
    connection = store._connection
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_database_of_another_node_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "store.sqlite")
    Store.open(path, NODE).close()
    with pytest.raises(StoreError, match=f"belongs to node {NODE}, not to {node_id(1)}"):
        Store.open(path, node_id(1))


def test_a_database_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(StoreError, match="version 7, and this vmconv-fleet knows versions up to 3"):
        Store.open(str(path), NODE)


def test_an_invalid_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError, match="not a database") as caught:
        Store.open(str(path), NODE)
    assert "move its store.sqlite* away" in (caught.value.hint or "")


def test_a_database_that_is_damaged_while_the_node_runs_says_what_helps(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    Store.open(str(path), NODE).close()
    with closing(Store.open(str(path), NODE)) as store, closing(store.reader()) as reader:
        size = path.stat().st_size
        with open(path, "r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * (size - 4096))
        with pytest.raises(StoreError, match="malformed") as caught:
            reader.find("note")
        assert "move its store.sqlite* away" in (caught.value.hint or "")


def test_an_atomic_block_that_fails_leaves_nothing(store: Store) -> None:
    with store.group():
        _extend(store, _record(1, "kept"))
        with pytest.raises(ZeroDivisionError), store.atomic():
            store.extend(NODE, [_record(2, "lost")])
            raise ZeroDivisionError
    assert store.position(NODE) == Position(1, 1)
    assert [record.id for record in store.find("thing")] == ["kept"]


def test_a_group_that_fails_leaves_nothing(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.group():
        _extend(store, _record(1))
        raise ZeroDivisionError
    assert store.position(NODE) == START
    assert store.find("thing") == []


def test_two_records_cannot_have_one_number(store: Store) -> None:
    _extend(store, _record(1, "a"))
    with pytest.raises(StoreError, match="UNIQUE"):
        _extend(store, _record(1, "b"))


def test_a_reader_sees_committed_records_only(store: Store) -> None:
    reader = store.reader()
    with store.group():
        _extend(store, _record(1))
        assert reader.find("thing") == []
    assert [record.seq for record in reader.find("thing")] == [1]
    assert reader.positions() == {NODE: Position(1, 1)}
    assert reader.get(NODE, "thing", "t") == store.get(NODE, "thing", "t")
    reader.close()


def test_a_reader_does_not_write(store: Store) -> None:
    reader = store.reader()
    with pytest.raises(StoreError, match="readonly"):
        reader._rows("DELETE FROM records")
    reader.close()


def test_a_reader_serves_several_threads(store: Store) -> None:
    _extend(store, *(_record(number, f"t{number}") for number in range(1, 200)))
    reader, counts = store.reader(), []

    def read() -> None:
        counts.append([len(reader.find("thing")) for _ in range(20)])

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [[199] * 20] * 4
    reader.close()


def test_the_state_is_the_sum_of_what_lives(store: Store) -> None:
    first, second, third = _record(1, "a"), _record(2, "b"), _record(3, "a")
    _extend(store, first, second, third, _record(4, "b", deleted=True))
    assert store.state(NODE) == fingerprint(third.payload)


def test_new_records_and_those_that_replace_others_may_come_together(store: Store) -> None:
    _extend(store, _record(1, "a"), _record(2, "b"), _record(3, "gone", deleted=True))
    later = [_record(4, "c"), _record(5, "a", deleted=True), _record(6, "c"), _record(7, "gone"), _record(8, "d")]
    _extend(store, *later)
    live = store.find("thing")
    assert {(record.id, record.seq) for record in live} == {("b", 2), ("c", 6), ("gone", 7), ("d", 8)}
    assert store.state(NODE) == sum(fingerprint(record.payload) for record in live) % STATE_MODULUS


def test_pages_begin_where_the_last_one_ended(store: Store) -> None:
    _extend(store, *(_record(number, f"t{number}") for number in range(1, 11)))
    seen, seq = [], 0
    while True:
        wires, seq = store.after(NODE, seq, 400)
        if not wires:
            break
        assert len(wires) < 10
        seen += [restore(wire).seq for wire in wires]
    assert seen == list(range(1, 11))


def test_staged_records_are_invisible_and_then_replace_all(store: Store) -> None:
    _extend(store, _record(1, "old"))
    with store.atomic():
        store.stage(7, [_record(3, "a", epoch=2), _record(4, "b", epoch=2)])
        store.stage(7, [_record(5, "a", epoch=2)])
    assert [record.id for record in store.find("thing")] == ["old"]
    with store.atomic():
        assert store.replace_by_staged(NODE, 7) == 2
    assert [(record.id, record.seq) for record in store.find("thing")] == [("a", 5), ("b", 4)]
    assert store.position(NODE) == Position(2, 5)
    assert store.state(NODE) == sum(fingerprint(record.payload) for record in store.find("thing")) % (1 << 128)


def test_a_history_contains_its_earlier_positions() -> None:
    history = History().begun(10, 1).begun(20, 6).begun(30, 9)
    held = [Position(10, 1), Position(10, 5), Position(20, 8), Position(30, 9), Position(30, 999)]
    strange = [START, Position(10, 6), Position(20, 5), Position(20, 9), Position(15, 3), Position(31, 9)]
    assert [history.holds(position) for position in held + strange] == [True] * 5 + [False] * 6
    floored = history._replace(floor=7)
    assert [floored.holds(position) for position in held] == [False, False, True, True, True]
    assert floored.follows(Position(10, 5))


def test_history_forgets_the_oldest_epochs() -> None:
    history = History()
    for epoch in range(1, MAX_EPOCHS + 3):
        history = history.begun(epoch, epoch)
    assert len(history.starts) == MAX_EPOCHS
    assert not history.holds(Position(2, 2))
    assert history.follows(Position(2, 2))


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"starts": 3, "floor": 0},
        {"starts": [[1]], "floor": 0},
        {"starts": [], "floor": -1},
        {"starts": [], "floor": 1 << 53},
    ],
)
def test_an_invalid_history_counts_as_empty(body: dict[str, object]) -> None:
    assert history_of(_record(1)._replace(body=body)) == History()


def test_a_history_may_have_the_largest_number() -> None:
    assert history_of(_record(1)._replace(body={"starts": [], "floor": (1 << 53) - 1})).floor == (1 << 53) - 1


def test_a_record_comes_back_as_it_was() -> None:
    record = _record(3)
    assert decode(record.wire) == restore(record.wire) == record
    assert record.key == Key(NODE, "thing", "t")
    assert record.key.path("home") == f"vmconv/home/{NODE}/thing/t"
    assert SIGNER.sign(record.payload) == record.signature


@pytest.mark.parametrize(
    "change",
    [
        {"owner": "0" * 32},
        {"owner": NODE[:-1]},
        {"kind": "Thing"},
        {"id": "../t"},
        {"id": "t" * 129},
        {"epoch": 0},
        {"seq": 1 << 53},
        {"clock": -1},
        {"schema": 1.0},
        {"txn": True},
        {"key_id": "a/b"},
        {"body": []},
        {"deleted": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_invalid_field_is_refused(change: dict[str, object]) -> None:
    payload = encode(_record(3)._replace(**change))  # type: ignore[arg-type]
    with pytest.raises(MalformedError):
        decode(seal(b"s", payload))


@pytest.mark.parametrize(
    "wire",
    [
        b"",
        b"\x00",
        b"\xff" * 10,
        b"\x00[",
        b"\x00" + b"[" * 10_000,
        b"\x00[1e999]",
        b"\x00[NaN]",
        b"\x00\xff",
        b"x" * (MAX_RECORD + 1),
    ],
    ids=range(9),
)
def test_an_invalid_record_is_refused(wire: bytes) -> None:
    with pytest.raises(MalformedError):
        decode(wire)


def test_a_clock_never_goes_back_and_follows_others_within_reason() -> None:
    clock = HybridClock()
    ticks = [clock.tick(now) for now in (1000, 1000, 900, 2000)]
    assert ticks == sorted(set(ticks))
    assert milliseconds(ticks[-1]) == 2000
    assert clock.observe((3000 << 16) + 5, 2000)
    assert clock.tick(2000) == (3000 << 16) + 6
    assert not clock.observe((2001 + MAX_AHEAD_MS) << 16, 2000)
    assert clock.last == (3000 << 16) + 6


def test_one_proof_of_a_fork_is_kept_for_each_owner(store: Store) -> None:
    with store.atomic():
        kept = [store.quarantine((_record(seq), _record(seq, id="other")), 0) for seq in range(1, 5)]
        other = _record(1)._replace(owner=node_id(1))
        assert store.quarantine((other, other._replace(seq=2)), 0)
    assert kept == [True, False, False, False]
    assert len(store.forks()) == 4


def test_what_reads_a_closed_database_is_told(tmp_path: Path) -> None:
    """A thread that still reads while the node ends; a soak has found it."""
    path = str(tmp_path / "store.sqlite")
    connection = open_writer(path)
    Store(connection, node_id(0))
    reader = Reader(open_reader(path))
    assert reader.find("note") == []
    reader.close()
    connection.close()
    with pytest.raises(StoreError, match="closed database"):
        reader.find("note")
