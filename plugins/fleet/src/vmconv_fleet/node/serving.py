"""The API on limited sockets: uvicorn, told which connection each request came on."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from vmconv_fleet.api.access import CALLER, CONNECTION
from vmconv_fleet.limiter import Connection, LimitedSocket, Limiter

GRACE_S = 2
"""Time for open requests to end when the servers stop."""
ANSWER_S = 1.0
"""Time for the answers to those that have not."""
READ_S = 60.0
"""Time for a caller to read a part of an answer."""
BACKLOG = 128
"""Connections that wait to be accepted; as many are accepted at a time before others are served."""
_SWEEP_S = 1.0
_MANY = 50
"""Connections accepted between two sweeps that make it worth to collect those that have ended."""


class Site(NamedTuple):
    """An application on a listening socket; `tls` are uvicorn's settings of it."""

    app: ASGIApp
    listening: LimitedSocket
    tls: dict[str, Any]

    def server(self) -> uvicorn.Server:
        limited = type("_Limited", (_Protocol,), {"limiter": self.listening.limiter})
        config = uvicorn.Config(
            self.app,
            http=limited,
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            # Nobody but the peer says who it is.
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=GRACE_S,
            **self.tls,
        )
        return uvicorn.Server(config)


async def serve(
    servers: Sequence[uvicorn.Server], listening: Sequence[LimitedSocket], works: Callable[[], None] = lambda: None
) -> None:
    """Serves until `should_exit` of each server; calls `works` every second."""
    sweeping = asyncio.create_task(_sweep({one.limiter for one in listening}, works))
    try:
        await asyncio.gather(*(server.serve(sockets=[one]) for server, one in zip(servers, listening, strict=True)))
        if cancelled := [task for server in servers for task in server.server_state.tasks]:
            # They answer that the node ends.
            await asyncio.wait(cancelled, timeout=ANSWER_S)
    finally:
        sweeping.cancel()


async def _sweep(limiters: set[Limiter], works: Callable[[], None]) -> None:
    accepted = 0
    while True:
        await asyncio.sleep(_SWEEP_S)
        works()
        for limiter in limiters:
            limiter.sweep()
        before, accepted = accepted, sum(limiter.counters["accepted"] for limiter in limiters)
        if accepted - before >= _MANY:
            # asyncio's TLS keeps 256 KiB for each connection, in a cycle that is otherwise collected rarely.
            gc.collect()


class _Protocol(H11Protocol):
    """HTTP on one connection, whose requests the limiter learns of."""

    limiter: ClassVar[Limiter]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        connection = self.limiter.find(transport.get_extra_info("socket").fileno())
        if connection is not None:
            self.app = cast("Any", _tracked(self.app, connection))


async def _busy(_scope: Scope, _receive: Receive, send: Send) -> None:
    """Answers that too many requests are being answered."""
    await _not_now("this node answers as many requests as it may at a time", "try again in a moment", send)


async def _ending(send: Send) -> None:
    """Answers that the servers stop."""
    await _not_now("this node ends, and has no answer yet", "a request that was sent on is executed all the same", send)


async def _not_now(error: str, hint: str, send: Send) -> None:
    body = json.dumps({"error": error, "hint": hint}).encode()
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"1"), (b"connection", b"close")]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _is_stream(start: Message) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in start["headers"])


def _tracked(app: Any, connection: Connection) -> ASGIApp:
    """Returns the application for one connection: notes its requests, their bodies, and whether the caller is known."""

    async def tracked(scope: Scope, receive: Receive, send: Send) -> None:
        is_complete = is_begun = False
        scope[CONNECTION] = connection

        async def noted() -> Message:
            nonlocal is_complete
            connection.reading(not is_complete)
            try:
                message = await receive()
            finally:
                connection.reading(False)
            is_complete = not message.get("more_body", False)
            return message

        async def known(message: Message) -> None:
            if CALLER in scope:
                connection.known = True
            nonlocal is_begun
            is_begun = True
            if message["type"] == "http.response.start" and _is_stream(message):
                connection.stream()
            try:
                async with asyncio.timeout(READ_S):
                    await send(message)
            except TimeoutError:
                # The caller does not read. What is sent from now on is dropped.
                connection.disconnect()

        try:
            await (app if connection.begin() else _busy)(scope, noted, known)
        except asyncio.CancelledError:
            # uvicorn does so to what has not ended GRACE_S after the request to stop, and would answer 500.
            if is_begun:
                raise
            await _ending(send)
        finally:
            connection.end()

    return tracked
