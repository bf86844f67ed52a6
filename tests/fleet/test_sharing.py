"""Storage that several nodes see: it has one owner, who lists and converts its disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fleet.in_memory import Node, nodes
from support.disks import MIB, make_disk
from vmconv.plugin import AccessError
from vmconv_fleet.catalogue import sharing
from vmconv_fleet.catalogue.scanning import Scanner
from vmconv_fleet.catalogue.sharing import ATTRIBUTE, FILE, MAX_HISTORY, MAX_NOTE, hold, nearest, refuse_unless_owner
from vmconv_fleet.jobs.runner import JobRunner
from vmconv_fleet.replication.records import Change, Record

ONE, OTHER, THIRD = "1" * 32, "2" * 32, "3" * 32


@pytest.fixture(params=["attribute", "file"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory; with `file` as NFS version 3 would have it, without extended attributes."""
    path = tmp_path / "shared"
    path.mkdir()
    if request.param == "file":

        def unsupported(*_arguments: Any) -> bytes:
            raise OSError(errno.ENOTSUP, "not supported")

        monkeypatch.setattr(os, "setxattr", unsupported)
        monkeypatch.setattr(os, "getxattr", unsupported)
        monkeypatch.setattr(sharing, "_place", lambda _directory, _path: {"network": True})
    return path


def owner(path: Path, node: str, **more: Any) -> str:
    found = hold(str(path), node, 5, **more)
    assert found
    return found.owner


def test_the_first_node_owns_a_storage_and_the_others_see_who(storage: Path) -> None:
    assert owner(storage, ONE) == ONE
    assert owner(storage, OTHER) == owner(storage, ONE) == ONE
    refuse_unless_owner(str(storage), ONE)
    with pytest.raises(AccessError, match=f"belongs to node {ONE}"):
        refuse_unless_owner(str(storage), OTHER)
    assert set(os.listdir(storage)) <= {FILE}


def test_only_its_owner_gives_it_and_the_history_stays(storage: Path) -> None:
    owner(storage, ONE)
    assert owner(storage, OTHER, give_to=OTHER) == ONE
    assert owner(storage, ONE, give_to=OTHER) == OTHER
    found = hold(str(storage), ONE, 9)
    assert found
    assert [(one["node"], one["how"]) for one in found.history] == [(ONE, "declared"), (OTHER, "given")]
    assert set(os.listdir(storage)) <= {FILE}


def test_it_is_taken_from_a_retired_node_only(storage: Path) -> None:
    owner(storage, ONE)
    assert owner(storage, OTHER, take=True) == ONE
    assert owner(storage, OTHER, take=True, retired=[THIRD]) == ONE
    assert owner(storage, OTHER, retired=[ONE]) == ONE
    assert owner(storage, OTHER, take=True, retired=[ONE]) == OTHER


def test_the_note_is_bounded_and_keeps_the_storage(storage: Path) -> None:
    first = hold(str(storage), ONE, 1 << 50)
    for number in range(3 * MAX_HISTORY):
        here, there = (ONE, OTHER) if number % 2 == 0 else (OTHER, ONE)
        owner(storage, here, give_to=there)
    last = hold(str(storage), ONE, 1 << 50)
    assert first
    assert last
    assert (last.storage, len(last.history)) == (first.storage, MAX_HISTORY)
    assert len(json.dumps(last._asdict())) < MAX_NOTE


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b'{"history": []}', b"[" * 3000, b'{"history": [{"node": 1}]}'])
def test_a_note_that_is_none_is_replaced(tmp_path: Path, note: bytes) -> None:
    os.setxattr(tmp_path, ATTRIBUTE, note)
    assert owner(tmp_path, ONE) == owner(tmp_path, OTHER) == ONE


HOSTILE: list[dict[str, Any]] = [
    {"since_ms": float("inf")},
    {"since_ms": 10**3000},
    {"since_ms": -1},
    {"node": "\ud800"},
    {"node": "<b>"},
    {"node": ""},
    {"how": "\ud800"},
]


def write_note(path: Path, **said: Any) -> None:
    """Writes a note with one owner, as anybody does who may write into the directory."""
    step = {"node": OTHER, "since_ms": 5, "how": "declared"} | said
    os.setxattr(path, ATTRIBUTE, json.dumps({"storage": "5" * 32, "place": {}, "history": [step]}).encode())


@pytest.mark.parametrize("said", HOSTILE)
def test_what_no_node_writes_is_no_note(tmp_path: Path, said: dict[str, Any]) -> None:
    write_note(tmp_path)
    assert owner(tmp_path, ONE) == OTHER
    write_note(tmp_path, **said)
    assert owner(tmp_path, ONE) == ONE


def test_a_copied_note_does_not_count(tmp_path: Path) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    original.mkdir()
    assert owner(original, ONE) == ONE
    shutil.copytree(original, copy)
    assert os.getxattr(copy, ATTRIBUTE) == os.getxattr(original, ATTRIBUTE)
    refuse_unless_owner(str(copy), OTHER)
    assert owner(copy, OTHER) == OTHER
    assert owner(original, OTHER) == ONE


def test_a_link_is_no_note(storage: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("{}")
    os.symlink(tmp_path / "elsewhere", storage / FILE)
    os.mkfifo(tmp_path / "pipe")
    hold(str(storage), ONE, 5)
    assert (tmp_path / "elsewhere").read_text() == "{}"


def test_a_directory_that_cannot_be_noted_has_no_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_arguments: Any) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(os, "setxattr", read_only)
    assert hold(str(tmp_path), ONE, 5) is None
    refuse_unless_owner(str(tmp_path), ONE)


# Two nodes


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Sequence[Node]]:
    with nodes(2, tmp_path) as made:
        yield made


def ask(node: Node, target: Node, verb: str, **arguments: Any) -> Record:
    by = {"node": node.id, "user": "root"}
    request = node.service.submit(target.id, verb, arguments, by)
    answer = node.service.response(request, 60)
    assert answer
    return answer


@pytest.mark.parametrize("said", HOSTILE)
def test_a_hostile_note_ends_no_scan(pair: Sequence[Node], tmp_path: Path, said: dict[str, Any]) -> None:
    node = pair[0]
    paths = {name: tmp_path / name for name in ("a", "b")}
    for path in paths.values():
        path.mkdir()
        make_disk(path / "disk.raw", MIB)
    write_note(paths["a"], **said)
    scanner = Scanner(node.service, {name: str(path) for name, path in paths.items()})
    scanner.start()
    try:
        for name in paths:
            found = node.body_when(node.id, "datastore", name, lambda one: one.body.get("scanned_ms", 0) > 0)
            assert "problem" not in found.body
            assert found.body["owner"] == node.id
    finally:
        scanner.stop()


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("disk", {"datastore": "theirs", "name": "a.raw", "chain": 5}),
        ("disk", {"datastore": "theirs", "name": "a.raw", "chain": [5]}),
        ("disk", {"datastore": "theirs", "name": 5}),
        ("disk", {"datastore": "theirs"}),
        ("disk", {"name": "a.raw"}),
        ("datastore", {"path": "/srv", "storage": "5" * 32, "converters": 5}),
        ("policy", {"naming": 5}),
    ],
)
def test_invalid_records_of_the_owner_fail_its_job_and_nothing_else(
    pair: Sequence[Node], tmp_path: Path, kind: str, body: dict[str, Any]
) -> None:
    here, other = pair
    shared: dict[str, Any] = {"path": str(tmp_path), "storage": "5" * 32, "owner": other.id}
    here.write(Change("datastore", "mine", shared))
    records: dict[str, tuple[str, dict[str, Any]]] = {
        "datastore": ("theirs", {**shared, "converters": [here.id]}),
        "disk": ("d", {"datastore": "theirs", "name": "a.raw"}),
        "policy": ("conversion", {}),
    }
    records[kind] = (records[kind][0], body | ({"owner": other.id} if kind == "datastore" else {}))
    other.write(*(Change(kind, identifier, said) for kind, (identifier, said) in records.items()))
    here.until(lambda: here.service.view().get(other.id, "policy", "conversion"))
    job = {"state": "queued", "created_ms": 1, "disk": "d", "of": other.id, "datastore": "mine", "format": "qcow2"}
    here.write(Change("job", "j1", {**job, "source": "a.raw"}))
    runner = JobRunner(here.service, str(here.directory))
    runner.start()
    try:
        ended = here.body_when(here.id, "job", "j1", lambda one: one.body["state"] == "failed").body
    finally:
        runner.stop()
    assert (ended["attempts"], runner.thread.counters["failures"]) == (1, 0), ended


def listed(node: Node) -> set[str]:
    """Returns which disks of the storage the fleet lists, with the number of the node."""
    return {f"{one.owner[0]}:{one.body['name']}" for one in node.service.view().find("disk")}


def test_two_nodes_share_a_storage(pair: Sequence[Node], tmp_path: Path) -> None:
    path = tmp_path / "shared"
    path.mkdir()
    for name in ("a.raw", "b.raw"):
        make_disk(path / name, MIB)
    one, other = pair
    with ExitStack() as stack:
        for node in pair:
            scanner = Scanner(node.service, {"ds": str(path)})
            scanner.start()
            stack.callback(scanner.stop)
            node.body_when(node.id, "datastore", "ds", lambda record: record.body.get("scanned_ms", 0) > 0)
        # Each disk once, whoever came first.
        first = one if one.service.view().get(one.id, "datastore", "ds").body["owner"] == one.id else other  # type: ignore[union-attr]
        second = other if first is one else one
        second.until(lambda: len(listed(second)) == 2)
        assert listed(second) == {f"{first.id[0]}:a.raw", f"{first.id[0]}:b.raw"}
        # The reader may ask, and its own conversions are refused.
        disk = second.service.view().find("disk")[0].id
        wish = {"disk": disk, "format": "raw", "dry_run": True, "job": "j1"}
        assert ask(second, first, "convert", **wish).body["ok"]
        assert "does not exist on this node" in ask(second, second, "convert", **wish).body["reason"]
        assert "owns it and is not retired" in ask(second, second, "datastore-take", name="ds").body["reason"]
        assert "not this node's to give" in ask(first, second, "datastore-give", name="ds", to=first.id).body["reason"]
        # It is given away, and the disks go with it.
        assert ask(first, first, "cancel", job="j1").body["ok"]
        assert ask(first, first, "datastore-give", name="ds", to=second.id).body["ok"]
        for node in pair:
            node.until(lambda node=node: listed(node) == {f"{second.id[0]}:a.raw", f"{second.id[0]}:b.raw"})  # type: ignore[misc]
        # Its new owner lets go of it, and the other takes it back.
        assert ask(second, second, "datastore-remove", name="ds").body["ok"]
        first.until(lambda: first.service.view().get(second.id, "datastore", "ds") is None)
        assert ask(first, first, "datastore-take", name="ds").body["ok"]
        for node in pair:
            node.until(lambda node=node: listed(node) == {f"{first.id[0]}:a.raw", f"{first.id[0]}:b.raw"})  # type: ignore[misc]
    record = first.service.view().get(first.id, "datastore", "ds")
    assert record
    assert [step["how"] for step in record.body["owners"]] == ["declared", "given", "taken"]
    assert "take" not in record.body


def scanned(pair: Sequence[Node], paths: Sequence[Path], order: Sequence[int]) -> None:
    """Lets the two nodes scan their datastores in this order, several times."""
    for _ in range(2):
        for number in order:
            node = pair[number]
            before = at(node)
            scanner = Scanner(node.service, {"ds": str(paths[number])})
            scanner.start()
            try:
                node.until(lambda node=node, before=before: at(node) > before)  # type: ignore[misc]
            finally:
                scanner.stop()
            for other in pair:
                same_records(other, node)


def at(node: Node) -> int:
    """Returns when the datastore was scanned."""
    record = node.service.view().get(node.id, "datastore", "ds")
    return int(record.body.get("scanned_ms", 0)) if record else 0


def same_records(one: Node, other: Node) -> None:
    one.until(lambda: one.service.view().positions() == other.service.view().positions())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["the outer one first", "the inner one first"])
def test_a_datastore_in_another_node_s_is_listed_once(
    pair: Sequence[Node], tmp_path: Path, order: Sequence[int]
) -> None:
    outer, inner = tmp_path / "outer", tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    make_disk(outer / "a.raw", MIB)
    make_disk(inner / "b.raw", MIB)
    scanned(pair, (outer, inner), order)
    one, other = pair
    problems = [node.service.view().get(node.id, "datastore", "ds").body.get("problem") for node in pair]  # type: ignore[union-attr]
    if order == (0, 1):
        assert listed(one) == {"1:a.raw", "1:inner/b.raw"}
        assert problems == [None, f"lies in {outer}, a datastore of node {one.id}, which lists its disks"]
        refuse_unless_owner(str(inner), one.id)
        with pytest.raises(AccessError, match=f"belongs to node {one.id}"):
            refuse_unless_owner(str(inner), other.id)
    else:
        assert listed(one) == {"1:a.raw", "2:b.raw"}
        assert problems == [f"inner: is a datastore of node {other.id}, which lists its disks", None]
        refuse_unless_owner(str(outer), one.id)
        with pytest.raises(AccessError, match=f"belongs to node {other.id}"):
            refuse_unless_owner(str(inner), one.id)
        # Its node gives it up.
        other.write(
            Change("datastore", "ds", None),
            *(Change("disk", record.id, None) for record in other.service.view().find("disk", other.id)),
        )
        same_records(one, other)
        scanned(pair, (outer, inner), (0,))
        assert listed(one) == {"1:a.raw", "1:inner/b.raw"}
        refuse_unless_owner(str(inner), one.id)


def test_a_filesystem_below_belongs_to_no_directory_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    owner(tmp_path, ONE)
    assert nearest(str(inner))
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **more: Device(real(path, **more), 1 + len(str(path))))
    assert nearest(str(inner)) is None


class Device:
    """The status of a file, on another device."""

    def __init__(self, status: os.stat_result, device: int) -> None:
        self._status = status
        self.st_dev = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._status, name)
