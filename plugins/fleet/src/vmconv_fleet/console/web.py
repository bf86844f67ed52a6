"""Session, page layout and CSRF checks shared by all pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, urlsplit

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from vmconv.plugin import AccessError, VmconvError
from vmconv_fleet.api.access import COOKIE, Caller, UnknownCallerError, caller_of, noted, of_token
from vmconv_fleet.api.state import State, state_of
from vmconv_fleet.catalogue.paging import Page
from vmconv_fleet.catalogue.snapshot import Snapshot
from vmconv_fleet.console.rendering import render

PAGE = 50
MAX_FORM = 64 << 10


class Visit(NamedTuple):
    """A request for a page: the caller and a snapshot of the fleet. `form_key` is empty without a session."""

    request: Request
    state: State
    caller: Caller
    snapshot: Snapshot
    form_key: str

    def page(self, template: str, *, title: str, status: int = 200, **values: Any) -> HTMLResponse:
        """Returns a page with its layout."""
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
            "may_change": self.caller.rights.reach("operator"),
            "form_key": self.form_key,
            "path": self.request.url.path,
            "said": self.request.query_params.get("said", "")[:300],
        }
        return HTMLResponse(render(template, around | values), status)

    def listing(self, template: str, page: Page, *, title: str, **values: Any) -> HTMLResponse:
        """Returns a page with a part of a list."""
        return self.page(template, title=title, total=page.total, next=page.next, after=self.after(), **values)

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
    """Returns the fields of a form."""
    declared = request.headers.get("content-type", "").partition(";")[0]
    if declared != "application/x-www-form-urlencoded":
        raise AccessError(f"form with content type {declared[:80] or 'none'}")
    body = await request.body()
    if len(body) > MAX_FORM:
        raise AccessError(f"a form of {len(body)} bytes, {MAX_FORM} at most")
    fields = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=100)
    return {name: values[0] for name, values in fields.items()}


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


def back_to(path: str, said: str) -> RedirectResponse:
    """Returns the redirect to a page that shows the result of a form."""
    return RedirectResponse(f"{path}?said={quote(said[:300])}", 303)


async def failed(exc: Exception) -> Response:
    """Returns the page for an error; the login page without a session."""
    if isinstance(exc, UnknownCallerError):
        return RedirectResponse("/login", 303)
    status = 403 if isinstance(exc, AccessError) else 404
    hint = exc.hint if isinstance(exc, VmconvError) else None
    return HTMLResponse(render("error.html", {"title": "Not possible", "message": str(exc), "hint": hint}), status)
