"""Session, page layout and CSRF checks shared by all pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from vmconv.plugin import AccessError, UsageError, VmconvError
from vmconv_fleet.api.access import COOKIE, Caller, UnknownCallerError, caller_of, noted, of_token
from vmconv_fleet.api.asking import NotHereError
from vmconv_fleet.api.state import State, state_of
from vmconv_fleet.catalogue.paging import Page
from vmconv_fleet.catalogue.snapshot import Snapshot
from vmconv_fleet.console.rendering import render
from vmconv_fleet.oidc.states import own_path

PAGE = 50
MAX_FORM = 64 << 10
MAX_FIELDS = 400

EVENTS = "node,heartbeat,datastore,disk,vm,job,request,response,transaction,policy,token,webhook,retirement"
"""The kinds of records after whose changes a page looks again."""

Fields = Mapping[str, list[str]]
"""The fields of a form or a query, each with all its values."""


class Visit(NamedTuple):
    """A request for a page: the caller and a snapshot of the fleet. `form_key` is empty without a session."""

    request: Request
    state: State
    caller: Caller
    snapshot: Snapshot
    form_key: str

    def page(
        self, template: str, *, title: str, status: int = 200, is_live: bool = True, **values: Any
    ) -> HTMLResponse:
        """Returns a page with its layout. One that answers a form is not live: it cannot be read again."""
        nodes = self.snapshot.nodes()
        around = {
            "title": title,
            "here": self.snapshot.name(self.state.node),
            "fleet": self.state.service.fleet,
            "snapshot": self.snapshot,
            "nodes": nodes,
            "unseen": self.snapshot.unseen(nodes),
            "is_disconnected": bool(self.state.link and self.state.link.is_disconnected),
            "serving": self.state.service.serving,
            "caller": self.caller,
            "may_change": bool(self.form_key) and self.caller.rights.reach("operator"),
            "may_govern": bool(self.form_key) and self.caller.rights.reach("admin"),
            "form_key": self.form_key,
            "path": self.request.url.path,
            "said": self.given("said")[:300],
            "events": EVENTS if is_live else "",
            "wrong_said": self.given("wrong") == "1",
            "link": self.link,
        }
        return HTMLResponse(render(template, around | values), status)

    def listing(self, template: str, page: Page, *, title: str, **values: Any) -> HTMLResponse:
        """Returns a page with a part of a list."""
        around: dict[str, Any] = {
            "total": page.total,
            "next": page.next,
            "after": self.after(),
            "search": self.given("search"),
        }
        return self.page(template, title=title, **around, **values)

    def given(self, name: str) -> str:
        """Returns a parameter of the page's address, empty if it is missing."""
        return self.request.query_params.get(name, "")

    def link(self, **changed: str | None) -> str:
        """Returns the address of this list with other parameters, from its first part on; None removes one."""
        dropped = {"after": None, "said": None, "wrong": None}
        found = {**self.request.query_params, **dropped, **changed}
        query = urlencode({name: value for name, value in found.items() if value})
        return self.request.url.path + (f"?{query}" if query else "")

    def after(self) -> str | None:
        """Returns the place where the shown part of the list begins; None for the first."""
        return self.request.query_params.get("after") or None


def visit_of(request: Request) -> Visit:
    """Returns the visit. Raises UnknownCallerError for a browser without a session."""
    state = state_of(request)
    session = state.sessions.get(request.cookies.get(COOKIE, ""))
    caller = noted(request, of_token(session.token, state) if session else caller_of(request, state))
    return Visit(request, state, caller, state.snapshot(), session.form_key if session else "")


async def form_of(request: Request) -> Mapping[str, str]:
    """Returns the fields of a form, each with its first value."""
    return {name: values[0] for name, values in (await fields_of(request)).items()}


async def fields_of(request: Request) -> Fields:
    """Returns the fields of a form. Raises AccessError for what no page of the console sends."""
    declared = request.headers.get("content-type", "").partition(";")[0]
    if declared != "application/x-www-form-urlencoded":
        raise AccessError(f"form with content type {declared[:80] or 'none'}")
    body = await request.body()
    if len(body) > MAX_FORM:
        raise AccessError(f"a form of {len(body)} bytes, {MAX_FORM} at most")
    return _parsed(body.decode("utf-8", "replace"))


def query_of(request: Request) -> Fields:
    """Returns the fields of the page's address."""
    return _parsed(request.url.query)


def _parsed(text: str) -> Fields:
    try:
        return parse_qs(text, keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError as exc:
        raise AccessError(f"more than {MAX_FIELDS} fields") from exc


def refuse_foreign(request: Request) -> None:
    """Raises AccessError for a form from another site: browsers state the origin."""
    site = request.headers.get("sec-fetch-site")
    if site is not None and site not in ("same-origin", "none"):
        raise AccessError("this form was sent by another site")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise AccessError("this form was sent by another site")


def refuse_forged(visit: Visit, form: Mapping[str, str]) -> None:
    """Raises AccessError for a form that does not come from a page of this session."""
    import hmac

    refuse_foreign(visit.request)
    if not visit.form_key or not hmac.compare_digest(form.get("form_key", "").encode(), visit.form_key.encode()):
        raise AccessError("this form is not from a page of this session")


def back_to(path: str, said: str, *, wrong: bool = False) -> RedirectResponse:
    """Returns the redirect to a page that shows the result of a form; `wrong` if it is a failure."""
    return RedirectResponse(f"{path}?said={quote(said[:300])}" + ("&wrong=1" if wrong else ""), 303)


_STATUS = ((AccessError, 403), (NotHereError, 404), (UsageError, 422))


def _next(request: Request) -> str:
    """Returns the query that makes the login lead back to this page; none for a form."""
    query = f"?{request.url.query}" if request.url.query else ""
    path = own_path(f"{request.url.path}{query}") if request.method == "GET" else "/"
    return "" if path == "/" else f"?next={quote(path, safe='/')}"


async def failed(request: Request, exc: Exception) -> Response:
    """Returns the page for an error; the login page without a session."""
    if isinstance(exc, UnknownCallerError):
        return RedirectResponse(f"/login{_next(request)}", 303)
    status = next((status for kind, status in _STATUS if isinstance(exc, kind)), 409)
    hint = exc.hint if isinstance(exc, VmconvError) else None
    return HTMLResponse(render("error.html", {"title": "Not possible", "message": str(exc), "hint": hint}), status)
