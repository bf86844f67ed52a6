"""Submits requests to owners and waits for their responses."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import Header, Query
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError

from vmconv.plugin import UsageError, VmconvError
from vmconv_fleet.api.access import Caller, refuse_if_over
from vmconv_fleet.api.state import State
from vmconv_fleet.catalogue.complaints import complaint
from vmconv_fleet.catalogue.fields import REQUEST_ID
from vmconv_fleet.catalogue.secrets import shown
from vmconv_fleet.jobs.arguments import ARGUMENTS, Arguments
from vmconv_fleet.replication.records import Record
from vmconv_fleet.replication.requests import response_id
from vmconv_fleet.trust.roles import refuse_unless_allowed

_audit = logging.getLogger("vmconv_fleet.audit")

MAX_WAIT = 300.0
_OWN_WAIT = 15.0
"""Seconds to wait for changes of own records."""
_CHECK = 1.0
"""Seconds for which a waiting caller may outlive its token."""

Wait = Annotated[float, Query(ge=0, le=MAX_WAIT, description="Seconds to wait for the response of another owner")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        pattern=REQUEST_ID,
        description="An id of your choice: the same id again is the same request, which is executed once",
    ),
]


class NotHereError(VmconvError):
    """This node's replica has no such record."""


class Answer(BaseModel):
    """The state of a request: `ok` if executed, `reason` if refused, neither before."""

    request: str
    requester: str
    target: str
    state: str
    ok: bool | None = None
    reason: str | None = None
    transaction: int | None = None
    late: bool = False
    body: dict[str, Any] = {}

    @property
    def status(self) -> int:
        return 202 if self.ok is None else 200 if self.ok else 409

    def as_response(self) -> JSONResponse:
        place = {"Location": f"/api/v1/requests/{self.requester}/{self.request}"}
        return JSONResponse(self.model_dump(exclude_none=True), self.status, place)


def arguments_of(verb: str, given: Mapping[str, Any]) -> Arguments:
    """Returns the arguments of a verb. Raises UsageError if the verb is unknown or they are not valid."""
    if verb not in ARGUMENTS:
        raise UsageError(f"no verb {verb!r}", hint=f"verbs: {', '.join(sorted(ARGUMENTS))}")
    try:
        return ARGUMENTS[verb].model_validate(dict(given))
    except ValidationError as exc:
        raise UsageError(f"{verb}: {complaint(exc.errors())}") from exc


def answer_of(requester: str, request: str, target: str, response: Record | None) -> Answer:
    if response is None:
        return Answer(request=request, requester=requester, target=target, state="sent")
    body = response.body
    return Answer(
        request=request,
        requester=requester,
        target=target,
        state="executed" if body.get("ok") else "refused",
        ok=bool(body.get("ok")),
        reason=body.get("reason"),
        transaction=body.get("transaction"),
        late=bool(body.get("late")),
        body=dict(body.get("body") or {}),
    )


async def ask(
    state: State,
    caller: Caller,
    target: str,
    verb: str,
    arguments: Mapping[str, Any],
    *,
    wait: float = 0,
    key: str | None = None,
) -> Answer:
    """Submits a request to the owner `target` for the caller, and waits up to `wait` seconds for the response.

    Raises AccessError at once if the caller lacks the role: the owner would refuse it as well. Raises UsageError if the
    authority has retired the owner. Raises UnknownCallerError if the caller's token ends while it waits; the request
    stays.
    """
    given = arguments_of(verb, arguments).given()
    state.refuse_while_held()
    if target in (retired := state.service.retirements()):
        raise UsageError(f"node {retired[target] or target} is retired: it answers no requests")
    refuse_unless_allowed(verb, target, caller.by, state.view(), state.now_ms(), arguments=given)
    by = caller.by.plain()
    async with state.bus.listener() as listener:
        # The listener starts before the check, so that no response is missed in between.
        request = await run_in_threadpool(state.service.submit, target, verb, given, by, id=key)
        _audit.info(
            "request",
            extra={"fields": {"request": request, "verb": verb, "target": target, "by": by, "with": shown(given)}},
        )
        until = time.monotonic() + (max(wait, _OWN_WAIT) if target == state.node else wait)
        while (response := state.view().get(target, "response", response_id(state.node, request))) is None:
            left = until - time.monotonic()
            if left <= 0:
                break
            await listener.take(min(left, _CHECK))
            await run_in_threadpool(refuse_if_over, caller, state)
    return answer_of(state.node, request, target, response)


async def ask_many(
    state: State,
    caller: Caller,
    wishes: Sequence[tuple[str, str, Mapping[str, Any]]],
    *,
    wait: float,
    keys: Sequence[str | None],
) -> list[Answer]:
    """Submits many requests at once, like `ask`. A refusal does not stop the others."""
    gate = asyncio.Semaphore(16)

    async def one(target: str, verb: str, arguments: Mapping[str, Any], key: str | None) -> Answer:
        async with gate:
            try:
                return await ask(state, caller, target, verb, arguments, wait=wait, key=key)
            except VmconvError as exc:
                return Answer(
                    request="", requester=state.node, target=target, state="refused", ok=False, reason=str(exc)
                )

    return await asyncio.gather(*(one(*wish, key) for wish, key in zip(wishes, keys, strict=True)))
