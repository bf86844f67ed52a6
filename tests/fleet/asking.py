"""A replica made for the purpose, whose owner is asked; and valid arguments of each verb."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Any

from vmconv_fleet.catalogue.indexes import INDEXES
from vmconv_fleet.catalogue.terms import Role
from vmconv_fleet.jobs.handlers import make_handlers
from vmconv_fleet.replication.indexing import ALL, Where
from vmconv_fleet.replication.records import Position, Record
from vmconv_fleet.replication.requests import IncomingRequest, Outcome
from vmconv_fleet.replication.signing import CertifiedKey
from vmconv_fleet.replication.store import Store
from vmconv_fleet.trust import tokens

HERE, OTHER, THIRD = "a" * 32, "b" * 32, "c" * 32
NOW = 1_800_000_000_000


class Replica:
    """What a handler may look at."""

    node = HERE
    now = NOW

    def __init__(self) -> None:
        self.records: dict[tuple[str, str, str], Record] = {}
        self.certified: list[CertifiedKey] = []
        self.add(HERE, "datastore", "ds", {"path": "/srv/images"})
        self.add(HERE, "disk", "d1", {"datastore": "ds", "name": "a.vmdk", "format": "vmdk", "virtual_size": 5})
        self.add(HERE, "vm", "v1", {"datastore": "ds", "file": "web.vmx", "name": "web", "format": "vmx"})
        formats = {"qcow2": {"writes": True}, "dmg": {"writes": False}}
        machines = {"libvirt": {"writes": True, "disks": "qcow2"}, "old": {"writes": False}}
        self.add(HERE, "capabilities", "installed", {"formats": formats, "machines": machines})

    def add(self, owner: str, kind: str, identifier: str, body: Mapping[str, Any]) -> None:
        record = Record(owner, kind, identifier, 1, len(self.records) + 1, 1, 0, False, 0, "k", 0, body, b"")
        self.records[owner, kind, identifier] = record

    def get(self, owner: str, kind: str, id: str) -> Record | None:
        return self.records.get((owner, kind, id))

    def find(self, kind: str, owner: str | None = None) -> list[Record]:
        return [one for key, one in sorted(self.records.items()) if key[1] == kind and owner in (None, key[0])]

    def count(self, kind: str, where: Where = ALL) -> int:
        store = Store(sqlite3.connect(":memory:", isolation_level=None), HERE, indexes=INDEXES)
        store.extend(HERE, sorted(self.find(kind, HERE), key=lambda one: one.seq), state=0)
        found = store.count(kind, HERE, where)
        store.close()
        return found

    def forked(self) -> frozenset[str]:
        return frozenset()

    def certified_keys(self) -> list[CertifiedKey]:
        return self.certified

    def positions(self) -> dict[str, Position]:
        return {HERE: Position(1, 9), OTHER: Position(3, 4)}

    def ask(
        self, verb: str, *, requester: str = HERE, by: Mapping[str, Any] | None = None, request: str = "r1", **what: Any
    ) -> Outcome:
        """Asks as the local administrator of a node, unless `by` is somebody else; carries out what was decided."""
        who = {"node": requester, "user": "root"} if by is None else by
        asked = IncomingRequest(request, requester, verb, what, who, 0, False)
        outcome = make_handlers("/nowhere")[verb](self, asked)
        for change in outcome.changes:
            if change.body is None:
                del self.records[HERE, change.kind, change.id]
            else:
                self.add(HERE, change.kind, change.id, change.body)
        return outcome

    def body(self, kind: str, identifier: str) -> Mapping[str, Any]:
        return self.records[HERE, kind, identifier].body

    def token(self, owner: str, role: Role, **more: Any) -> dict[str, Any]:
        """Returns who asks with a new token of this role."""
        new = tokens.make(owner)
        self.add(owner, "token", new.id, {"label": "eve", "role": role, "hash": new.hash, **more})
        return {"node": OTHER, "token": f"{owner}/{new.id}", "user": "eve"}


ASKED: dict[str, dict[str, Any]] = {
    "convert": {"disk": "d1", "format": "qcow2"},
    "convert-machine": {"vm": "v1", "format": "libvirt"},
    "cancel": {"job": "j1"},
    "scan": {},
    "datastore-add": {"name": "more", "path": "/srv/more"},
    "datastore-remove": {"name": "ds"},
    "datastore-appoint": {"name": "ds", "nodes": [OTHER]},
    "datastore-give": {"name": "ds", "to": OTHER},
    "datastore-take": {"name": "ds"},
    "policy-set": {"max_parallel": 3},
    "resume": {"without": [OTHER]},
    "token-create": {"id": "0" * 12, "hash": "0" * 64, "label": "x", "role": "viewer"},
    "token-revoke": {"id": "0" * 12},
    "webhook-add": {"id": "0" * 12, "place": "https://hooks.example"},
    "webhook-remove": {"id": "0" * 12},
    "group-set": {"group": "ops", "role": "operator"},
    "group-remove": {"id": "0" * 32},
    "retire": {"node": OTHER},
    "revoke": {"node": OTHER},
}
