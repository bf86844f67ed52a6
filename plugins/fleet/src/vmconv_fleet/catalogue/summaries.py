"""Transactions in one line for people: what became of what, not ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vmconv_fleet.catalogue.differences import differences
from vmconv_fleet.catalogue.snapshot import Snapshot
from vmconv_fleet.words import role_text

_MAX_LISTED = 3

Body = Mapping[str, Any]


def summary(snapshot: Snapshot, owner: str, transaction: Body) -> str:
    """Returns what a transaction of `owner` did, such as `web.raw -> web.qcow2`. The body may be another node's."""
    verb = str(transaction.get("verb") or "change")
    if verb == "resume":
        return _resumed(snapshot, _object(transaction.get("body")))
    changes = [one for one in transaction.get("changes", ()) if isinstance(one, Mapping)]
    said = [_said(snapshot, owner, verb, one) for one in changes]
    listed = [one for one in said[:_MAX_LISTED] if one]
    if not listed:
        return _PLAIN.get(verb, verb)
    more = f" and {len(said) - _MAX_LISTED} more" if len(said) > _MAX_LISTED else ""
    return _PREFIX.get(verb, f"{verb} ") + ", ".join(listed) + more


_PLAIN = {"convert": "the same conversion again", "convert-machine": "the same conversion again", "scan": "scan"}
"""Verbs that changed nothing."""

_PREFIX = {
    "convert": "",
    "convert-machine": "",
    "cancel": "cancelled ",
    "scan": "scan of ",
    "datastore-add": "new datastore ",
    "datastore-remove": "removed datastore ",
    "datastore-appoint": "who converts datastore ",
    "datastore-give": "giving datastore ",
    "datastore-take": "taking datastore ",
    "policy-set": "policy: ",
    "token-create": "new token of ",
    "token-revoke": "revoked token of ",
    "retire": "retired ",
    "revoke": "revoked ",
    "webhook-add": "new webhook to ",
    "webhook-remove": "removed webhook to ",
}


def _said(snapshot: Snapshot, owner: str, verb: str, change: Body) -> str:
    kind, identifier = str(change.get("kind", "")), str(change.get("id", ""))
    before, after = _object(change.get("before")), _object(change.get("after"))
    describe = _KINDS.get(kind)
    if describe is None:
        return f"{kind} {identifier}"
    if kind == "revocation" and verb == "retire":
        # It comes with a retirement, whose text says enough.
        return ""
    return describe(snapshot, owner, identifier, before, after)


def _resumed(snapshot: Snapshot, given: Body) -> str:
    """Returns how a node writes again that was restored, or had two histories."""
    if given.get("merge"):
        return "merged the histories of this node"
    without = given.get("without")
    names = ", ".join(snapshot.names(map(str, without))) if isinstance(without, list) else ""
    return "resumed without " + (names or "other nodes")


def _object(value: Any) -> Body:
    return value if isinstance(value, Mapping) else {}


def _job(snapshot: Snapshot, owner: str, identifier: str, before: Body, after: Body) -> str:
    # The name of the target is known once the job has begun.
    job = snapshot.view.get(owner, "job", identifier)
    body = {**before, **after, **(job.body if job else {})}
    return conversion(body)


def conversion(job: Body) -> str:
    """Returns a conversion by its job's body: source and target, or the target's format as long as it has no name."""
    source = str(job.get("source") or job.get("disk") or job.get("vm") or "?")
    target = job.get("file") or job.get("target") or f"a {job.get('format', '?')}"
    return f"{source} -> {target}" + (" (dry run)" if job.get("dry_run") else "")


def _datastore(_snapshot: Snapshot, _owner: str, identifier: str, before: Body, after: Body) -> str:
    return identifier if before else f"{identifier} at {after.get('path', '?')}"


def _policy(_snapshot: Snapshot, _owner: str, _identifier: str, before: Body, after: Body) -> str:
    found = differences(before, after)
    return ", ".join(f"{one.field} {one.before or 'default'} -> {one.after or 'default'}" for one in found)


def _token(snapshot: Snapshot, _owner: str, _identifier: str, before: Body, after: Body) -> str:
    granted = {"role": "?", **before, **after}
    try:
        role = role_text(granted, snapshot.name)
    except (AttributeError, TypeError, ValueError):
        role = "?"
    return f"{granted.get('label', '?')} ({role})"


def _retirement(snapshot: Snapshot, _owner: str, identifier: str, _before: Body, after: Body) -> str:
    return str(after.get("name") or snapshot.name(identifier))


def _revocation(snapshot: Snapshot, _owner: str, _identifier: str, _before: Body, after: Body) -> str:
    node, key = snapshot.name(str(after.get("node", ""))), after.get("key_id")
    return f"key {key} of {node}" if key else f"all keys of {node}"


def _webhook(_snapshot: Snapshot, _owner: str, _identifier: str, before: Body, after: Body) -> str:
    return str(after.get("place") or before.get("place") or "?")


_KINDS: Mapping[str, Callable[[Snapshot, str, str, Body, Body], str]] = {
    "job": _job,
    "datastore": _datastore,
    "policy": _policy,
    "token": _token,
    "retirement": _retirement,
    "revocation": _revocation,
    "webhook": _webhook,
}
