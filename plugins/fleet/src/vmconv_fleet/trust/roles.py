"""Authorisation: the role that each verb needs, of the node or of the datastores that it concerns.

The same function checks it twice: on the caller's node, for an early refusal, and on the owner of the records, against
its own replica of the token, because the owner does not trust the caller's node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vmconv.plugin import AccessError
from vmconv_fleet.trust.groups import refuse_impostor, rights_of_person
from vmconv_fleet.trust.rights import Place, Records, Rights, allows, datastores_of, rights_in

if TYPE_CHECKING:
    from vmconv_fleet.catalogue.kinds import Principal, TokenBody
    from vmconv_fleet.catalogue.terms import Role
    from vmconv_fleet.replication.records import Record

VERBS: Mapping[str, Role] = {
    "convert": "operator",
    "convert-machine": "operator",
    "cancel": "operator",
    "scan": "operator",
    "datastore-add": "admin",
    "datastore-remove": "admin",
    "datastore-appoint": "admin",
    "datastore-give": "admin",
    "datastore-take": "admin",
    "policy-set": "admin",
    "resume": "admin",
    "retire": "admin",
    "revoke": "admin",
    "token-create": "admin",
    "token-revoke": "admin",
    "webhook-add": "admin",
    "webhook-remove": "admin",
    "group-set": "admin",
    "group-remove": "admin",
}
"""The role that a verb needs; reading needs `viewer`."""

LOCAL_ONLY = frozenset({"datastore-add", "resume"})
"""Verbs for the local administrator of the target only: they name its paths, or decide about its database."""

ACTS: Mapping[str, Role] = {**VERBS, "invite": "admin", "webhook-test": "admin"}
"""The verbs, and what a node does without a request."""

GOVERNING = frozenset(
    (
        *("invite", "retire", "revoke", "token-create", "group-set", "group-remove"),
        *("webhook-add", "webhook-remove", "webhook-test"),
    )
)
"""Acts that decide who belongs to the fleet, who may do what in it, and where a node connects to. By default they are
for the node's own administrators, so that the root of one node cannot remove another, or get a token of it.
"""

_GOVERNING_RULE = "administrators_of"
"""The rule of a policy that says whose administrators are accepted; changing it is a governing act too."""


def rights_of(by: Principal, records: Records, now_ms: int) -> Rights:
    """Returns the rights of the caller. Raises AccessError if the token is not valid, or not that of the caller."""
    if by.token is None:
        refuse_impostor(by, None)
        return Rights("admin")
    owner, _, identifier = by.token.partition("/")
    record = records.get(owner, "token", identifier)
    if record is None:
        raise AccessError(f"token {identifier} is unknown here")
    refuse_impostor(by, token_in(record))
    return rights_of_token(record, records, now_ms)


def rights_of_token(record: Record, records: Records, now_ms: int) -> Rights:
    """Returns the rights of a token. Raises AccessError if it was revoked, has expired, or its issuer has forked."""
    token, identifier = token_in(record), record.id
    if record.owner in records.forked():
        # It may be revoked in the other history.
        raise AccessError(f"the node that issued token {identifier} has two histories")
    if token.revoked:
        raise AccessError(f"token {identifier} was revoked")
    if token.expires_ms is not None and now_ms >= token.expires_ms:
        raise AccessError(f"token {identifier} has expired")
    return rights_of_person(record.owner, token.person.groups, records) if token.person else rights_in(token)


def token_in(record: Record) -> TokenBody:
    """Returns a token's record as its model. Raises AccessError if its owner has written anything else."""
    from pydantic import ValidationError

    from vmconv_fleet.catalogue.kinds import TokenBody

    try:
        return TokenBody.model_validate(record.body)
    except ValidationError as exc:
        raise AccessError(f"the record of token {record.id} is not valid") from exc


def refuse_unless_allowed(
    verb: str,
    target: str,
    by: Principal,
    records: Records,
    now_ms: int,
    *,
    arguments: Mapping[str, Any],
    rights: Rights | None = None,
) -> None:
    """Raises AccessError unless the caller may send this verb with these arguments to the node `target`.

    `rights` are those of the caller, if they are known already.
    """
    needed = ACTS.get(verb)
    if needed is None:
        raise AccessError(f"no verb {verb!r}", hint=f"verbs: {', '.join(sorted(VERBS))}")
    _refuse_strangers(verb, target, by, records, governs=verb in GOVERNING or _GOVERNING_RULE in arguments)
    rights = rights_of(by, records, now_ms) if rights is None else rights
    places = datastores_of(verb, target, arguments, records)
    if not allows(rights.role, needed) and not (places and all(rights.allow(needed, *one) for one in places)):
        raise AccessError(
            f"{_act(verb, places, rights)} needs the role {needed}, {by.user or by.token} has {rights.role}"
        )
    if verb in LOCAL_ONLY and not (by.token is None and by.node == target):
        raise AccessError(f"{verb} is for the local administrator of the node alone")


def _act(verb: str, places: Sequence[Place], rights: Rights) -> str:
    """Returns the act in words, with the datastores if the caller's rights depend on them."""
    names = dict.fromkeys(place.datastore for place in places)
    return f"{verb} in {' and '.join(names)}" if places and rights.datastores else verb


def _accepted(policy: Record) -> list[str] | None:
    """Returns the nodes whose administrators a policy accepts. Raises AccessError if it is no policy: any node's may be
    asked for.
    """
    from pydantic import ValidationError

    from vmconv_fleet.catalogue.kinds import PolicyBody

    try:
        return PolicyBody.model_validate(policy.body).administrators_of
    except ValidationError as exc:
        raise AccessError(f"the policy of {policy.owner} is not valid") from exc


def _refuse_strangers(verb: str, target: str, by: Principal, records: Records, *, governs: bool) -> None:
    """Raises AccessError if the target's policy does not accept the administrators of the caller's nodes.

    These are the node that issued the token, wherever its holder connects, and the node that sends the request: it
    alone has seen the token.
    """
    record = records.get(target, "policy", "conversion")
    heard = _accepted(record) if record else None
    if heard is None and not governs:
        return
    vouching = {by.node, by.token.partition("/")[0] if by.token else by.node}
    strangers = sorted(vouching - {target, *(heard or ())})
    if strangers:
        raise AccessError(
            f"{verb}: the policy of {target} does not accept administrators of {', '.join(strangers)}",
            hint="its own administrator names other nodes: vmconv fleet policy NODE --administrators-of NODE,NODE",
        )
