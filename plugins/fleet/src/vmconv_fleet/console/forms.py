"""Entering and leaving the console."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from fastapi import Request
from fastapi.responses import RedirectResponse, Response

from vmconv_fleet.api.access import COOKIE, UnknownCallerError, of_token
from vmconv_fleet.api.sessions import LIFETIME
from vmconv_fleet.api.state import state_of
from vmconv_fleet.console.signin import begin_session, login_door
from vmconv_fleet.console.web import form_of, refuse_foreign, refuse_forged, visit_of
from vmconv_fleet.oidc.people import leave
from vmconv_fleet.oidc.states import own_path

_audit = logging.getLogger("vmconv_fleet.audit")


async def _login(request: Request) -> Response:
    refuse_foreign(request)
    state = state_of(request)
    form = await form_of(request)
    token, next_ = form.get("token", "").strip(), own_path(form.get("next"))
    try:
        caller = of_token(token, state)
    except UnknownCallerError as exc:
        _audit.warning("login refused", extra={"fields": {"why": str(exc)}})
        return login_door(request, next_, wrong=str(exc), status=401)
    _audit.info("login", extra={"fields": {"by": caller.by.plain()}})
    answer = RedirectResponse(next_, 303)
    begin_session(request, answer, token, caller, LIFETIME)
    return answer


async def _logout(request: Request) -> Response:
    visit = visit_of(request)
    refuse_forged(visit, await form_of(request))
    cookie = request.cookies.get(COOKIE, "")
    if session := visit.state.sessions.get(cookie):
        leave(visit.state.service, session.token)
    visit.state.sessions.end(cookie)
    _audit.info("logout", extra={"fields": {"by": visit.caller.by.plain()}})
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(COOKIE, path="/", secure=True, httponly=True, samesite="strict")
    return answer


FORMS: dict[str, Callable[[Request], Awaitable[Response]]] = {"/login": _login, "/logout": _logout}
