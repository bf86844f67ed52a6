"""The pages of the console."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from starlette.routing import Route

from vmconv.plugin import VmconvError
from vmconv_fleet.api.asking import NotHereError
from vmconv_fleet.catalogue import kinds
from vmconv_fleet.catalogue.kinds import Body
from vmconv_fleet.catalogue.snapshot import Snapshot
from vmconv_fleet.catalogue.summaries import conversion
from vmconv_fleet.console import appointing, confirming, converting, forms, governing, lists, webhooks
from vmconv_fleet.console.lists import bodies
from vmconv_fleet.console.signin import SIGN_IN, SignIn, login_page
from vmconv_fleet.console.web import Visit, failed, visit_of
from vmconv_fleet.oidc.settings import OidcSettings
from vmconv_fleet.replication.indexing import UNANSWERED, Where
from vmconv_fleet.replication.records import Record

_STATIC = {"fleet.css": "text/css", "fleet.js": "text/javascript", "icon.svg": "image/svg+xml"}

_RELATED = 200
"""The most related records on a page of one."""

_FIRST = 20
"""The records of each kind on the page of a datastore."""

B = TypeVar("B", bound=Body)
Show = Callable[[Visit], Response]
Endpoint = Callable[[Request], Awaitable[Response]]


def install(app: FastAPI, sign_in: OidcSettings | None = None) -> None:
    """Adds the console to the application; its pages are not part of the API's description.

    `sign_in` is the provider where people sign in.
    """
    app.state.sign_in = SignIn(sign_in) if sign_in else None
    routes = [Route(path, _shown(page), methods=["GET"]) for path, page in _PAGES.items()]
    routes += [Route(path, _guarded(form), methods=["POST"]) for path, form in _FORMS.items()]
    routes += [
        Route("/login", _guarded(login_page), methods=["GET"]),
        *(Route(path, _guarded(page), methods=["GET"]) for path, page in SIGN_IN.items() if sign_in),
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
            return await failed(request, exc)

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
    body = visit.snapshot.body(model, owner, kind, identifier)
    if record is None or body is None:
        raise NotHereError(f"{kind} {identifier} is not here")
    return record, body


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
    return visit.page(
        "node.html",
        title=found[0].name,
        node=found[0],
        datastores=_read(snapshot, kinds.DatastoreBody, "datastore", owner),
        policy=snapshot.body(kinds.PolicyBody, owner, "policy", "conversion") or kinds.PolicyBody(),
        formats=_able(snapshot, owner).formats,
    )


def _able(snapshot: Snapshot, owner: str) -> kinds.CapabilitiesBody:
    return snapshot.body(kinds.CapabilitiesBody, owner, "capabilities", "installed") or kinds.CapabilitiesBody()


def _disk(visit: Visit) -> Response:
    record, disk = _one(visit, kinds.DiskBody, "disk")
    snapshot = visit.snapshot
    formats = _able(snapshot, record.owner).formats
    jobs = _jobs_of(snapshot, record.owner, Where("disk = ?", (record.id,)))
    return visit.page(
        "disk.html",
        title=disk.name,
        record=record,
        disk=disk,
        formats=[name for name, one in sorted(formats.items()) if one.writes],
        children=_using(snapshot, kinds.DiskBody, "disk", "parents", record),
        jobs=jobs,
        drawn=next((one for one in jobs if one[1].plan and one[1].plan.source), None),
        vms=_using(snapshot, kinds.VmBody, "vm", "uses", record),
    )


def _vm(visit: Visit) -> Response:
    record, vm = _one(visit, kinds.VmBody, "vm")
    jobs = _jobs_of(visit.snapshot, record.owner, Where("vm = ?", (record.id,)))
    ids = [one.disk for one in vm.disks if one.disk]
    disks = {one: visit.snapshot.body(kinds.DiskBody, record.owner, "disk", one) for one in ids}
    machines = _able(visit.snapshot, record.owner).machines
    return visit.page(
        "vm.html",
        title=vm.name,
        record=record,
        vm=vm,
        disks=disks,
        planned=next((one for _, one in jobs if one.plan), None),
        formats=[name for name, one in sorted(machines.items()) if one.writes],
        jobs=jobs,
    )


def _using(snapshot: Snapshot, model: type[B], kind: str, column: str, disk: Record) -> list[tuple[Record, B]]:
    """Returns the first records of a node whose `column` names one of its disks."""
    uses = Where(f"instr({column}, ?)", (f" {disk.id} ",))
    return bodies(model, snapshot.page(kind, uses, owner=disk.owner, limit=_RELATED))


def _jobs_of(snapshot: Snapshot, owner: str, whose: Where) -> list[tuple[Record, kinds.JobBody]]:
    """Returns the latest jobs of an owner for which a condition holds."""
    page = snapshot.page("job", whose, owner=owner, order=("created_ms",), descending=True, limit=_RELATED)
    return bodies(kinds.JobBody, page)


def _datastore(visit: Visit) -> Response:
    record, store = _one(visit, kinds.DatastoreBody, "datastore")
    snapshot, place = visit.snapshot, Where("datastore = ?", (record.id.casefold(),))
    disks = snapshot.page("disk", place, owner=record.owner, order=("size",), descending=True, limit=_FIRST)
    vms = snapshot.page("vm", place, owner=record.owner, order=("name",), limit=_FIRST)
    jobs = Where("? IN (datastore, target_datastore)", (record.id,))
    return visit.page(
        "datastore.html",
        title=record.id,
        record=record,
        store=store,
        disks=bodies(kinds.DiskBody, disks),
        disk_total=disks.total,
        vms=bodies(kinds.VmBody, vms),
        vm_total=vms.total,
        jobs=_jobs_of(snapshot, record.owner, jobs)[:_FIRST],
        selection=f"node={record.owner} and datastore={record.id}",
        others=appointing.others(visit, record),
        may_appoint=appointing.may_appoint(visit, record),
    )


def _job(visit: Visit) -> Response:
    record, job = _one(visit, kinds.JobBody, "job")
    return visit.page("job.html", title=conversion(record.body), record=record, job=job, steps=_steps(job))


def _steps(job: kinds.JobBody) -> list[kinds.JobEvent]:
    """Returns the log of a job, from its request on."""
    who = (job.by.user if job.by else "") or "somebody"
    return [kinds.JobEvent(at_ms=job.created_ms, text=f"requested by {who}"), *job.log]


_ACTS = {**confirming.ACTS, **webhooks.REMOVE}

_PAGES: dict[str, Show] = {
    "/": _nodes,
    "/nodes/{owner}": _node,
    "/datastores": lists.datastores,
    "/datastores/{owner}/{id}": _datastore,
    "/datastores/{owner}/{id}/appoint": appointing.review,
    "/disks": lists.disks,
    "/disks/{owner}/{id}": _disk,
    "/vms": lists.vms,
    "/vms/{owner}/{id}": _vm,
    "/convert": converting.choose,
    "/convert/review": converting.review,
    "/jobs": lists.jobs,
    "/jobs/{owner}/{id}": _job,
    "/requests": lists.requests,
    "/history": lists.history,
    "/policies": lists.policies,
    "/policies/{owner}": governing.policy,
    "/policies/{owner}/review": governing.policy_review,
    "/webhooks": webhooks.webhooks,
    "/webhooks/new": webhooks.new_webhook,
    "/tokens": lists.tokens,
    "/tokens/new": governing.new_token,
    "/tokens/new/review": governing.token_review,
    **{path: confirming.asking(act) for path, act in _ACTS.items()},
}

_FORMS: dict[str, Endpoint] = {
    **forms.FORMS,
    "/convert": converting.convert,
    "/datastores/{owner}/{id}/appoint": appointing.appoint,
    "/policies/{owner}": governing.set_policy,
    "/tokens": governing.make_token,
    "/webhooks": webhooks.make_webhook,
    "/webhooks/{owner}/{id}/test": webhooks.try_webhook,
    **{path: confirming.doing(act) for path, act in _ACTS.items()},
}
