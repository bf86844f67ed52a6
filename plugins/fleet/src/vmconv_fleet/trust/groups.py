"""The rights of people who have signed in: those of their groups, as the node states them where they did.

They are looked up for each request, so a change of a group's role counts at once, on all nodes that know of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmconv.plugin import AccessError
from vmconv_fleet.trust.rights import ORDER, Records, Rights, allows, rights_in

if TYPE_CHECKING:
    from vmconv_fleet.catalogue.kinds import GroupBody, Principal, TokenBody
    from vmconv_fleet.catalogue.terms import Role

KIND = "group"


def group_id(name: str) -> str:
    """Returns the id of a group's record."""
    return hashlib.sha256(name.encode()).hexdigest()[:32]


def rights_of_person(owner: str, groups: Iterable[str], records: Records) -> Rights:
    """Returns the rights of all groups together. Raises AccessError if none has a role at the node `owner` any more."""
    found = [one for one in (_group(owner, name, records) for name in groups) if one is not None]
    if not found:
        raise AccessError("no group of this person has a role any more")
    rights = [rights_in(one) for one in found]
    datastores: dict[str, Role] = {}
    for one in rights:
        for reference, role in one.datastores.items():
            datastores[reference] = _higher(role, datastores.get(reference, "viewer"))
    return Rights(max((one.role for one in rights), key=ORDER.index), datastores)


def refuse_impostor(by: Principal, token: TokenBody | None) -> None:
    """Raises AccessError if the caller states another person than the one who has signed in with the token."""
    person = token.person if token else None
    signed_in = (person.issuer, person.subject) if person else (None, None)
    if (by.issuer, by.subject) != signed_in or (token and person and by.user != token.label):
        raise AccessError("the request states another person than the one who has signed in")


def groups_of(by: Principal, records: Records) -> list[str] | None:
    """Returns the groups of a caller who has signed in; None for any other caller."""
    owner, _, identifier = (by.token or "").partition("/")
    record = records.get(owner, "token", identifier) if by.subject is not None else None
    person = record.body.get("person") if record else None
    return list(person["groups"]) if person else None


def _higher(one: Role, other: Role) -> Role:
    return one if allows(one, other) else other


def _group(owner: str, name: str, records: Records) -> GroupBody | None:
    """Returns what a group may do; None if it has no role, or its record is not valid."""
    from pydantic import ValidationError

    from vmconv_fleet.catalogue.kinds import GroupBody

    record = records.get(owner, KIND, group_id(name))
    if record is None:
        return None
    try:
        group = GroupBody.model_validate(record.body)
    except ValidationError:
        return None
    return group if group.group == name else None
