"""Requests to stores that are slow, answer early, answer in part, or close connections."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread

import pytest

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
    with scripted_server(answer) as port:
        monkeypatch.setenv("OS_STORAGE_URL", f"http://127.0.0.1:{port}/v1/AUTH_x")
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
