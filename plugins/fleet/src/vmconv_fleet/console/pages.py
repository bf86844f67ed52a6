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
from vmconv_fleet.catalogue.selection import FIELDS, Selection, parse
from vmconv_fleet.catalogue.snapshot import Snapshot
from vmconv_fleet.console import forms
from vmconv_fleet.console.web import PAGE, Visit, failed, visit_of
from vmconv_fleet.replication.records import Record

_STATIC = {"fleet.css": "text/css", "fleet.js": "text/javascript", "icon.svg": "image/svg+xml"}

B = TypeVar("B", bound=Body)
Page = Callable[[Visit], Response]
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


def _shown(page: Page) -> Endpoint:
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
    jobs = _read(snapshot, kinds.JobBody, "job")
    running = Counter(one.owner for one, body in jobs if body.state in ("planned", "running") and not body.dry_run)
    disks = Counter(one.owner for one in snapshot.find("disk"))
    unanswered = [one for one in snapshot.find("request") if snapshot.response_of(one) is None]
    shared = sum(body.plan.shared + body.plan.referenced for _, body in jobs if body.state == "done" and body.plan)
    moved = sum(body.plan.copied + body.plan.written for _, body in jobs if body.state == "done" and body.plan)
    return visit.page(
        "nodes.html",
        title="Nodes",
        running=running,
        disks=disks,
        unanswered=len(unanswered),
        shared=shared,
        moved=moved,
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
    found = [] if wrong else visit.snapshot.disks(selection)
    offset = visit.offset()
    return visit.page(
        "disks.html",
        title="Disks",
        disks=[(one, kinds.DiskBody.model_validate(one.body)) for one in found[offset : offset + PAGE]],
        total=len(found),
        offset=offset,
        limit=PAGE,
        select=text,
        wrong=wrong,
        fields=FIELDS,
    )


def _disk(visit: Visit) -> Response:
    record, disk = _one(visit, kinds.DiskBody, "disk")
    snapshot = visit.snapshot
    able = snapshot.view.get(record.owner, "capabilities", "installed")
    formats = kinds.CapabilitiesBody.model_validate(able.body).formats if able else {}
    children = [
        (one, body)
        for one, body in _read(snapshot, kinds.DiskBody, "disk", record.owner)
        if any(layer.disk == record.id for layer in body.chain)
    ]
    return visit.page(
        "disk.html",
        title=disk.name,
        record=record,
        disk=disk,
        formats=[name for name, one in sorted(formats.items()) if one.writes],
        children=children,
        jobs=[(one, job) for one, job in _latest_jobs(snapshot) if (one.owner, job.disk) == (record.owner, record.id)],
        vms=[
            (one, vm)
            for one, vm in _read(snapshot, kinds.VmBody, "vm", record.owner)
            if any(used.disk == record.id for used in vm.disks)
        ],
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
        jobs=[
            (one, job) for one, job in _latest_jobs(visit.snapshot) if (one.owner, job.vm) == (record.owner, record.id)
        ],
    )


def _vms(visit: Visit) -> Response:
    found = sorted(_read(visit.snapshot, kinds.VmBody, "vm"), key=lambda one: (one[1].name, one[0].id))
    offset = visit.offset()
    page = found[offset : offset + PAGE]
    return visit.page("vms.html", title="Virtual machines", vms=page, total=len(found), offset=offset, limit=PAGE)


def _latest_jobs(snapshot: Snapshot) -> list[tuple[Record, kinds.JobBody]]:
    found = _read(snapshot, kinds.JobBody, "job")
    return sorted(found, key=lambda one: (-one[1].created_ms, one[0].owner, one[0].id))


def _jobs(visit: Visit) -> Response:
    found = _latest_jobs(visit.snapshot)
    states = Counter(job.state for _, job in found)
    wanted = visit.request.query_params.get("state", "")
    chosen = [one for one in found if not wanted or one[1].state == wanted]
    offset = visit.offset()
    return visit.page(
        "jobs.html",
        title="Jobs",
        jobs=chosen[offset : offset + PAGE],
        total=len(chosen),
        offset=offset,
        limit=PAGE,
        states=states,
        state=wanted,
    )


def _job(visit: Visit) -> Response:
    record, job = _one(visit, kinds.JobBody, "job")
    return visit.page("job.html", title=f"{job.source} to {job.format}", record=record, job=job)


def _requests(visit: Visit) -> Response:
    snapshot = visit.snapshot
    found = sorted(_read(snapshot, kinds.RequestBody, "request"), key=lambda one: -one[0].clock)
    offset = visit.offset()
    page = found[offset : offset + PAGE]
    responses = {(one.owner, one.id): _response_to(snapshot, one) for one, _ in page}
    wishes = {(one.owner, one.id): differences(None, body.arguments) for one, body in page}
    return visit.page(
        "requests.html",
        title="Requests",
        requests=page,
        responses=responses,
        wishes=wishes,
        total=len(found),
        offset=offset,
        limit=PAGE,
    )


def _response_to(snapshot: Snapshot, request: Record) -> kinds.ResponseBody | None:
    record = snapshot.response_of(request)
    return kinds.ResponseBody.model_validate(record.body) if record else None


def _history(visit: Visit) -> Response:
    found = sorted(_read(visit.snapshot, kinds.TransactionBody, "transaction"), key=lambda one: -one[0].clock)
    owner = visit.request.query_params.get("node", "")
    chosen = [one for one in found if not owner or one[0].owner == owner]
    offset = visit.offset()
    page = chosen[offset : offset + PAGE]
    changes = defaultdict(list)
    for record, transaction in page:
        for change in transaction.changes:
            changes[record.owner, record.id].append((change, differences(change.before, change.after)))
    return visit.page(
        "history.html",
        title="History",
        transactions=page,
        changes=changes,
        total=len(chosen),
        offset=offset,
        limit=PAGE,
        owner=owner,
    )


def _tokens(visit: Visit) -> Response:
    found = sorted(_read(visit.snapshot, kinds.TokenBody, "token"), key=lambda one: (one[1].label, one[0].id))
    return visit.page("tokens.html", title="Tokens", tokens=found)


_PAGES: dict[str, Page] = {
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
