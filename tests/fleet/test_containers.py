"""A container of OpenStack Swift as a datastore: one storage on all nodes, and conversions that send metadata only."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import vmconv
from fleet.in_memory import Node, nodes
from fleet.serving import served
from support.containers import Container, publish
from support.disks import MIB, QemuImg, make_disk
from support.swift import CLOUD, KEY, OTHER_KEY, OTHER_USER, USER, Swift
from vmconv.cli.main import main
from vmconv.testing.disks import random_bytes
from vmconv_fleet import config as settings
from vmconv_fleet.catalogue import containers
from vmconv_fleet.catalogue.appointing import converters
from vmconv_fleet.catalogue.containers import ContainerNote, ContainerScan, container_at, refuse_unless_owned
from vmconv_fleet.catalogue.ownership import Ownership
from vmconv_fleet.catalogue.places import disk_id
from vmconv_fleet.catalogue.scanning import Scanner
from vmconv_fleet.catalogue.sharing import hold_by
from vmconv_fleet.config import NodeConfig
from vmconv_fleet.jobs.journal import JobJournal
from vmconv_fleet.jobs.runner import JobRunner
from vmconv_fleet.replication.database import open_reader
from vmconv_fleet.replication.records import Change, Record
from vmconv_fleet.replication.store import Reader
from vmconv_fleet.testing import PATIENCE, Driven, Lab, wait_until
from vmconv_swift.client import client_of
from vmconv_swift.cloud import cloud_of

HERE = Path(__file__).parent
ONE, OTHER = "1" * 32, "2" * 32
DISKS = ("a.raw", "b.raw", "sub/c.raw", "sub/d.raw")
AGAIN = "another-name"
"""What the other node calls the cloud."""
STRANGER = "another-account"
MISTAKEN = "another-password"
METADATA = 3 * MIB // 2
"""More than a publication of such a disk sends besides payload: metadata of 1 MiB at least, and manifests twice."""


@pytest.fixture(scope="module", autouse=True)
def clouds(swift: Swift, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One configuration with the account by two names, and another account."""
    path = tmp_path_factory.mktemp("clouds") / "clouds.yaml"
    accounts = {
        CLOUD: (USER, KEY),
        AGAIN: (USER, KEY),
        STRANGER: (OTHER_USER, OTHER_KEY),
        MISTAKEN: (USER, f"not-{KEY}"),
    }
    found = {
        name: {
            "auth_type": "v1password",
            "auth": {"auth_url": swift.auth_url, "username": user, "password": key},
            "region_name": "",
        }
        for name, (user, key) in accounts.items()
    }
    # JSON is YAML.
    path.write_text(json.dumps({"clouds": found}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OS_CLIENT_CONFIG_FILE", str(path))
        cloud_of.cache_clear()
        client_of.cache_clear()
        yield
    cloud_of.cache_clear()
    client_of.cache_clear()


@pytest.fixture
def container(swift: Swift) -> Container:
    return Container(swift)


@pytest.fixture
def filled(container: Container, tmp_path: Path) -> Container:
    """The container with disks that vmconv has published."""
    for number, name in enumerate(DISKS):
        local = tmp_path / f"{number}.raw"
        make_disk(local, 4 * MIB)
        assert publish("-q", local, container.url(name)) == 0
    container.received()
    return container


class Sent:
    """What the store has received from clients since this was made, bytes: of payload, and of all else."""

    def __init__(self, container: Container) -> None:
        self._swift, self._before = container.swift, len(container.swift.logged())

    def bytes(self) -> tuple[int, int]:
        new = [one for one in self._swift.logged()[self._before :] if one.source == "-"]
        payload = sum(one.received for one in new if "/payload/" in one.path or "/encoded/" in one.path)
        return payload, sum(one.received for one in new) - payload


def url(container: Container, cloud: str = CLOUD) -> str:
    return f"swift://{cloud}/{container.name}"


def ask(node: Node, target: Node, verb: str, **arguments: Any) -> Record:
    request = node.service.submit(target.id, verb, arguments, {"node": node.id, "user": "root"})
    answer = node.service.response(request, 60)
    assert answer
    return answer


def ended(node: Node, owner: Node, job: str) -> Mapping[str, Any]:
    states = ("done", "failed", "cancelled")
    return node.body_when(owner.id, "job", job, lambda one: one.body["state"] in states).body


@contextmanager
def scanned(node: Node, **datastores: str) -> Iterator[None]:
    """Lets a node scan; its datastores have been scanned once."""
    scanner = Scanner(node.service, datastores)
    scanner.start()
    try:
        for name in datastores:
            node.body_when(node.id, "datastore", name, lambda one: one.body.get("scanned_ms", 0) > 0)
        yield
    finally:
        scanner.stop()


def listed(node: Node) -> dict[str, Mapping[str, Any]]:
    return {str(one.body["name"]): one.body for one in node.service.view().find("disk", node.id)}


# -- which storage it is, and whose


def test_a_container_is_one_storage_whatever_a_node_calls_its_cloud(container: Container) -> None:
    first = hold_by(ContainerNote(container_at(url(container))), ONE, 5)
    assert first
    assert first.owner == ONE
    again = ContainerNote(container_at(url(container, AGAIN)))
    assert hold_by(again, OTHER, 6) == first
    # Of two nodes that are first at the same time one is quicker.
    again.write(b"another's", replace=False)
    assert hold_by(again, OTHER, 6) == first
    # Without the note it is the same storage.
    assert container.swift.request("DELETE", f"/{container.own}/notes/owner").status == 204
    second = hold_by(again, OTHER, 7)
    assert second
    assert (second.owner, second.storage) == (OTHER, first.storage)
    given = hold_by(again, OTHER, 8, give_to=ONE)
    assert given
    assert [one["node"] for one in given.history] == [OTHER, ONE]
    refuse_unless_owned(container_at(url(container)), [ONE])
    with pytest.raises(vmconv.AccessError, match=f"belongs to node {ONE}"):
        refuse_unless_owned(container_at(url(container)), [OTHER])


def test_containers_of_one_name_in_two_accounts_are_two_storages(container: Container, swift: Swift) -> None:
    ours, theirs = (container_at(url(container, cloud)) for cloud in (CLOUD, STRANGER))
    assert ours.identity != theirs.identity


def test_a_note_about_another_address_is_a_problem_and_stays(container: Container) -> None:
    """It was copied, or the store has two addresses, of which each node uses another one."""
    assert hold_by(ContainerNote(container_at(url(container))), ONE, 5)
    before = container.swift.request("GET", f"/{container.own}/notes/owner").body
    other = container_at(url(container, AGAIN))
    other.identity = f"another.example/{container.name}"
    with pytest.raises(vmconv.AccessError, match=r"another\.example.* the note with its owner is about 127\.0\.0\.1"):
        hold_by(ContainerNote(other), OTHER, 6)
    assert container.swift.request("GET", f"/{container.own}/notes/owner").body == before


def test_the_note_is_no_garbage(container: Container) -> None:
    from support.containers import collected, let_time_pass

    assert hold_by(ContainerNote(container_at(url(container))), ONE, 5)
    let_time_pass()
    assert collected(container) == 0
    assert container.names(container.own) == ["notes/owner"]


# -- listing


def records(container: Container, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns what a scan finds, by the names of disks, and the datastore under an empty name."""
    from vmconv_fleet.catalogue.inspection import _Inspection

    inspection = _Inspection({"ds": url(container)}, {})
    inspection.known = {"ds": known or {}}
    return {body.get("name", ""): body for _, _, body in inspection.records("ds")}


def test_disks_are_listed_and_read_once(filled: Container, tmp_path: Path) -> None:
    filled.put("notes.txt", b"no disk")
    filled.put("broken.qcow2", b"QFI\xfb" + bytes(100))
    with nodes(1, tmp_path) as (node,), scanned(node, ds=url(filled)):
        found = listed(node)
        store = node.service.view().get(node.id, "datastore", "ds")
        assert store
        assert (store.body["filesystem"], store.body["disks"], store.body["path"]) == ("swift", 5, url(filled))
        assert "problem" not in store.body
        assert set(found) == {*DISKS, "broken.qcow2"}
        for name in DISKS:
            assert (found[name]["format"], found[name]["virtual_size"]) == ("raw", 4 * MIB)
            assert found[name]["actual_size"] == 4 * MIB
        assert "broken.qcow2" in found["broken.qcow2"]["problem"]
        # Only what has changed, and what could not be read, is read again.
        before = len(filled.swift.logged())
        filled.put("a.raw", b"other" * 1024)
        published = len(filled.swift.logged())
        assert published > before
        assert ask(node, node, "scan").body["ok"]
        node.until(lambda: listed(node)["a.raw"] != found["a.raw"])
        read = {
            one.path.partition("?")[0] for one in filled.swift.logged()[published:] if one.method in ("GET", "HEAD")
        }
        read = {path.partition(f"/{filled.name}/")[2] for path in read if f"/{filled.name}/" in path}
        assert read == {"a.raw", "broken.qcow2"}


def test_what_is_not_the_version_that_was_listed_is_read_again(
    filled: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = records(filled)
    assert found["a.raw"]["version"]
    assert records(filled, found)["a.raw"] == found["a.raw"]
    reads: list[str] = []
    image = ContainerScan._image

    def noted(self: ContainerScan, place: str, version: str) -> dict[str, Any]:
        reads.append(place)
        return image(self, place, version)

    monkeypatch.setattr(ContainerScan, "_image", noted)
    records(filled, found)
    assert reads == []
    records(filled, {name: {**body, "version": "0" * 32} for name, body in found.items()})
    assert len(reads) == len(DISKS)
    # The store serves another version than it lists.
    monkeypatch.setattr("vmconv_swift.container.StoredObject", of_another_version)
    assert "version" not in records(filled)["a.raw"]


def of_another_version(name: str, size: int, _version: str, changed: float) -> Any:
    from vmconv.plugin import StoredObject

    return StoredObject(name, size, "0" * 32, changed)


def test_hostile_names_hide_nothing(filled: Container) -> None:
    # A client that resolves dots cannot ask for such a name, so it is quoted wholly.
    for quoted in ("x%2F%2E%2E%2Fup.raw", "line%0Abreak.raw", "%E2%80%AEward.raw", "%1B%5B2J.raw", ".hidden.raw"):
        assert filled.swift.request("PUT", f"/{filled.name}/{quoted}", b"1" * 512).status == 201
    filled.put("deep/" * 9 + "deep.raw", bytes(512))
    filled.put("folder.raw/", b"")
    found = records(filled)
    store = found.pop("")
    assert set(found) == set(DISKS)
    assert store["disks"] == len(DISKS)
    assert store["problem"].endswith("(and 3 more)")
    assert store["problem"].isprintable()


def test_objects_name_no_others(filled: Container, tmp_path: Path, qemu_img: QemuImg) -> None:
    child = tmp_path / "child.qcow2"
    make_disk(tmp_path / "a.raw", 4 * MIB)
    qemu_img("create", "-f", "qcow2", "-u", "-b", "a.raw", "-F", "raw", child, "4M")
    filled.put("child.qcow2", child.read_bytes())
    filled.put(
        "flat.vmdk",
        b'# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
        b'RW 8192 FLAT "a.raw" 0\n',
    )
    # What a guest may have written is no disk, whatever it begins with.
    vmconv.convert(str(child), str(tmp_path / "guest.vmdk"))
    filled.put("web-flat.vmdk", (tmp_path / "guest.vmdk").read_bytes())
    found = records(filled)
    assert "web-flat.vmdk" in found["web-flat.vmdk"]["problem"]
    for name in ("child.qcow2", "flat.vmdk"):
        assert found[name]["problem"] == f"{name}: names 'a.raw', and a disk in a container is one object"


class Many:
    """A container of very many objects."""

    shown, identity, requests = "swift://cloud/many", "host/many", 0

    def __init__(self, count: int) -> None:
        self.count, self.listed = count, 0

    def objects(self) -> Iterator[Any]:
        from vmconv.plugin import StoredObject

        for number in range(self.count):
            self.listed += 1
            yield StoredObject(f"{number:07}.raw", 512, f"{number:032x}", 0.0)

    def url(self, name: str) -> str:
        return f"{self.shown}/{name}"


def test_very_many_objects_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    from vmconv.plugin import installed

    many = Many(10 * containers.MAX_OBJECTS)
    monkeypatch.setattr(containers, "container_at", lambda _path: many)

    def image(self: ContainerScan, place: str, version: str) -> dict[str, Any]:
        many.requests += 3
        # The first half of all.
        if version < f"{containers.MAX_IMAGES // 2:032x}":
            raise vmconv.ImageError(f"{place}: is damaged")
        return {"format": "raw", "version": version}

    monkeypatch.setattr(ContainerScan, "_image", image)

    alive: list[str] = []

    def reading(_datastore: str, _name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def look(known: Mapping[str, Any]) -> dict[str, Any]:
        many.requests = many.listed = 0
        scan = ContainerScan(installed(), Ownership(), {"ds": known}, reading, alive.append)
        return {body.get("name", ""): body for _, _, body in scan.records("ds", "swift://cloud/many")}

    found = look({})
    assert many.listed <= containers.MAX_OBJECTS + 1
    store = found.pop("")
    assert (len(found), store["disks"]) == (containers.MAX_IMAGES, containers.MAX_IMAGES)
    assert "more than 10000 images" in store["problem"]
    assert len(alive) > containers.MAX_OBJECTS // 20_000

    def unread(found: Mapping[str, Any]) -> int:
        return sum("the next one continues" in body.get("problem", "") for body in found.values())

    assert 0 < unread(found) < len(found)
    assert many.requests < containers.MAX_REQUESTS + 3
    # The next scan reads the rest, whatever it tries once more.
    found = look(found)
    del found[""]
    assert unread(found) == 0
    assert sum("problem" in body for body in found.values()) == containers.MAX_IMAGES // 2
    assert many.requests < containers.MAX_REQUESTS + 3


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("swift://none/images", "swift://none"),
        (f"swift://{MISTAKEN}/images", f"swift://{MISTAKEN}"),
        (f"swift://{CLOUD}/none", "there is no such container"),
        (f"swift://{CLOUD}/images_vmconv", "is vmconv's own"),
        ("http://127.0.0.1/images", "has no containers of objects"),
        ("other://cloud/images", "other:// is not installed"),
    ],
)
def test_a_container_that_cannot_be_listed_keeps_its_disks(tmp_path: Path, path: str, problem: str) -> None:
    with nodes(1, tmp_path) as (node,):
        node.write(Change("disk", disk_id("ds", "a.raw"), {"datastore": "ds", "name": "a.raw"}))
        with scanned(node, ds=path):
            store = node.service.view().get(node.id, "datastore", "ds")
        assert store
        assert problem in store.body["problem"]
        assert KEY not in json.dumps(store.body)
        assert set(listed(node)) == {"a.raw"}


def test_a_store_that_does_not_answer_holds_up_no_other_datastore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    monkeypatch.setattr("vmconv_fleet.catalogue.scanning.STUCK", 5.0)
    directory = tmp_path / "directory"
    directory.mkdir()
    make_disk(directory / "b.raw", MIB)
    with socket.create_server(("127.0.0.1", 0)) as silent, nodes(1, tmp_path) as (node,):
        auth = {"auth_url": f"http://127.0.0.1:{silent.getsockname()[1]}/auth", "username": USER, "password": KEY}
        clouds = {"silent": {"auth_type": "v1password", "auth": auth, "region_name": ""}}
        (tmp_path / "silent.yaml").write_text(json.dumps({"clouds": clouds}))
        monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(tmp_path / "silent.yaml"))
        node.write(Change("disk", disk_id("a", "a.raw"), {"datastore": "a", "name": "a.raw"}))
        with scanned(node, a="swift://silent/images", b=str(directory)):
            first, second = (node.service.view().get(node.id, "datastore", name) for name in "ab")
        assert first
        assert "its store does not answer" in first.body["problem"]
        assert second
        assert "problem" not in second.body
        assert set(listed(node)) == {"a.raw", "b.raw"}


@pytest.mark.parametrize(
    "path",
    [
        "swift://cloud",
        "swift://cloud/",
        "swift://cloud/images/more",
        "swift://user:secret@cloud/images",
        "swift://user@cloud/images",
        "swift://cloud/images?key=secret",
        "swift:///images",
        "swift://cloud/ima ges",
    ],
)
def test_a_url_that_names_no_container_or_has_secrets_is_refused(tmp_path: Path, path: str) -> None:
    with nodes(1, tmp_path) as (node,):
        body = ask(node, node, "datastore-add", name="ds", path=path).body
        assert not body["ok"]
        assert "secret" not in body["reason"]
        assert ask(node, node, "datastore-add", name="ds", path="swift://cloud/images").body["ok"]
        assert "overlap" in ask(node, node, "datastore-add", name="two", path="swift://cloud/images").body["reason"]
        assert ask(node, node, "datastore-add", name="two", path="swift://cloud/images2").body["ok"]


# -- conversions


@pytest.fixture
def pair(tmp_path: Path, filled: Container) -> Iterator[Sequence[Node]]:
    """Two nodes that scan and convert; the first owns the storage."""
    with nodes(2, tmp_path) as made, ExitStack() as stack:
        for node, cloud in zip(made, (CLOUD, AGAIN), strict=True):
            runner = JobRunner(node.service, str(node.directory))
            stack.enter_context(scanned(node, ds=url(filled, cloud)))
            runner.start()
            stack.callback(runner.stop)
        one, other = made
        other.until(lambda: other.service.view().count("disk", one.id) == len(DISKS))
        yield made


def test_the_owner_converts_without_sending_payload(pair: Sequence[Node], filled: Container, qemu_img: QemuImg) -> None:
    one, other = pair
    assert one.service.view().count("disk", other.id) == 0
    stores = [one.body_when(node.id, "datastore", "ds", lambda store: "owner" in store.body).body for node in pair]
    assert [store["owner"] for store in stores] == [one.id, one.id]
    assert stores[0]["storage"] == stores[1]["storage"]
    sent = Sent(filled)
    wish = {"disk": disk_id("ds", "sub/c.raw"), "format": "qcow2", "zero_copy": "require"}
    assert ask(one, one, "convert", **wish, dry_run=True, job="plan").body["ok"]
    plan = one.body_when(one.id, "job", "plan", lambda record: bool(record.body.get("ended_ms"))).body
    assert (plan["state"], plan["file"], plan["plan"]["copied"]) == ("planned", "c.qcow2", 0)
    assert plan["plan"]["source"]["parts"]
    assert sent.bytes() == (0, 0)
    assert ask(one, one, "convert", **wish, job="made").body["ok"]
    body = ended(one, one, "made")
    assert (body["state"], body["plan"]["backend"], body["plan"]["copied"]) == ("done", "swift", 0), body
    assert body["plan"]["shared"] == plan["plan"]["shared"] > MIB
    payload, rest = sent.bytes()
    assert (payload, rest < METADATA) == (0, True)
    source, read = filled.for_qemu("sub/c.raw", "raw"), filled.for_qemu("sub/c.qcow2", "qcow2")
    assert "identical" in qemu_img("compare", source, read).stdout
    one.until(lambda: "sub/c.qcow2" in listed(one))
    # It is not made again in its place.
    assert ask(one, one, "convert", **wish, job="again").body["ok"]
    assert "already exists" in ended(one, one, "again")["error"]


def test_what_makes_no_sense_in_a_container_is_refused(pair: Sequence[Node], tmp_path: Path) -> None:
    one, _ = pair
    one.write(
        Change("datastore", "files", {"path": str(tmp_path)}),
        Change("disk", disk_id("files", "0.raw"), {"datastore": "files", "name": "0.raw"}),
        Change("policy", "conversion", {"may_remove_source": True}),
    )
    wish: dict[str, Any] = {"disk": disk_id("ds", "a.raw"), "format": "qcow2"}
    for given, why in (
        ({"keep_source": False}, "vmconv unpublish removes it"),
        ({"target_datastore": "files"}, "beside its source"),
        ({"target_datastore": "ds"}, "beside its source"),
        ({"disk": disk_id("files", "0.raw"), "target_datastore": "ds"}, "vmconv publish"),
    ):
        assert why in ask(one, one, "convert", **{**wish, **given}).body["reason"]
    for number, options in enumerate(({"subformat": "split"}, {"data_file": "/etc/other"})):
        assert ask(one, one, "convert", **wish, options=options, job=f"options-{number}").body["ok"]
        assert ended(one, one, f"options-{number}")["state"] == "failed"


def test_only_who_is_appointed_converts(pair: Sequence[Node], filled: Container) -> None:
    one, other = pair
    wish: dict[str, Any] = {"disk": disk_id("ds", "a.raw"), "of": one.id, "format": "qcow2"}
    assert "has not appointed this node" in ask(one, other, "convert", **wish).body["reason"]
    assert ask(one, one, "datastore-appoint", name="ds", nodes=[other.id]).body["ok"]
    other.until(lambda: converters(other.service.view(), one.id, "ds") == [one.id, other.id])
    # The note names another owner by now, which no record says yet.
    note = ContainerNote(container_at(url(filled)))
    assert hold_by(note, one.id, 5, give_to="3" * 32)
    for node, job in ((one, "own"), (other, "theirs")):
        of = {} if node is one else {"of": one.id}
        assert ask(one, node, "convert", **{**wish, **of, "of": of.get("of", one.id)}, job=job).body["ok"]
        assert f"belongs to node {'3' * 32}" in ended(one, node, job)["error"]
    assert "a.qcow2" not in filled.names()


def test_a_node_without_the_store_says_so(pair: Sequence[Node]) -> None:
    one, other = pair
    assert ask(one, one, "datastore-appoint", name="ds", nodes=[other.id]).body["ok"]
    other.until(lambda: converters(other.service.view(), one.id, "ds") == [one.id, other.id])
    assert ask(other, other, "datastore-remove", name="ds").body["ok"]
    wish: dict[str, Any] = {"disk": disk_id("ds", "a.raw"), "of": one.id, "format": "qcow2"}
    reason = ask(one, other, "convert", **wish).body["reason"]
    assert "does not see the storage" in reason
    assert "by the name that this node has for the store" in reason


def test_both_convert_at_the_same_time(pair: Sequence[Node], filled: Container) -> None:
    one, other = pair
    assert ask(one, one, "datastore-appoint", name="ds", nodes=[other.id]).body["ok"]
    other.until(lambda: len(converters(other.service.view(), one.id, "ds")) == 2)
    sent = Sent(filled)
    for number, name in enumerate(DISKS):
        target = pair[number % 2]
        of = {} if target is one else {"of": one.id}
        wish = {"disk": disk_id("ds", name), "format": "vmdk", "job": f"job-{number}", "max_parallel": 2, **of}
        assert ask(one, target, "convert", **wish).body["ok"]
    for number in range(len(DISKS)):
        body = ended(one, pair[number % 2], f"job-{number}")
        assert (body["state"], body["plan"]["backend"], body["plan"]["copied"]) == ("done", "swift", 0), body
        assert KEY not in json.dumps(dict(body))
    payload, rest = sent.bytes()
    assert (payload, rest < len(DISKS) * METADATA) == (0, True)
    # The owner lists what the other has made.
    one.until(lambda: one.service.view().count("disk", one.id) == 2 * len(DISKS))
    assert one.service.view().count("disk", other.id) == 0
    for name in DISKS:
        assert vmconv.compare(filled.url(name), filled.url(name.replace("raw", "vmdk")))


def test_payload_of_others_is_copied_with_the_reason_or_not_at_all(pair: Sequence[Node], filled: Container) -> None:
    one, _ = pair
    filled.put("uploaded.raw", random_bytes(MIB, 7))
    assert ask(one, one, "scan").body["ok"]
    one.until(lambda: "uploaded.raw" in listed(one))
    sent = Sent(filled)
    wish: dict[str, Any] = {"disk": disk_id("ds", "uploaded.raw"), "format": "qcow2"}
    assert ask(one, one, "convert", **wish, zero_copy="require", job="never").body["ok"]
    assert ended(one, one, "never")["state"] == "failed"
    assert sent.bytes() == (0, 0)
    assert "uploaded.qcow2" not in filled.names()
    assert ask(one, one, "convert", **wish, job="copied").body["ok"]
    body = ended(one, one, "copied")
    assert (body["state"], body["plan"]["copied"]) == ("done", MIB)
    assert filled.name in body["plan"]["copies"][0]["reason"]
    assert sent.bytes()[0] == MIB
    assert vmconv.compare(filled.url("uploaded.raw"), filled.url("uploaded.qcow2"))


def test_the_command_line(
    pair: Sequence[Node], filled: Container, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = pair
    monkeypatch.setenv("VMCONV_NODE", str(one.directory))

    def run(*arguments: str, code: int = 0) -> str:
        assert main(["fleet", *arguments]) == code, capsys.readouterr()
        said = capsys.readouterr()
        return said.out + (said.err if code else "")

    with served(one):
        for bad in ("swift://user:secret@cloud/images", f"swift://{CLOUD}/a/b", f"swift://{CLOUD}/images?key=secret"):
            assert "SCHEME://STORE/CONTAINER" in (said := run("datastore", "add", "bad", bad, code=2))
            assert "secret" not in said
        for kind in ("request", "response", "transaction"):
            assert not any("secret" in json.dumps(dict(record.body)) for record in one.service.view().find(kind))
        said = run("datastore", "add", "more", f"swift://{CLOUD}/none")
        assert said.startswith(f"datastore more is swift://{CLOUD}/none (transaction")
        one.body_when(one.id, "datastore", "more", lambda store: "problem" in store.body)
        assert "there is no such container" in run("datastores")
        run("datastore", "remove", "more")
        row = next(line.split() for line in run("datastores").splitlines() if line.startswith("n01"))
        assert row == ["n01", "ds", "swift", "yes", "-", "4", url(filled)]
        run("datastore", "appoint", "ds", "--nodes", other.id)
        one.until(lambda: len(converters(one.service.view(), one.id, "ds")) == 2)
        chosen = ("--select", "datastore=ds and format=raw", "--to", "vhdx", "--max-parallel", "2")
        assert "copied 0 B" in run("convert", *chosen, "--zero-copy", "require", "--dry-run")
        run("convert", *chosen, "--zero-copy", "require", "--follow", "--yes")
    jobs = [job for node in pair for job in one.service.view().find("job", node.id) if not job.body["dry_run"]]
    assert sorted(job.owner for job in jobs) == [one.id, one.id, other.id, other.id]
    assert {job.body["state"] for job in jobs} == {"done"}
    for name in DISKS:
        assert vmconv.compare(filled.url(name), filled.url(name.replace("raw", "vhdx")))


def body_in(config: NodeConfig, owner: str, kind: str, identifier: str) -> Mapping[str, Any]:
    """Returns the body of a record in the database of a node; empty if there is none."""
    reader = Reader(open_reader(config.database))
    try:
        record = reader.get(owner, kind, identifier)
        return record.body if record else {}
    finally:
        reader.close()


def test_nodes_themselves_make_no_requests_to_a_store(
    filled: Container, lab: Lab, drive: Callable[..., Driven]
) -> None:
    configs = [dataclasses.replace(lab.add(), datastores={"ds": url(filled, cloud)}) for cloud in (CLOUD, AGAIN)]
    running = []
    for config in configs:
        settings.save(config)
        running.append(drive(config))
        wait_until(lambda log=running[-1].log: '"scanned"' in log(), PATIENCE, "the container is scanned")
    (mine, theirs), (one, other) = configs, running
    converters = {"name": "ds", "nodes": [theirs.node]}
    assert one.ask("request", target=mine.node, verb="datastore-appoint", arguments=converters)["ok"]
    disk = disk_id("ds", "a.raw")

    def is_known() -> bool:
        store = body_in(theirs, mine.node, "datastore", "ds")
        return bool(store.get("converters") and body_in(theirs, mine.node, "disk", disk))

    wait_until(is_known, PATIENCE, "the appointment is known")
    wish = {"disk": disk, "of": mine.node, "format": "qcow2", "job": "j1", "zero_copy": "require"}
    assert other.ask("request", target=theirs.node, verb="convert", arguments=wish)["ok"]
    ends = ("done", "failed")
    wait_until(lambda: body_in(mine, theirs.node, "job", "j1").get("state") in ends, PATIENCE, "the end of the job")
    assert body_in(mine, theirs.node, "job", "j1")["state"] == "done"
    made = disk_id("ds", "a.qcow2")
    wait_until(lambda: body_in(theirs, mine.node, "disk", made), PATIENCE, "the owner lists it")
    clients = ("keystoneauth1", "openstack", "requests", "vmconv_swift")
    for config, node in zip(configs, running, strict=True):
        assert not [name for name in node.ask("modules")["modules"] if name.partition(".")[0] in clients]
        # Tokens begin so.
        files = (config.database, f"{config.database}-wal")
        assert not any(b"AUTH_tk" in Path(file).read_bytes() for file in files)
        assert "AUTH_tk" not in node.log()


STOPS = """
import os, sys, threading
from vmconv_fleet.jobs import worker
from vmconv_swift.backend import SwiftOutput
finish = SwiftOutput.finish
def finished(self):
    made = finish(self)
    with open(sys.argv[1], "w") as told:
        told.write("here")
    threading.Event().wait()
    return made
SwiftOutput.finish = finished
os._exit(worker.main())
"""
"""A worker that does not go on once the store has all of an object but its name."""


def test_a_job_that_is_cancelled_leaves_no_object(filled: Container, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    disk = disk_id("ds", "a.raw")
    with nodes(1, tmp_path) as (node,):
        node.write(
            Change("datastore", "ds", {"path": url(filled)}),
            Change("disk", disk, {"datastore": "ds", "name": "a.raw"}),
        )
        before = filled.names(), [name for name in filled.names(filled.own) if name.startswith(("records", "cand"))]
        runner = JobRunner(node.service, str(node.directory), command=(sys.executable, "-c", STOPS, str(pipe)))
        runner.start()
        try:
            assert ask(node, node, "convert", disk=disk, format="qcow2", job="j1").body["ok"]
            assert pipe.read_text() == "here"
            own = filled.names(filled.own)
            assert sum(name.startswith("candidates/") for name in own) == 1
            assert ask(node, node, "cancel", job="j1").body["ok"]
            assert ended(node, node, "j1")["state"] == "cancelled"
        finally:
            runner.stop()
    after = [name for name in filled.names(filled.own) if name.startswith(("records", "cand"))]
    assert (filled.names(), after) == before


# -- a node that is killed


@pytest.mark.parametrize(
    ("gate", "with_worker", "attempts"),
    [("begun", True, 2), ("begun", False, 1), ("made", True, 1)],
    ids=["before", "while", "after"],
)
def test_a_node_killed_in_the_middle_has_it_in_the_end(
    filled: Container, tmp_path: Path, gate: str, with_worker: bool, attempts: int
) -> None:
    """Right before the object appears, or right after. A worker that is not killed has the object appear."""
    pipe = tmp_path / "pipe"
    for path in (pipe, tmp_path / "pipe.go"):
        os.mkfifo(path)
    disk = disk_id("ds", "a.raw")
    with again(tmp_path) as node:
        node.write(
            Change("datastore", "ds", {"path": url(filled)}),
            Change("disk", disk, {"datastore": "ds", "name": "a.raw"}),
            Change("job", "j1", {"state": "queued", "disk": disk, "datastore": "ds", "format": "vhdx"}),
        )
    program = [sys.executable, str(HERE / "node_to_kill.py"), str(tmp_path), gate, str(pipe)]
    process = subprocess.Popen(program, env={**os.environ, "PYTHONPATH": str(HERE.parent)})
    try:
        assert pipe.read_text() == "here\n"
        workers = children(process.pid)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(workers) == 1
    assert ("a.vhdx" in filled.names()) == (gate == "made")
    if with_worker:
        os.kill(workers[0], signal.SIGKILL)
    else:
        (tmp_path / "pipe.go").write_text("")
    with again(tmp_path) as node:
        runner = JobRunner(node.service, str(node.directory))
        runner.start()
        try:
            body = ended(node, node, "j1")
        finally:
            runner.stop()
    found = body["state"], body["attempts"], body.get("recovered", False)
    assert found == ("done", attempts, attempts == 1), body
    assert filled.names().count("a.vhdx") == 1
    assert vmconv.compare(filled.url("a.raw"), filled.url("a.vhdx"))


def test_the_journal_knows_an_object_by_its_version(filled: Container, tmp_path: Path) -> None:
    """A store that cannot be asked has made nothing."""
    version = container_at(url(filled)).version("a.raw")
    assert version
    journal = JobJournal(str(tmp_path / "journal"))
    for place, stated, made in (
        (url(filled), version, "a.raw"),
        (url(filled, AGAIN), version, "a.raw"),
        (url(filled), "0" * 32, None),
        (f"swift://none/{filled.name}", version, None),
    ):
        journal.write_object(place, "a.raw", stated)
        assert journal.made() == made


def children(pid: int) -> list[int]:
    """Returns the child processes of all threads of a process."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]


@contextmanager
def again(tmp_path: Path) -> Iterator[Node]:
    """Yields a node, once more on the database that its predecessor left."""
    node = Node(1, tmp_path, {})
    try:
        node.start()
        yield node
    finally:
        node.service.close()
