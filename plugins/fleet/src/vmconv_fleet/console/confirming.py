"""Acts on one record: a page that says what will happen, with one button, and the request that it sends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from vmconv.plugin import VmconvError
from vmconv_fleet.api.asking import Answer, NotHereError, ask
from vmconv_fleet.catalogue.summaries import conversion
from vmconv_fleet.console.rendering import address_of
from vmconv_fleet.console.web import Visit, back_to, form_of, refuse_forged, visit_of
from vmconv_fleet.replication.records import Record
from vmconv_fleet.trust.roles import refuse_unless_allowed

WAIT = 3.0
"""Seconds to wait for the owner's answer."""


class Confirmation(NamedTuple):
    """What a page says before an act: `fields` are sent with it, `back` is the page before and after."""

    title: str
    sentences: list[str]
    button: str
    back: str
    danger: bool = False
    fields: Mapping[str, str] = {}
    rows: Sequence[tuple[str, str]] = ()


class Act(NamedTuple):
    """A verb about the record in the page's address, of which `arguments` are made."""

    verb: str
    kind: str
    ask: Callable[[Visit, Record], Confirmation]
    arguments: Callable[[Record], dict[str, Any]]


def confirm(visit: Visit, what: Confirmation) -> Response:
    """Returns the page that asks once; its form is sent to the page's own address."""
    return visit.page("confirm.html", title=what.title, is_live=False, what=what, action=visit.request.url.path)


def asking(act: Act) -> Callable[[Visit], Response]:
    """Returns the page that asks before the act."""

    def page(visit: Visit) -> Response:
        record = recorded(visit, act.kind)
        given = act.arguments(record)
        refuse_unless_allowed(
            act.verb, record.owner, visit.caller.by, visit.snapshot.view, visit.snapshot.now_ms, arguments=given
        )
        return confirm(visit, act.ask(visit, record))

    return page


def doing(act: Act) -> Callable[[Request], Any]:
    """Returns the handler of its form."""

    async def do(request: Request) -> Response:
        visit, form = visit_of(request), await form_of(request)
        refuse_forged(visit, form)
        record = await run_in_threadpool(recorded, visit, act.kind)
        back = (await run_in_threadpool(act.ask, visit, record)).back
        return await sent(visit, record.owner, act.verb, act.arguments(record), back)

    return do


async def sent(visit: Visit, target: str, verb: str, arguments: Mapping[str, Any], back: str) -> Response:
    """Sends a request and redirects to a page, which shows the answer."""
    try:
        answer = await ask(visit.state, visit.caller, target, verb, arguments, wait=WAIT)
    except VmconvError as exc:
        return back_to(back, f"Not requested: {exc}", wrong=True)
    return back_to(back, words(answer), wrong=answer.ok is False)


def words(answer: Answer) -> str:
    if answer.ok is None:
        return f"Requested, request {answer.request}: its owner has not answered yet"
    return f"Done, transaction {answer.transaction}" if answer.ok else f"Refused: {answer.reason}"


def recorded(visit: Visit, kind: str) -> Record:
    """Returns the record in the page's address. Raises NotHereError without one."""
    owner = visit.request.path_params["owner"]
    identifier = visit.request.path_params.get("id", owner)
    record = visit.snapshot.view.get(owner, kind, identifier)
    if record is None:
        raise NotHereError(f"{kind} {identifier} is not here")
    return record


def _cancel(visit: Visit, record: Record) -> Confirmation:
    return Confirmation(
        "Cancel this conversion",
        [f"{conversion(record.body)} on {visit.snapshot.name(record.owner)} ends, and what it has made is removed."],
        "Cancel the conversion",
        address_of("jobs", record),
        danger=True,
    )


def _scan_node(visit: Visit, record: Record) -> Confirmation:
    name = visit.snapshot.name(record.owner)
    return Confirmation("Scan all datastores", [f"{name} reads all its datastores."], "Scan", f"/nodes/{record.owner}")


def _scan_datastore(visit: Visit, record: Record) -> Confirmation:
    name = visit.snapshot.name(record.owner)
    back = address_of("datastores", record)
    return Confirmation(f"Scan {record.id}", [f"{name} reads this datastore."], "Scan", back)


def _remove(visit: Visit, record: Record) -> Confirmation:
    return Confirmation(
        f"Remove datastore {record.id}",
        [
            f"{visit.snapshot.name(record.owner)} no longer lists the {record.body.get('disks', 0)} disks of this"
            " datastore, nor its machines. The files stay."
        ],
        "Remove the datastore from the catalogue",
        "/datastores",
        danger=True,
    )


def _revoke(visit: Visit, record: Record) -> Confirmation:
    role = visit.snapshot.describe_by(record.body.get("by"))
    return Confirmation(
        "Revoke this token",
        [f"The token of {record.body.get('label', '?')}, made by {role or 'somebody'}, is refused from then on."],
        "Revoke the token",
        "/tokens",
        danger=True,
    )


ACTS: Mapping[str, Act] = {
    "/jobs/{owner}/{id}/cancel": Act("cancel", "job", _cancel, lambda one: {"job": one.id}),
    "/nodes/{owner}/scan": Act("scan", "node", _scan_node, lambda _one: {}),
    "/datastores/{owner}/{id}/scan": Act("scan", "datastore", _scan_datastore, lambda one: {"datastore": one.id}),
    "/datastores/{owner}/{id}/remove": Act("datastore-remove", "datastore", _remove, lambda one: {"name": one.id}),
    "/tokens/{owner}/{id}/revoke": Act("token-revoke", "token", _revoke, lambda one: {"id": one.id}),
}
"""The acts by the address of their page."""
