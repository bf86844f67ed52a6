"""Which nodes convert the disks of shared storage: a form on the page of its owner's datastore."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from vmconv.plugin import AccessError, UsageError
from vmconv_fleet.console.confirming import Confirmation, confirm, recorded, sent
from vmconv_fleet.console.rendering import address_of
from vmconv_fleet.console.web import Visit, back_to, form_of, query_of, refuse_forged, visit_of
from vmconv_fleet.replication.records import Record
from vmconv_fleet.trust.roles import refuse_unless_allowed

_VERB = "datastore-appoint"


class Other(NamedTuple):
    """A node besides the owner: whether it may convert, and whether it has a datastore on this storage."""

    node: str
    name: str
    appointed: bool
    sees: bool


def others(visit: Visit, record: Record) -> list[Other]:
    """Returns the other nodes that see the storage or are appointed, by name; none for a datastore of no owner."""
    storage, owner = record.body.get("storage"), record.body.get("owner")
    if not storage or owner != record.owner:
        return []
    seeing = {one.owner for one in visit.snapshot.find("datastore") if one.body.get("storage") == storage}
    appointed = frozenset(record.body.get("converters", ()))
    found = [
        Other(node, visit.snapshot.name(node), node in appointed, node in seeing)
        for node in (seeing | appointed) - {owner}
    ]
    return sorted(found, key=lambda one: (one.name, one.node))


def may_appoint(visit: Visit, record: Record) -> bool:
    """Returns whether this browser's session may appoint nodes."""
    try:
        _refuse_others(visit, record)
    except AccessError:
        return False
    return bool(visit.form_key)


def _refuse_others(visit: Visit, record: Record) -> None:
    """Raises AccessError if the caller may not appoint nodes."""
    given, view = {"name": record.id}, visit.snapshot.view
    refuse_unless_allowed(_VERB, record.owner, visit.caller.by, view, visit.snapshot.now_ms, arguments=given)


def review(visit: Visit) -> Response:
    """Returns the page that asks before nodes are appointed or withdrawn."""
    record = recorded(visit, "datastore")
    _refuse_others(visit, record)
    found = others(visit, record)
    if not found:
        raise UsageError(f"no other node sees the storage of {record.id}", hint="declare a datastore on it there first")
    chosen = _chosen(found, query_of(visit.request).get("node", []))
    back = address_of("datastores", record)
    withdrawn = [one.name for one in found if one.appointed and one.node not in chosen]
    if not withdrawn and all(one.appointed for one in found if one.node in chosen):
        return back_to(back, "Nothing is changed: these nodes convert it already")
    names = [visit.snapshot.name(record.owner), *(one.name for one in found if one.node in chosen)]
    if len(names) > 1:
        sentences = [f"{', '.join(names[:-1])} and {names[-1]} convert the disks of {record.id}."]
    else:
        sentences = [f"Only {names[0]} converts the disks of {record.id}."]
    if withdrawn:
        sentences.append(f"{' and '.join(withdrawn)} will begin no conversion there; what runs is finished.")
    what = Confirmation(
        f"Change who converts {record.id}", sentences, "Change who converts", back, fields={"nodes": " ".join(chosen)}
    )
    return confirm(visit, what)


async def appoint(request: Request) -> Response:
    visit, form = visit_of(request), await form_of(request)
    refuse_forged(visit, form)

    def arguments() -> tuple[Record, dict[str, Any]]:
        record = recorded(visit, "datastore")
        return record, {"name": record.id, "nodes": _chosen(others(visit, record), form.get("nodes", "").split())}

    record, given = await run_in_threadpool(arguments)
    return await sent(visit, record.owner, _VERB, given, address_of("datastores", record))


def _chosen(found: Collection[Other], nodes: Collection[str]) -> list[str]:
    """Returns the ids of nodes, each once. Raises UsageError for one that cannot be appointed."""
    known = {one.node for one in found}
    for node in nodes:
        if node not in known:
            raise UsageError(f"node {node[:40]} does not see this storage")
    return list(dict.fromkeys(nodes))
