"""Authentication: the local administrator on the node's socket, or the holder of a token."""

from __future__ import annotations

import re
from typing import Annotated, Any, NamedTuple

from fastapi import Depends, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from vmconv.plugin import AccessError
from vmconv_fleet.api.state import State, StateOf
from vmconv_fleet.catalogue.kinds import Principal, TokenBody
from vmconv_fleet.catalogue.terms import Role
from vmconv_fleet.errors import NotReadyError
from vmconv_fleet.limiter import Connection
from vmconv_fleet.trust import tokens
from vmconv_fleet.trust.rights import Rights, allows
from vmconv_fleet.trust.roles import rights_of, rights_of_token, token_in

_LOCAL = "vmconv.local"
CALLER = "vmconv.caller"
"""The name in a request's scope of its authenticated caller."""
CONNECTION = "vmconv.connection"
"""The name in a request's scope of the limiter's connection."""
_USER = re.compile(r"[^\w.@-]+")
COOKIE = "__Host-vmconv"


class UnknownCallerError(AccessError):
    """The caller has no valid token."""


class Caller(NamedTuple):
    """An authenticated caller. `by` is the caller in requests."""

    by: Principal
    rights: Rights
    is_local: bool = False

    @property
    def role(self) -> Role:
        return self.rights.role

    def must_be(self, role: Role) -> None:
        """Raises AccessError unless the caller has at least this role."""
        if not allows(self.role, role):
            raise AccessError(f"this needs the role {role}, {self.by.user} has {self.role}")

    def must_be_somewhere(self, role: Role) -> None:
        """Raises AccessError unless the caller has this role everywhere or in some datastore."""
        if not self.rights.reach(role):
            raise AccessError(f"this needs the role {role}, {self.by.user} has {self.role}")


def as_local(app: ASGIApp) -> ASGIApp:
    """Returns the application for a socket that only the node's own administrator can open."""

    async def local(scope: Scope, receive: Receive, send: Send) -> None:
        scope[_LOCAL] = True
        await app(scope, receive, send)

    return local


def caller_of(request: Request, state: State) -> Caller:
    """Returns the caller. Raises UnknownCallerError."""
    if request.scope.get(_LOCAL):
        name = _USER.sub("", request.headers.get("x-vmconv-user", ""))[:64].lstrip("-.")
        return Caller(Principal(node=state.node, user=name or "local administrator"), Rights("admin"), is_local=True)
    scheme, _, text = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return of_token(text.strip(), state)
    raise UnknownCallerError("no token", hint="Authorization: Bearer TOKEN")


def of_token(text: str, state: State) -> Caller:
    """Returns the holder of a token. Raises UnknownCallerError if the token is not valid."""
    reference = tokens.reference(text)
    view = state.view()
    record = view.get(reference[0], "token", reference[1]) if reference else None
    if reference is None or record is None:
        raise UnknownCallerError("this token is not known here")
    try:
        token = token_in(record)
        if not tokens.fits(text, token.hash):
            raise UnknownCallerError("this token is not known here")
        rights = rights_of_token(record, view, state.now_ms())
    except AccessError as exc:
        raise UnknownCallerError(str(exc)) from exc
    by = Principal(node=state.node, token="/".join(reference), user=token.label, **_person(token))
    return Caller(by, rights)


def _person(token: TokenBody) -> dict[str, str]:
    """Returns the fields of a caller who has signed in."""
    return {"issuer": token.person.issuer, "subject": token.person.subject} if token.person else {}


def refuse_if_over(caller: Caller, state: State, needed: Role = "viewer") -> None:
    """Checks the caller of a long answer again.

    Raises UnknownCallerError if the token is no longer valid, AccessError if its role is too low.
    """
    try:
        rights = rights_of(caller.by, state.view(), state.now_ms())
    except AccessError as exc:
        raise UnknownCallerError(str(exc)) from exc
    caller._replace(rights=rights).must_be(needed)


def noted(request: Request, caller: Caller) -> Caller:
    """Notes the caller for the log; returns it with the address that it connects from.

    Raises NotReadyError if the caller has as many requests as one may have at a time.
    """
    request.scope[CALLER] = caller.by.user
    if caller.is_local or request.client is None:
        return caller
    connection: Connection | None = request.scope.get(CONNECTION)
    if connection is not None and not connection.hold(holder_of(caller.by)):
        raise NotReadyError("you have as many requests at this node as one may have at a time", hint="try again")
    return caller._replace(by=caller.by.model_copy(update={"address": request.client.host}))


def holder_of(by: Principal) -> str:
    """Returns the same text for all sessions and tokens of a person who has signed in, else for one token."""
    return f"{by.issuer} {by.subject}" if by.subject else str(by.token)


def _caller(request: Request, state: StateOf) -> Caller:
    return noted(request, caller_of(request, state))


def caller_or_browser(request: Request, state: StateOf) -> Caller:
    """Returns the caller, also by a browser's cookie: for requests that change nothing. Raises UnknownCallerError."""
    session = state.sessions.get(request.cookies.get(COOKIE, ""))
    if session and "authorization" not in request.headers:
        return noted(request, of_token(session.token, state))
    return _caller(request, state)


Known = Annotated[Caller, Depends(_caller)]
"""A caller with at least the role viewer."""

KnownOrBrowser = Annotated[Caller, Depends(caller_or_browser)]

UNAUTHORIZED: dict[int | str, dict[str, Any]] = {
    401: {"description": "No valid token"},
    403: {"description": "The role of the token does not allow it"},
}
