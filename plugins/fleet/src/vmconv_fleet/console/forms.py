"""Forms of the console: each becomes the same request as in the API and on the command line."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from vmconv.plugin import VmconvError
from vmconv_fleet.api.access import COOKIE, UnknownCallerError, of_token
from vmconv_fleet.api.asking import Answer, ask
from vmconv_fleet.api.sessions import LIFETIME
from vmconv_fleet.api.state import state_of
from vmconv_fleet.console.rendering import render
from vmconv_fleet.console.web import Visit, back_to, form_of, refuse_foreign, refuse_forged, visit_of

_audit = logging.getLogger("vmconv_fleet.audit")

_WAIT = 3.0

CONVERSION = ("format", "target", "zero_copy", "dry_run")
"""The fields of a conversion in the form on a disk's page."""

MACHINE_CONVERSION = (*CONVERSION, "strict")
"""The fields of a conversion in the form on the page of a virtual machine."""


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


async def _asked(visit: Visit, target: str, verb: str, arguments: dict[str, Any], path: str) -> Response:
    """Sends a request and redirects to a page, which shows the answer."""
    try:
        answer = await ask(visit.state, visit.caller, target, verb, arguments, wait=_WAIT)
    except VmconvError as exc:
        return back_to(path, f"Not requested: {exc}")
    return back_to(path, _words(answer))


def _words(answer: Answer) -> str:
    if answer.ok is None:
        return f"Requested, request {answer.request}: its owner has not answered yet"
    return f"Done, transaction {answer.transaction}" if answer.ok else f"Refused: {answer.reason}"


async def _convert(request: Request) -> Response:
    visit, form = visit_of(request), await form_of(request)
    refuse_forged(visit, form)
    owner, disk = request.path_params["owner"], request.path_params["id"]
    arguments = {name: form[name] for name in CONVERSION if form.get(name)}
    return await _asked(visit, owner, "convert", arguments | {"disk": disk}, f"/disks/{owner}/{disk}")


async def _convert_machine(request: Request) -> Response:
    visit, form = visit_of(request), await form_of(request)
    refuse_forged(visit, form)
    owner, vm = request.path_params["owner"], request.path_params["id"]
    arguments = {name: form[name] for name in MACHINE_CONVERSION if form.get(name)}
    return await _asked(visit, owner, "convert-machine", arguments | {"vm": vm}, f"/vms/{owner}/{vm}")


async def _cancel(request: Request) -> Response:
    visit, form = visit_of(request), await form_of(request)
    refuse_forged(visit, form)
    owner, job = request.path_params["owner"], request.path_params["id"]
    return await _asked(visit, owner, "cancel", {"job": job}, f"/jobs/{owner}/{job}")


async def _scan(request: Request) -> Response:
    visit, form = visit_of(request), await form_of(request)
    refuse_forged(visit, form)
    owner = request.path_params["owner"]
    arguments = {"datastore": form["datastore"]} if form.get("datastore") else {}
    return await _asked(visit, owner, "scan", arguments, f"/nodes/{owner}")


async def _revoke_token(request: Request) -> Response:
    visit, form = visit_of(request), await form_of(request)
    refuse_forged(visit, form)
    owner, identifier = request.path_params["owner"], request.path_params["id"]
    return await _asked(visit, owner, "token-revoke", {"id": identifier}, "/tokens")


FORMS: dict[str, Callable[[Request], Awaitable[Response]]] = {
    "/login": _login,
    "/logout": _logout,
    "/disks/{owner}/{id}/convert": _convert,
    "/vms/{owner}/{id}/convert": _convert_machine,
    "/jobs/{owner}/{id}/cancel": _cancel,
    "/nodes/{owner}/scan": _scan,
    "/tokens/{owner}/{id}/revoke": _revoke_token,
}
