"""What is removed, and what is not: publications, their payload, and what interrupted runs have left."""

from __future__ import annotations

import argparse
import json
import threading
from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.containers import MIB, Container, collected, let_time_pass, publish, unpublish
from support.swift import CLOUD
from vmconv_swift import unpublishing
from vmconv_swift.client import Client
from vmconv_swift.cloud import cloud_of
from vmconv_swift.names import ObjectName
from vmconv_swift.records import Unused, remove, unused


def test_payload_stays_until_no_publication_uses_it(published: Container, disk: Path) -> None:
    assert publish(published.url("disk.qcow2"), published.url("copy.vmdk")) == 0
    payload = published.segments()
    assert unpublish(published.url("disk.qcow2")) == 0
    assert published.names() == ["copy.vmdk"]
    let_time_pass()
    assert collected(published) == 0
    assert published.segments() == payload
    assert vmconv.compare(str(disk), published.url("copy.vmdk"))
    assert unpublish(published.url("copy.vmdk")) == 0
    let_time_pass()
    assert collected(published) == 0
    assert published.names(published.own) == []


def test_what_is_young_stays(published: Container) -> None:
    assert unpublish(published.url("disk.qcow2")) == 0
    before = published.names(published.own)
    let_time_pass()
    assert unpublish("--unused", f"swift://{CLOUD}/{published.name}") == 0
    assert unpublish("--unused", "--older-than=1h", f"swift://{CLOUD}/{published.name}") == 0
    assert published.names(published.own) == before


def test_what_would_be_removed_is_shown(published: Container, capsys: pytest.CaptureFixture[str]) -> None:
    assert unpublish("--dry-run", published.url("disk.qcow2")) == 0
    assert published.names() == ["disk.qcow2"]
    assert unpublish(published.url("disk.qcow2")) == 0
    before = published.names(published.own)
    let_time_pass()
    capsys.readouterr()
    assert collected(published, "--dry-run", "--output=json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["name"] for row in rows} == {f"swift://{CLOUD}/{published.own}/{name}" for name in before}
    assert not any(row["removed"] for row in rows)
    assert published.names(published.own) == before


def test_only_publications_are_unpublished(published: Container, capsys: pytest.CaptureFixture[str]) -> None:
    published.put("theirs.qcow2", b"x")
    assert unpublish(published.url("theirs.qcow2")) == 1
    assert "vmconv publish has not made it" in capsys.readouterr().err
    published.put("disk.qcow2", b"x")
    assert unpublish(published.url("disk.qcow2")) == 1
    assert unpublish(published.url("missing.qcow2")) == 1
    assert published.names() == ["disk.qcow2", "theirs.qcow2"]


def test_what_replaced_a_publication_needs_none_of_it(published: Container) -> None:
    published.put("disk.qcow2", b"x")
    let_time_pass()
    assert collected(published) == 0
    assert published.names(published.own) == []


def test_a_replaced_publication_is_garbage(published: Container, disk: Path) -> None:
    assert publish("--force", "-o", "cluster_size=128K", disk, published.url("disk.qcow2")) == 0
    let_time_pass()
    assert collected(published) == 0
    assert sum(name.startswith("records/") for name in published.names(published.own)) == 1
    assert vmconv.compare(str(disk), published.url("disk.qcow2"))


def test_a_record_that_cannot_be_read_stops_the_removal(published: Container) -> None:
    assert unpublish(published.url("disk.qcow2")) == 0
    published.put("records/x/y", b"{}", container=published.own)
    before = published.names(published.own)
    let_time_pass()
    assert collected(published) == 1
    assert published.names(published.own) == before


def test_only_what_publications_make_is_removed(published: Container) -> None:
    """Somebody else has put objects into vmconv's container, one with a name that leads to another container."""
    theirs = [f"../{published.name}/precious.raw", "mine.txt", "notes/owner", "payload/short", "payload/" + "x" * 64]
    for name in ("precious.raw", "precious2.raw"):
        published.put(name, b"x")
    for name in theirs:
        published.put(name, b"theirs", container=published.own)
    assert unpublish(published.url("disk.qcow2")) == 0
    let_time_pass()
    assert collected(published) == 0
    assert published.names() == ["precious.raw", "precious2.raw"]
    assert published.names(published.own) == theirs
    # A record that leads elsewhere says nothing about what is used.
    published.put(f"records/../../{published.name}/precious.raw", b"x", container=published.own)
    let_time_pass()
    assert collected(published) == 1
    assert published.names() == ["precious.raw", "precious2.raw"]


@pytest.mark.parametrize("given", [[], ["--adopt"]], ids=["copied", "adopted"])
def test_records_are_no_payload(published: Container, tmp_path: Path, given: list[str]) -> None:
    """Somebody has made a disk of what vmconv removes or replaces: a record of nothing."""
    (real,) = [name for name in published.names(published.own) if name.startswith("records/")]
    body = json.dumps({"vmconv": 1, "target": "/none/none", "etag": None, "uses": []}).encode().ljust(MIB)
    name = f"{real}0"
    published.put(name, body, container=published.own)
    rows = json.dumps([{"path": f"/{published.own}/{name}"}]).encode()
    path = f"/{published.name}/strange.raw?multipart-manifest=put"
    assert published.swift.request("PUT", path, rows).status == 201
    assert publish(*given, published.url("strange.raw"), published.url("copy.raw")) == 0
    let_time_pass()
    assert collected(published) == 0
    assert name not in published.names(published.own)
    assert published.get("copy.raw") == body


def test_what_is_used_again_while_it_is_removed_stays(
    published: Container, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A publication begins after the removal has read all records, and before it removes."""
    from vmconv_swift import backend

    assert unpublish(published.url("disk.qcow2")) == 0
    let_time_pass()
    let_time_pass()
    # Whatever exists is old.
    monkeypatch.setattr(backend, "_FRESH", 0)
    client = Client(cloud_of(CLOUD))
    began = client.now()
    found = list(unused(client, published.name, 0))
    assert {one.where.name for one in found} >= set(published.segments())
    assert publish("--zero-copy=require", disk, published.url("again.vmdk")) == 0
    removed = {one.where.name.partition("/")[0] for one in found if remove(client, one, client.now() - began + 1)}
    assert removed == {"metadata"}
    assert vmconv.compare(str(disk), published.url("again.vmdk"))


def test_what_was_removed_while_it_is_used_again_is_an_error(
    published: Container, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The removal of a piece comes after the plan that relies on it."""
    from vmconv_swift.backend import Publication

    assert unpublish(published.url("disk.qcow2")) == 0
    record = Publication.record

    def removing(self: Publication) -> None:
        record(self)
        published.swift.request("DELETE", f"/{published.own}/{published.segments()[0]}")

    with monkeypatch.context() as patch:
        patch.setattr(Publication, "record", removing)
        assert publish(disk, published.url("again.qcow2")) == 1
    assert "was removed, or has changed, since the conversion was planned" in capsys.readouterr().err
    assert published.names() == []
    assert publish(disk, published.url("again.qcow2")) == 0
    assert vmconv.compare(str(disk), published.url("again.qcow2"))


def test_a_large_object_is_removed_without_its_segments(published: Container) -> None:
    client = Client(cloud_of(CLOUD))
    (record,) = [name for name in published.names(published.own) if name.startswith("records/")]
    where = ObjectName(published.name, "disk.qcow2")
    assert json.loads(client.read(ObjectName(published.own, record), MIB))["target"] == where.path
    assert client.delete(where)
    assert len(published.segments()) == 2
    assert not client.delete(where)
    assert not remove(client, Unused(where, 1), 0)


def test_a_record_that_was_taken_for_that_of_another_is_written_again(
    container: Container, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object is unpublished while the same disk is published once more under its name."""
    assert publish(disk, container.url("disk.raw")) == 0
    put_manifest = Client.put_manifest

    def unpublishing(self: Client, where: ObjectName, *arguments: Any, **named: Any) -> bool:
        if where == ObjectName(container.name, "disk.raw"):
            assert unpublish(container.url("disk.raw")) == 0
        return put_manifest(self, where, *arguments, **named)

    monkeypatch.setattr(Client, "put_manifest", unpublishing)
    assert publish("--force", disk, container.url("disk.raw")) == 0
    let_time_pass()
    assert collected(container) == 0
    assert vmconv.compare(str(disk), container.url("disk.raw"))


def test_a_record_that_is_removed_after_its_object_has_appeared_is_written_again(
    container: Container, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object is unpublished, and another publication of it ends before the records are removed."""
    assert publish(disk, container.url("disk.raw")) == 0
    put_manifest, delete = Client.put_manifest, Client.delete
    target = ObjectName(container.name, "disk.raw")
    gone, appeared = threading.Event(), threading.Event()
    statuses: list[int] = []
    # The whole command handles signals, which only the main thread may.
    options = argparse.Namespace(
        names=[container.url("disk.raw")], unused=False, older_than=None, dry_run=False, output="human"
    )
    remover = threading.Thread(target=lambda: statuses.append(unpublishing._run(options)))

    def putting(self: Client, where: ObjectName, *arguments: Any, **named: Any) -> bool:
        if where == target:
            remover.start()
            assert gone.wait(60)
        return put_manifest(self, where, *arguments, **named)

    def deleting(self: Client, where: ObjectName) -> bool:
        if threading.current_thread() is remover and where.name.startswith("records/"):
            gone.set()
            assert appeared.wait(60)
        return delete(self, where)

    with monkeypatch.context() as patch:
        patch.setattr(Client, "put_manifest", putting)
        patch.setattr(Client, "delete", deleting)
        assert publish("--force", disk, container.url("disk.raw")) == 0
        appeared.set()
        remover.join()
    assert statuses == [0]
    let_time_pass()
    assert collected(container) == 0
    assert vmconv.compare(str(disk), container.url("disk.raw"))


def test_a_listing_that_is_late_does_no_harm(
    published: Container, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Payload was removed, and the listing has it still: the store refuses a manifest that names it."""
    from vmconv_swift import backend

    client = Client(cloud_of(CLOUD))
    late = list(client.listing(published.own, "payload/"))
    monkeypatch.setattr(backend, "_FEW", 0)
    monkeypatch.setattr(Client, "listing", lambda *_: iter(late))
    assert publish(published.url("disk.qcow2"), published.url("copy.vmdk")) == 0
    published.swift.request("DELETE", f"/{published.own}/{late[0].name}")
    assert publish(published.url("copy.vmdk"), published.url("again.vhdx")) == 1
    assert late[0].name in capsys.readouterr().err
    assert published.names() == ["copy.vmdk", "disk.qcow2"]


def test_a_publication_that_the_store_does_not_find_for_a_moment_keeps_its_payload(
    published: Container, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While devices are away, the store answers 404 for what it has; its listing has the object."""
    payload, head = published.segments(), Client.head
    let_time_pass()

    def missing(self: Client, where: ObjectName, **named: Any) -> Any:
        return None if where.container == published.name else head(self, where, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Client, "head", missing)
        assert collected(published) == 0
    assert published.segments() == payload
    assert vmconv.compare(str(disk), published.url("disk.qcow2"))
    published.swift.request("DELETE", f"/{published.name}/disk.qcow2")
    # The name of another object begins with its name.
    published.put("disk.qcow2.old", b"x")
    assert collected(published) == 0
    assert published.names(published.own) == []


def test_what_is_unused_is_removed_when_its_container_has_gone(published: Container) -> None:
    assert published.swift.request("DELETE", f"/{published.name}/disk.qcow2").status == 204
    assert published.swift.request("DELETE", f"/{published.name}").status == 204
    let_time_pass()
    assert collected(published) == 0
    assert published.names(published.own) == []


def test_removal_asks_all_replicas(published: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has missed a touch would make an object look old."""
    asked: list[tuple[str, bool]] = []
    head = Client.head

    def noted(self: Client, where: ObjectName, *, newest: bool = False) -> Any:
        asked.append((where.name, newest))
        return head(self, where, newest=newest)

    published.swift.request("DELETE", f"/{published.name}/disk.qcow2")
    before = published.names(published.own)
    let_time_pass()
    monkeypatch.setattr(Client, "head", noted)
    assert collected(published) == 0
    assert {name for name, _ in asked} == {"disk.qcow2", *before}
    assert all(newest for _, newest in asked)
