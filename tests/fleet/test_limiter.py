"""Strangers at a node's listening sockets: they lose their places to others, in time, and stop nothing."""

from __future__ import annotations

import os
import resource
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from fleet.in_memory import Node, nodes
from fleet.serving import served
from vmconv.errors import VmconvError
from vmconv_fleet import limiter
from vmconv_fleet.api import asking
from vmconv_fleet.cli.client import NodeClient
from vmconv_fleet.config import ConfigError, NodeConfig, load, save, split_address
from vmconv_fleet.limiter import LimitedSocket, Limiter, Limits, address_key, connection_of
from vmconv_fleet.node import serving
from vmconv_fleet.node.activation import limits_of
from vmconv_fleet.replication.records import Change, Record
from vmconv_fleet.replication.service import NodeService
from vmconv_fleet.testing import PATIENCE, Lab, free_port, wait_until
from vmconv_fleet.trust import joining
from vmconv_fleet.trust.identity import Keys, new_node_id
from vmconv_fleet.trust.joining import JoinService

STRANGERS = 100
FEW = Limits(total=12, address=8, seconds=600.0)
HASTY = Limits(total=12, address=8, seconds=0.5)


@pytest.fixture(autouse=True)
def slow_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets changes wait for the disk as long as tests do. These are about connections, and a commit may take long."""
    monkeypatch.setattr(asking, "_OWN_WAIT", PATIENCE)
    patient = {**(NodeService.submit.__kwdefaults__ or {}), "timeout": PATIENCE}
    monkeypatch.setattr(NodeService.submit, "__kwdefaults__", patient)
    monkeypatch.setattr(limiter, "RECENT", PATIENCE)


@contextmanager
def strangers(address: tuple[str, int], number: int = STRANGERS) -> Iterator[list[socket.socket]]:
    """Yields connections that send nothing."""
    with ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(address, PATIENCE)) for _ in range(number)]


def is_ended(connection: socket.socket) -> bool:
    """Returns whether the other end closes the connection, in time."""
    connection.settimeout(PATIENCE)
    with suppress(ConnectionError, ssl.SSLError):
        while connection.recv(1 << 16):
            pass
    return True


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with nodes(1, tmp_path) as (one,):
        yield one


# The API


def test_reads_and_changes_go_on_under_idle_connections(node: Node) -> None:
    with served(node, FEW) as api:
        client = api.client("admin")
        stream = api.client("viewer").lines("/api/v1/events")
        assert next(stream) == "event: here"
        with strangers(split_address(api.url.removeprefix("https://"))) as held:
            assert client.get("/api/v1/fleet")["node"] == node.id
            assert client.call("POST", "/api/v1/tokens", {"label": "x", "role": "viewer"}).content["ok"]
            counters = api.limiter.counters
            assert counters["displaced"] + counters["refused"] >= STRANGERS - FEW.total
            assert len(api.limiter) <= 2 * FEW.total
            assert is_ended(held[0])
            assert any("port api: " in said for said in client.get("/api/v1/fleet")["problems"])
            assert any('event="api displaced"' in line for line in api.local.lines("/metrics"))
        # Whoever is known keeps the place.
        assert any(line == "event: token" for line in stream)


SLOW = {
    "handshake": (False, b"\x16\x03\x01\x02"),
    "head": (True, b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-More: "),
    "next-head": (True, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /heal"),
    "body": (True, b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
             b"Content-Length: 1000\r\n\r\ntoken="),
}  # fmt: skip


@pytest.mark.parametrize("phase", SLOW)
def test_each_phase_of_a_stranger_has_its_time(node: Node, phase: str) -> None:
    is_secure, sent = SLOW[phase]
    with served(node, HASTY) as api, strangers(split_address(api.url.removeprefix("https://")), 1) as (plain,):
        connection = plain
        if is_secure:
            context = ssl.create_default_context(cafile=api.ca)
            connection = context.wrap_socket(plain, server_hostname="127.0.0.1")
        with connection:
            connection.sendall(sent)
            assert is_ended(connection)
        assert api.limiter.counters["overdue"] == 1


def test_a_known_callers_long_request_has_no_limit(node: Node) -> None:
    with served(node, HASTY) as api:
        stream = api.client("viewer").lines("/api/v1/events")
        assert next(stream) == "event: here"
        with strangers(split_address(api.url.removeprefix("https://")), 1) as (stranger,):
            # The stranger came later and is overdue.
            assert is_ended(stranger)
        api.token("viewer")
        assert any(line == "event: token" for line in stream)


ONE = Limits(total=12, address=12, seconds=600.0, requests=1)


def test_more_requests_than_places_are_told_to_try_again(node: Node) -> None:
    with served(node, ONE) as api:
        stream = api.client("viewer").lines("/api/v1/events")
        assert next(stream) == "event: here"
        # Streams of events have no place among the requests.
        waiting, other = api.client("admin"), api.client("viewer")
        with gate_of(node) as (arrived, go):
            thread = threading.Thread(target=waiting.call, args=("POST", "/api/v1/nodes/n01/scan", {}), daemon=True)
            thread.start()
            assert arrived.wait(PATIENCE)
            with pytest.raises(VmconvError, match="as many requests as it may"):
                other.get("/api/v1/fleet")
            assert api.limiter.counters["busy"] == 1
            assert api.local.get("/api/v1/fleet")
            go.set()
            thread.join(PATIENCE)
        assert other.get("/api/v1/fleet")["node"] == node.id


def test_one_caller_does_not_take_all_requests(node: Node) -> None:
    with served(node, ONE._replace(requests=8)) as api:
        greedy, other = api.token("admin")["token"], api.client("viewer")
        clients = [NodeClient(api.url, ca=api.ca, token=greedy) for _ in range(4)]
        answers: list[str] = []

        def ask(client: NodeClient) -> None:
            try:
                client.call("POST", "/api/v1/nodes/n01/scan", {})
                answers.append("done")
            except VmconvError as exc:
                answers.append(str(exc))

        with gate_of(node) as (arrived, go):
            threads = [threading.Thread(target=ask, args=(one,), daemon=True) for one in clients]
            for thread in threads:
                thread.start()
            assert arrived.wait(PATIENCE)
            wait_until(lambda: len(answers) == 2, PATIENCE, "two are refused")
            assert other.get("/api/v1/fleet")["node"] == node.id
            go.set()
            for thread in threads:
                thread.join(PATIENCE)
    assert sorted(text.partition(" ")[0] for text in answers) == ["done", "done", "you", "you"]


def test_one_caller_does_not_take_all_streams(node: Node) -> None:
    with served(node, FEW) as api:
        token = api.token("viewer")["token"]
        streams = [NodeClient(api.url, ca=api.ca, token=token).lines("/api/v1/events") for _ in range(4)]
        assert [next(one) for one in streams[:3]] == ["event: here"] * 3
        with pytest.raises(VmconvError, match="as many requests at this node"):
            next(streams[3])
        assert next(api.client("viewer").lines("/api/v1/events")) == "event: here"


def test_an_answer_that_nobody_reads_ends(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "READ_S", 0.2)
    node.write(*(Change("thing", f"t{number}", {"text": "x" * 100_000}) for number in range(100)))
    with served(node, FEW) as api:
        token = api.token("viewer")["token"]
        address = split_address(api.url.removeprefix("https://"))
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.connect(address)
        with ssl.create_default_context(cafile=api.ca).wrap_socket(plain, server_hostname="127.0.0.1") as reader:
            head = f"GET /api/v1/records/thing?limit=1000 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n"
            reader.sendall(head.encode())
            wait_until(lambda: not any(one.known for one in api.limiter._placed), PATIENCE, "its place is free")


@contextmanager
def gate_of(node: Node) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Holds the replica's thread, and so each change, once it has something to do; yields (it is held, release it)."""
    arrived, go = threading.Event(), threading.Event()

    def hold(_records: list[Record]) -> None:
        arrived.set()
        go.wait(PATIENCE)

    unsubscribe = node.service.subscribe(hold)
    try:
        yield arrived, go
    finally:
        go.set()
        unsubscribe()


def test_a_strangers_slow_body_takes_nobodys_place(node: Node) -> None:
    secure, sent = SLOW["body"]
    assert secure
    with served(node, ONE) as api, strangers(split_address(api.url.removeprefix("https://")), 1) as (plain,):
        client = api.client("viewer")
        context = ssl.create_default_context(cafile=api.ca)
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
            connection.sendall(sent)
            wait_until(lambda: any(one.is_slow for one in api.limiter._asking), PATIENCE, "the body is awaited")
            assert client.get("/api/v1/fleet")["node"] == node.id
            assert is_ended(connection)


def test_limits_are_settings(tmp_path: Path) -> None:
    config = NodeConfig(
        directory=str(tmp_path), fleet="f", node="1" * 32, name="n", limits={"connections": 9, "requests": 3}
    )
    save(config)
    assert load(str(tmp_path)) == config
    assert limits_of(load(str(tmp_path))) == Limits(9, 64, 15.0, 3)
    for wrong in ("connections = 0", "connections = true", "requests = 70000", "conections = 5", 'requests = "5"'):
        (tmp_path / "node.toml").write_text(f'fleet = "f"\nnode = "{"1" * 32}"\nname = "n"\n[limits]\n{wrong}\n')
        with pytest.raises(ConfigError, match="setting 'limits' is"):
            load(str(tmp_path))


# Joining


@pytest.fixture
def join_at(lab: Lab, request: pytest.FixtureRequest) -> Callable[[Limits], JoinService]:
    def start(limits: Limits) -> JoinService:
        config = lab.add(join=f"127.0.0.1:{free_port()}")
        assert lab.authority is not None
        service = JoinService(config, lab.authority, _Nobody(), limits=limits)
        service.start()
        request.addfinalizer(service.close)
        return service

    return start


class _Nobody:
    """A fleet without members."""

    def is_known(self, node: str) -> bool:
        return False

    def is_revoked(self, node: str, key_id: str) -> bool:
        return False

    def names(self) -> Mapping[str, AbstractSet[str]]:
        return {}

    def seeds(self) -> list[str]:
        return []

    def certificates(self) -> list[bytes]:
        return []

    def certified(self, certificate: bytes) -> None:
        pass

    def expect(self, node: str, stated: object) -> None:
        pass

    def revoke(self, node: str) -> None:
        pass


def test_joining_works_under_idle_connections(join_at: Callable[[Limits], JoinService]) -> None:
    service = join_at(FEW)
    with strangers(split_address(service.config.join)) as held:
        invitation = service.authority.invite(service.config, host="127.0.0.1")
        keys, node = Keys.generate(), new_node_id()
        granted = joining.join(invitation, keys.request(node, "lab", ["127.0.0.1"]))
        assert b"BEGIN CERTIFICATE" in granted.certificate
        assert is_ended(held[0])


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02"])
def test_a_silent_joiner_has_its_time(join_at: Callable[[Limits], JoinService], sent: bytes) -> None:
    service = join_at(HASTY)
    with strangers(split_address(service.config.join), 1) as (connection,):
        connection.sendall(sent)
        assert is_ended(connection)
    assert service.limiter.counters["overdue"] == 1


# The limiter


class Listening(NamedTuple):
    """A limited socket of the test, and what it opens."""

    limiter: Limiter
    limited: LimitedSocket
    stack: ExitStack

    def knock(self, source: str) -> socket.socket:
        """Returns a connection from an address of loopback, which is not accepted yet."""
        return self.stack.enter_context(
            socket.create_connection(self.limited.getsockname(), source_address=(source, 0))
        )

    def connect(self, source: str, *, known: bool = False) -> tuple[socket.socket, socket.socket]:
        """Returns both ends of a connection."""
        near = self.knock(source)
        far = self.stack.enter_context(self.limited.accept()[0])
        connection_of(far).known = known
        return near, far


@pytest.fixture
def listening() -> Iterator[Listening]:
    limiter = Limiter("test", Limits(total=6, address=4, seconds=600.0))
    with ExitStack() as stack:
        made = stack.enter_context(limiter.listen(socket.create_server(("127.0.0.1", 0))))
        stack.callback(limiter.close)
        yield Listening(limiter, made, stack)


def is_open(near: socket.socket) -> bool:
    near.setblocking(False)
    with suppress(BlockingIOError):
        return near.recv(1) != b""
    return True


def test_the_oldest_stranger_of_the_most_frequent_address_loses_its_place(listening: Listening) -> None:
    sources = ["127.0.0.3", "127.0.0.2", "127.0.0.2", "127.0.0.2", "127.0.0.4", "127.0.0.5"]
    near = [listening.connect(source)[0] for source in sources]
    listening.connect("127.0.0.6")
    assert [is_open(one) for one in near] == [True, False, True, True, True, True]
    assert listening.limiter.counters["displaced"] == 1


def test_a_known_caller_without_a_request_loses_its_place_last(listening: Listening) -> None:
    ends = [listening.connect("127.0.0.2", known=n < 3) for n in range(4)]
    connection_of(ends[0][1]).begin()
    listening.connect("127.0.0.2", known=True)
    assert [is_open(near) for near, _ in ends] == [True, True, True, False]
    listening.connect("127.0.0.2", known=True)
    assert [is_open(near) for near, _ in ends] == [True, False, True, False]
    # Sending a body slowly is not being busy.
    connection_of(ends[0][1]).reading(True)
    for _ in range(4):
        listening.connect("127.0.0.2", known=True)
    assert not is_open(ends[0][0])


def test_without_a_dispensable_connection_the_new_one_is_refused(listening: Listening) -> None:
    for _ in range(4):
        connection_of(listening.connect("127.0.0.2", known=True)[1]).begin()
    near = listening.knock("127.0.0.2")
    with pytest.raises(BlockingIOError):
        listening.limited.accept()
    assert is_ended(near)
    assert listening.limiter.counters["refused"] == 1
    listening.connect("127.0.0.3")


def test_disconnected_connections_count_until_they_are_closed(listening: Listening) -> None:
    for _ in range(12):
        listening.connect("127.0.0.2")
    near = listening.knock("127.0.0.3")
    with pytest.raises(BlockingIOError):
        listening.limited.accept()
    assert is_ended(near)


def test_a_place_is_free_once_its_connection_is_closed(listening: Listening) -> None:
    for _ in range(20):
        listening.connect("127.0.0.2")[1].close()
    assert len(listening.limiter) == 0
    assert listening.limiter.counters.pop("accepted") == 20
    assert not any(listening.limiter.counters.values())
    assert listening.limiter.problem() is None


def test_exhausted_descriptors_refuse_one_connection(listening: Listening) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    older, _far = listening.connect("127.0.0.2")
    near = listening.knock("127.0.0.3")
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(BlockingIOError):
            listening.limited.accept()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert is_ended(near)
    assert is_ended(older)
    assert listening.limiter.counters["failed"] == 1
    assert is_open(listening.connect("127.0.0.3")[0])


def test_a_crowd_of_strangers_is_a_problem(listening: Listening) -> None:
    for _ in range(8):
        listening.connect("127.0.0.2")
    assert listening.limiter.problem() == "port test: 4 connections of strangers were ended in the last minute"


NONE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("limits", "raised"),
    [
        ((1024, NONE), (1 << 16, NONE)),
        ((1024, 4096), (4096, 4096)),
        ((1024, 1 << 20), (1 << 16, 1 << 20)),
        ((1 << 17, 1 << 20), None),
        ((4096, 4096), None),
        ((NONE, NONE), None),
    ],
)
def test_the_limit_of_descriptors_is_raised_as_far_as_it_may(
    limits: tuple[int, int], raised: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _what: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _what, wanted: made.append(wanted))
    limiter.raise_descriptor_limit()
    assert made == ([] if raised is None else [raised])


@pytest.mark.parametrize(
    ("family", "host", "key"),
    [
        (socket.AF_INET, "10.1.2.3", "0a010203"),
        (socket.AF_INET6, "::ffff:10.1.2.3", "0a010203"),
        (socket.AF_INET6, "2001:db8:1:2:3::4", "20010db800010002"),
        (socket.AF_INET6, "fe80::1%lo", "fe80000000000000"),
        (socket.AF_UNIX, "", ""),
    ],
)
def test_an_address_is_a_host_or_an_ipv6_network(family: socket.AddressFamily, host: str, key: str) -> None:
    assert address_key(family, (host, 1)).hex() == key
