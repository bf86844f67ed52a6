"""The replica's thread and the service in front of it: durable before told, never stuck, always ended."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from fleet.in_memory import Wire
from fleet.plain import PlainSigner, PlainTrust, certificate, node_id
from vmconv_fleet.errors import ClosedError, MalformedError, NotReadyError, StoreError
from vmconv_fleet.replication import engine
from vmconv_fleet.replication.anti_entropy import NEVER
from vmconv_fleet.replication.engine import CLEAN_MS, Engine
from vmconv_fleet.replication.records import Change, Record
from vmconv_fleet.replication.requests import Context, IncomingRequest, Outcome
from vmconv_fleet.replication.retention import DAY_MS
from vmconv_fleet.replication.service import NodeService
from vmconv_fleet.replication.store import ReplicaView, Store
from vmconv_fleet.replication.verifier_pool import FEW, VerifierPool
from vmconv_fleet.testing import PATIENCE

BY = {"user": "somebody"}


def _set(context: Context, request: IncomingRequest) -> Outcome:
    return Outcome([Change("setting", "s", dict(request.arguments))], {"done": True})


class Nodes:
    """Services of a test, on links in memory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._wires: dict[str, Wire] = {}
        self.services: list[NodeService] = []

    def add(self, number: int, *, patience_ms: int | None = 0, transport: Any = None) -> NodeService:
        signer = PlainSigner(node_id(number))
        wire = self._wires[signer.owner] = Wire(signer.owner, self._wires)
        service = NodeService(
            fleet="test",
            database=str(self._directory / f"{number}.sqlite"),
            signer=signer,
            trust=PlainTrust(signer),
            transport=transport or wire,
            handlers={"set": _set},
            schema=1,
            patience_ms=patience_ms,
            introduction=[certificate(signer.owner, signer.key_id)],
        )
        self.services.append(service)
        service.start()
        return service


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path)
    yield nodes
    for service in nodes.services:
        service.close()


def _write(service: NodeService, id: str, value: object) -> Record:
    (record,) = service.write([Change("thing", id, {"value": value})]).result(PATIENCE)
    return record


def _seen(service: NodeService, owner: str, id: str) -> threading.Event:
    """Returns an event that is set once a service has a record."""
    event = threading.Event()

    def look(_: list[Record]) -> None:
        if service.view().get(owner, "thing", id):
            event.set()

    service.subscribe(look)
    look([])
    return event


@pytest.mark.parametrize("jump_ms", [-400 * DAY_MS, 20 * 60_000, 400 * DAY_MS], ids=["back", "20 minutes", "a year"])
def test_cleaning_waits_after_a_jump_of_the_clock(jump_ms: int) -> None:
    """By the clock after the jump all records may seem old."""
    times = {"monotonic": 0, "wall": 1_700_000_000_000}
    cleaned: list[int] = []

    def clean() -> list[Any]:
        cleaned.append(times["monotonic"])
        return []

    requests: Any = SimpleNamespace(run=list, clean=clean)
    replica: Any = SimpleNamespace(due=lambda: NEVER)

    def pass_time(milliseconds: int) -> None:
        for name in times:
            times[name] += milliseconds
        one._routine([])

    with (
        patch.object(engine, "wall_ms", lambda: times["wall"]),
        patch.object(engine, "_monotonic_ms", lambda: times["monotonic"]),
    ):
        one = Engine(replica, requests, Wire("0", {}))
        pass_time(CLEAN_MS - 1)
        # A clock that NTP corrects a little is no reason.
        times["wall"] += 60_000
        pass_time(1)
        assert cleaned == [CLEAN_MS]
        pass_time(CLEAN_MS - 1)
        times["wall"] += jump_ms
        pass_time(1)
        pass_time(CLEAN_MS - 1)
        assert cleaned == [CLEAN_MS]
        pass_time(1)
        assert cleaned == [CLEAN_MS, 3 * CLEAN_MS]


def test_records_are_durable_when_the_future_is_done(nodes: Nodes) -> None:
    service = nodes.add(0)
    record = _write(service, "t", 1)
    assert service.view().get(service.node, "thing", "t") == record


def test_a_record_of_one_node_reaches_another(nodes: Nodes) -> None:
    one, other = nodes.add(0), nodes.add(1)
    seen = _seen(other, one.node, "t")
    _write(one, "t", 1)
    assert seen.wait(PATIENCE)


def test_a_request_is_answered(nodes: Nodes) -> None:
    one, other = nodes.add(0), nodes.add(1)
    request = one.submit(other.node, "set", {"value": 3}, BY)
    response = one.response(request, PATIENCE)
    assert response is not None
    assert response.body["ok"] is True
    setting = one.view().get(other.node, "setting", "s")
    assert setting is not None
    assert setting.body == {"value": 3}


def test_the_wait_for_a_response_ends(nodes: Nodes) -> None:
    service = nodes.add(0)
    request = service.submit(node_id(7), "set", {}, BY)
    assert service.response(request, 0.01) is None
    assert service.response("never asked", 0.01) is None


def test_a_request_that_was_withdrawn_is_gone(nodes: Nodes) -> None:
    service = nodes.add(0)
    request = service.submit(node_id(7), "set", {}, BY, id="mine")
    service.withdraw(request).result(PATIENCE)
    assert service.view().find("request") == []


def test_an_update_sees_what_was_written_before_it(nodes: Nodes) -> None:
    service = nodes.add(0)

    def count(view: ReplicaView) -> list[Change]:
        record = view.get(service.node, "thing", "n")
        return [Change("thing", "n", {"value": record.body["value"] + 1 if record else 1})]

    for future in [service.update(count) for _ in range(50)]:
        future.result(PATIENCE)
    record = service.view().get(service.node, "thing", "n")
    assert record is not None
    assert record.body == {"value": 50}


@pytest.mark.parametrize("kind", ["epoch", "request", "response", "transaction"])
def test_telemetry_does_not_write_what_the_system_writes(nodes: Nodes, kind: str) -> None:
    service = nodes.add(0)
    with pytest.raises(MalformedError, match=kind):
        service.write([Change(kind, "x", {})])
    with pytest.raises(MalformedError, match=kind):
        service.update(lambda _: [Change(kind, "x", {})]).result(PATIENCE)


def test_waiting_writes_share_a_commit(nodes: Nodes) -> None:
    service = nodes.add(0)
    _write(service, "first", 0)
    commits = []
    service._replica.store._connection.set_trace_callback(
        lambda statement: commits.append(statement) if statement == "COMMIT" else None
    )
    gate = threading.Event()
    service._engine.call(lambda: gate.wait(PATIENCE))
    futures = [service.write([Change("thing", f"t{number}", {})]) for number in range(100)]
    gate.set()
    for future in futures:
        future.result(PATIENCE)
    assert len(commits) < 50


def test_waiting_writes_share_a_commit_up_to_the_links_limit(nodes: Nodes) -> None:
    """More than waits for a link at once would be lost, and asked for again."""
    service = nodes.add(0)
    _write(service, "first", 0)
    commits: list[int] = []
    service.subscribe(lambda records: commits.append(len(records)))
    gate = threading.Event()
    service._engine.call(lambda: gate.wait(PATIENCE))
    with patch.object(engine, "BURST", 5000):
        futures = [service.write([Change("thing", f"t{n}", {"filling": "x" * 1000})]) for n in range(20)]
        gate.set()
        for future in futures:
            future.result(PATIENCE)
    assert sum(commits) == 20
    assert max(commits) < 10


def test_a_write_waits_until_the_node_has_recovered(nodes: Nodes) -> None:
    service = nodes.add(0, patience_ms=None)
    future = service.write([Change("thing", "t", {})])
    with pytest.raises(NotReadyError, match="did not write within"):
        service.submit(service.node, "set", {}, BY, timeout=0.01)
    assert not future.done()
    nodes.add(1)
    assert future.result(PATIENCE)


def test_a_function_that_fails_fails_alone(nodes: Nodes) -> None:
    service = nodes.add(0)
    gate = threading.Event()
    service._engine.call(lambda: gate.wait(PATIENCE))
    before = service.write([Change("thing", "before", {})])
    bad = service.update(lambda _: [Change("thing", "x", {"not": object()})])
    after = service.write([Change("thing", "after", {})])
    gate.set()
    with pytest.raises(MalformedError):
        bad.result(PATIENCE)
    assert before.result(PATIENCE)
    assert after.result(PATIENCE)


def test_a_failed_commit_is_reported_and_the_node_continues(nodes: Nodes) -> None:
    service = nodes.add(0)
    _write(service, "first", 0)
    with (
        patch.object(engine, "FAILURE_PAUSE_S", 0.0),
        patch.object(Store, "group", _full),
        pytest.raises(StoreError, match="disk is full"),
    ):
        _write(service, "second", 0)
    assert [problem.kind for problem in service.problems()] == ["store"]
    _write(service, "third", 0)
    assert [record.id for record in service.view().find("thing")] == ["first", "third"]
    assert service.problems() == []
    assert service.counters()["store"] >= 1


_GROUP = Store.group


@contextmanager
def _full(self: Store) -> Iterator[None]:
    with _GROUP(self):
        yield
        raise StoreError("database: disk is full")


def test_messages_beyond_the_limit_are_dropped_and_pulled_later(nodes: Nodes) -> None:
    one, other = nodes.add(0), nodes.add(1)
    seen = _seen(other, one.node, "first")
    _write(one, "first", 0)
    assert seen.wait(PATIENCE)
    seen = _seen(other, one.node, "last")
    with patch.object(engine, "MAX_QUEUED", 0):
        _write(one, "last", 0)
        assert one.counters() is not None
    assert seen.wait(PATIENCE)
    assert other.counters()["dropped"] >= 1


def test_waiting_writes_of_a_stopped_node_fail(nodes: Nodes) -> None:
    service = nodes.add(0, patience_ms=None)
    waiting = service.write([Change("thing", "t", {})])
    service.close()
    service.close()
    with pytest.raises(ClosedError):
        waiting.result(PATIENCE)
    with pytest.raises(ClosedError):
        service.write([Change("thing", "t", {})]).result(PATIENCE)
    assert "fleet-replica" not in [thread.name for thread in threading.enumerate()]


def test_the_end_does_not_depend_on_the_transport(nodes: Nodes) -> None:
    class Broken:
        def start(self, events: object) -> None: ...

        def send(self, peer: str | None, message: bytes) -> None: ...

        def close(self) -> None:
            raise RuntimeError("a link that does not close")

    service = nodes.add(0, transport=Broken())
    _write(service, "t", 0)
    service.close()
    with pytest.raises(ClosedError):
        service.write([Change("thing", "t", {})]).result(PATIENCE)


def test_waiting_for_a_response_ends_at_shutdown(nodes: Nodes) -> None:
    service = nodes.add(0)
    request = service.submit(node_id(7), "set", {}, BY)
    result: Future[Record | None] = Future()
    waiter = threading.Thread(target=lambda: result.set_result(service.response(request, None)))
    waiter.start()
    service.close()
    assert result.result(PATIENCE) is None
    waiter.join()


def test_many_signatures_are_verified_in_their_order() -> None:
    verifiers = VerifierPool()
    draft = Record(node_id(1), "thing", "t", 1, 1, 1, 5, False, 0, "k", 0, {}, b"")
    groups = [[draft._replace(seq=seq)] for seq in range(FEW * 5)]
    for count in (1, len(groups)):
        expected = [number % 3 == 0 for number in range(count)]
        assert list(verifiers(lambda group: group[0].seq % 3 == 0, groups[:count])) == expected
    verifiers.close()
