"""Authorisation: three roles, each with the rights of the one before it, and the role that each verb needs.

The same function checks it twice: on the caller's node, for an early refusal, and on the owner of the records, against
its own replica of the token, because the owner does not trust the caller's node.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from vmconv.plugin import AccessError

if TYPE_CHECKING:
    from vmconv_fleet.catalogue.fields import Role
    from vmconv_fleet.catalogue.kinds import Principal, TokenBody
    from vmconv_fleet.replication.records import Record

ORDER: tuple[Role, ...] = ("viewer", "operator", "admin")

VERBS: Mapping[str, Role] = {
    "convert": "operator",
    "convert-machine": "operator",
    "cancel": "operator",
    "scan": "operator",
    "datastore-add": "admin",
    "datastore-remove": "admin",
    "datastore-give": "admin",
    "datastore-take": "admin",
    "policy-set": "admin",
    "retire": "admin",
    "revoke": "admin",
    "token-create": "admin",
    "token-revoke": "admin",
}
"""The role that a verb needs; reading needs `viewer`."""

LOCAL_ONLY = frozenset({"datastore-add"})
"""Verbs for the local administrator of the target only: they name its paths."""

ACTS: Mapping[str, Role] = {**VERBS, "invite": "admin"}
"""The verbs, and what a node does without a request."""

GOVERNING = frozenset({"invite", "retire", "revoke", "token-create"})
"""Acts that decide who belongs to the fleet, and who may do what in it. By default they are for the node's own
administrators, so that the root of one node cannot remove another, or get a token of it.
"""

_GOVERNING_RULE = "administrators_of"
"""The rule of a policy that says whose administrators are accepted; changing it is a governing act too."""


class Records(Protocol):
    """Looks up live records, None if there is none; and the nodes whose keys two machines use."""

    def get(self, owner: str, kind: str, id: str, /) -> Record | None: ...

    def cloned(self) -> frozenset[str]: ...


def allows(role: Role, needed: Role) -> bool:
    return ORDER.index(role) >= ORDER.index(needed)


def role_of(by: Principal, records: Records, now_ms: int) -> Role:
    """Returns the role of the caller. Raises AccessError if the token is not valid."""
    from vmconv_fleet.catalogue.kinds import TokenBody

    if by.token is None:
        return "admin"
    owner, _, identifier = by.token.partition("/")
    record = records.get(owner, "token", identifier)
    if record is None:
        raise AccessError(f"token {identifier} is unknown here")
    return role_of_token(record, TokenBody.model_validate(record.body), records, now_ms)


def role_of_token(record: Record, token: TokenBody, records: Records, now_ms: int) -> Role:
    """Returns the role of a token. Raises AccessError if it was revoked, has expired, or its issuer is cloned."""
    identifier = record.id
    if record.owner in records.cloned():
        # It may be revoked in the other history.
        raise AccessError(f"two machines write with the keys of the node that issued token {identifier}")
    if token.revoked:
        raise AccessError(f"token {identifier} was revoked")
    if token.expires_ms is not None and now_ms >= token.expires_ms:
        raise AccessError(f"token {identifier} has expired")
    return token.role


def refuse_unless_allowed(
    verb: str, target: str, by: Principal, records: Records, now_ms: int, *, arguments: Mapping[str, Any]
) -> None:
    """Raises AccessError unless the caller may send this verb with these arguments to the node `target`."""
    needed = ACTS.get(verb)
    if needed is None:
        raise AccessError(f"no verb {verb!r}", hint=f"verbs: {', '.join(sorted(VERBS))}")
    _refuse_strangers(verb, target, by, records, governs=verb in GOVERNING or _GOVERNING_RULE in arguments)
    role = role_of(by, records, now_ms)
    if not allows(role, needed):
        raise AccessError(f"{verb} needs the role {needed}, {by.user or by.token} has {role}")
    if verb in LOCAL_ONLY and not (by.token is None and by.node == target):
        raise AccessError(f"{verb} is for the local administrator of the node alone: it names its paths")


def _refuse_strangers(verb: str, target: str, by: Principal, records: Records, *, governs: bool) -> None:
    """Raises AccessError if the target's policy does not accept the administrators of the caller's nodes.

    These are the node that issued the token, wherever its holder connects, and the node that sends the request: it
    alone has seen the token.
    """
    from vmconv_fleet.catalogue.kinds import PolicyBody

    record = records.get(target, "policy", "conversion")
    heard = PolicyBody.model_validate(record.body).administrators_of if record else None
    if heard is None and not governs:
        return
    vouching = {by.node, by.token.partition("/")[0] if by.token else by.node}
    strangers = sorted(vouching - {target, *(heard or ())})
    if strangers:
        raise AccessError(
            f"{verb}: the policy of {target} does not accept administrators of {', '.join(strangers)}",
            hint="its own administrator names other nodes: vmconv fleet policy NODE --administrators-of NODE,NODE",
        )
