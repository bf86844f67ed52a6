"""Shared storage that several nodes convert: its owner appoints them, and each uses the storage by its own mount, or by
its own name of the store.

The owner's record names the nodes, and all of them check it again when a job begins. So an appointment ends as soon as
its end is known, and with the ownership.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from vmconv.plugin import printable
from vmconv_fleet.catalogue.places import is_container
from vmconv_fleet.errors import Refusal
from vmconv_fleet.replication.records import Record


class Records(Protocol):
    """Looks up live records."""

    def get(self, owner: str, kind: str, id: str, /) -> Record | None: ...

    def find(self, kind: str, owner: str | None = None, /) -> Iterable[Record]: ...


def own_datastore(records: Records, node: str, of: str, disk: Mapping[str, Any]) -> str:
    """Returns the name that a node has for the datastore of a disk of the node `of`.

    Raises Refusal unless `of` owns the storage and has appointed the node, and the node sees the same storage.
    """
    name = str(disk.get("datastore"))
    theirs = records.get(of, "datastore", name)
    if theirs is None or theirs.body.get("owner") != of or not theirs.body.get("storage"):
        raise Refusal(f"datastore {name} of node {of} is no shared storage of its own")
    if node not in theirs.body.get("converters", ()):
        raise Refusal(f"node {of} has not appointed this node to convert its datastore {name}")
    mine = _on(records, node, theirs)
    if mine is None:
        why, path = "", str(theirs.body.get("path"))
        if is_container(path):
            # What a node calls a store is its own affair.
            why = f": its administrator adds {printable(path)[:200]} by the name that this node has for the store"
        raise Refusal(f"this node does not see the storage of datastore {name} of node {of}{why}")
    return mine


def converters(records: Records, of: str, datastore: str) -> list[str]:
    """Returns the nodes that can convert the disks of a datastore: its owner, and those that it has appointed."""
    theirs = records.get(of, "datastore", datastore)
    if theirs is None or theirs.body.get("owner") != of or not theirs.body.get("storage"):
        return [of]
    return [of, *(node for node in theirs.body.get("converters", ()) if node != of and _on(records, node, theirs))]


def _on(records: Records, node: str, theirs: Record) -> str | None:
    """Returns the name of a node's datastore on the storage of another's, as far as both know whose it is."""
    storage, owner = theirs.body["storage"], theirs.body["owner"]
    for one in records.find("datastore", node):
        if (one.body.get("storage"), one.body.get("owner")) == (storage, owner):
            return one.id
    return None
