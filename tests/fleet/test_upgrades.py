"""Nodes of two versions in one fleet: revision 3 does not know shared storage and retention, revision 6 does."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fleet.in_memory import Node, Wire
from vmconv_fleet.catalogue import kinds
from vmconv_fleet.catalogue.kinds import Body, DatastoreBody, DiskBody, JobBody, JobPlan, PolicyBody
from vmconv_fleet.catalogue.terms import SCHEMA
from vmconv_fleet.errors import StoreError
from vmconv_fleet.jobs.arguments import ARGUMENTS
from vmconv_fleet.replication.records import Change, Record
from vmconv_fleet.replication.store import Store
from vmconv_fleet.testing import PATIENCE

NEW_FIELDS: dict[type[Body], tuple[str, ...]] = {
    PolicyBody: ("keep_days", "keep_records"),
    DatastoreBody: ("storage", "owner", "owners", "give_to", "take", "converters"),
    DiskBody: ("version",),
    JobBody: ("of",),
    JobPlan: ("source", "strips"),
}
NEW_VERBS = ("datastore-appoint", "datastore-give", "datastore-take")


class OldDatastore(Body):
    """What revision 3 knows of a datastore."""

    path: str
    scanned_ms: int = 0
    scan_asked_ms: int = 0


class Fleet:
    """Three nodes that are started and stopped one by one, as revision 3 or 6."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.patch = monkeypatch
        self.wires: dict[str, Wire] = {}
        self.running: dict[int, Node] = {}
        self.revisions: dict[int, int] = {}

    def start(self, number: int, revision: int) -> Node:
        node = self.running[number] = Node(number, self.directory, self.wires)
        self.revisions[number] = revision
        node.service._replica._own._schema = node.service._requests._schema = revision
        if revision == 3:
            handlers = dict(node.service._requests._handlers)
            for verb in NEW_VERBS:
                del handlers[verb]
            node.service._requests._handlers = handlers
        node.start()
        return node

    def stop(self, number: int) -> None:
        node = self.running.pop(number)
        node.service.close()
        del self.wires[node.id]

    def downgrade_file(self, number: int) -> None:
        """Makes the database of a node what version 1 left behind."""
        with sqlite3.connect(self.directory / f"n{number:02}" / "store.sqlite") as database:
            tables = database.execute("SELECT name FROM sqlite_schema WHERE type = 'table' AND name GLOB 'index_*'")
            for (name,) in tables.fetchall():
                database.execute(f"DROP TABLE {name}")
            database.execute("DELETE FROM meta WHERE name = 'indexes'")
            database.execute("DROP INDEX executed_by_clock")
            for column in ("clock", "epoch", "seq"):
                database.execute(f"ALTER TABLE executed DROP COLUMN {column}")
            database.execute("PRAGMA user_version = 1")
        database.close()

    def ask(self, node: Node, target: str, verb: str, **arguments: Any) -> Record:
        by = {"node": node.id, "user": "root"}
        request = node.service.submit(target, verb, arguments, by)
        answer = node.service.response(request, 60)
        assert answer
        return answer

    def agree(self) -> None:
        """Waits until all running nodes have the same records."""

        def known(node: Node) -> set[bytes]:
            return {one.wire for kind in kinds.KINDS for one in node.service.view().find(kind)}

        changed = threading.Event()
        ends = [node.service.subscribe(lambda _records: changed.set()) for node in self.running.values()]
        while True:
            first, *others = map(known, self.running.values())
            if all(other == first for other in others):
                break
            assert changed.wait(PATIENCE)
            changed.clear()
        for end in ends:
            end()

    def close(self) -> None:
        for number in list(self.running):
            self.stop(number)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1)], ids=lambda order: "".join(map(str, order)))
def test_a_rolling_upgrade_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]
) -> None:
    fleet = Fleet(tmp_path, monkeypatch)
    ids = {number: fleet.start(number, 3).id for number in (1, 2, 3)}
    try:
        for node in fleet.running.values():
            node.write(
                Change("datastore", "ds", {"path": "/srv", "scanned_ms": 1}),
                Change("disk", "d1", {"datastore": "ds", "name": f"{node.id[0]}.raw", "format": "raw"}),
            )
            assert fleet.ask(node, node.id, "policy-set", max_parallel=3).body["ok"]
        fleet.agree()
        for number in order:
            fleet.stop(number)
            fleet.downgrade_file(number)
            node = fleet.start(number, 6)
            # The new node uses what only it knows; the old ones keep it, and are asked for what they know.
            new = {"path": "/srv", "scanned_ms": 2, "storage": "s", "owner": node.id, "owners": [{"node": node.id}]}
            node.until(lambda node=node: node.service.serving)  # type: ignore[misc]
            node.write(Change("datastore", "ds", new))
            assert fleet.ask(node, node.id, "policy-set", keep_days=30).body["ok"]
            fleet.agree()
            for other, peer in fleet.running.items():
                answer = fleet.ask(node, ids[other], "datastore-take", name="ds").body
                if fleet.revisions[other] == 3:
                    assert answer["reason"] == "verb 'datastore-take' is unknown to this node"
                    # What an old node rewrites of its own stays; what it has of others is untouched.
                    assert fleet.ask(node, ids[other], "policy-set", max_parallel=2).body["ok"]
                seen = peer.service.view().get(node.id, "datastore", "ds")
                assert seen
                assert seen.body == new
                assert OldDatastore.model_validate(seen.body).stated() == new
        fleet.agree()
        for node in fleet.running.values():
            view = node.service.view()
            assert len(view.find("disk")) == len(view.listed("disk")) == 3
            for owner in ids.values():
                policy, store = view.get(owner, "policy", "conversion"), view.get(owner, "datastore", "ds")
                assert policy
                assert store
                assert policy.body["keep_days"] == 30
                assert store.schema == 6
                numbers = [one.body["number"] for one in view.find("transaction", owner)]
                assert numbers == list(range(1, len(numbers) + 1))
    finally:
        fleet.close()


def test_a_downgrade_is_refused_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(tmp_path, monkeypatch)
    node = fleet.start(1, 6)
    node.write(Change("policy", "conversion", {"keep_days": 30}))
    fleet.stop(1)
    path = tmp_path / "n01" / "store.sqlite"

    def content() -> list[str]:
        with closing(sqlite3.connect(path)) as database:
            return list(database.iterdump())

    before = content()
    # The program before: it knows version 1 of the database.
    monkeypatch.setattr("vmconv_fleet.replication.database.VERSION", 1)
    with pytest.raises(StoreError, match="database has version 3, and this vmconv-fleet knows versions up to 1"):
        Store.open(str(path), node.id)
    assert content() == before
    monkeypatch.undo()
    again = fleet.start(1, 6)
    record = again.service.view().get(node.id, "policy", "conversion")
    assert record
    assert record.body == {"keep_days": 30}
    fleet.close()


def test_the_new_fields_are_those_of_this_revision() -> None:
    """The tests above have to be changed with the schema."""
    assert SCHEMA == 6
    for model, fields in NEW_FIELDS.items():
        assert set(fields) <= model.model_fields.keys()
    assert set(NEW_VERBS) <= ARGUMENTS.keys()
