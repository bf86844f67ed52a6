"""Server-sent events: each record, of any owner, when it is committed here."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event

from vmconv_fleet.api.access import UNAUTHORIZED, KnownOrBrowser, UnknownCallerError, caller_or_browser
from vmconv_fleet.api.reading import plain
from vmconv_fleet.api.state import State, StateOf
from vmconv_fleet.errors import NotReadyError
from vmconv_fleet.replication.records import Record

router = APIRouter(prefix="/api/v1", responses=UNAUTHORIZED)

KEEP_ALIVE = 15.0
CHECK = 1.0
"""Seconds for which a stream may outlive its token or session."""


def _event(name: str, data: Mapping[str, Any], **more: Any) -> bytes:
    return format_sse_event(event=name, data_str=json.dumps(data), **more)


_LOST = _event("lost", {})
"""Some records may be missing. The replica has them: read it again."""


@router.get(
    "/events",
    summary="Changes as they arrive (server-sent events)",
    responses={200: {"content": {"text/event-stream": {}}, "description": "One event for each record"}},
    # FastAPI takes the function for a generator if this is EventSourceResponse.
    response_class=StreamingResponse,
)
async def events(
    request: Request,
    state: StateOf,
    _caller: KnownOrBrowser,
    kinds: Annotated[str, Query(description="Only these kinds, separated by commas")] = "",
    last_event_id: Annotated[str, Header(description="The last event before a reconnect")] = "",
) -> StreamingResponse:
    if state.bus.is_full:
        raise NotReadyError("too many listeners on this node")
    wanted = frozenset(filter(None, kinds.split(",")))
    return EventSourceResponse(
        _stream(request, state, wanted, returned=bool(last_event_id)),
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _stream(request: Request, state: State, wanted: frozenset[str], *, returned: bool) -> AsyncIterator[bytes]:
    async with state.bus.listener() as listener:
        yield _event("here", {"node": state.node}, retry=2000)
        if returned:
            yield _LOST
        alive = time.monotonic()
        while not await request.is_disconnected():
            records, lost = await listener.take(CHECK)
            try:
                await run_in_threadpool(caller_or_browser, request, state)
            except UnknownCallerError as exc:
                yield _event("ended", {"reason": str(exc)})
                return
            if lost:
                yield _LOST
            if records:
                for event in await run_in_threadpool(_events, state, records, wanted):
                    yield event
            elif time.monotonic() - alive > KEEP_ALIVE:
                yield KEEPALIVE_COMMENT
                alive = time.monotonic()


def _events(state: State, records: Sequence[Record], wanted: frozenset[str]) -> list[bytes]:
    snapshot = state.snapshot()
    return [
        _event(one.kind, plain(one, snapshot) | {"deleted": one.deleted}, id=f"{one.owner}.{one.epoch}.{one.seq}")
        for one in records
        if not wanted or one.kind in wanted
    ]
