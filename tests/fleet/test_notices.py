"""Webhooks and syslog: which events there are, that they arrive, and where a node does not connect to."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import queue
import re
import socket
import sqlite3
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fleet.in_memory import Node, nodes
from fleet.serving import Served, served, tls_files
from vmconv.errors import AccessError, UsageError, VmconvError
from vmconv_fleet import supervision
from vmconv_fleet.api.asking import Answer
from vmconv_fleet.config import NodeConfig, load, save
from vmconv_fleet.deadline import Deadline, TimedConnection
from vmconv_fleet.notices import delivery, outbox, webhooks
from vmconv_fleet.notices.addresses import ForbiddenAddressError, places_of, why_refused
from vmconv_fleet.notices.delivery import Delivery, DeliveryError, key_of, parsed, place_in, signature
from vmconv_fleet.notices.event import Event, Events
from vmconv_fleet.notices.outbox import Outbox
from vmconv_fleet.notices.secrets import HookSecrets, Target
from vmconv_fleet.notices.syslog import Destination, Syslog, destination, message
from vmconv_fleet.notices.webhooks import Webhooks, delay_ms
from vmconv_fleet.replication.clock import wall_ms
from vmconv_fleet.replication.records import Change, Record
from vmconv_fleet.testing import PATIENCE, wait_until

LOOPBACK = [ipaddress.ip_network("127.0.0.0/8")]
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


class Got(NamedTuple):
    """What the receiver got."""

    path: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    """A real server of webhooks: it has the status codes of its next `answers`, and refuses bodies with `refused`."""

    def __init__(self, tls: tuple[str, str] | None = None) -> None:
        self.got: queue.Queue[Got] = queue.Queue()
        self.answers: queue.Queue[int] = queue.Queue()
        self.refused = b""
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.got.put(Got(self.path, {name.lower(): value for name, value in self.headers.items()}, body))
                try:
                    self.send_response(receiver.answers.get_nowait())
                except queue.Empty:
                    self.send_response(400 if receiver.refused and receiver.refused in body else 204)
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            def log_message(self, *_arguments: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls[1], tls[0])
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._server.server_port}/hook?key=1"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def next(self) -> Got:
        return self.got.get(timeout=PATIENCE)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(PATIENCE)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    one = Receiver()
    yield one
    one.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with nodes(1, tmp_path) as (one,):
        yield one


@contextmanager
def hooked(node: Node, **more: Any) -> Iterator[Webhooks]:
    """Yields the running webhooks of a node."""
    made = Webhooks(node.service, str(node.directory), Delivery(LOOPBACK, **more))
    made.start()
    try:
        yield made
    finally:
        made.stop()
        assert not made.thread.is_alive()


def add(node: Node, url: str, *events: str, hook: str = "0123456789ab") -> str:
    HookSecrets(str(node.directory)).add(hook, Target(url, SECRET))
    node.write(Change("webhook", hook, {"place": place_in(parsed(url, allow_http=True)), "events": list(events)}))
    return hook


def job(state: str, **more: Any) -> dict[str, Any]:
    return {"state": state, "disk": "d1", "datastore": "ds", "format": "qcow2", "source": "web.raw", **more}


def record(kind: str, body: dict[str, Any], seq: int = 1, *, id: str = "x", deleted: bool = False) -> Record:
    return Record("1" * 32, kind, id, 7, seq, 1, 5 << 16, deleted, 0, "k", 0, body, b"")


# Events


def test_a_job_is_an_event_for_each_state_and_none_for_its_progress() -> None:
    events = Events()
    states = ["queued", "planned", "running", "running", "running", "done"]
    found = [one for seq, state in enumerate(states) for one in events.of(record("job", job(state), seq))]
    assert [one.type for one in found] == ["job.queued", "job.planned", "job.running", "job.done"]
    assert found[-1].id == f"evt_{'1' * 32}_7_5_0"
    assert found[-1].data["source"] == "web.raw"


def test_a_problem_is_an_event_when_it_begins_and_when_all_are_over() -> None:
    events = Events()

    def types(kind: str, body: dict[str, Any]) -> list[tuple[str, Any]]:
        return [(one.type, one.data.get("problem")) for one in events.of(record(kind, body))]

    assert types("heartbeat", {"problems": []}) == []
    assert types("heartbeat", {"problems": ["a"]}) == [("node.problem", "a")]
    assert types("heartbeat", {"problems": ["a", "b"]}) == [("node.problem", "b")]
    once, again = "c failed once: 5 wait", "c failed 2 times in a row: 16 wait"
    assert types("heartbeat", {"problems": [once]}) == [("node.problem", once)]
    assert types("heartbeat", {"problems": [again]}) == []
    assert types("heartbeat", {"problems": []}) == [("node.well", None)]
    assert types("datastore", {}) == []
    assert types("datastore", {"problem": "gone"}) == [("datastore.problem", "gone")]
    assert types("datastore", {}) == [("datastore.well", None)]
    assert types("disk", {"problem": "gone"}) == []


def test_a_transaction_names_its_caller_and_not_the_contents_of_records() -> None:
    changes = [{"kind": "token", "id": "t1", "after": {"hash": "0" * 64}}]
    body = {"number": 3, "verb": "token-create", "by": {"user": "anna", "node": "n"}, "changes": changes}
    (event,) = Events().of(record("transaction", body))
    assert event.data["by"] == {"user": "anna", "node": "n"}
    assert event.data["changes"] == [{"kind": "token", "id": "t1"}]
    assert "hash" not in json.dumps(event.data)


# Deliveries


def named(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Lets every name have these addresses."""

    def found(_host: str, port: int, **_more: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", found)


def test_signatures_are_those_of_the_convention() -> None:
    # The example of the specification's own libraries.
    signed = signature(key_of(SECRET), "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize(
    "secret", ["", "whsec_", "whsec_YQ==", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_!!!!", f"{SECRET}é"]
)
def test_weak_secrets_are_refused(secret: str) -> None:
    with pytest.raises(UsageError, match="is not the secret of a webhook"):
        key_of(secret)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/", "https://", "https:///x", "https://a b/", "https://host:0/", "https://host:99999/", "file:///etc",
        "https://user:pw@host/", "https://host/#x", "https://host/\r\nX: y", "https://hést/", "http://host/",
        "https://host/" + "x" * 1000, "https://[::1/", "https://ho%00st/",
    ],
)  # fmt: skip
def test_urls_that_are_not_plain_https_are_refused(url: str) -> None:
    with pytest.raises(UsageError) as refused:
        parsed(url, allow_http=False)
    assert "pw" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.9.9.9", "::1", "169.254.169.254", "169.254.0.1", "fe80::1", "0.0.0.0", "::", "224.0.0.1",
        "ff02::1", "240.0.0.1", "255.255.255.255", "100.100.100.200", "168.63.129.16", "fd00:ec2::254",
        "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::",
        "fec0::1", "feff::1", "2001:db8::5efe:127.0.0.1", "2001:db8::200:5efe:169.254.169.254", "fe80::5efe:8.8.8.8",
        "2002:808:808::5efe:127.0.0.1", "2001:0:7f00:1::f7f7:f7f7", "2001:0:808:808::80ff:fffe", "::127.0.0.1",
    ],
)  # fmt: skip
def test_addresses_of_the_machine_and_of_its_cloud_are_refused(address: str) -> None:
    one = ipaddress.ip_address(address)
    assert why_refused(one, [])
    assert why_refused(one, [ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0")]) is None


@pytest.mark.parametrize(
    "address", ["192.0.2.7", "10.0.0.5", "192.168.1.1", "2001:db8::1", "fd12:3456::1", "2001:db8::5efe:10.0.0.5"]
)
def test_other_addresses_are_permitted(address: str) -> None:
    assert why_refused(ipaddress.ip_address(address), []) is None


def test_each_spelling_of_loopback_is_refused() -> None:
    for host in ("localhost", "127.1", "2130706433", "0x7f000001", "::1", "0"):
        with pytest.raises(ForbiddenAddressError, match="addresses are refused"):
            places_of(host, 80, [])


def test_a_delivery_connects_to_the_address_that_was_judged(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = socket.getaddrinfo, []

    def rebound(host: str, port: int, *arguments: Any, **more: Any) -> Any:
        asked.append(host)
        return real("127.0.0.1" if len(asked) == 1 else "169.254.169.254", port, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", rebound)
    url = receiver.url.replace("127.0.0.1", "hooks.example")
    Delivery(LOOPBACK).send(url, SECRET, "evt_1", b"{}")
    assert receiver.next().headers["host"].startswith("hooks.example:")
    assert asked == ["hooks.example"]


def test_a_delivery_is_signed_and_sent_once(receiver: Receiver) -> None:
    Delivery(LOOPBACK).send(receiver.url, SECRET, "evt_1", b'{"type": "x"}')
    got = receiver.next()
    assert (got.path, got.body, got.headers["webhook-id"]) == ("/hook?key=1", b'{"type": "x"}', "evt_1")
    signed = signature(key_of(SECRET), "evt_1", int(got.headers["webhook-timestamp"]), got.body)
    assert got.headers["webhook-signature"] == signed
    assert receiver.got.empty()


@pytest.mark.parametrize(
    ("status", "said"),
    [(500, "status 500"), (400, "status 400$"), (300, "status 300, a redirect"), (399, "status 399, a redirect")],
)
def test_other_answers_are_failures_and_redirects_are_not_followed(receiver: Receiver, status: int, said: str) -> None:
    receiver.answers.put(status)
    with pytest.raises(DeliveryError, match=f"^{said}$"):
        Delivery(LOOPBACK).send(receiver.url, SECRET, "evt_1", b"{}")
    receiver.next()
    assert receiver.got.empty()


def test_a_certificate_of_another_authority_is_refused(tmp_path: Path) -> None:
    files = tls_files(tmp_path)
    receiver = Receiver(files)
    try:
        with pytest.raises(DeliveryError, match=r"CERTIFICATE_VERIFY_FAILED|certificate verify failed"):
            Delivery(LOOPBACK).send(receiver.url, SECRET, "evt_1", b"{}")
        Delivery(LOOPBACK, files[1]).send(receiver.url, SECRET, "evt_2", b"{}")
        assert receiver.next().headers["webhook-id"] == "evt_2"
    finally:
        receiver.close()


def test_a_receiver_that_never_ends_its_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "DELIVER_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server, ExitStack() as stack:

        def drip() -> None:
            connection = stack.enter_context(server.accept()[0])
            connection.recv(1 << 16)
            try:
                while True:
                    connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            except OSError:
                pass

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        with pytest.raises(DeliveryError):
            Delivery(LOOPBACK).send(f"http://127.0.0.1:{server.getsockname()[1]}/", SECRET, "evt_1", b"{}")
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_addresses_that_hang_do_not_exceed_the_time_of_a_delivery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "CONNECT_S", 0.2)
    monkeypatch.setattr(delivery, "DELIVER_S", 0.3)
    with ExitStack() as stack:
        # They accept connections, but begin no TLS.
        first = stack.enter_context(socket.create_server(("127.0.1.1", 0)))
        port = first.getsockname()[1]
        others = [stack.enter_context(socket.create_server((f"127.0.1.{n}", port))) for n in (2, 3, 4)]
        named(monkeypatch, *(f"127.0.1.{n}" for n in (1, 2, 3, 4)))
        with pytest.raises(DeliveryError, match="timed out"):
            Delivery(LOOPBACK).send(f"https://hooks.example:{port}/", SECRET, "evt_1", b"{}")
        first.accept()[0].close()
        others[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            others[-1].accept()


def test_bytes_that_drip_do_not_exceed_a_deadline() -> None:
    here, there = socket.socketpair()
    with here, there:
        connection = TimedConnection(here, Deadline(0.3))
        ended = threading.Event()

        def drip() -> None:
            with suppress(OSError):
                while not ended.wait(0.05):
                    there.sendall(b"a")

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        try:
            with pytest.raises(TimeoutError):
                connection.makefile("rb").read()
        finally:
            ended.set()
            thread.join(PATIENCE)


def test_no_more_than_four_addresses_are_tried(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    url = receiver.url.replace("127.0.0.1", "hooks.example")
    named(monkeypatch, *(f"127.0.1.{n}" for n in (1, 2, 3)), "127.0.0.1")
    Delivery(LOOPBACK).send(url, SECRET, "evt_1", b"{}")
    named(monkeypatch, *(f"127.0.1.{n}" for n in (1, 2, 3, 4)), "127.0.0.1")
    with pytest.raises(DeliveryError, match="refused"):
        Delivery(LOOPBACK).send(url, SECRET, "evt_2", b"{}")
    assert receiver.next().headers["webhook-id"] == "evt_1"


# Webhooks


def test_each_event_of_the_nodes_own_records_arrives(receiver: Receiver, tmp_path: Path) -> None:
    with nodes(2, tmp_path) as (one, other), hooked(one) as hooks:
        add(one, receiver.url)
        other.write(Change("job", "j0", job("done")))
        one.body_when(other.id, "job", "j0", lambda _record: True)
        one.write(Change("job", "j1", job("queued")))
        one.write(Change("job", "j1", job("done", by={"user": "anna", "node": one.id})))
        got = receiver.next()
        said = json.loads(got.body)
        assert (said["type"], said["data"]["id"], said["data"]["by"]["user"]) == ("job.done", "j1", "anna")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", said["timestamp"])
        wait_until(lambda: hooks.counters["delivered"] == 1, PATIENCE, "a delivery")
        assert receiver.got.empty()


def test_a_failed_delivery_is_repeated_with_the_same_id(
    node: Node, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "SOONEST_MS", 20)
    receiver.answers.put(500)
    receiver.answers.put(302)
    with hooked(node) as hooks:
        add(node, receiver.url, "job.done")
        node.write(Change("job", "j1", job("done")))
        got = [receiver.next() for _ in range(3)]
        assert len({one.headers["webhook-id"] for one in got}) == len({one.body for one in got}) == 1
        wait_until(lambda: hooks.problem() is None, PATIENCE, "no problem")
        assert hooks.counters == {"delivered": 1, "failed": 2, "dropped": 0, "expired": 0}


def test_one_event_that_is_never_accepted_does_not_stop_the_others(
    node: Node, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "delay_ms", lambda _failures: 20)
    receiver.refused = b'"bad"'
    with hooked(node):
        add(node, receiver.url, "job.*")
        node.write(Change("job", "bad", job("done")), Change("job", "good", job("done")))
        assert [json.loads(receiver.next().body)["data"]["id"] for _ in range(2)] == ["bad", "good"]


def test_a_receiver_that_fails_is_left_alone_for_a_while(node: Node, receiver: Receiver) -> None:
    receiver.answers.put(500)
    with hooked(node) as hooks:
        hook = add(node, receiver.url)
        node.write(Change("job", "j1", job("done")))
        receiver.next()
        node.write(Change("job", "j2", job("done")))
        box = Outbox(str(node.directory))
        wait_until(lambda: box.waiting(hook) == 2, PATIENCE, "both wait")
        # The node looks at its queue again for this event of no webhook.
        node.write(Change("job", "j3", job("running")))
        wait_until(hooks._queue.empty, PATIENCE, "it is taken")
        box.close()
        assert receiver.got.empty()


def test_a_failing_webhook_is_a_problem_until_it_works(node: Node, receiver: Receiver) -> None:
    with hooked(node) as hooks:
        node.service.observe(hooks)
        receiver.answers.put(503)
        hook = add(node, receiver.url, "job.done")
        node.write(Change("job", "j1", job("done")))
        wait_until(lambda: hooks.problem() is not None, PATIENCE, "a problem")
        place = receiver.url.partition("/hook")[0]
        said = f"webhook {hook} ({place}): failed once, the last time with: status 503"
        assert [one.text for one in node.service.problems()] == [said]
        assert "key=1" not in said


def test_a_restart_sends_what_waited_and_what_was_committed_meanwhile(
    node: Node, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "delay_ms", lambda _failures: 50)
    receiver.answers.put(500)
    with hooked(node) as hooks:
        add(node, receiver.url, "job.*", "transaction.*")
        node.write(Change("job", "j1", job("done")))
        receiver.next()
        wait_until(lambda: hooks.counters["failed"] == 1, PATIENCE, "a failure")
    node.write(Change("job", "j2", job("queued")))
    node.write(Change("job", "j2", job("failed")))
    request = node.service.submit(node.id, "scan", {}, {"node": node.id, "user": "root"})
    assert node.service.response(request, PATIENCE)
    with hooked(node) as hooks:
        types = {json.loads(receiver.next().body)["type"] for _ in range(3)}
        assert types == {"job.done", "job.failed", "transaction.executed"}
        wait_until(lambda: hooks.counters["delivered"] == 3, PATIENCE, "three deliveries")
    with hooked(node) as hooks:
        node.write(Change("job", "j3", job("done")))
        assert json.loads(receiver.next().body)["data"]["id"] == "j3"
    assert receiver.got.empty()


def test_a_new_webhook_gets_nothing_from_before(node: Node, receiver: Receiver) -> None:
    node.write(Change("job", "j1", job("done")))
    add(node, receiver.url)
    node.write(Change("job", "j2", job("done")))
    with hooked(node):
        assert json.loads(receiver.next().body)["data"]["id"] == "j2"
    assert receiver.got.empty()


def test_a_removed_webhook_gets_nothing_and_leaves_nothing(node: Node, receiver: Receiver) -> None:
    receiver.answers.put(500)
    with hooked(node) as hooks:
        hook = add(node, receiver.url)
        node.write(Change("job", "j1", job("done")))
        receiver.next()
        wait_until(lambda: hooks.problem() is not None, PATIENCE, "a problem")
        node.write(Change("webhook", hook, None))
        wait_until(lambda: hooks.problem() is None, PATIENCE, "no problem")
        assert HookSecrets(str(node.directory)).all() == {}
    box = Outbox(str(node.directory))
    assert (box.hooks(), box.waiting(hook)) == ({}, 0)
    box.close()


def test_a_webhook_without_its_secret_is_a_problem(node: Node) -> None:
    with hooked(node) as hooks:
        node.write(Change("webhook", "0123456789ab", {"place": "https://hooks.example", "events": []}))
        node.write(Change("job", "j1", job("done")))
        wait_until(lambda: "its secret is not on this node" in (hooks.problem() or ""), PATIENCE, "a problem")


def test_the_queue_of_a_webhook_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MAX_WAITING", 3)
    box = Outbox(str(tmp_path))
    box.begin("h", 0)
    assert box.add("h", [(f"e{n}", b"", n) for n in range(5)], 5) == 2
    first = box.first("h")
    assert first
    assert (first.id, box.waiting("h"), box.hooks()) == ("e2", 3, {"h": 5})
    assert os.stat(tmp_path / outbox.FILE).st_mode & 0o777 == 0o600
    box.close()


def test_a_full_outbox_says_so_and_takes_events_again(tmp_path: Path) -> None:
    with closing(Outbox(str(tmp_path))) as box:
        box.begin("h", 0)
        (pages,) = box._connection.execute("PRAGMA page_count").fetchone()
        box._connection.execute(f"PRAGMA max_page_count = {pages + 5}")
        with pytest.raises(sqlite3.Error, match="database or disk is full"):
            box.add("h", [(f"e{n}", bytes(1000), n) for n in range(100)], 5)
        assert (box.waiting("h"), box.hooks()) == (0, {"h": 0})
        assert box.add("h", [("e0", b"", 0)], 5) == 0
        assert (box.waiting("h"), box.hooks()) == (1, {"h": 5})


def test_a_damaged_outbox_can_be_removed_while_the_node_runs(
    node: Node, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "SOONEST", 0.02)
    with hooked(node) as hooks:
        add(node, receiver.url, "job.done")
        node.write(Change("job", "j1", job("done")))
        receiver.next()
        wait_until(lambda: hooks.counters["delivered"] == 1, PATIENCE, "a delivery")
        path = node.directory / outbox.FILE
        with closing(sqlite3.connect(path)) as damaging:
            damaging.execute("DROP TABLE message")
        for file in path.parent.glob(f"{outbox.FILE}*"):
            file.unlink()
        node.write(Change("job", "j2", job("done")))
        assert [json.loads(receiver.next().body)["data"]["id"] for _ in range(2)] == ["j1", "j2"]
        wait_until(lambda: hooks.thread.problem() is None, PATIENCE, "it works")
    assert receiver.got.empty()


def test_an_event_is_given_up_after_a_day(node: Node, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "delay_ms", lambda _failures: 10)
    monkeypatch.setattr(webhooks, "GIVE_UP_MS", -1)
    receiver.answers.put(500)
    with hooked(node) as hooks:
        add(node, receiver.url)
        node.write(Change("job", "j1", job("done")))
        wait_until(lambda: hooks.counters["expired"] == 1, PATIENCE, "an event is given up")
        assert "1 events were not delivered" in (hooks.problem() or "")
        node.write(Change("job", "j2", job("done")))
        wait_until(lambda: hooks.problem() is None, PATIENCE, "no problem")


def test_delays_grow_to_an_hour_and_vary() -> None:
    for failures, middle in ((0, 5000), (3, 40_000), (30, 3_600_000)):
        found = {delay_ms(failures) for _ in range(50)}
        assert len(found) > 10
        assert middle * 0.5 <= min(found) <= max(found) <= middle * 1.5


# The API


@pytest.fixture
def api(node: Node) -> Iterator[Served]:
    config = NodeConfig(
        directory=str(node.directory), fleet="test", node=node.id, name="n01", webhook_networks=["127.0.0.0/8"]
    )
    save(config)
    with served(node) as one:
        yield one


def test_a_secret_is_shown_once_and_is_in_no_record(
    api: Served, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    made = api.local.call("POST", "/api/v1/webhooks", {"url": receiver.url, "allow_http": True}).content
    secret, hook = made["secret"], made["webhook"]
    key_of(secret)
    everything = "\n".join(api.local.lines("/api/v1/export")) + "\n".join(api.local.lines("/api/v1/audit"))
    listed = json.dumps([*api.local.everything("/api/v1/webhooks"), *api.local.everything("/api/v1/requests")])
    view, kinds = api.node.service.view(), ("webhook", "request", "transaction", "response")
    stored = b"".join(one.wire for kind in kinds for one in view.find(kind))
    for text in (secret, "key=1"):
        assert text not in everything + listed + caplog.text
        assert text.encode() not in stored
    assert receiver.url.partition("/hook")[0] in listed
    assert os.stat(api.node.directory / "webhooks.json").st_mode & 0o777 == 0o600
    assert api.local.call("POST", f"/api/v1/webhooks/n01/{hook}/test").content == {"ok": True, "problem": None}
    got = receiver.next()
    signed = signature(key_of(secret), got.headers["webhook-id"], int(got.headers["webhook-timestamp"]), got.body)
    assert (json.loads(got.body)["type"], got.headers["webhook-signature"]) == ("webhook.test", signed)
    api.local.call("DELETE", f"/api/v1/webhooks/n01/{hook}")
    with pytest.raises(VmconvError, match="is not here"):
        api.local.call("POST", f"/api/v1/webhooks/n01/{hook}/test")


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"url": "http://host/"}, "http is not encrypted"),
        ({"url": "https://host/", "events": ["job.finished"]}, "no event is called 'job.finished'"),
        ({"url": "https://host/", "secret": "whsec_YQ=="}, "is not the secret of a webhook"),
        ({"url": "https://host/", "colour": "red"}, "colour"),
    ],
)
def test_invalid_webhooks_are_refused_and_leave_nothing(api: Served, wish: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        api.local.call("POST", "/api/v1/webhooks", wish)
    assert "YQ" not in str(refused.value)
    assert not HookSecrets(str(api.node.directory)).all()


def test_a_webhook_that_the_owner_refuses_leaves_nothing(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(*_arguments: Any, **_more: Any) -> Answer:
        assert HookSecrets(str(api.node.directory)).all()
        return Answer(request="r", requester="n", target="n", state="refused", ok=False, reason="no")

    monkeypatch.setattr("vmconv_fleet.api.webhooks.ask", ask)
    made = api.local.call("POST", "/api/v1/webhooks", {"url": "https://host/"}).content
    assert made.get("secret") is None
    assert not HookSecrets(str(api.node.directory)).all()


def test_events_of_long_ago_are_not_sent(node: Node, receiver: Receiver) -> None:
    long_ago = wall_ms() - 2 * webhooks.OLDEST_MS
    with hooked(node) as hooks:
        hook = add(node, receiver.url)
        wait_until(lambda: hook in hooks._complete, PATIENCE, "the node knows the webhook")
        old = record("job", job("done"), 1 << 40, id="old")._replace(owner=node.id, clock=long_ago << 16)
        hooks._queue.put(old)
        node.write(Change("job", "new", job("done")))
        assert json.loads(receiver.next().body)["data"]["id"] == "new"
    assert receiver.got.empty()


def test_webhooks_are_for_administrators(api: Served) -> None:
    with api.client("operator") as client:
        for method, path in (("POST", "/api/v1/webhooks"), ("POST", "/api/v1/webhooks/n01/0123456789ab/test")):
            with pytest.raises(AccessError, match="needs the role admin"):
                client.call(method, path, {"url": "https://host/"})
        assert client.get("/api/v1/webhooks")["items"] == []
    assert not HookSecrets(str(api.node.directory)).all()


def test_a_test_does_not_reach_the_machine_itself(api: Served, receiver: Receiver) -> None:
    wish = {"url": receiver.url, "allow_http": True}
    hook = api.local.call("POST", "/api/v1/webhooks", wish).content["webhook"]
    config = load(str(api.node.directory))
    save(NodeConfig(**{**vars(config), "webhook_networks": []}))
    answer = api.local.call("POST", f"/api/v1/webhooks/n01/{hook}/test").content
    assert not answer["ok"]
    assert "127.0.0.1 is 127.0.0.1: loopback addresses are refused" in answer["problem"]
    assert receiver.got.empty()


# Syslog

_RFC5424 = re.compile(
    rb"<(?P<pri>\d{1,3})>1 (?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (?P<host>[!-~]{1,255})"
    rb" (?P<app>[!-~]{1,48}) (?P<proc>[!-~]{1,128}) (?P<id>[!-~]{1,32}) - (?P<text>[ -~]+)"
)


def event(**data: Any) -> Event:
    return Event("evt_1", "job.failed", 1_800_000_000_123, {"id": "j1", **data}, 1)


@pytest.mark.parametrize(
    "name", ["a\nb", "a\r\n<13>1 - forged - - - -", "\x00\x1b[2J\x7f", "\u2028\u202e\x85", "ü", "\ud800", "x" * 5000]
)
def test_no_name_forges_a_line(name: str) -> None:
    found = _RFC5424.fullmatch(message(event(source=name), f"n01{name}"))
    assert found
    assert (found["pri"], found["time"], found["id"]) == (b"28", b"2027-01-15T08:00:00.123Z", b"job.failed")
    said = json.loads(found["text"])
    assert said.get("source", name) == name
    assert len(found[0]) <= 2048


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("/dev/log", Destination("/dev/log", socket.SOCK_DGRAM)),
        ("udp://log.example", Destination(("log.example", 514), socket.SOCK_DGRAM)),
        ("tcp://[2001:db8::1]:601", Destination(("2001:db8::1", 601), socket.SOCK_STREAM)),
    ],
)
def test_destinations(text: str, where: Destination) -> None:
    assert destination(text) == where


@pytest.mark.parametrize(
    "text", ["log.example", "tls://host", "udp://", "udp://host:0", "udp://host:70000", "udp://a/b"]
)
def test_other_destinations_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not /dev/log"):
        destination(text)


@contextmanager
def logging_to(node: Node, where: Destination) -> Iterator[Syslog]:
    made = Syslog(node.service, where, "n01")
    made.start()
    try:
        yield made
    finally:
        made.stop()
        assert not made.thread.is_alive()


def test_events_arrive_on_a_unix_socket_and_over_udp(node: Node, tmp_path: Path) -> None:
    unix = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    unix.bind(str(tmp_path / "log"))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    wheres = [destination(str(tmp_path / "log")), destination(f"udp://127.0.0.1:{udp.getsockname()[1]}")]
    with unix, udp, logging_to(node, wheres[0]), logging_to(node, wheres[1]):
        node.write(Change("job", "j1", job("done", source="a\nb")))
        for one in (unix, udp):
            one.settimeout(PATIENCE)
            found = _RFC5424.fullmatch(one.recv(1 << 16))
            assert found
            assert json.loads(found["text"])["source"] == "a\nb"


def test_events_arrive_over_tcp_and_again_after_the_receiver_was_gone(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmconv_fleet.supervision.SOONEST", 0.01)
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    with logging_to(node, destination(f"tcp://127.0.0.1:{port}")) as syslog:
        node.write(Change("job", "j1", job("done")))
        assert frames(server, 1) == ["j1"]
        server.close()
        # What TCP had taken when the receiver went is lost; so the next is sent until it cannot be.
        number = 1
        while syslog.thread.problem() is None:
            number += 1
            node.write(Change("job", f"j{number}", job("done")))
        assert "cannot" not in str(syslog.thread.problem())
        node.write(Change("job", "last", job("done")))
        with socket.create_server(("127.0.0.1", port)) as again:
            assert "last" in frames(again, None)


def frames(server: socket.socket, count: int | None) -> list[str]:
    """Returns the ids of the jobs in this number of messages, or up to `last`."""
    server.settimeout(PATIENCE)
    with server.accept()[0] as connection, connection.makefile("rb") as stream:
        found: list[str] = []
        while len(found) != count and found[-1:] != ["last"]:
            length = b""
            while (one := stream.read(1)) != b" ":
                length += one
            match = _RFC5424.fullmatch(stream.read(int(length)))
            assert match
            found.append(json.loads(match["text"])["id"])
        return found


def test_messages_that_wait_are_bounded(node: Node, tmp_path: Path) -> None:
    syslog = Syslog(node.service, destination(str(tmp_path / "nobody")), "n01")
    many: Sequence[Record] = [record("job", job("done"), seq, id=f"j{seq}") for seq in range(1010)]
    syslog._notice([one._replace(owner=node.id) for one in many])
    assert syslog.counters == {"sent": 0, "dropped": 10}
    assert "10 messages were dropped" in (syslog.problem() or "")
