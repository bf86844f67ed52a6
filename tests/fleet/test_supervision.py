"""A node's threads continue after failures, say so, and forget what is over."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from fleet.in_memory import Node, nodes
from support.disks import MIB, make_disk
from vmconv_fleet import supervision
from vmconv_fleet.catalogue.places import disk_id
from vmconv_fleet.catalogue.scanning import Scanner
from vmconv_fleet.cli.client import NodeClient
from vmconv_fleet.config import NodeConfig
from vmconv_fleet.errors import StoreError
from vmconv_fleet.jobs.runner import JobRunner
from vmconv_fleet.node import heartbeat
from vmconv_fleet.node.activation import ApiSockets
from vmconv_fleet.node.daemon import Daemon
from vmconv_fleet.node.heartbeat import HeartbeatWriter
from vmconv_fleet.replication import engine
from vmconv_fleet.replication.problems import FORGOTTEN_S, NodeProblem, ProblemLog
from vmconv_fleet.replication.records import Change, Record
from vmconv_fleet.replication.store import Store
from vmconv_fleet.supervision import Supervised
from vmconv_fleet.testing import PATIENCE, Lab, free_port, wait_until
from vmconv_fleet.trust import joining
from vmconv_fleet.trust.joining import JoinError


@pytest.fixture(autouse=True)
def _at_once() -> Iterator[None]:
    with patch.object(supervision, "SOONEST", 0.01), patch.object(engine, "FAILURE_PAUSE_S", 0.01):
        yield


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with nodes(1, tmp_path) as (one,):
        yield one


class _Script:
    """A body that does one step of a script each time; the last one ends the test."""

    def __init__(self, *steps: Callable[[Callable[[], None]], None]) -> None:
        self.ending = _Impatient()
        self._steps = list(steps)

    def __call__(self, works: Callable[[], None]) -> None:
        self._steps.pop(0)(works)
        if not self._steps:
            self.ending.set()


class _Impatient(threading.Event):
    """Notes how long somebody would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.delays: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.delays.append(timeout or 0.0)
        return self.is_set()


def _fail(_works: Callable[[], None]) -> None:
    raise OSError("no space")


def _exit(_works: Callable[[], None]) -> None:
    raise SystemExit(3)


def _return(_works: Callable[[], None]) -> None:
    pass


def _work_and_fail(works: Callable[[], None]) -> None:
    works()
    raise OSError("no space")


def _run(*steps: Callable[[Callable[[], None]], None]) -> tuple[Supervised, list[float]]:
    body = _Script(*steps)
    thread = Supervised("it", body, body.ending)
    with patch.object(supervision, "SOONEST", 1.0):
        thread.start()
        thread.join(PATIENCE)
    assert not thread.is_alive()
    return thread, body.ending.delays


@pytest.mark.parametrize("step", [_fail, _exit, _return], ids=["fails", "exits", "returns"])
def test_a_thread_continues_after_growing_delays(step: Callable[[Callable[[], None]], None]) -> None:
    thread, delays = _run(*[step] * 8, _return)
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60]
    assert thread.counters == {"failures": 8}


def test_success_resets_the_delay() -> None:
    assert _run(_fail, _fail, _work_and_fail, _fail, _return)[1] == [1, 2, 1, 2]


def test_a_problem_is_what_fails_now(caplog: pytest.LogCaptureFixture) -> None:
    said: list[str | None] = []

    def look(works: Callable[[], None]) -> None:
        said.append(thread.problem())
        works()
        said.append(thread.problem())

    body = _Script(_fail, _fail, look)
    thread = Supervised("it", body, body.ending)
    thread.start()
    thread.join(PATIENCE)
    assert said == ["it failed 2 times in a row, the last time with: no space", None]
    assert "it failed once, the last time with: no space" in caplog.text


def test_the_log_of_problems_forgets() -> None:
    now = 0.0
    log = ProblemLog(lambda: now)
    fork, torn, store = (NodeProblem(kind, "x") for kind in ("fork", "torn", "store"))
    for problem in (fork, torn, store):
        log.report(*problem)
    now = FORGOTTEN_S / 2
    log.report(*torn)
    assert log.all() == [fork, store, torn]
    now = FORGOTTEN_S + 1
    assert log.all() == [fork, torn]
    log.report(*store)
    log.forget("store")
    assert log.all() == [fork, torn]
    assert log.counters == {"fork": 1, "torn": 2, "store": 2}


# The parts


_GROUP = Store.group


@contextmanager
def full() -> Iterator[None]:
    """No commit succeeds while the block runs."""

    @contextmanager
    def group(self: Store) -> Iterator[None]:
        with _GROUP(self):
            yield
            raise StoreError("database: disk is full")

    with patch.object(Store, "group", group):
        yield


def test_a_scanner_continues_when_there_is_room_again(node: Node, tmp_path: Path) -> None:
    (tmp_path / "ds").mkdir()
    scanner = Scanner(node.service, {"ds": str(tmp_path / "ds")})
    node.service.observe(scanner.thread)
    try:
        with full():
            scanner.start()
            wait_until(scanner.thread.problem, PATIENCE, "a failure")
            assert "scanner failed" in "".join(problem.text for problem in node.service.problems())
        node.body_when(node.id, "datastore", "ds", lambda one: one.body.get("scanned_ms", 0) > 0)
        wait_until(lambda: scanner.thread.problem() is None, PATIENCE, "success")
    finally:
        scanner.stop()
    assert node.service.counters()["scanner failures"] >= 1
    assert node.service.problems() == []


def test_a_job_is_done_when_there_is_room_again(node: Node, tmp_path: Path) -> None:
    """The disk is full when the worker sends its plan, and when the runner settles the interrupted job."""
    (tmp_path / "ds").mkdir()
    make_disk(tmp_path / "ds" / "a.raw", MIB)
    disk = disk_id("ds", "a.raw")
    node.write(Change("datastore", "ds", {"path": str(tmp_path / "ds")}))
    node.write(Change("disk", disk, {"datastore": "ds", "name": "a.raw"}))
    runner = JobRunner(node.service, str(node.directory))
    filled, written = threading.Event(), threading.Event()
    body: dict[str, Any] = {"state": "queued", "disk": disk, "datastore": "ds", "source": "a.raw", "format": "qcow2"}

    @contextmanager
    def group(self: Store) -> Iterator[None]:
        with _GROUP(self):
            yield
            begun = self.get(node.id, "job", "j1")
            if begun is not None and begun.body["state"] != "queued":
                filled.set()
            if filled.is_set() and not written.is_set():
                raise StoreError("database: disk is full")

    runner.start()
    try:
        with patch.object(Store, "group", group):
            node.write(Change("job", "j1", body))
            assert filled.wait(PATIENCE)
            wait_until(runner.thread.problem, PATIENCE, "a failure")
            written.set()
            done = node.body_when(node.id, "job", "j1", lambda one: one.body["state"] in ("done", "failed"))
    finally:
        runner.stop()
    assert (done.body["state"], done.body["attempts"]) == ("done", 2)
    assert (tmp_path / "ds" / "a.qcow2").exists()


def test_heartbeats_continue(node: Node) -> None:
    failures = [OSError(24, "Too many open files")] * 2
    link: Any = node.wire
    writer = HeartbeatWriter(node.service, link)

    def memory() -> int:
        if failures:
            raise failures.pop()
        return 1

    with patch.object(heartbeat, "_memory", memory):
        writer.start()
        node.body_when(node.id, "heartbeat", node.id, lambda one: one.body["memory"] == 1)
        writer.close()
    assert writer.thread.counters == {"failures": 2}


def test_a_heartbeat_waits_for_the_one_before() -> None:
    """A node that cannot write for hours must not queue heartbeats for as long."""
    written: list[Future[list[Record]]] = []

    def write(_changes: object) -> Future[list[Record]]:
        written.append(Future())
        return written[-1]

    view = SimpleNamespace(positions=dict)
    service: Any = SimpleNamespace(node="1" * 32, view=lambda: view, problems=list, write=write)
    link: Any = SimpleNamespace(problems=list, neighbours=list)
    writer = HeartbeatWriter(service, link)
    assert [writer._beat() for _ in range(3)] == [heartbeat.INTERVAL] * 3
    assert len(written) == 1
    written[0].set_exception(StoreError("disk full"))
    writer._beat()
    writer._beat()
    assert len(written) == 2


def test_the_api_listens_again(node: Node) -> None:
    config = NodeConfig(directory=str(node.directory), fleet="test", node=node.id, name="n00", api="")
    link: Any = node.wire
    failing = [RuntimeError("no more memory")] * 2
    serve = ApiSockets._serve

    def flaky(self: ApiSockets, works: Callable[[], None]) -> None:
        if failing:
            raise failing.pop()
        serve(self, works)

    with patch.object(ApiSockets, "_serve", flaky):
        api = ApiSockets(config, node.service, link)
        api.start()
        try:
            # The first connection makes it serve.
            with socket.socket(socket.AF_UNIX) as first:
                first.connect(config.socket)
                wait_until(lambda: api.thread.counters["failures"] == 2, PATIENCE, "two failures")
            wait_until(lambda: api.thread.problem() is None, PATIENCE, "it serves")
            with NodeClient(config.directory) as client:
                assert client.get("/api/v1/fleet")["node"] == node.id
        finally:
            api.close()


def _answers(address: str) -> bool:
    """Returns whether the service for joining answers there."""
    try:
        with joining._connected(address, ssl._create_unverified_context()) as connection:
            connection.request("GET", "/ca")
            return connection.getresponse().status == 200
    except JoinError:
        return False


def test_all_threads_of_a_daemon_are_supervised(lab: Lab) -> None:
    config = lab.add(api=f"127.0.0.1:{free_port()}", join=f"127.0.0.1:{free_port()}")
    daemon = Daemon(config)
    before = set(threading.enumerate())
    failing = [OSError("no more memory")]

    def fail_once(_server: joining._Server) -> None:
        if failing:
            raise failing.pop()

    try:
        with patch.object(joining._Server, "service_actions", fail_once):
            daemon.start()
            wait_until(lambda: daemon.service.counters()["joining failures"] == 1, PATIENCE, "a failure")
            wait_until(lambda: _answers(config.join), PATIENCE, "it listens again")
        started = {one.name for one in set(threading.enumerate()) - before}
        names = {name.removesuffix(" failures") for name in daemon.service.counters() if name.endswith(" failures")}
        assert names == {
            "api",
            "heartbeat",
            "jobs",
            "joining",
            "link",
            "link-bulk",
            "renewal",
            "scanner",
            "watch",
            "webhooks",
        }
        # The replica's thread continues by itself; Zenoh's call back and end, and that of an inspection ends with it.
        others = {name for name in started if not name.startswith(("Dummy", "Thread", "asyncio", "pyo3"))}
        assert others - names - {"inspection"} == {"fleet-replica"}
    finally:
        daemon.close()
