"""The pages of the console."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from starlette.routing import Route

from vmconv.plugin import UsageError, VmconvError
from vmconv_fleet.api.asking import NotHereError
from vmconv_fleet.catalogue import kinds
from vmconv_fleet.catalogue.differences import differences
from vmconv_fleet.catalogue.kinds import Body
from vmconv_fleet.catalogue.paging import Page
from vmconv_fleet.catalogue.selection import DISKS, Selection, parse
from vmconv_fleet.catalogue.snapshot import Snapshot
from vmconv_fleet.console import forms
from vmconv_fleet.console.web import PAGE, Visit, failed, visit_of
from vmconv_fleet.replication.indexing import ALL, UNANSWERED, Where
from vmconv_fleet.replication.records import Record

_STATIC = {"fleet.css": "text/css", "fleet.js": "text/javascript", "icon.svg": "image/svg+xml"}

_RELATED = 200
"""The most related records on a page of one."""

B = TypeVar("B", bound=Body)
Show = Callable[[Visit], Response]
Endpoint = Callable[[Request], Awaitable[Response]]


def install(app: FastAPI) -> None:
    """Adds the console to the application; its pages are not part of the API's description."""
    routes = [Route(path, _shown(page), methods=["GET"]) for path, page in _PAGES.items()]
    routes += [Route(path, _guarded(form), methods=["POST"]) for path, form in forms.FORMS.items()]
    routes += [
        Route("/login", _guarded(forms.login_page), methods=["GET"]),
        Route("/static/{name}", _static, methods=["GET"]),
    ]
    app.router.routes.extend(routes)


def _shown(page: Show) -> Endpoint:
    """Returns the endpoint of a page, which reads the replica on a thread."""

    async def show(request: Request) -> Response:
        return await run_in_threadpool(lambda: page(visit_of(request)))

    return _guarded(show)


def _guarded(endpoint: Endpoint) -> Endpoint:
    """Returns the endpoint with errors shown as pages."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except VmconvError as exc:
            return await failed(exc)

    return answer


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _STATIC:
        return Response("not here", 404, media_type="text/plain")
    content = files("vmconv_fleet.console").joinpath("static", name).read_bytes()
    return Response(content, media_type=_STATIC[name], headers={"Cache-Control": "private, max-age=300"})


def _read(snapshot: Snapshot, model: type[B], kind: str, owner: str | None = None) -> list[tuple[Record, B]]:
    return [(one, model.model_validate(one.body)) for one in snapshot.find(kind, owner)]


def _one(visit: Visit, model: type[B], kind: str) -> tuple[Record, B]:
    """Returns the record that the page's address names."""
    owner, identifier = visit.request.path_params["owner"], visit.request.path_params["id"]
    record = visit.snapshot.view.get(owner, kind, identifier)
    if record is None:
        raise NotHereError(f"{kind} {identifier} is not here")
    return record, model.model_validate(record.body)


def _nodes(visit: Visit) -> Response:
    snapshot = visit.snapshot
    view = snapshot.view
    running = Counter(dict(view.tally("job", Where("state IN ('planned', 'running') AND NOT ended"), by=("owner",))))
    disks = Counter(dict(view.tally("disk", by=("owner",))))
    sums = view.tally("job", Where("state = 'done'"), sums=("shared", "referenced", "copied", "written"))
    ((_, shared, referenced, copied, written),) = sums
    return visit.page(
        "nodes.html",
        title="Nodes",
        running=running,
        disks=disks,
        unanswered=view.tally("request", UNANSWERED)[0][0],
        shared=int(shared + referenced),
        moved=int(copied + written),
        problems=visit.state.problems(),
    )


def _node(visit: Visit) -> Response:
    snapshot, owner = visit.snapshot, visit.request.path_params["owner"]
    found = [one for one in snapshot.nodes() if one.node == owner]
    if not found:
        raise NotHereError(f"node {owner} is not here")
    policy = snapshot.view.get(owner, "policy", "conversion")
    able = snapshot.view.get(owner, "capabilities", "installed")
    return visit.page(
        "node.html",
        title=found[0].name,
        node=found[0],
        datastores=_read(snapshot, kinds.DatastoreBody, "datastore", owner),
        policy=kinds.PolicyBody.model_validate(policy.body if policy else {}),
        formats=kinds.CapabilitiesBody.model_validate(able.body).formats if able else {},
    )


def _disks(visit: Visit) -> Response:
    text = visit.request.query_params.get("select", "")[:4000]
    selection: Selection | None = None
    wrong = None
    try:
        selection = parse(text) if text.strip() else None
    except UsageError as exc:
        wrong = str(exc)
    sort = visit.request.query_params.get("sort", "node")
    if sort.removeprefix("-") not in ("node", "name", "size", "actual-size", "format"):
        sort = "node"
    page = Page([], None, 0) if wrong else visit.snapshot.disks(selection, sort=sort, after=visit.after(), limit=PAGE)
    return visit.listing(
        "disks.html",
        page,
        title="Disks",
        disks=[(one, kinds.DiskBody.model_validate(one.body)) for one in page.records],
        select=text,
        sort=sort,
        wrong=wrong,
        fields=DISKS.meanings,
    )


def _disk(visit: Visit) -> Response:
    record, disk = _one(visit, kinds.DiskBody, "disk")
    snapshot = visit.snapshot
    able = snapshot.view.get(record.owner, "capabilities", "installed")
    formats = kinds.CapabilitiesBody.model_validate(able.body).formats if able else {}
    return visit.page(
        "disk.html",
        title=disk.name,
        record=record,
        disk=disk,
        formats=[name for name, one in sorted(formats.items()) if one.writes],
        children=_using(snapshot, kinds.DiskBody, "disk", "parents", record),
        jobs=_jobs_of(snapshot, record),
        vms=_using(snapshot, kinds.VmBody, "vm", "uses", record),
    )


def _vm(visit: Visit) -> Response:
    record, vm = _one(visit, kinds.VmBody, "vm")
    able = visit.snapshot.view.get(record.owner, "capabilities", "installed")
    machines = kinds.CapabilitiesBody.model_validate(able.body).machines if able else {}
    return visit.page(
        "vm.html",
        title=vm.name,
        record=record,
        vm=vm,
        formats=[name for name, one in sorted(machines.items()) if one.writes],
        jobs=_jobs_of(visit.snapshot, record),
    )


def _using(snapshot: Snapshot, model: type[B], kind: str, column: str, disk: Record) -> list[tuple[Record, B]]:
    """Returns the first records of a node whose `column` names one of its disks."""
    uses = Where(f"instr({column}, ?)", (f" {disk.id} ",))
    return _bodies(model, snapshot.page(kind, uses, owner=disk.owner, limit=_RELATED))


def _jobs_of(snapshot: Snapshot, source: Record) -> list[tuple[Record, kinds.JobBody]]:
    """Returns the latest jobs of a disk or a machine."""
    whose = Where(f"{source.kind} = ?", (source.id,))
    page = snapshot.page("job", whose, owner=source.owner, order=("created_ms",), descending=True, limit=_RELATED)
    return _bodies(kinds.JobBody, page)


def _bodies(model: type[B], page: Page) -> list[tuple[Record, B]]:
    return [(one, model.model_validate(one.body)) for one in page.records]


def _vms(visit: Visit) -> Response:
    page = visit.snapshot.page("vm", order=("name",), after=visit.after(), limit=PAGE)
    return visit.listing("vms.html", page, title="Virtual machines", vms=_bodies(kinds.VmBody, page))


def _jobs(visit: Visit) -> Response:
    wanted = visit.request.query_params.get("state", "")
    where = Where("state = ?", (wanted,)) if wanted else ALL
    page = visit.snapshot.page("job", where, order=("created_ms",), descending=True, after=visit.after(), limit=PAGE)
    states = Counter(dict(visit.snapshot.view.tally("job", by=("state",))))
    return visit.listing(
        "jobs.html", page, title="Jobs", jobs=_bodies(kinds.JobBody, page), states=states, state=wanted
    )


def _job(visit: Visit) -> Response:
    record, job = _one(visit, kinds.JobBody, "job")
    return visit.page("job.html", title=f"{job.source} to {job.format}", record=record, job=job)


def _requests(visit: Visit) -> Response:
    snapshot = visit.snapshot
    found = snapshot.page("request", order=("clock",), descending=True, after=visit.after(), limit=PAGE)
    page = _bodies(kinds.RequestBody, found)
    return visit.listing(
        "requests.html",
        found,
        title="Requests",
        requests=page,
        responses={(one.owner, one.id): _response_to(snapshot, one) for one, _ in page},
        wishes={(one.owner, one.id): differences(None, body.arguments) for one, body in page},
    )


def _response_to(snapshot: Snapshot, request: Record) -> kinds.ResponseBody | None:
    record = snapshot.response_of(request)
    return kinds.ResponseBody.model_validate(record.body) if record else None


def _history(visit: Visit) -> Response:
    owner = visit.request.query_params.get("node", "")
    found = visit.snapshot.page(
        "transaction", owner=owner or None, order=("clock",), descending=True, after=visit.after(), limit=PAGE
    )
    page = _bodies(kinds.TransactionBody, found)
    changes = defaultdict(list)
    for record, transaction in page:
        for change in transaction.changes:
            changes[record.owner, record.id].append((change, differences(change.before, change.after)))
    return visit.listing("history.html", found, title="History", transactions=page, changes=changes, owner=owner)


def _tokens(visit: Visit) -> Response:
    found = sorted(_read(visit.snapshot, kinds.TokenBody, "token"), key=lambda one: (one[1].label, one[0].id))
    return visit.page("tokens.html", title="Tokens", tokens=found)


_PAGES: dict[str, Show] = {
    "/": _nodes,
    "/nodes/{owner}": _node,
    "/disks": _disks,
    "/disks/{owner}/{id}": _disk,
    "/vms": _vms,
    "/vms/{owner}/{id}": _vm,
    "/jobs": _jobs,
    "/jobs/{owner}/{id}": _job,
    "/requests": _requests,
    "/history": _history,
    "/tokens": _tokens,
}
