"""Routes that read, from this node's replica."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse

from vmconv_fleet.api.access import UNAUTHORIZED, Known
from vmconv_fleet.api.asking import Answer, NotHereError, answer_of
from vmconv_fleet.api.state import State, StateOf
from vmconv_fleet.api.tags import tag_of, tag_of_all, tag_of_positions, tagged
from vmconv_fleet.catalogue.paging import Page
from vmconv_fleet.catalogue.searching import MAX_SEARCH, containing
from vmconv_fleet.catalogue.secrets import shown
from vmconv_fleet.catalogue.selection import VMS, parse
from vmconv_fleet.catalogue.snapshot import NodeView, Snapshot
from vmconv_fleet.catalogue.summaries import summary
from vmconv_fleet.catalogue.windows import Waiting
from vmconv_fleet.replication.clock import milliseconds
from vmconv_fleet.replication.indexing import ALL, UNANSWERED, Where
from vmconv_fleet.replication.records import Record
from vmconv_fleet.replication.signing import CertifiedKey

router = APIRouter(prefix="/api/v1", responses=UNAUTHORIZED)

MAX_LISTED = 1000

NodeName = Annotated[
    str | None, Query(description="Only records of this node: its name, id, or the beginning of its id")
]
Limit = Annotated[int, Query(ge=1, le=MAX_LISTED)]
After = Annotated[str | None, Query(description="`next` of the page before", max_length=20_000)]
BeginningOfId = Annotated[str | None, Query(description="Only records whose id begins like this", max_length=128)]
DiskOrder = Annotated[
    Literal["node", "name", "-name", "size", "-size", "actual-size", "-actual-size", "format", "-format"],
    Query(description="The order; `-` reverses it. node: by node, datastore and name"),
]
VmOrder = Annotated[
    Literal["name", "-name", "system", "-system", "memory", "-memory", "processors", "-processors", "disks", "-disks"],
    Query(description="The order; `-` reverses it. disks: by their number"),
]
Search = Annotated[str, Query(description="Words that are all in the record's texts", max_length=MAX_SEARCH)]
JobStates = Annotated[str | None, Query(description="Only jobs in one of these states, separated by commas")]


def plain(record: Record, snapshot: Snapshot) -> dict[str, Any]:
    """Returns a record as JSON, without the hashes of tokens; of a queued job also when it may begin."""
    waiting = snapshot.waiting_of(record) if record.kind == "job" else Waiting()
    more = {} if waiting.until_ms is None else {"waits_until_ms": waiting.until_ms}
    more |= {"waits_forever": True} if waiting.is_forever else {}
    return {
        "owner": record.owner,
        "node": snapshot.name(record.owner),
        "kind": record.kind,
        "id": record.id,
        "position": f"{record.epoch}.{record.seq}",
        "written_ms": milliseconds(record.clock),
        "transaction": record.txn or None,
        "key": record.key_id,
        "body": shown(record.body),
        **more,
    }


def plain_node(one: NodeView) -> dict[str, Any]:
    return {
        "node": one.node,
        "name": one.name,
        "claims": one.claims,
        "has_record": one.has_record,
        "state": one.state,
        "age_ms": one.age_ms,
        "lag": one.lag,
        "position": f"{one.position.epoch}.{one.position.seq}",
        "neighbour": one.is_neighbour,
        "problems": one.heartbeat.problems if one.heartbeat else [],
        "body": one.body.plain(),
    }


def plain_key(one: CertifiedKey, snapshot: Snapshot, signing: frozenset[tuple[str, str]]) -> dict[str, str]:
    """Returns a key of a node; a key in use has signed the node's last heartbeat."""
    used = "in use" if (one.node, one.key_id) in signing else "unused"
    return {
        "node": one.node,
        "name": snapshot.name(one.node),
        "key": one.key_id,
        "state": "revoked" if one.is_revoked else used,
        "until": one.until.isoformat(timespec="seconds"),
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


class Listing:
    """The wanted part of a list, and the snapshot that it is read from. Raises NotHereError for an unknown node."""

    def __init__(
        self,
        request: Request,
        state: StateOf,
        _caller: Known,
        node: NodeName = None,
        limit: Limit = 100,
        after: After = None,
    ) -> None:
        self.request = request
        self.snapshot = state.snapshot()
        self.owner = owner_of(self.snapshot, node)
        self.limit = limit
        self.after = after

    def page(self, kind: str, where: Where = ALL, *, order: Sequence[str] = (), descending: bool = False) -> Page:
        """Returns the part of an indexed kind."""
        return self.snapshot.page(
            kind, where, owner=self.owner, order=order, descending=descending, after=self.after, limit=self.limit
        )

    def answer(self, page: Page) -> Response:
        items = [plain(one, self.snapshot) for one in page.records]
        # What a job waits for changes without its record.
        waits = (f"{item.get('waits_until_ms')} {item.get('waits_forever')}" for item in items)
        return self.answer_with(page, items, page.records, *waits)

    def answer_with(self, page: Page, items: list[Any], shown: Sequence[Record], *more_of: str) -> Response:
        """Returns the answer with these items, made of the records `shown` and of these texts."""
        more = {} if page.total is None else {"total": page.total}
        tag = tag_of_all(shown, page.total, page.next, self.after, *more_of)
        return tagged(self.request, tag, {**more, "next": page.next, "items": items})


Listed = Annotated[Listing, Depends()]


def _begins(beginning: str | None) -> Where:
    """Returns the condition for ids that begin like this."""
    return ALL if beginning is None else Where("substr(id, 1, ?) = ?", (len(beginning), beginning))


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
        "waits_for": state.waits_for(),
        "forked": state.service.is_forked,
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
    return tagged(request, tag_of_all((), json.dumps(stable)), {"total": len(found), "next": None, "items": found})


@router.get("/nodes/{node}", summary="One node")
def node(request: Request, node: str, state: StateOf, _caller: Known) -> Response:
    snapshot = state.snapshot()
    owner = owner_of(snapshot, node)
    (one,) = [one for one in snapshot.nodes() if one.node == owner]
    return tagged(request, tag_of_all((), one.node, one.position, one.state, one.lag), plain_node(one))


@router.get("/keys", summary="The signing keys that the authority has certified for nodes, and which are revoked")
def keys(request: Request, state: StateOf, _caller: Known, node: NodeName = None) -> Response:
    snapshot = state.snapshot()
    owner = owner_of(snapshot, node)
    signing = snapshot.signing()
    found = [plain_key(one, snapshot, signing) for one in state.service.certified_keys() if owner in (None, one.node)]
    found.sort(key=lambda one: (one["name"], one["node"], one["state"], one["key"]))
    return tagged(request, tag_of_all((), json.dumps(found)), {"total": len(found), "next": None, "items": found})


@router.get("/disks", summary="Disk images, of which a selection can choose some")
def disks(
    wanted: Listed,
    select: Annotated[str | None, Query(description="Such as: format=vmdk and node=n0*", max_length=4000)] = None,
    search: Search = "",
    sort: DiskOrder = "node",
) -> Response:
    chosen = parse(select) if select else None
    page = wanted.snapshot.disks(chosen, wanted.owner, search=search, sort=sort, after=wanted.after, limit=wanted.limit)
    return wanted.answer(page)


@router.get("/jobs", summary="Conversions, the latest first")
def jobs(
    wanted: Listed,
    states: JobStates = None,
    id: BeginningOfId = None,
    batch: Annotated[str | None, Query(description="Only jobs of one call", max_length=128)] = None,
    search: Search = "",
) -> Response:
    where = _begins(id).joined(containing("job", search))
    if states:
        where = where.also("state IN (SELECT value FROM json_each(?))", json.dumps(states.split(",")))
    if batch:
        where = where.also("batch = ?", batch)
    return wanted.answer(wanted.page("job", where, order=("created_ms",), descending=True))


@router.get(
    "/vms", summary="Virtual machines, as files in datastores define them, of which a selection can choose some"
)
def vms(
    wanted: Listed,
    select: Annotated[str | None, Query(description="Such as: os=debian* and memory>4G", max_length=4000)] = None,
    search: Search = "",
    sort: VmOrder = "name",
) -> Response:
    chosen = parse(select, VMS) if select else None
    page = wanted.snapshot.vms(chosen, wanted.owner, search=search, sort=sort, after=wanted.after, limit=wanted.limit)
    return wanted.answer(page)


def _list_of(kind: str, *order: str, descending: bool = False) -> Callable[..., Response]:
    """Returns the route that lists an indexed kind by these columns."""

    def listed(wanted: Listed) -> Response:
        return wanted.answer(wanted.page(kind, order=order, descending=descending))

    return listed


for _path, _summary, _route in (
    ("/datastores", "Directories whose disks are in the catalogue", _list_of("datastore")),
    ("/policies", "How nodes convert", _list_of("policy")),
    ("/webhooks", "Webhooks: nodes, hosts and events", _list_of("webhook")),
    ("/tokens", "Tokens: holders and roles", _list_of("token", "label")),
    ("/groups", "Groups of people, and their roles where they sign in", _list_of("group", "name")),
):
    router.add_api_route(_path, _route, methods=["GET"], summary=_summary, name=_path.strip("/"))


_SCANS_TOO = Query(description="Also those that only asked for a scan")
NO_SCANS = Where("verb != 'scan'")
"""The condition for requests and transactions that did more than ask for a scan."""


@router.get(
    "/transactions",
    summary="Executed transactions: caller, one line of text, records before and after; the latest first",
)
def transactions(wanted: Listed, scans: Annotated[bool, _SCANS_TOO] = True) -> Response:
    page = wanted.page("transaction", ALL if scans else NO_SCANS, order=("clock",), descending=True)
    items = [
        plain(one, wanted.snapshot) | {"summary": summary(wanted.snapshot, one.owner, one.body)} for one in page.records
    ]
    # The text depends on other records, such as a job that knows its target by now.
    return wanted.answer_with(page, items, page.records, *(one["summary"] for one in items))


@router.get("/requests", summary="Requests and their responses, the latest first")
def requests(
    wanted: Listed,
    unanswered: Annotated[bool, Query(description="Only requests without a response")] = False,
    scans: Annotated[bool, _SCANS_TOO] = True,
) -> Response:
    where = (UNANSWERED if unanswered else ALL).joined(ALL if scans else NO_SCANS)
    page = wanted.page("request", where, order=("clock",), descending=True)
    answers = [wanted.snapshot.response_of(one) for one in page.records]
    items = [
        plain(one, wanted.snapshot) | {"answer": _answer(one, answer).model_dump(exclude_none=True)}
        for one, answer in zip(page.records, answers, strict=True)
    ]
    return wanted.answer_with(page, items, [*page.records, *(one for one in answers if one)])


def _answer(request: Record, response: Record | None) -> Answer:
    return answer_of(request.owner, request.id, str(request.body.get("target", "")), response)


@router.get("/requests/{owner}/{identifier}", summary="The response to a request; 202 while there is none")
def request_(owner: str, identifier: str, state: StateOf, _caller: Known) -> JSONResponse:
    record = record_of(state, owner, "request", identifier)
    return _answer(record, state.snapshot().response_of(record)).as_response()


@router.get("/records/{kind}", summary="All records of a kind, known or unknown to this node")
def records(kind: str, wanted: Listed) -> Response:
    return wanted.answer(wanted.snapshot.records(kind, wanted.owner, after=wanted.after, limit=wanted.limit))


@router.get("/records/{owner}/{kind}/{identifier}", summary="One record; its ETag is its owner's position")
def record(request: Request, owner: str, kind: str, identifier: str, state: StateOf, _caller: Known) -> Response:
    snapshot = state.snapshot()
    found = record_of(state, owner_of(snapshot, owner) or owner, kind, identifier)
    return tagged(request, tag_of(found), plain(found, snapshot))
