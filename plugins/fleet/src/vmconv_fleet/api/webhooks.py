"""Routes of webhooks: the node that is asked keeps URL and secret, and sends the events."""

from __future__ import annotations

import logging
import secrets
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from vmconv.plugin import UsageError
from vmconv_fleet import config
from vmconv_fleet.api.access import UNAUTHORIZED, Caller, Known
from vmconv_fleet.api.asking import Answer, NotHereError, Wait, ask
from vmconv_fleet.api.reading import owner_of, record_of
from vmconv_fleet.api.state import State, StateOf
from vmconv_fleet.catalogue.fields import EventPattern
from vmconv_fleet.notices import delivery
from vmconv_fleet.notices.event import TYPES, Event, fits
from vmconv_fleet.notices.secrets import HookSecrets, Target
from vmconv_fleet.notices.webhooks import delivery_of
from vmconv_fleet.trust.roles import refuse_unless_allowed

router = APIRouter(prefix="/api/v1", responses=UNAUTHORIZED)

_audit = logging.getLogger("vmconv_fleet.audit")


class WebhookWish(BaseModel):
    """A webhook of this node. `secret` is your own; without it there is a new one."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    url: Annotated[str, Field(max_length=delivery.MAX_URL)]
    events: Annotated[list[EventPattern], Field(max_length=32)] = []
    allow_http: bool = False
    secret: Annotated[str, Field(max_length=200)] | None = None


class WebhookMade(Answer):
    """`secret` is shown only once: this node keeps it, and no record has it."""

    webhook: str
    secret: str | None = None


class Tested(BaseModel):
    """Whether the receiver has accepted the event `webhook.test`; `problem` says why not."""

    ok: bool
    problem: str | None = None


@router.post("/webhooks", summary="Add a webhook of this node; only this answer shows its secret")
async def add_webhook(wish: WebhookWish, state: StateOf, caller: Known) -> WebhookMade:
    return await added(wish, state, caller)


async def added(wish: WebhookWish, state: State, caller: Caller, *, key: str | None = None) -> WebhookMade:
    """Adds a webhook; the same `key` again adds none."""
    parts = delivery.parsed(wish.url, allow_http=wish.allow_http)
    secret = wish.secret or delivery.new_secret()
    delivery.key_of(secret)
    for pattern in wish.events:
        if not any(fits(one, [pattern]) for one in TYPES):
            raise UsageError(f"no event is called {pattern!r}", hint=f"events: {', '.join(TYPES)}")
    identifier = secrets.token_hex(6)
    arguments = {"id": identifier, "place": delivery.place_in(parts), "events": wish.events}
    refuse_unless_allowed("webhook-add", state.node, caller.by, state.view(), state.now_ms(), arguments=arguments)
    kept = HookSecrets(state.directory)
    # Before the record, which begins the deliveries.
    await run_in_threadpool(kept.add, identifier, Target(wish.url, secret))
    answer = None
    try:
        answer = await ask(state, caller, state.node, "webhook-add", arguments, key=key)
    finally:
        if answer is None or answer.ok is False:
            await run_in_threadpool(kept.remove, identifier)
    return WebhookMade(**answer.model_dump(), webhook=identifier, secret=None if answer.ok is False else secret)


@router.delete("/webhooks/{owner}/{identifier}", summary="Remove a webhook and its secret")
async def remove_webhook(owner: str, identifier: str, state: StateOf, caller: Known, wait: Wait = 0) -> JSONResponse:
    target = owner_of(state.snapshot(), owner) or owner
    record_of(state, target, "webhook", identifier)
    return (await ask(state, caller, target, "webhook-remove", {"id": identifier}, wait=wait)).as_response()


@router.post("/webhooks/{owner}/{identifier}/test", summary="Send an event webhook.test of this node now")
def test_webhook(owner: str, identifier: str, state: StateOf, caller: Known) -> Tested:
    refuse_unless_allowed("webhook-test", state.node, caller.by, state.view(), state.now_ms(), arguments={})
    if (owner_of(state.snapshot(), owner) or owner) != state.node:
        raise UsageError("a webhook is tested at its own node, which has its secret", hint="--node names that node")
    record_of(state, state.node, "webhook", identifier)
    target = HookSecrets(state.directory).all().get(identifier)
    if target is None:
        raise NotHereError(f"the secret of webhook {identifier} is not on this node", hint="remove it and add it again")
    _audit.info("webhook test", extra={"fields": {"webhook": identifier, "by": caller.by.plain()}})
    return _tested(state, target)


def _tested(state: State, target: Target) -> Tested:
    data: dict[str, Any] = {"node": state.node}
    event = Event(f"evt_{secrets.token_hex(12)}", "webhook.test", state.now_ms(), data, 0)
    sender = delivery_of(config.load(state.directory))
    try:
        sender.send(target.url, target.secret, event.id, delivery.body_of(event))
    except delivery.DeliveryError as exc:
        return Tested(ok=False, problem=str(exc))
    return Tested(ok=True)
