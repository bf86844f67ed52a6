"""The client, or a server of the store, is killed at any request: nothing is half visible, and all is collected."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.containers import Container, collected, let_time_pass, publish
from support.killing import killed_at
from support.swift import Swift
from vmconv.errors import BackendError
from vmconv_swift.client import Client
from vmconv_swift.cloud import cloud_of

Hook = Callable[[str, bool], None]
"""Called with the URL of a request that changes something, before it is made and after it."""


def hooked(hook: Hook) -> Callable[..., Any]:
    """Returns what replaces `Client._request`."""
    request = Client._request

    def replaced(self: Client, method: str, url: str, *arguments: Any, **named: Any) -> Any:
        changes = method not in ("GET", "HEAD")
        if changes:
            hook(url, False)
        answer = request(self, method, url, *arguments, **named)
        if changes:
            hook(url, True)
        return answer

    return replaced


def count(reached: Callable[[], None]) -> None:
    """Calls a function before each request that changes something, and after it."""
    # Connections of the parent are not for the child.
    cloud_of.cache_clear()
    Client._request = hooked(lambda *_: reached())  # type: ignore[method-assign]


def test_a_client_that_is_killed_leaves_nothing_half_made(container: Container, disk: Path) -> None:
    step, seen = 0, 0
    # Each run finds what those before have left; the first sends the payload.
    while killed_at(step, lambda: publish("-q", disk, container.url("disk.vmdk")), count):
        names = container.names()
        assert names in ([], ["disk.vmdk"])
        if names:
            seen += 1
            assert vmconv.compare(str(disk), container.url("disk.vmdk"))
            assert container.swift.request("DELETE", f"/{container.name}/disk.vmdk").status == 204
        step += 1
    assert step > 10
    # Killed after the object appeared, before the candidate was removed, and after that.
    assert seen == 3
    assert container.names() == ["disk.vmdk"]
    let_time_pass()
    assert collected(container) == 0
    own = container.names(container.own)
    assert sum(name.startswith("records/") for name in own) == 1
    assert not any(name.startswith("candidates/") for name in own)
    assert vmconv.compare(str(disk), container.url("disk.vmdk"))
    container.swift.request("DELETE", f"/{container.name}/disk.vmdk")
    let_time_pass()
    assert collected(container) == 0
    assert container.names(container.own) == []


@pytest.mark.parametrize(
    ("server", "place"),
    [
        ("object", "/payload/"),
        ("object", "/candidates/"),
        ("object", "disk.vhdx?"),
        ("proxy", "disk.vhdx?"),
        ("container", "/metadata/"),
    ],
)
def test_a_server_that_is_killed_leaves_nothing_half_made(
    container: Container, disk: Path, swift: Swift, server: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(url: str, done: bool) -> None:
        if place in url and not done and swift.is_running(server):
            swift.kill(server)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Client, "_request", hooked(kill))
            status = publish("-q", disk, container.url("disk.vhdx"))
        assert not swift.is_running(server)
    finally:
        if not swift.is_running(server):
            swift.start(server)
    # An object server takes what a container server will list later.
    assert status == 1 or server == "container"
    if status:
        assert swift.request("GET", f"/{container.name}/disk.vhdx").status == 404
        assert publish("-q", disk, container.url("disk.vhdx")) == 0
    assert vmconv.compare(str(disk), container.url("disk.vhdx"))


def test_an_answer_that_is_lost_is_no_failure(
    container: Container, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object was made, and the client does not know: it asks again, and finds its own object."""
    answer = Client._answer
    lost: list[str] = []

    def losing(self: Client, method: str, target: str, *arguments: Any) -> Any:
        found = answer(self, method, target, *arguments)
        if target.endswith("disk.vmdk?multipart-manifest=put") and not lost:
            lost.append(target)
            raise ConnectionResetError("lost")
        return found

    monkeypatch.setattr(Client, "_answer", losing)
    assert publish(disk, container.url("disk.vmdk")) == 0
    assert len(lost) == 1
    assert vmconv.compare(str(disk), container.url("disk.vmdk"))


def test_two_publications_at_once_make_one_object(
    container: Container, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another publication of another disk takes the name just before."""
    made: list[bytes] = []

    def other(url: str, done: bool) -> None:
        if url.endswith("disk.vmdk?multipart-manifest=put") and not made:
            made.append(b"other")
            container.put("disk.vmdk", made[0])

    monkeypatch.setattr(Client, "_request", hooked(other))
    assert publish(disk, container.url("disk.vmdk")) == 1
    assert "disk.vmdk: appeared while it was being made" in capsys.readouterr().err
    assert container.get("disk.vmdk") == b"other"
    assert not any(name.startswith(("records/", "candidates/")) for name in container.names(container.own))


def test_the_same_object_of_another_publication_is_not_taken_back(
    container: Container, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It appears while the request of this one fails; a qcow2 of one disk has the same ETag each time."""
    request = Client._request

    def failing(self: Client, method: str, url: str, *arguments: Any, **named: Any) -> Any:
        if url.endswith("/disk.qcow2?multipart-manifest=put"):
            monkeypatch.setattr(Client, "_request", request)
            assert publish(disk, container.url("disk.qcow2")) == 0
            raise BackendError("no answer")
        return request(self, method, url, *arguments, **named)

    monkeypatch.setattr(Client, "_request", failing)
    assert publish(disk, container.url("disk.qcow2")) == 1
    let_time_pass()
    assert collected(container) == 0
    assert vmconv.compare(str(disk), container.url("disk.qcow2"))


@pytest.mark.parametrize("force", [False, True])
def test_what_may_have_appeared_keeps_its_record(
    container: Container, disk: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    """The second object of two cannot be made, and the first cannot be taken back."""
    request = Client._request

    def failing(self: Client, method: str, url: str, *arguments: Any, **named: Any) -> Any:
        if url.endswith("two.vhdx?multipart-manifest=put") or (method == "DELETE" and url.endswith("one.vmdk")):
            raise BackendError("the store is gone")
        return request(self, method, url, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Client, "_request", failing)
        given = ["--force"] if force else []
        assert publish(*given, disk, container.url("one.vmdk"), container.url("two.vhdx")) == 1
    assert container.names() == ["one.vmdk"]
    let_time_pass()
    assert collected(container) == 0
    assert sum(name.startswith("records/") for name in container.names(container.own)) == 1
    assert vmconv.compare(str(disk), container.url("one.vmdk"))


def test_what_appears_after_its_publication_has_failed_keeps_its_payload(
    container: Container, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store takes longer for the last request than the client waits."""
    request = Client._request
    late: list[Callable[[], Any]] = []

    def slow(self: Client, method: str, url: str, *arguments: Any, **named: Any) -> Any:
        if url.endswith("/disk.vmdk?multipart-manifest=put"):
            late.append(partial(request, self, method, url, *arguments, **named))
            raise BackendError("no answer")
        return request(self, method, url, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Client, "_request", slow)
        assert publish(disk, container.url("disk.vmdk")) == 1
    (ending,) = late
    ending()
    let_time_pass()
    assert collected(container) == 0
    assert vmconv.compare(str(disk), container.url("disk.vmdk"))


def test_of_several_objects_none_stays_if_one_cannot_be_made(
    container: Container, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(url: str, done: bool) -> None:
        if url.endswith("two.vhdx?multipart-manifest=put") and not done:
            container.put("two.vhdx", b"other")

    monkeypatch.setattr(Client, "_request", hooked(other))
    assert publish(disk, container.url("one.vmdk"), container.url("two.vhdx")) == 1
    assert container.names() == ["two.vhdx"]
    assert not any(name.startswith("records/") for name in container.names(container.own))
