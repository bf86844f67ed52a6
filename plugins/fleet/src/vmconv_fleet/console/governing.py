"""Pages for administrators: the policy of a node, and new tokens."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from pydantic import ValidationError

from vmconv.plugin import UsageError, VmconvError, parse_size
from vmconv_fleet.api.asking import NotHereError, arguments_of, ask
from vmconv_fleet.api.changing import TokenWish, granted
from vmconv_fleet.api.reading import owner_of
from vmconv_fleet.catalogue import kinds
from vmconv_fleet.catalogue.complaints import complaint
from vmconv_fleet.catalogue.differences import differences
from vmconv_fleet.console.confirming import Confirmation, sent, words
from vmconv_fleet.console.web import Fields, Visit, fields_of, query_of, refuse_forged, visit_of
from vmconv_fleet.trust import tokens
from vmconv_fleet.trust.roles import refuse_unless_allowed
from vmconv_fleet.words import numbers_by_name, role_text, time_text

_NUMBERS = ("max_parallel", "keep_days", "keep_records")
_LIMITS: Mapping[str, Callable[[str], int]] = {"datastore_parallel": int, "bandwidth": parse_size}
"""Rules with a number for each datastore."""


# Policies


def policy(visit: Visit) -> Response:
    """Returns the page with the rules of a node, as a form."""
    return _policy_page(visit, None)


def policy_review(visit: Visit) -> Response:
    """Returns the page that asks before rules are changed; the form again if they are not valid."""
    owner = _node_of(visit)
    try:
        wished = _rules(visit, query_of(visit.request))
    except VmconvError as exc:
        return _policy_page(visit, str(exc))
    changed = differences(_policy_of(visit, owner).plain(), {**_policy_of(visit, owner).plain(), **wished})
    if not changed:
        return _policy_page(visit, "no rule differs from those of now")
    rows = [(one.field, f"{one.before or 'any'} -> {one.after or 'any'}") for one in changed]
    fields = {name: values[0] for name, values in query_of(visit.request).items()}
    sentences = [f"{visit.snapshot.name(owner)} converts by these rules from then on."]
    title, back = "Change the policy", f"/policies/{owner}"
    what = Confirmation(title, sentences, title, back, fields=fields, rows=rows)
    return visit.page("confirm.html", title=what.title, is_live=False, what=what, action=back)


async def set_policy(request: Request) -> Response:
    visit, fields = visit_of(request), await fields_of(request)
    refuse_forged(visit, {name: values[0] for name, values in fields.items()})
    owner = _node_of(visit)
    wished = await run_in_threadpool(_rules, visit, fields)
    return await sent(visit, owner, "policy-set", wished, f"/policies/{owner}")


def _node_of(visit: Visit) -> str:
    owner = str(visit.request.path_params["owner"])
    if all(one.node != owner for one in visit.snapshot.nodes()):
        raise NotHereError(f"node {owner} is not here")
    return owner


def _policy_of(visit: Visit, owner: str) -> kinds.PolicyBody:
    return visit.snapshot.body(kinds.PolicyBody, owner, "policy", "conversion") or kinds.PolicyBody()


def _policy_page(visit: Visit, wrong: str | None) -> Response:
    owner = _node_of(visit)
    name = visit.snapshot.name(owner)
    rules = _policy_of(visit, owner)
    return visit.page("policy.html", title=f"Policy of {name}", owner=owner, rules=rules, wrong=wrong)


def _rules(visit: Visit, fields: Fields) -> dict[str, Any]:
    """Returns the rules of a form that differ from the node's. Raises UsageError if one is not valid."""
    given = {name: values[0].strip() for name, values in fields.items()}
    rules: dict[str, Any] = {name: given[name] for name in ("naming", "zero_copy") if given.get(name)}
    rules |= {name: _number(name, given[name]) for name in _NUMBERS if given.get(name)}
    if given.get("may_remove_source"):
        rules["may_remove_source"] = given["may_remove_source"] == "yes"
    if "between" in given:
        rules["between"] = given["between"] or None
    for name, type_ in _LIMITS.items():
        if name in given:
            rules[name] = _limits(name, type_, given[name])
    for name in ("formats", "administrators_of"):
        if name in given:
            listed = [one.strip() for one in given[name].split(",") if one.strip()]
            rules[name] = listed or None
    if rules.get("administrators_of"):
        rules["administrators_of"] = [owner_of(visit.snapshot, one) for one in rules["administrators_of"]]
    now = _policy_of(visit, _node_of(visit)).model_dump(mode="json")
    found = {name: value for name, value in rules.items() if value != now.get(name)}
    arguments_of("policy-set", found)
    return found


def _limits(name: str, type_: Callable[[str], int], text: str) -> dict[str, int]:
    try:
        return numbers_by_name(type_, text) if text else {}
    except UsageError as exc:
        raise UsageError(f"{name}: {exc}") from exc


def _number(name: str, text: str) -> int:
    if not text.isdecimal() or len(text) > 15:
        raise UsageError(f"{name}: {text[:40]!r} is not allowed: a whole number")
    return int(text)


# Tokens


def new_token(visit: Visit) -> Response:
    return _token_page(visit, None)


def token_review(visit: Visit) -> Response:
    """Returns the page that asks before a token is made; the form again if its fields are not valid."""
    fields = {name: values[0] for name, values in query_of(visit.request).items()}
    try:
        given = _token(visit, fields)
        refuse_unless_allowed(
            "token-create",
            visit.state.node,
            visit.caller.by,
            visit.snapshot.view,
            visit.snapshot.now_ms,
            arguments=given,
        )
    except VmconvError as exc:
        return _token_page(visit, str(exc))
    until = time_text(given["expires_ms"]) if "expires_ms" in given else "without end"
    role = role_text(given, visit.snapshot.name)
    what = Confirmation(
        "New token",
        ["Its holder enters any node with it. It is shown once, on the next page."],
        "Make the token",
        "/tokens",
        fields={**fields, "once": secrets.token_hex(8)},
        rows=[("Label", given["label"]), ("Role", role), ("Valid until", until)],
    )
    return visit.page("confirm.html", title=what.title, is_live=False, what=what, action="/tokens")


async def make_token(request: Request) -> Response:
    """Makes a token and shows it. The same form again makes none: the token would be shown twice."""
    visit, fields = visit_of(request), await fields_of(request)
    given = {name: values[0] for name, values in fields.items()}
    refuse_forged(visit, given)
    once = given.get("once", "")
    if len(once) != 16 or visit.snapshot.view.get(visit.state.node, "request", once) is not None:
        raise UsageError("this form was sent before: its token was shown then", hint="revoke it and make another one")
    new = tokens.make(visit.state.node)
    wished = await run_in_threadpool(_token, visit, given)
    arguments = {"id": new.id, "hash": new.hash, **wished}
    answer = await ask(visit.state, visit.caller, visit.state.node, "token-create", arguments, key=once)
    return visit.page(
        "token.html",
        title="New token",
        is_live=False,
        status=200 if answer.ok else 409,
        # The answer to another form with this key is about another token.
        token=new.text if answer.ok and answer.body.get("token") == new.id else None,
        label=wished["label"],
        words=words(answer),
    )


def _token_page(visit: Visit, wrong: str | None) -> Response:
    return visit.page("new_token.html", title="New token", wrong=wrong)


def _token(visit: Visit, given: Mapping[str, str]) -> dict[str, Any]:
    """Returns the fields of a token's record. Raises UsageError if one is not valid."""
    wish: dict[str, Any] = {name: given[name].strip() for name in ("label", "role") if given.get(name)}
    if places := [one.strip() for one in given.get("datastores", "").split(",") if one.strip()]:
        wish["datastores"] = places
    if days := given.get("days", "").strip():
        wish["ttl_s"] = _number("days", days) * 86400
    try:
        checked = TokenWish.model_validate(wish)
    except ValidationError as exc:
        raise UsageError(complaint(exc.errors())) from exc
    found = {"label": checked.label, **granted(visit.state, checked.role, checked.datastores)}
    if checked.ttl_s is not None:
        found["expires_ms"] = visit.snapshot.now_ms + int(checked.ttl_s * 1000)
    return found
