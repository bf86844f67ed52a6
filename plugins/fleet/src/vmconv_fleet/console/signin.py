"""How people enter the console: the login page, and the sign-in at an OpenID provider."""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any, cast
from urllib.parse import quote, urlsplit

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from vmconv.plugin import AccessError
from vmconv_fleet.api.access import CALLER, COOKIE, Caller, of_token
from vmconv_fleet.api.state import state_of
from vmconv_fleet.console.rendering import render
from vmconv_fleet.errors import NotReadyError
from vmconv_fleet.limiter import address_key
from vmconv_fleet.oidc import states
from vmconv_fleet.oidc.fetching import SignInError
from vmconv_fleet.oidc.people import enter
from vmconv_fleet.oidc.places import Places
from vmconv_fleet.oidc.provider import Provider, SignedIn
from vmconv_fleet.oidc.settings import CALLBACK, OidcSettings

_audit = logging.getLogger("vmconv_fleet.audit")

SIGN_IN_COOKIE = "__Host-vmconv-signin"
START = "/login/oidc"
_MAX_ANSWER = 8192


class SignIn:
    """The sign-in of a node; the provider is first asked when somebody signs in."""

    def __init__(self, settings: OidcSettings) -> None:
        self.settings = settings
        self.provider = Provider(settings)
        self.seal = states.Seal()
        self.places = Places()


def _address_of(request: Request) -> bytes:
    host = request.client.host if request.client else ""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET if host else socket.AF_UNIX
    return address_key(family, (host,))


def sign_in_of(request: Request) -> SignIn | None:
    return cast("SignIn | None", request.app.state.sign_in)


def login_door(request: Request, next_: str, *, wrong: str | None = None, status: int = 200) -> Response:
    """Returns the login page."""
    sign_in = sign_in_of(request)
    values: dict[str, Any] = {
        "title": "Enter",
        "wrong": wrong,
        "next": next_,
        "provider": urlsplit(sign_in.settings.issuer).netloc if sign_in else None,
        "start": f"{START}?next={quote(next_, safe='/')}",
    }
    return HTMLResponse(render("login.html", values), status)


async def login_page(request: Request) -> Response:
    return login_door(request, states.own_path(request.query_params.get("next")))


def begin_session(request: Request, answer: Response, token: str, caller: Caller, lifetime: float) -> None:
    """Sets the cookie of a new session, which replaces the browser's old one."""
    sessions = state_of(request).sessions
    sessions.end(request.cookies.get(COOKIE, ""))
    by = caller.by
    answer.set_cookie(
        COOKIE,
        sessions.begin(token, holder=f"{by.issuer} {by.subject}" if by.subject else None, lifetime=lifetime),
        max_age=int(lifetime),
        path="/",
        secure=True,
        httponly=True,
        samesite="strict",
    )


async def _start(request: Request) -> Response:
    """Sends the browser to the provider."""
    sign_in = cast("SignIn", sign_in_of(request))
    next_ = states.own_path(request.query_params.get("next"))
    if request.headers.get("host") != urlsplit(sign_in.settings.url).netloc:
        # The provider sends the browser back to that address, where it needs its cookie.
        return RedirectResponse(f"{sign_in.settings.url}{START}?next={quote(next_, safe='/')}", 303)
    begun = states.begun(next_)
    try:
        async with sign_in.places.taken(_address_of(request)):
            address = await run_in_threadpool(_address, sign_in, begun)
    except (SignInError, NotReadyError) as exc:
        return _refused(request, next_, exc)
    answer = RedirectResponse(address, 303)
    answer.set_cookie(
        SIGN_IN_COOKIE,
        sign_in.seal.close(begun),
        max_age=states.LIFETIME_S,
        path="/",
        secure=True,
        httponly=True,
        # The provider's redirect comes from another site.
        samesite="lax",
    )
    return answer


def _address(sign_in: SignIn, begun: states.SignInState) -> str:
    return sign_in.provider.address(state=begun.state, nonce=begun.nonce, verifier=begun.verifier)


async def _callback(request: Request) -> Response:
    """Ends a sign-in: makes a session of the provider's answer."""
    sign_in = cast("SignIn", sign_in_of(request))
    next_ = "/"
    try:
        begun = _begun(request, sign_in)
        next_ = begun.next
        async with sign_in.places.taken(_address_of(request)):
            person = await run_in_threadpool(_person, request, sign_in, begun)
        token, caller = await run_in_threadpool(_enter, request, sign_in, person)
    except (SignInError, AccessError, NotReadyError) as exc:
        return _refused(request, next_, exc)
    # Not a redirect: after one from another site, browsers do not send cookies that are SameSite=Strict.
    answer = HTMLResponse(render("entered.html", {"title": "Enter", "next": next_}))
    begin_session(request, answer, token, caller, sign_in.settings.minutes * 60)
    return _without_state(answer)


def _begun(request: Request, sign_in: SignIn) -> states.SignInState:
    if len(request.url.query) > _MAX_ANSWER:
        raise SignInError(f"the provider's answer has more than {_MAX_ANSWER} characters")
    return sign_in.seal.open(request.cookies.get(SIGN_IN_COOKIE, ""), request.query_params.get("state", ""))


def _person(request: Request, sign_in: SignIn, begun: states.SignInState) -> SignedIn:
    return sign_in.provider.person(dict(request.query_params), nonce=begun.nonce, verifier=begun.verifier)


def _enter(request: Request, sign_in: SignIn, person: SignedIn) -> tuple[str, Caller]:
    """Returns the token of a person's new session, and the person as its holder."""
    state = state_of(request)
    token = enter(state.service, person, now_ms=state.now_ms(), minutes=sign_in.settings.minutes)
    caller = of_token(token, state)
    request.scope[CALLER] = caller.by.user
    _audit.info("login", extra={"fields": {"by": caller.by.plain()}})
    return token, caller


def _refused(request: Request, next_: str, exc: SignInError | AccessError | NotReadyError) -> Response:
    _audit.warning("login refused", extra={"fields": {"why": str(exc)}})
    said = f"{exc} ({exc.hint})" if exc.hint else str(exc)
    return _without_state(login_door(request, next_, wrong=said, status=503 if isinstance(exc, NotReadyError) else 403))


def _without_state(answer: Response) -> Response:
    answer.delete_cookie(SIGN_IN_COOKIE, path="/", secure=True, httponly=True, samesite="lax")
    return answer


SIGN_IN: dict[str, Callable[[Request], Awaitable[Response]]] = {START: _start, CALLBACK: _callback}
