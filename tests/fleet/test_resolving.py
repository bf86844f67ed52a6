"""Names whose look-up is not answered: callers wait for a time, and few threads are left behind."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vmconv_fleet import resolving
from vmconv_fleet.config import NodeConfig
from vmconv_fleet.errors import FleetError
from vmconv_fleet.links import probing
from vmconv_fleet.links.probing import probe
from vmconv_fleet.notices import delivery, syslog
from vmconv_fleet.notices.delivery import Delivery, new_secret
from vmconv_fleet.oidc import fetching
from vmconv_fleet.oidc.fetching import Fetcher
from vmconv_fleet.resolving import Resolver, connected
from vmconv_fleet.testing import Lab, wait_until
from vmconv_fleet.trust import joining

PLACE = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 1))


class NameServer:
    """Answers at once, but not for names that begin with "silent"."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers = threading.Event()

    def __call__(self, host: str, *_arguments: Any, **_more: Any) -> list[Any]:
        self.asked.append(host)
        if host.startswith("silent"):
            self.answers.wait()
        if host == "unknown":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [PLACE]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[NameServer]:
    made = NameServer()
    monkeypatch.setattr(socket, "getaddrinfo", made)
    yield made
    made.answers.set()


def test_an_answer_is_returned_and_an_error_raised(server: NameServer) -> None:
    resolver = Resolver()
    assert resolver.addresses("hooks.example", 1) == [PLACE]
    with pytest.raises(socket.gaierror, match="not known"):
        resolver.addresses("unknown", 1)
    wait_until(lambda: not resolver._running, 60, "both look-ups have ended")


def test_a_look_up_that_is_not_answered_is_not_repeated(server: NameServer) -> None:
    resolver = Resolver()
    for _ in range(3):
        with pytest.raises(TimeoutError, match="the address of silent1 is not found in time"):
            resolver.addresses("silent1", 1, within=0.01)
    assert server.asked == ["silent1"]
    assert resolver.addresses("hooks.example", 1) == [PLACE]
    server.answers.set()
    wait_until(lambda: not resolver._running, 60, "the look-up has ended")
    assert resolver.addresses("silent1", 1) == [PLACE]


def test_those_who_come_later_do_not_wait_longer(server: NameServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that has not been answered in `LOOK_UP_S` holds nobody up any more."""
    monkeypatch.setattr(resolving, "LOOK_UP_S", 0.0)
    with pytest.raises(TimeoutError):
        Resolver().addresses("silent1", 1, within=1 << 20)


def test_the_look_ups_of_a_resolver_are_limited(server: NameServer) -> None:
    resolver = Resolver()
    for number in range(resolving.MAX_LOOK_UPS):
        with pytest.raises(TimeoutError):
            resolver.addresses(f"silent{number}", 1, within=0)
    with pytest.raises(OSError, match="16 other names are not answered"):
        resolver.addresses("hooks.example", 1)
    assert Resolver().addresses("hooks.example", 1) == [PLACE]


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "fe80::1%lo"])
def test_an_address_needs_no_look_up(server: NameServer, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "Thread", None)
    assert Resolver().addresses(host, 1) == [PLACE]


def test_a_node_without_threads_says_so(server: NameServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any, **_more: Any) -> None:
        raise RuntimeError("can't start new thread")

    resolver = Resolver()
    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(OSError, match="not looked up: can't start"):
        resolver.addresses("hooks.example", 1)
    assert not resolver._running


def test_the_first_address_that_answers_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.1.2", 0)) as listening:
        port = listening.getsockname()[1]
        resolver = Resolver()
        found = [(*PLACE[:4], (f"127.0.1.{n}", port)) for n in (1, 2)]
        monkeypatch.setattr(resolver, "addresses", lambda *_arguments, **_more: found)
        with connected(resolver, "x", port, 5) as made:
            assert made.getpeername() == ("127.0.1.2", port)
    with pytest.raises(ConnectionRefusedError):
        connected(resolver, "x", port, 5)


def _deliver(_config: NodeConfig) -> None:
    Delivery().send("https://silent.example/", new_secret(), "evt_1", b"{}")


def _fetch(_config: NodeConfig) -> None:
    Fetcher("").get("https://silent.example/")


def _log(_config: NodeConfig) -> None:
    syslog._connected(syslog.Destination(("silent.example", 514), socket.SOCK_DGRAM))


def _log_by_tcp(_config: NodeConfig) -> None:
    syslog._connected(syslog.Destination(("silent.example", 514), socket.SOCK_STREAM))


def _probe(config: NodeConfig) -> None:
    found = probe(config, "silent.example:7447")
    raise OSError(found.text)


def _ask_authority(_config: NodeConfig) -> None:
    with joining._connected("silent.example:7448", ssl.create_default_context()):
        pass


@pytest.mark.parametrize("act", [_deliver, _fetch, _log, _log_by_tcp, _probe, _ask_authority])
def test_nobody_waits_for_a_name_server_without_end(
    act: Callable[[NodeConfig], None], server: NameServer, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = lab.add()
    for module, name in (
        (delivery, "CONNECT_S"),
        (fetching, "CONNECT_S"),
        (syslog, "_TIMEOUT_S"),
        (probing, "TIMEOUT"),
        (joining, "TIMEOUT"),
    ):
        monkeypatch.setattr(module, name, 0.01)
    with pytest.raises((OSError, FleetError), match=r"silent.example is not found in time"):
        act(config)
    assert server.asked == ["silent.example"]
    server.answers.set()
