"""Requests to stores that are slow, answer early, answer in part, or close connections."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import md5
from threading import Barrier, Thread
from typing import Any

import pytest
from keystoneauth1.exceptions import ServiceUnavailable

from support.scripted import Asked, scripted_server
from vmconv.plugin import AccessError, ReadError, VmconvError
from vmconv_swift import client as requests
from vmconv_swift import cloud as clouds
from vmconv_swift.client import Client
from vmconv_swift.cloud import Cloud
from vmconv_swift.names import ObjectName

MIB = 1 << 20
WHERE = ObjectName("c", "o")


@contextmanager
def store(answer: Callable[[Asked], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """Yields a client of a store that answers so."""
    with scripted_server(answer) as port, client_at(f"http://127.0.0.1:{port}/v1/AUTH_x", monkeypatch) as client:
        yield client


@contextmanager
def client_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setenv("OS_STORAGE_URL", endpoint)
    monkeypatch.setenv("OS_AUTH_TOKEN", "token")
    cloud = Cloud("-")
    yield Client(cloud)
    cloud.close()


def test_a_slow_line_is_no_silent_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time-out is for what the store takes next, not for all of the body."""
    monkeypatch.setattr(clouds, "SILENCE", 1.5)
    with store(lambda asked: asked.say(201, ETag=asked.take(0.05)), monkeypatch) as client:
        begin = time.monotonic()
        client.put(WHERE, bytes(16 * MIB), payload=True)
        assert time.monotonic() - begin > 1.5
        assert client.requests == 1


def test_an_answer_before_the_body_has_been_sent_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token may expire while payload is read; the store does not take a body that nobody signed."""
    tokens = ["old", "new"]

    def early(asked: Asked) -> None:
        if asked.headers["X-Auth-Token"] == "old":
            asked.close_connection = True
            asked.say(401, Connection="close")
        else:
            asked.say(201, ETag=asked.take())

    monkeypatch.setattr(Cloud, "token", lambda _: tokens[0])
    monkeypatch.setattr(Cloud, "renew", lambda _: tokens.pop(0))
    with store(early, monkeypatch) as client:
        client.put(WHERE, bytes(16 * MIB), payload=True)
        assert (client.requests, tokens) == (2, ["new"])


def test_a_token_that_is_refused_is_renewed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cloud, "renew", lambda _: True)
    with store(lambda asked: asked.say(401), monkeypatch) as client:
        with pytest.raises(AccessError, match="401"):
            client.read(WHERE, MIB)
        assert client.requests == 2


@pytest.mark.parametrize("chunked", [False, True])
def test_an_answer_that_ends_too_early_is_none(monkeypatch: pytest.MonkeyPatch, chunked: bool) -> None:
    def cut(asked: Asked) -> None:
        asked.close_connection = True
        if chunked:
            asked.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\n" + bytes(50))
        else:
            asked.say(200, bytes(50), length=100)

    with store(cut, monkeypatch) as client:
        with pytest.raises(ReadError, match="o: cannot be read: "):
            client.read(WHERE, MIB)
        assert client.requests == requests.TRIES


def test_connections_that_the_store_has_closed_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would be a failed request otherwise, and a publication makes one after the other."""

    def once(asked: Asked) -> None:
        time.sleep(0.1)
        if asked.command == "GET":
            asked.say(200, b"content")
        else:
            asked.say(201, ETag=asked.take())
        # Closed without saying so, as when it is restarted.
        asked.close_connection = True

    with store(once, monkeypatch) as client:
        threads = [Thread(target=client.read, args=(WHERE, MIB)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        time.sleep(0.2)
        client.put(WHERE, bytes(MIB))
        assert client.requests == 9


@pytest.mark.parametrize("request_", [Client.touch, Client.delete])
def test_a_page_instead_of_an_answer_is_an_error(
    request_: Callable[[Client, ObjectName], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something between here and the store answers 200 to everything."""
    with (
        store(lambda asked: asked.say(200, b"<html>"), monkeypatch) as client,
        pytest.raises(VmconvError, match="the store answers 200"),
    ):
        request_(client, WHERE)


CHUNKED = b"Transfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    "rest",
    [
        b"Content-Length: 3\r\nContent-Length: 7\r\n\r\ncontent",
        b"Content-Length: 0_3\r\n\r\ncontent",
        b"Transfer-Encoding: gzip, chunked\r\n\r\n7\r\ncontent\r\n0\r\n\r\n",
        CHUNKED + b"\r\n-1\r\ncontent",
        CHUNKED + b"\r\n-5\r\ncontent",
    ],
    ids=["two lengths", "no number", "coding", "chunk of -1", "chunk of -5"],
)
def test_an_answer_without_a_clear_end_is_none(rest: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def unclear(asked: Asked) -> None:
        asked.wfile.write(b"HTTP/1.1 200 OK\r\n" + rest)

    monkeypatch.setattr(clouds, "SILENCE", 1)
    with store(unclear, monkeypatch) as client:
        # It is not waited for, either.
        with pytest.raises(ReadError, match=r"o: cannot be read: (IncompleteRead|the length|the server sends)"):
            client.read(WHERE, MIB)
        assert client.requests == requests.TRIES


def test_a_connection_whose_answer_had_two_lengths_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = []

    def both(asked: Asked) -> None:
        clients.append(asked.client_address)
        asked.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n" + CHUNKED + b"\r\n7\r\ncontent\r\n0\r\n\r\n")

    with store(both, monkeypatch) as client:
        assert [client.read(WHERE, MIB) for _ in range(2)] == [b"content"] * 2
        assert len(set(clients)) == 2


def test_answers_before_the_answer_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come from what is between here and the store; the next request would get the answer to this one."""

    def early(asked: Asked) -> None:
        asked.wfile.write(b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")
        time.sleep(0.1)
        asked.say(200, asked.path.encode())

    with store(early, monkeypatch) as client:
        for name in ("a", "b"):
            assert client.read(ObjectName("c", name), MIB) == f"/v1/AUTH_x/c/{name}".encode()
        assert client.requests == 2


def test_no_content_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(asked: Asked) -> None:
        asked.wfile.write(b"HTTP/1.1 204 No\r\n" + CHUNKED + b"\r\n")

    monkeypatch.setattr(clouds, "SILENCE", 0.5)
    with store(nothing, monkeypatch) as client:
        assert client.delete(WHERE)
        assert client.requests == 1


@pytest.mark.parametrize("token", ["secret\r\nX-Other: 1", "secret\n", "secr\u0119t"])
def test_a_token_that_is_no_header_is_an_error(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with store(lambda asked: asked.say(200), monkeypatch) as client:
        monkeypatch.setenv("OS_AUTH_TOKEN", token)
        with pytest.raises(AccessError, match="token") as caught:
            Client(Cloud("-")).read(WHERE, MIB)
        assert "secr" not in str(caught.value)
        assert client.requests == 0


class Session:
    """A session as keystoneauth has it: nothing is left to forget once a token has been forgotten."""

    def __init__(self) -> None:
        self.token: str | None = "old"
        self.failures: list[Exception] = []

    def get_token(self) -> str:
        if self.token is None and self.failures:
            raise self.failures.pop()
        self.token = self.token or "new"
        return self.token

    def invalidate(self) -> bool:
        had, self.token = self.token, None
        return had is not None


def signed_in(client: Client, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    access: Any = client.cloud._access
    monkeypatch.setattr(client.cloud, "_access", access._replace(session=session))


def of_the_new_token(asked: Asked) -> None:
    if asked.headers["X-Auth-Token"] == "new":
        asked.say(200, b"content")
    else:
        asked.say(401)


def test_keystone_may_fail_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session()
    session.failures = [ServiceUnavailable()]
    with store(of_the_new_token, monkeypatch) as client:
        signed_in(client, session, monkeypatch)
        assert client.read(WHERE, MIB) == b"content"


def test_a_token_expires_for_all_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = 16
    all_asked, all_refused = Barrier(threads), Barrier(threads)

    def together(asked: Asked) -> None:
        if asked.headers["X-Auth-Token"] == "old":
            all_asked.wait(10)
        of_the_new_token(asked)

    class Forgetting(Session):
        def invalidate(self) -> bool:
            had = super().invalidate()
            # Nobody has a new token yet.
            all_refused.wait(10)
            return had

    with store(together, monkeypatch) as client:
        signed_in(client, Forgetting(), monkeypatch)
        with ThreadPoolExecutor(threads) as pool:
            assert list(pool.map(lambda _: client.read(WHERE, MIB), range(threads))) == [b"content"] * threads


def test_a_proxy_does_not_answer_for_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers, and resets the connection, before it is asked for a tunnel."""
    body = b"content"
    forged = b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\nETag: %s\r\n\r\n" % md5(body).hexdigest().encode()
    connect = socket.create_connection

    def late(*given: Any, **named: Any) -> socket.socket:
        made = connect(*given, **named)
        time.sleep(0.2)
        return made

    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def answer() -> None:
            for _ in range(requests.TRIES):
                accepted = proxy.accept()[0]
                accepted.sendall(forged)
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                accepted.close()

        Thread(target=answer, daemon=True).start()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.setattr(socket, "create_connection", late)
        with client_at("https://store.invalid/v1/AUTH_x", monkeypatch) as client, pytest.raises(VmconvError):
            client.put(WHERE, body)


@pytest.mark.parametrize("bypass", ["127.0.0.1:{port}", "10.0.0.0/8, 127.0.0.0/8", "127.0.0.1"])
def test_no_proxy_gets_the_token(bypass: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with store(lambda asked: asked.say(200, b"content"), monkeypatch) as client:
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        monkeypatch.setenv("no_proxy", bypass.format(port=client.cloud.place.port))
        assert client.read(WHERE, MIB) == b"content"


def test_names_are_sent_as_they_were_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for = []

    def note(asked: Asked) -> None:
        asked_for.append(asked.path)
        asked.say(200, b"content")

    with (
        scripted_server(note) as port,
        client_at(f"http://127.0.0.1:{port}/v1/AUTH_%C3%A4%2Fb//", monkeypatch) as client,
    ):
        for name in ("a%2Fb", "a b+~", "\u00e4?#", "a//b"):
            client.read(ObjectName("c d", name), MIB)
    begin = "/v1/AUTH_%C3%A4%2Fb/c%20d/"
    assert asked_for == [begin + name for name in ("a%252Fb", "a%20b%2B~", "%C3%A4%3F%23", "a//b")]


def test_a_client_that_was_closed_keeps_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = []

    def note(asked: Asked) -> None:
        clients.append(asked.client_address)
        asked.say(200, b"content")

    with store(note, monkeypatch) as client:
        client.cloud.close()
        assert [client.read(WHERE, MIB) for _ in range(2)] == [b"content"] * 2
        assert len(set(clients)) == 2
