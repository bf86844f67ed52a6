"""Routes that stream: the export of all records, and the audit. A stream ends with its caller's token."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from vmconv.plugin import AccessError, UsageError
from vmconv_fleet.api.access import UNAUTHORIZED, Caller, Known, refuse_if_over
from vmconv_fleet.api.reading import MAX_LISTED, plain
from vmconv_fleet.api.state import State, StateOf
from vmconv_fleet.catalogue.audit import audited
from vmconv_fleet.catalogue.fields import Milliseconds
from vmconv_fleet.catalogue.kinds import KINDS
from vmconv_fleet.catalogue.terms import Role

router = APIRouter(prefix="/api/v1", responses=UNAUTHORIZED)

_LINES = 100
"""The lines that a stream may send between two looks at its caller's token."""

Moment = Annotated[Milliseconds, Query(description="Milliseconds since 1970")]


@router.get("/export", summary='Everything, one record on each line (NDJSON); {"error": ...} last if it ends early')
def export(state: StateOf, caller: Known) -> StreamingResponse:
    return _stream(state, caller, "operator", _exported(state))


@router.get("/audit", summary="Who asked what, when, from where, with what result (NDJSON); for administrators")
def audit(state: StateOf, caller: Known, since_ms: Moment = 0, until_ms: Moment | None = None) -> StreamingResponse:
    until_ms = state.now_ms() + 1 if until_ms is None else until_ms
    if since_ms >= until_ms:
        raise UsageError(f"since_ms {since_ms} is not before until_ms {until_ms}")
    return _stream(state, caller, "admin", audited(state.snapshot(), since_ms, until_ms))


def _stream(state: State, caller: Caller, role: Role, items: Iterable[dict[str, Any]]) -> StreamingResponse:
    caller.must_be(role)
    return StreamingResponse(_lines(state, caller, role, items), media_type="application/x-ndjson")


def _lines(state: State, caller: Caller, role: Role, items: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yields lines while the caller may see them."""
    lines: list[str] = []
    try:
        for item in items:
            lines.append(json.dumps(item) + "\n")
            if len(lines) == _LINES:
                refuse_if_over(caller, state, role)
                yield "".join(lines)
                lines = []
        refuse_if_over(caller, state, role)
        yield "".join(lines)
    except AccessError as exc:
        yield json.dumps({"error": str(exc)}) + "\n"


def _exported(state: State) -> Iterator[dict[str, Any]]:
    snapshot = state.snapshot()
    for kind in sorted(KINDS):
        page = snapshot.records(kind, limit=MAX_LISTED)
        while page.records:
            yield from (plain(one, snapshot) for one in page.records)
            if page.next is None:
                break
            page = snapshot.records(kind, after=page.next, limit=MAX_LISTED)
