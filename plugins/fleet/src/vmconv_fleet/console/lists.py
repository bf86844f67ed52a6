"""The pages with lists: searched, selected and sorted by the database."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

from fastapi.responses import Response

from vmconv.plugin import UsageError
from vmconv_fleet.api.reading import NO_SCANS
from vmconv_fleet.catalogue import kinds
from vmconv_fleet.catalogue.differences import differences
from vmconv_fleet.catalogue.kinds import Body
from vmconv_fleet.catalogue.paging import Page
from vmconv_fleet.catalogue.searching import containing
from vmconv_fleet.catalogue.selection import DISKS, MAX_LENGTH, VMS, Fields, Selection, parse
from vmconv_fleet.catalogue.snapshot import Snapshot
from vmconv_fleet.catalogue.summaries import summary
from vmconv_fleet.console.web import PAGE, Visit
from vmconv_fleet.replication.indexing import ALL, Where
from vmconv_fleet.replication.records import Record

B = TypeVar("B", bound=Body)

_DISK_ORDERS = ("node", "name", "format", "size", "actual-size")
_VM_ORDERS = ("name", "system", "memory", "processors", "disks")
_STATES = ("queued", "planned", "running", "done", "failed", "cancelled")


def bodies(model: type[B], page: Page) -> list[tuple[Record, B]]:
    return [(one, model.model_validate(one.body)) for one in page.records]


def disks(visit: Visit) -> Response:
    page, chosen = _chosen(visit, DISKS, _DISK_ORDERS, visit.snapshot.disks)
    return visit.listing("disks.html", page, title="Disks", disks=bodies(kinds.DiskBody, page), **chosen)


def vms(visit: Visit) -> Response:
    page, chosen = _chosen(visit, VMS, _VM_ORDERS, visit.snapshot.vms)
    return visit.listing("vms.html", page, title="Virtual machines", vms=bodies(kinds.VmBody, page), **chosen)


def _chosen(
    visit: Visit, fields: Fields, orders: Sequence[str], find: Callable[..., Page]
) -> tuple[Page, dict[str, object]]:
    """Returns the part of a list that the page's address asks for, and what the page says about the choice."""
    text, sort = visit.given("select")[:MAX_LENGTH], visit.given("sort")
    if sort.removeprefix("-") not in orders:
        sort = orders[0]
    selection: Selection | None = None
    wrong = None
    try:
        selection = parse(text, fields) if text.strip() else None
    except UsageError as exc:
        wrong = str(exc)
    page = Page([], None, 0)
    if not wrong:
        page = find(selection, search=visit.given("search"), sort=sort, after=visit.after(), limit=PAGE)
    return page, {"select": text, "sort": sort, "wrong": wrong, "fields": fields.meanings}


def datastores(visit: Visit) -> Response:
    page = visit.snapshot.page("datastore", after=visit.after(), limit=PAGE)
    return visit.listing("datastores.html", page, title="Datastores", datastores=bodies(kinds.DatastoreBody, page))


def jobs(visit: Visit) -> Response:
    state, batch = visit.given("state"), visit.given("batch")
    where = containing("job", visit.given("search"))
    if batch:
        where = where.also("batch = ?", batch)
    states = Counter(dict(visit.snapshot.view.tally("job", where, by=("state",))))
    if state:
        where = where.also("state = ?", state)
    page = visit.snapshot.page("job", where, order=("created_ms",), descending=True, after=visit.after(), limit=PAGE)
    found = bodies(kinds.JobBody, page)
    return visit.listing(
        "jobs.html", page, title="Jobs", jobs=found, states=states, names=_STATES, state=state, batch=batch
    )


def requests(visit: Visit) -> Response:
    snapshot, scans = visit.snapshot, visit.given("scans") == "1"
    page = snapshot.page("request", _worth(scans), order=("clock",), descending=True, after=visit.after(), limit=PAGE)
    found = bodies(kinds.RequestBody, page)
    return visit.listing(
        "requests.html",
        page,
        title="Requests",
        requests=found,
        responses={(one.owner, one.id): _response_to(snapshot, one) for one, _ in found},
        wishes={(one.owner, one.id): differences(None, body.arguments) for one, body in found},
        scans=scans,
    )


def _worth(scans: bool) -> Where:
    """Returns the condition for what is listed: scans would hide everything else."""
    return ALL if scans else NO_SCANS


def _response_to(snapshot: Snapshot, request: Record) -> kinds.ResponseBody | None:
    record = snapshot.response_of(request)
    return kinds.ResponseBody.model_validate(record.body) if record else None


def history(visit: Visit) -> Response:
    owner, scans = visit.given("node"), visit.given("scans") == "1"
    page = visit.snapshot.page(
        "transaction",
        _worth(scans),
        owner=owner or None,
        order=("clock",),
        descending=True,
        after=visit.after(),
        limit=PAGE,
    )
    found = bodies(kinds.TransactionBody, page)
    changes = defaultdict(list)
    for record, transaction in found:
        for change in transaction.changes:
            changes[record.owner, record.id].append((change, differences(change.before, change.after)))
    return visit.listing(
        "history.html",
        page,
        title="History",
        transactions=found,
        summaries={(one.owner, one.id): summary(visit.snapshot, one.owner, one.body) for one, _ in found},
        changes=changes,
        owner=owner,
        scans=scans,
    )


def tokens(visit: Visit) -> Response:
    page = visit.snapshot.page("token", order=("label",), after=visit.after(), limit=PAGE)
    return visit.listing("tokens.html", page, title="Tokens", tokens=bodies(kinds.TokenBody, page))


def policies(visit: Visit) -> Response:
    nodes = [one for one in visit.snapshot.nodes() if one.state != "retired"]
    own = {one.node: visit.snapshot.body(kinds.PolicyBody, one.node, "policy", "conversion") for one in nodes}
    rules = [(one, own[one.node] or kinds.PolicyBody()) for one in nodes]
    return visit.page("policies.html", title="Policies", rules=rules)
