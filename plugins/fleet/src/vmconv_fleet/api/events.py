"""Server-sent events: each record, of any owner, when it is committed here."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse

from vmconv_fleet.api.access import UNAUTHORIZED, KnownOrBrowser
from vmconv_fleet.api.reading import plain
from vmconv_fleet.api.state import State, StateOf
from vmconv_fleet.errors import NotReadyError

router = APIRouter(prefix="/api/v1", responses=UNAUTHORIZED)

KEEP_ALIVE = 15.0
_LOST = "event: lost\ndata: {}\n\n"
"""Some records may be missing. The replica has them: read it again."""


@router.get(
    "/events",
    summary="Changes as they arrive (server-sent events)",
    responses={200: {"content": {"text/event-stream": {}}, "description": "One event for each record"}},
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
    return StreamingResponse(
        _stream(request, state, wanted, returned=bool(last_event_id)),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _stream(request: Request, state: State, wanted: frozenset[str], *, returned: bool) -> AsyncIterator[str]:
    async with state.bus.listener() as listener:
        yield f"retry: 2000\nevent: here\ndata: {json.dumps({'node': state.node})}\n\n"
        if returned:
            yield _LOST
        while not await request.is_disconnected():
            records, lost = await listener.take(KEEP_ALIVE)
            if lost:
                yield _LOST
            if not records:
                yield ": nothing new\n\n"
                continue
            snapshot = state.snapshot()
            for one in records:
                if wanted and one.kind not in wanted:
                    continue
                content = plain(one, snapshot) | {"deleted": one.deleted}
                yield f"id: {one.owner}.{one.epoch}.{one.seq}\nevent: {one.kind}\ndata: {json.dumps(content)}\n\n"
