"""The web application of a node: API and metrics, and the middleware that protects them and the console."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vmconv.plugin import AccessError, UsageError, VmconvError
from vmconv_fleet.api import bulk, changing, events, exporting, metrics, reading, webhooks
from vmconv_fleet.api.access import CALLER, UnknownCallerError
from vmconv_fleet.api.asking import NotHereError
from vmconv_fleet.api.state import Link, State
from vmconv_fleet.catalogue.complaints import complaint
from vmconv_fleet.errors import ClosedError, NotReadyError, Refusal
from vmconv_fleet.replication.service import NodeService

_log = logging.getLogger("vmconv_fleet.api")

MAX_BODY = 1 << 20

_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    # Not no-referrer: forms would then be sent without their origin.
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
    (
        b"content-security-policy",
        b"default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
        b"form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    ),
)

_STATUS: tuple[tuple[type[VmconvError], int], ...] = (
    (UnknownCallerError, 401),
    (NotHereError, 404),
    (AccessError, 403),
    (UsageError, 422),
    (Refusal, 409),
    (NotReadyError, 503),
    (ClosedError, 503),
)

_DESCRIPTION = """
Reads are answered from this node's replica, connected or not. The owner of a record makes its changes: own records are
changed at once; for others the answer is 202 with the request's id, and `?wait=SECONDS` waits for the owner's response.
Answers to reads have an ETag made of positions of owners; `If-None-Match` works.
"""


def create_app(service: NodeService, *, directory: str, link: Link | None = None) -> FastAPI:
    """Returns the API of a running node; `directory` is the node's own. `console.install` adds the pages."""
    app = FastAPI(
        title="vmconv fleet",
        version="1",
        description=_DESCRIPTION,
        openapi_url="/api/v1/openapi.json",
        # These pages load scripts from other sites.
        docs_url=None,
        redoc_url=None,
    )
    app.state.fleet = State(service, directory, link)
    for one in (reading, exporting, bulk, changing, events, metrics, webhooks):
        app.include_router(one.router)
    for kind, status in _STATUS:
        app.add_exception_handler(kind, _answers(status))
    app.add_exception_handler(VmconvError, _answers(500))
    app.add_exception_handler(TimeoutError, _late)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_middleware(Guard)
    return app


def _answers(status: int) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(_request: Request, exc: Exception) -> Response:
        hint = exc.hint if isinstance(exc, VmconvError) else None
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
        return JSONResponse({"error": str(exc), "hint": hint}, status, headers)

    return answer


async def _invalid(_request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    first = exc.errors()[0]
    # The first part of the place is `body` or `query`: the name of the field says enough.
    return JSONResponse({"error": complaint([{**first, "loc": first["loc"][1:]}]), "hint": None}, 422)


async def _late(_request: Request, _exc: Exception) -> Response:
    """Answers that the replica's thread did not: its disk is slow, or full."""
    said = {"error": "this node did not do it in time", "hint": "it may do it yet: look before you try again"}
    return JSONResponse(said, 503)


async def _gone(_request: Request, _exc: Exception) -> Response:
    """Answers a caller that has disconnected: strangers must not fill the log with tracebacks."""
    return Response(status_code=400)


class Guard:
    """Sets the headers that protect browsers, limits the size of bodies, and logs each call."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        status = 500
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY:
                raise HTTPException(413, f"body of more than {MAX_BODY} bytes")
            return message

        async def protected(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(one for one in _HEADERS if one[0] not in given)]
                if b"cache-control" not in given:
                    message["headers"].append((b"cache-control", b"no-store"))
            await send(message)

        try:
            await self._app(scope, bounded, protected)
        finally:
            _log_call(scope, status, time.monotonic() - began)


def _log_call(scope: Scope, status: int, seconds: float) -> None:
    fields: dict[str, Any] = {
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "who": scope.get(CALLER),
        "ms": round(seconds * 1000, 1),
    }
    changes = scope["method"] not in ("GET", "HEAD")
    _log.log(logging.INFO if changes or status >= 400 else logging.DEBUG, "call", extra={"fields": fields})
