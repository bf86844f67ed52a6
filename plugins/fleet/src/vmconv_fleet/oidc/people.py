"""People who have signed in: each session is a token of this node, which all nodes judge like any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from vmconv.plugin import AccessError, printable
from vmconv_fleet.oidc.provider import SignedIn
from vmconv_fleet.replication.records import Change, Record
from vmconv_fleet.replication.retention import DAY_MS
from vmconv_fleet.trust import tokens
from vmconv_fleet.trust.groups import KIND, group_id

if TYPE_CHECKING:
    from vmconv_fleet.replication.service import NodeService
    from vmconv_fleet.replication.store import ReplicaView


MAX_SESSIONS = 1000
MAX_OF_ONE = 10
"""Sessions of one person."""
REVOKED_KEPT_MS = 90 * DAY_MS
_MAX_GROUPS = 64
_MAX_NAME, _MAX_SUBJECT, _MAX_ISSUER = 60, 64, 80
_WRITTEN_WITHIN = 10.0


def label_of(person: SignedIn) -> str:
    """Returns a person's name, and in brackets what nobody else is called."""
    name = printable(person.name).replace("[", "(").replace("]", ")")[:_MAX_NAME].strip(" -.")
    where = urlsplit(person.issuer)
    issuer = f"{where.netloc}{where.path.rstrip('/')}"[:_MAX_ISSUER]
    return f"{name or 'somebody'} [{printable(person.subject)[:_MAX_SUBJECT]} at {printable(issuer)}]"


def enter(service: NodeService, person: SignedIn, *, now_ms: int, minutes: int) -> str:
    """Returns a new token for the session of a person. Raises AccessError if none of their groups has a role."""
    view = service.view()
    groups = [one for one in dict.fromkeys(person.groups) if view.get(service.node, KIND, group_id(one))]
    if not groups:
        raise AccessError(
            f"{label_of(person)}: none of your groups has a role on this node",
            hint="an administrator gives it: vmconv fleet group set GROUP --role ROLE",
        )
    new = tokens.make(service.node)
    body: dict[str, Any] = {
        "label": label_of(person),
        # What an older version sees, which knows no groups.
        "role": "viewer",
        "hash": new.hash,
        "created_ms": now_ms,
        "expires_ms": now_ms + minutes * 60_000,
        "person": {"issuer": person.issuer, "subject": person.subject, "groups": groups[:_MAX_GROUPS]},
    }

    def decide(view: ReplicaView) -> Sequence[Change]:
        return [*_over(view, service.node, _who(body), now_ms), Change("token", new.id, body)]

    service.update(decide).result(_WRITTEN_WITHIN)
    return new.text


def leave(service: NodeService, token: str) -> None:
    """Ends the session of a person, on all nodes; does nothing to other tokens."""
    reference = tokens.reference(token)
    if reference is None or reference[0] != service.node:
        return
    record = service.view().get(service.node, "token", reference[1])
    if record is not None and record.body.get("person") and not record.body.get("revoked"):
        service.update(lambda _view: [Change("token", reference[1], None)])


def _over(view: ReplicaView, node: str, who: tuple[str, str], now_ms: int) -> list[Change]:
    """Returns the deletions of sessions that are over, and of the oldest if there are too many, the person's first.

    A revoked session stays for longer: jobs of it may still wait.
    """
    found = sorted((one for one in view.find("token", node) if one.body.get("person")), key=_end)
    sessions = [one for one in found if not one.body.get("revoked")]
    over = {one.id for one in sessions if _end(one) <= now_ms}
    over |= {one.id for one in found if _end(one) <= now_ms - REVOKED_KEPT_MS}
    own = [one.id for one in sessions if one.id not in over and _who(one.body) == who]
    over |= set(own[: max(0, len(own) + 1 - MAX_OF_ONE)])
    left = [one.id for one in sessions if one.id not in over]
    over |= set(left[: max(0, len(left) + 1 - MAX_SESSIONS)])
    return [Change("token", one, None) for one in sorted(over)]


def _who(body: Mapping[str, Any]) -> tuple[str, str]:
    return body["person"]["issuer"], body["person"]["subject"]


def _end(record: Record) -> int:
    return int(record.body.get("expires_ms") or 0)
