"""Entering and leaving the console."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from vmconv_fleet.api.access import COOKIE, UnknownCallerError, of_token
from vmconv_fleet.api.sessions import LIFETIME
from vmconv_fleet.api.state import state_of
from vmconv_fleet.console.rendering import render
from vmconv_fleet.console.web import form_of, refuse_foreign, refuse_forged, visit_of

_audit = logging.getLogger("vmconv_fleet.audit")


async def login_page(_request: Request) -> Response:
    return HTMLResponse(render("login.html", {"title": "Enter", "wrong": None}))


async def _login(request: Request) -> Response:
    refuse_foreign(request)
    state = state_of(request)
    token = (await form_of(request)).get("token", "").strip()
    try:
        caller = of_token(token, state)
    except UnknownCallerError as exc:
        _audit.warning("login refused", extra={"fields": {"why": str(exc)}})
        return HTMLResponse(render("login.html", {"title": "Enter", "wrong": str(exc)}), 401)
    _audit.info("login", extra={"fields": {"by": caller.by.plain()}})
    answer = RedirectResponse("/", 303)
    answer.set_cookie(
        COOKIE,
        state.sessions.begin(token),
        max_age=int(LIFETIME),
        path="/",
        secure=True,
        httponly=True,
        samesite="strict",
    )
    return answer


async def _logout(request: Request) -> Response:
    visit = visit_of(request)
    refuse_forged(visit, await form_of(request))
    visit.state.sessions.end(request.cookies.get(COOKIE, ""))
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(COOKIE, path="/", secure=True, httponly=True, samesite="strict")
    return answer


FORMS: dict[str, Callable[[Request], Awaitable[Response]]] = {"/login": _login, "/logout": _logout}
