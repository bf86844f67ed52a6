"""Routes that read, from this node's replica."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from vmconv_fleet.api.access import UNAUTHORIZED, Caller, Known
from vmconv_fleet.api.asking import Answer, NotHereError, answer_of
from vmconv_fleet.api.state import State, StateOf
from vmconv_fleet.api.tags import tag_of, tag_of_all, tag_of_positions, tagged
from vmconv_fleet.catalogue.kinds import KINDS
from vmconv_fleet.catalogue.selection import parse
from vmconv_fleet.catalogue.snapshot import NodeView, Snapshot
from vmconv_fleet.replication.clock import milliseconds
from vmconv_fleet.replication.records import Record

router = APIRouter(prefix="/api/v1", responses=UNAUTHORIZED)

MAX_LISTED = 1000

NodeName = Annotated[
    str | None, Query(description="Only records of this node: its name, id, or the beginning of its id")
]
Limit = Annotated[int, Query(ge=1, le=MAX_LISTED)]
Offset = Annotated[int, Query(ge=0)]
JobStates = Annotated[str | None, Query(description="Only jobs in one of these states, separated by commas")]


def plain(record: Record, snapshot: Snapshot) -> dict[str, Any]:
    """Returns a record as JSON. Records hold no secrets, but hashes of tokens are omitted."""
    body = {key: value for key, value in record.body.items() if (record.kind, key) != ("token", "hash")}
    return {
        "owner": record.owner,
        "node": snapshot.name(record.owner),
        "kind": record.kind,
        "id": record.id,
        "position": f"{record.epoch}.{record.seq}",
        "written_ms": milliseconds(record.clock),
        "transaction": record.txn or None,
        "body": body,
    }


def plain_node(one: NodeView) -> dict[str, Any]:
    return {
        "node": one.node,
        "name": one.name,
        "state": one.state,
        "age_ms": one.age_ms,
        "lag": one.lag,
        "position": f"{one.position.epoch}.{one.position.seq}",
        "neighbour": one.is_neighbour,
        "problems": one.heartbeat.problems if one.heartbeat else [],
        "body": one.body.plain(),
    }


def owner_of(snapshot: Snapshot, named: str | None) -> str | None:
    """Returns the id of a node, given by name or id. Raises NotHereError if it is unknown."""
    if named is None:
        return None
    found = snapshot.find_node(named)
    if found is None:
        raise NotHereError(f"no node {named!r}")
    return found


def record_of(state: State, owner: str, kind: str, identifier: str) -> Record:
    record = state.view().get(owner, kind, identifier)
    if record is None:
        raise NotHereError(f"{kind} {identifier} of {owner} is not here")
    return record


def _listed(request: Request, snapshot: Snapshot, records: list[Record], limit: int, offset: int) -> Response:
    page = records[offset : offset + limit]
    return tagged(
        request,
        tag_of_all(page, len(records), offset),
        {"total": len(records), "offset": offset, "items": [plain(one, snapshot) for one in page]},
    )


@router.get("/fleet", summary="This node and its replica")
def fleet(request: Request, state: StateOf, _caller: Known) -> Response:
    snapshot = state.snapshot()
    nodes = snapshot.nodes()
    positions = state.view().positions()
    content = {
        "fleet": state.service.fleet,
        "node": state.node,
        "name": snapshot.name(state.node),
        "serving": state.service.serving,
        "cut": bool(state.link and state.link.is_disconnected),
        "problems": state.problems(),
        "nodes": len(nodes),
        "unseen": [{"node": one.node, "name": one.name, "age_ms": one.age_ms} for one in snapshot.unseen(nodes)],
        "positions": {owner: f"{at.epoch}.{at.seq}" for owner, at in sorted(positions.items())},
    }
    return tagged(request, tag_of_positions(positions), content)


@router.get("/nodes", summary="The nodes: state, age of the last heartbeat, records behind")
def nodes(request: Request, state: StateOf, _caller: Known) -> Response:
    found = [plain_node(one) for one in state.snapshot().nodes()]
    stable = [{key: value for key, value in one.items() if key != "age_ms"} for one in found]
    return tagged(request, tag_of_all((), json.dumps(stable)), {"total": len(found), "offset": 0, "items": found})


@router.get("/nodes/{node}", summary="One node")
def node(request: Request, node: str, state: StateOf, _caller: Known) -> Response:
    snapshot = state.snapshot()
    owner = owner_of(snapshot, node)
    (one,) = [one for one in snapshot.nodes() if one.node == owner]
    return tagged(request, tag_of_all((), one.node, one.position, one.state, one.lag), plain_node(one))


@router.get("/disks", summary="Disk images, of which a selection can choose some")
def disks(
    request: Request,
    state: StateOf,
    _caller: Known,
    select: Annotated[str | None, Query(description="Such as: format=vmdk and node=n0*", max_length=4000)] = None,
    node: NodeName = None,
    limit: Limit = 100,
    offset: Offset = 0,
) -> Response:
    snapshot = state.snapshot()
    found = snapshot.disks(parse(select) if select else None, owner_of(snapshot, node))
    return _listed(request, snapshot, found, limit, offset)


@router.get("/jobs", summary="Conversions, the latest first")
def jobs(
    request: Request,
    state: StateOf,
    _caller: Known,
    states: JobStates = None,
    node: NodeName = None,
    limit: Limit = 100,
    offset: Offset = 0,
) -> Response:
    snapshot = state.snapshot()
    found = snapshot.find("job", owner_of(snapshot, node))
    if states:
        wanted = set(states.split(","))
        found = [one for one in found if one.body.get("state") in wanted]
    found.sort(key=lambda one: (-int(one.body.get("created_ms", 0)), one.owner, one.id))
    return _listed(request, snapshot, found, limit, offset)


def _list_of(kind: str, order: Callable[[Record], Any] | None) -> Callable[..., Response]:
    """Returns the route that lists a kind; `order` None: the latest first."""

    def listed(
        request: Request, state: StateOf, _caller: Known, node: NodeName = None, limit: Limit = 100, offset: Offset = 0
    ) -> Response:
        snapshot = state.snapshot()
        found = snapshot.find(kind, owner_of(snapshot, node))
        found.sort(key=order or (lambda one: (-one.clock, one.owner, one.id)))
        return _listed(request, snapshot, found, limit, offset)

    return listed


for _path, _kind, _summary, _order in (
    ("/datastores", "datastore", "Directories whose disks are in the catalogue", lambda one: (one.owner, one.id)),
    ("/vms", "vm", "Virtual machines, as files in datastores define them", lambda one: (one.body["name"], one.id)),
    ("/policies", "policy", "How nodes convert", lambda one: one.owner),
    ("/tokens", "token", "Tokens: holders and roles", lambda one: (one.body["label"], one.id)),
    ("/transactions", "transaction", "Executed transactions: caller, records before and after; the latest first", None),
):
    router.add_api_route(_path, _list_of(_kind, _order), methods=["GET"], summary=_summary, name=_kind)


@router.get("/requests", summary="Requests and their responses, the latest first")
def requests(
    request: Request, state: StateOf, _caller: Known, node: NodeName = None, limit: Limit = 100, offset: Offset = 0
) -> Response:
    snapshot = state.snapshot()
    found = sorted(snapshot.find("request", owner_of(snapshot, node)), key=lambda one: -one.clock)
    page = found[offset : offset + limit]
    answers = [snapshot.response_of(one) for one in page]
    items = [
        plain(one, snapshot) | {"answer": _answer(one, answer).model_dump(exclude_none=True)}
        for one, answer in zip(page, answers, strict=True)
    ]
    tag = tag_of_all([*page, *(one for one in answers if one)], len(found), offset)
    return tagged(request, tag, {"total": len(found), "offset": offset, "items": items})


def _answer(request: Record, response: Record | None) -> Answer:
    return answer_of(request.owner, request.id, str(request.body.get("target", "")), response)


@router.get("/requests/{owner}/{identifier}", summary="The response to a request; 202 while there is none")
def request_(owner: str, identifier: str, state: StateOf, _caller: Known) -> JSONResponse:
    record = record_of(state, owner, "request", identifier)
    return _answer(record, state.snapshot().response_of(record)).as_response()


@router.get("/records/{kind}", summary="All records of a kind, known or unknown to this node")
def records(
    request: Request,
    kind: str,
    state: StateOf,
    _caller: Known,
    node: NodeName = None,
    limit: Limit = 100,
    offset: Offset = 0,
) -> Response:
    snapshot = state.snapshot()
    return _listed(request, snapshot, state.view().find(kind, owner_of(snapshot, node)), limit, offset)


@router.get("/records/{owner}/{kind}/{identifier}", summary="One record; its ETag is its owner's position")
def record(request: Request, owner: str, kind: str, identifier: str, state: StateOf, _caller: Known) -> Response:
    snapshot = state.snapshot()
    found = record_of(state, owner_of(snapshot, owner) or owner, kind, identifier)
    return tagged(request, tag_of(found), plain(found, snapshot))


@router.get("/export", summary="Everything, one record on each line (NDJSON)")
def export(state: StateOf, caller: Known) -> StreamingResponse:
    caller.must_be("operator")
    return StreamingResponse(_exported(state, caller), media_type="application/x-ndjson")


def _exported(state: State, _caller: Caller) -> Iterator[str]:
    snapshot = state.snapshot()
    for kind in sorted(KINDS):
        for one in state.view().find(kind):
            yield json.dumps(plain(one, snapshot)) + "\n"
