"""A volume of JuiceFS on two nodes, by a mount of each: one storage, which its owner lets the other convert too."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fleet.in_memory import Node, nodes
from support.disks import MIB, make_disk
from support.juicefs import Volume
from support.requirements import oracle_program
from vmconv_fleet.api.bulk import _spread
from vmconv_fleet.api.state import State
from vmconv_fleet.catalogue.appointing import converters
from vmconv_fleet.catalogue.places import disk_id
from vmconv_fleet.catalogue.scanning import Scanner
from vmconv_fleet.catalogue.sharing import FILE, hold, owner_of
from vmconv_fleet.jobs.runner import JobRunner
from vmconv_fleet.replication.records import Change, Record

ONE, OTHER = "1" * 32, "2" * 32
DISKS = ("a.raw", "b.raw", "c.raw", "d.raw")


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Volume]:
    made = Volume(tmp_path_factory.mktemp("juicefs"), "redis")
    try:
        made.mount("one")
        made.mount("other")
        yield made
    finally:
        made.close()


@pytest.fixture
def folders(volume: Volume) -> Iterator[tuple[Path, Path]]:
    """An empty directory of the volume, on both mounts."""
    made = volume.mounts["one"] / "images"
    made.mkdir()
    yield made, volume.mounts["other"] / "images"
    subprocess.run(["rm", "-r", made], check=True)


def ask(node: Node, target: Node, verb: str, **arguments: Any) -> Record:
    request = node.service.submit(target.id, verb, arguments, {"node": node.id, "user": "root"})
    answer = node.service.response(request, 60)
    assert answer
    return answer


# -- which storage it is, and whose


def test_all_mounts_show_the_same_storage(volume: Volume, folders: tuple[Path, Path]) -> None:
    here, there = folders
    first = hold(str(here), ONE, 5)
    assert first
    assert first.owner == ONE
    assert hold(str(there), OTHER, 6) == first
    assert set(os.listdir(here)) == {FILE}
    # A mount of this directory alone; its root has another number.
    subdirectory = volume.mount("part", "--subdir", "/images")
    try:
        assert hold(str(subdirectory), OTHER, 7) == first
    finally:
        volume.unmount("part")


def test_the_volume_says_which_storage_it_is_and_no_note(volume: Volume, folders: tuple[Path, Path]) -> None:
    here, there = folders
    first = hold(str(here), ONE, 5)
    assert first
    copy = volume.mounts["one"] / "copy"
    subprocess.run(["cp", "-r", here, copy], check=True)
    try:
        # The note was copied with its directory.
        assert owner_of(str(copy)) is None
        other = hold(str(copy), OTHER, 6)
        assert other
        assert (other.owner, other.storage == first.storage) == (OTHER, False)
        # One that states another storage, or another volume.
        for changed in ({"storage": "f" * 32}, {"place": {**first.place, "volume": "another"}}):
            (copy / FILE).write_text(json.dumps({**first._asdict(), **changed}))
            assert owner_of(str(copy)) is None
    finally:
        subprocess.run(["rm", "-r", copy], check=True)
    assert owner_of(str(there)) == first


def test_without_the_note_it_is_the_same_storage_again(folders: tuple[Path, Path]) -> None:
    here, there = folders
    first = hold(str(here), ONE, 5)
    (here / FILE).unlink()
    again = hold(str(there), OTHER, 6)
    assert first
    assert again
    assert (again.owner, again.storage) == (OTHER, first.storage)


def test_a_node_that_may_not_ask_the_mount_goes_by_the_note(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = folders
    first = hold(str(here), ONE, 5)
    monkeypatch.setattr("vmconv.api.volume_of", lambda _mount: None)
    assert hold(str(there), OTHER, 6) == first


# -- two nodes


@pytest.fixture
def pair(tmp_path: Path, folders: tuple[Path, Path]) -> Iterator[Sequence[Node]]:
    """Two nodes that scan and convert; the first owns the storage."""
    for name in DISKS:
        make_disk(folders[0] / name, 4 * MIB)
    with nodes(2, tmp_path) as made, ExitStack() as stack:
        for node, path in zip(made, folders, strict=True):
            scanner, runner = Scanner(node.service, {"ds": str(path)}), JobRunner(node.service, str(node.directory))
            scanner.start()
            stack.callback(scanner.stop)
            runner.start()
            stack.callback(runner.stop)
            node.body_when(node.id, "datastore", "ds", lambda one: bool(one.body.get("storage")))
        one, other = made
        other.until(lambda: other.service.view().count("disk", one.id) == len(DISKS))
        yield made


def ended(node: Node, owner: Node, job: str) -> Record:
    return node.body_when(owner.id, "job", job, lambda one: one.body["state"] in ("done", "failed", "cancelled"))


def test_only_who_is_appointed_converts(pair: Sequence[Node]) -> None:
    one, other = pair
    wish: dict[str, Any] = {"disk": disk_id("ds", "a.raw"), "of": one.id, "format": "qcow2"}
    assert converters(other.service.view(), one.id, "ds") == [one.id]
    assert "has not appointed this node" in ask(one, other, "convert", **wish).body["reason"]
    assert "not this node's to convert" in ask(one, other, "datastore-appoint", name="ds", nodes=[]).body["reason"]
    assert ask(one, one, "datastore-appoint", name="ds", nodes=[other.id, one.id]).body["body"] == {
        "converters": [other.id]
    }
    other.until(lambda: converters(other.service.view(), one.id, "ds") == [one.id, other.id])
    for more in ({"keep_source": False}, {"target_datastore": "ds"}):
        assert "made beside its source" in ask(one, other, "convert", **wish, **more).body["reason"]
    stranger = {**wish, "disk": disk_id("ds", "none.raw")}
    assert "is not known here" in ask(one, other, "convert", **stranger).body["reason"]
    # What waits when the appointment ends is not begun.
    later = ask(one, other, "convert", **wish, job="later", at_ms=1 << 42)
    assert later.body["ok"]
    assert ask(one, one, "datastore-appoint", name="ds", nodes=[]).body["ok"]
    other.until(lambda: converters(other.service.view(), one.id, "ds") == [one.id])
    record = other.service.view().get(other.id, "job", "later")
    assert record
    other.write(Change("job", "later", {**record.body, "at_ms": 1}))
    assert "has not appointed this node" in ended(other, other, "later").body["error"]


def test_both_convert_at_the_same_time(pair: Sequence[Node], folders: tuple[Path, Path], volume: Volume) -> None:
    one, other = pair
    assert ask(one, one, "datastore-appoint", name="ds", nodes=[other.id]).body["ok"]
    other.until(lambda: len(converters(other.service.view(), one.id, "ds")) == 2)
    before = volume.names()
    for number, name in enumerate(DISKS):
        target = pair[number % 2]
        of = {} if target is one else {"of": one.id}
        wish = {"disk": disk_id("ds", name), "format": "qcow2", "job": f"job-{number}", "max_parallel": 2, **of}
        assert ask(one, target, "convert", **wish).body["ok"]
    for number in range(len(DISKS)):
        body = ended(one, pair[number % 2], f"job-{number}").body
        assert (body["state"], body["plan"]["backend"], body["plan"]["copied"]) == ("done", "juicefs", 0)
    assert volume.added(before) < len(DISKS) * MIB
    # The owner lists what the other has made.
    one.until(lambda: one.service.view().count("disk", one.id) == 2 * len(DISKS))
    assert one.service.view().count("disk", other.id) == 0
    assert {path.name for path in folders[0].glob("*.qcow2")} == {f"{name[0]}.qcow2" for name in DISKS}


def test_many_disks_are_spread_over_all_that_answer(pair: Sequence[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = pair
    state = State(one.service, str(one.directory), None)
    chosen = one.service.view().find("disk", one.id)
    assert _spread(state, chosen, {}) == [one.id] * 4
    assert ask(one, one, "datastore-appoint", name="ds", nodes=[other.id, "3" * 32]).body["ok"]
    assert _spread(state, chosen, {}) == [one.id, other.id] * 2
    # What only the owner does.
    for given in ({"keep_source": False}, {"target_datastore": "ds"}):
        assert _spread(state, chosen, given) == [one.id] * 4
    # Without a link, and without a heartbeat.
    monkeypatch.setattr(one.service, "neighbours", list)
    assert _spread(state, chosen, {}) == [one.id] * 4


def test_the_owner_s_rules_count_too(pair: Sequence[Node]) -> None:
    one, other = pair
    assert ask(one, one, "datastore-appoint", name="ds", nodes=[other.id]).body["ok"]
    assert ask(one, one, "policy-set", naming="{stem}-new{suffix}", formats=["qcow2"]).body["ok"]
    other.until(lambda: bool(other.service.view().get(one.id, "policy", "conversion")))
    other.until(lambda: len(converters(other.service.view(), one.id, "ds")) == 2)
    wish: dict[str, Any] = {"disk": disk_id("ds", "a.raw"), "of": one.id}
    assert "converts to qcow2" in ask(one, other, "convert", **wish, format="vhdx").body["reason"]
    assert ask(one, other, "convert", **wish, format="qcow2", job="named").body["ok"]
    assert ended(one, other, "named").body["file"] == "a-new.qcow2"


# -- a node that lies


def test_an_owner_leads_an_appointed_node_nowhere_else(pair: Sequence[Node], folders: tuple[Path, Path]) -> None:
    """Into no other datastore of that node, whatever the owner writes into its records and on the volume."""
    one, other = pair
    private = folders[1].parent / "private"
    private.mkdir()
    try:
        make_disk(private / "secret.raw", 4 * MIB)
        other.write(Change("datastore", "private", {"path": str(private)}))
        (folders[0] / "link.raw").symlink_to(private / "secret.raw")
        (folders[0] / "inner").symlink_to(private)
        create = ["create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b", str(private / "secret.raw")]
        subprocess.run([oracle_program("qemu-img"), *create, str(folders[0] / "top.qcow2"), "4M"], check=True)
        names = {
            "link": "link.raw",
            "inner": "inner/secret.raw",
            "up": "../private/secret.raw",
            "root": str(private / "secret.raw"),
            "top": "top.qcow2",
        }
        one.write(
            *(Change("disk", key, {"datastore": "ds", "name": name, "format": "raw"}) for key, name in names.items())
        )
        assert ask(one, one, "datastore-appoint", name="ds", nodes=[other.id]).body["ok"]
        other.until(lambda: len(converters(other.service.view(), one.id, "ds")) == 2)
        before = {*os.listdir(folders[0])}
        for key in names:
            answer = ask(one, other, "convert", disk=key, of=one.id, format="vhdx", job=key).body
            assert answer["ok"], answer
            body = ended(one, other, key).body
            assert (body["state"], body["attempts"]) == ("failed", 1), body
            assert re.search("outside|not a path", body["error"])
        assert {*os.listdir(folders[0])} == before
        assert os.listdir(private) == ["secret.raw"]
    finally:
        subprocess.run(["rm", "-r", private], check=True)


def test_a_node_that_claims_a_storage_appoints_nobody(pair: Sequence[Node]) -> None:
    """Its record is its own, but whose the storage is, the other one has read on the volume."""
    one, other = pair
    held = one.service.view().get(one.id, "datastore", "ds")
    assert held
    other.write(
        Change("datastore", "ds", {**held.body, "owner": other.id, "converters": [one.id, other.id]}),
        Change("disk", "d1", {"datastore": "ds", "name": "a.raw", "format": "raw"}),
    )
    one.body_when(other.id, "disk", "d1", lambda _one: True)
    assert converters(one.service.view(), other.id, "ds") == [other.id]
    answer = ask(other, one, "convert", disk="d1", of=other.id, format="qcow2").body
    assert "does not see the storage" in answer["reason"]


def test_only_appointed_nodes_make_the_owner_look(pair: Sequence[Node]) -> None:
    one, other = pair
    scanner = Scanner(one.service, {})
    sources = {"disk": disk_id("ds", "a.raw")}, {"vm": "v1"}
    one.write(Change("vm", "v1", {"datastore": "ds", "file": "a.vmx", "name": "a"}))
    bodies = [{"state": "done", **source, "of": one.id, "datastore": "ds", "format": "vmx"} for source in sources]
    jobs = other.write(*(Change("job", f"j{number}", body) for number, body in enumerate(bodies)))
    scanner._notice(jobs)
    assert scanner._changed(one.service.view()) == set()
    assert ask(one, one, "datastore-appoint", name="ds", nodes=[other.id]).body["ok"]
    for job in jobs:
        scanner._notice([job])
        assert scanner._changed(one.service.view()) == {"ds"}


# -- the end of an appointment


def owned(node: Node, by: Node) -> Record:
    """Returns the record of a node's datastore once it says whose the storage is."""
    return node.body_when(node.id, "datastore", "ds", lambda one: one.body.get("owner") == by.id)


def _is_owner(node: Node, other: Node) -> bool:
    """Returns whether a node knows that the other one holds it to be the owner."""
    record = node.service.view().get(other.id, "datastore", "ds")
    return record is not None and record.body.get("owner") == node.id


def test_a_storage_that_comes_back_has_no_appointed_nodes(pair: Sequence[Node]) -> None:
    one, other = pair
    assert ask(one, one, "datastore-appoint", name="ds", nodes=[other.id]).body["ok"]
    for giver, taker in ((one, other), (other, one)):
        giver.until(lambda: _is_owner(giver, taker))  # noqa: B023
        assert ask(giver, giver, "datastore-give", name="ds", to=taker.id).body["ok"]
        for node in pair:
            owned(node, taker)
    assert "converters" not in owned(one, one).body


def test_another_directory_at_the_path_has_no_appointed_nodes(pair: Sequence[Node], folders: tuple[Path, Path]) -> None:
    one, other = pair
    assert ask(one, one, "datastore-appoint", name="ds", nodes=[other.id]).body["ok"]
    before = owned(one, one).body["storage"]
    moved = folders[0].with_name("moved")
    folders[0].rename(moved)
    try:
        folders[0].mkdir()
        assert ask(one, one, "scan").body["ok"]
        now = one.body_when(one.id, "datastore", "ds", lambda now: now.body["storage"] != before)
        assert "converters" not in now.body
    finally:
        subprocess.run(["rm", "-r", moved], check=True)
