"""Pages of webhooks: their list, a new one of this node, a test, and their removal."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from pydantic import ValidationError

from vmconv.plugin import UsageError, VmconvError
from vmconv_fleet.api.webhooks import WebhookWish, added, test_webhook
from vmconv_fleet.catalogue import kinds
from vmconv_fleet.catalogue.complaints import complaint
from vmconv_fleet.console.confirming import Act, Confirmation, words
from vmconv_fleet.console.lists import bodies
from vmconv_fleet.console.web import PAGE, Visit, back_to, form_of, refuse_forged, visit_of
from vmconv_fleet.notices.event import TYPES
from vmconv_fleet.replication.records import Record

_ONCE = 16


def webhooks(visit: Visit) -> Response:
    page = visit.snapshot.records("webhook", after=visit.after(), limit=PAGE)
    found = bodies(kinds.WebhookBody, page)
    return visit.listing("webhooks.html", page, title="Webhooks", webhooks=found, own=visit.state.node)


def new_webhook(visit: Visit) -> Response:
    return _form(visit, None)


def _form(visit: Visit, wrong: str | None) -> Response:
    """Returns the page with the form, which is sent in its body: the path of the URL may be a secret."""
    return visit.page(
        "new_webhook.html",
        title="New webhook",
        is_live=False,
        status=422 if wrong else 200,
        wrong=wrong,
        types=TYPES,
        once=secrets.token_hex(_ONCE // 2),
    )


async def make_webhook(request: Request) -> Response:
    """Makes a webhook of this node and shows its secret. The same form again makes none."""
    visit, given = visit_of(request), await form_of(request)
    refuse_forged(visit, given)
    once = given.get("once", "")
    if len(once) != _ONCE or visit.snapshot.view.get(visit.state.node, "request", once) is not None:
        raise UsageError("this form was sent before: its secret was shown then", hint="remove it and make another one")
    try:
        made = await added(_wish(given), visit.state, visit.caller, key=once)
    except VmconvError as exc:
        hint = f" ({exc.hint})" if exc.hint else ""
        return await run_in_threadpool(_form, visit, f"{exc}{hint}")
    return visit.page(
        "webhook.html",
        title="New webhook",
        is_live=False,
        status=200 if made.ok else 409,
        secret=made.secret,
        identifier=made.webhook,
        words=words(made),
    )


def _wish(given: Mapping[str, str]) -> WebhookWish:
    events = [one.strip() for one in given.get("events", "").split(",") if one.strip()]
    try:
        return WebhookWish(
            url=given.get("url", "").strip(), events=events, allow_http=given.get("allow_http") == "yes", secret=None
        )
    except ValidationError as exc:
        raise UsageError(complaint(exc.errors(include_input=False))) from exc


async def try_webhook(request: Request) -> Response:
    """Sends an event `webhook.test` of this node, and shows what the receiver said."""
    visit = visit_of(request)
    refuse_forged(visit, await form_of(request))
    owner, identifier = (str(request.path_params[name]) for name in ("owner", "id"))
    tested = await run_in_threadpool(test_webhook, owner, identifier, visit.state, visit.caller)
    said = f"Webhook {identifier}: the receiver has accepted the event webhook.test"
    return back_to("/webhooks", said if tested.ok else f"Webhook {identifier}: {tested.problem}", wrong=not tested.ok)


def _remove(visit: Visit, record: Record) -> Confirmation:
    node, place = visit.snapshot.name(record.owner), record.body.get("place", "?")
    sentence = f"{node} sends no more events to {place}; those that wait, and the secret, are deleted."
    return Confirmation("Remove this webhook", [sentence], "Remove the webhook", "/webhooks", danger=True)


REMOVE = {"/webhooks/{owner}/{id}/remove": Act("webhook-remove", "webhook", _remove, lambda one: {"id": one.id})}
