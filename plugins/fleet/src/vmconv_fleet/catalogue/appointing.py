"""Shared storage that several nodes convert: its owner appoints them, and each uses the storage by its own mount, or by
its own name of the store.

The owner's record names the nodes, and all of them check it again when a job begins. So an appointment ends as soon as
its end is known, and with the ownership.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from vmconv.plugin import printable
from vmconv_fleet.catalogue.places import is_container
from vmconv_fleet.errors import Refusal
from vmconv_fleet.replication.records import Record


class Records(Protocol):
    """Looks up live records."""

    def get(self, owner: str, kind: str, id: str, /) -> Record | None: ...

    def find(self, kind: str, owner: str | None = None, /) -> Iterable[Record]: ...


def own_datastore(records: Records, node: str, of: str, source: Record) -> str:
    """Returns the name that a node has for the datastore of a disk or machine of the node `of`.

    Raises Refusal unless `of` owns the storage and has appointed the node, the node sees the same storage, and it finds
    there all files that the source consists of.
    """
    name = str(source.body.get("datastore"))
    theirs = records.get(of, "datastore", name)
    if theirs is None or theirs.body.get("owner") != of or not theirs.body.get("storage"):
        raise Refusal(f"datastore {name} of node {of} is no shared storage of its own")
    if node not in _list(theirs.body.get("converters", [])):
        raise Refusal(f"node {of} has not appointed this node to convert its datastore {name}")
    mine = _on(records, node, theirs)
    if mine is None:
        why, path = "", str(theirs.body.get("path"))
        if is_container(path):
            # What a node calls a store is its own affair.
            why = f": its administrator adds {printable(path)[:200]} by the name that this node has for the store"
        raise Refusal(f"this node does not see the storage of datastore {name} of node {of}{why}")
    own = records.get(node, "datastore", mine)
    same_path = own is not None and own.body.get("path") == theirs.body.get("path")
    if (part := _elsewhere(records, source, same_path=same_path)) is not None:
        what = printable(part)[:200] or "a file"
        raise Refusal(
            f"this node may not find {what} of {source.kind} {source.id}: it is in another datastore, or the storage "
            f"has another path here: ask node {of}"
        )
    return mine


def may_convert(records: Records, node: str, source: Record) -> bool:
    """Returns whether a node can convert a disk or machine: as its owner, or for it."""
    if node == source.owner:
        return True
    try:
        own_datastore(records, node, source.owner, source)
    except Refusal:
        return False
    return True


def _elsewhere(records: Records, source: Record, *, same_path: bool) -> str | None:
    """Returns the name of a part of a disk or machine that another node may not find; None: it finds all.

    A path from the root leads to the same file only with the `same_path` to the datastore.
    """
    if source.kind == "vm":
        parts = [] if source.body.get("packaged") else source.body.get("disks", [])
    else:
        parts = source.body.get("chain", [])
    if not isinstance(parts, list):
        return ""
    for part in parts:
        if not isinstance(part, dict):
            return ""
        name = str(part.get("name", ""))
        # A disk without a file.
        if not name:
            continue
        disk = records.get(source.owner, "disk", str(part.get("disk")))
        if disk is None or disk.body.get("datastore") != source.body.get("datastore"):
            return name
        if not same_path and (name.startswith("/") or ":" in name):
            return name
        # The layers of a disk are those of its own record.
        if source.kind == "vm" and (below := _elsewhere(records, disk, same_path=same_path)) is not None:
            return below
    return None


def converters(records: Records, of: str, datastore: str) -> list[str]:
    """Returns the nodes that can convert the disks of a datastore: its owner, and those that it has appointed."""
    theirs = records.get(of, "datastore", datastore)
    if theirs is None or theirs.body.get("owner") != of or not theirs.body.get("storage"):
        return [of]
    appointed = (one for one in _list(theirs.body.get("converters", [])) if isinstance(one, str))
    return [of, *(node for node in appointed if node != of and _on(records, node, theirs))]


def _list(said: Any) -> list[Any]:
    """Returns a field of another node's record, which may be anything, as a list."""
    return said if isinstance(said, list) else []


def _on(records: Records, node: str, theirs: Record) -> str | None:
    """Returns the name of a node's datastore on the storage of another's, as far as both know whose it is."""
    storage, owner = theirs.body["storage"], theirs.body["owner"]
    for one in records.find("datastore", node):
        if (one.body.get("storage"), one.body.get("owner")) == (storage, owner):
            return one.id
    return None
