"""The rights of a caller: a role on all nodes, and higher roles in some datastores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from vmconv_fleet.catalogue.kinds import Granted
    from vmconv_fleet.catalogue.terms import Role
    from vmconv_fleet.replication.records import Record

ORDER: tuple[Role, ...] = ("viewer", "operator", "admin")


class Records(Protocol):
    """Looks up live records, None if there is none; and the nodes with two histories."""

    def get(self, owner: str, kind: str, id: str, /) -> Record | None: ...

    def forked(self) -> frozenset[str]: ...


def allows(role: Role, needed: Role) -> bool:
    return ORDER.index(role) >= ORDER.index(needed)


class Rights(NamedTuple):
    """A role for everything, and roles by datastore; a datastore is `NODE/NAME` with the node's id."""

    role: Role
    datastores: Mapping[str, Role] = {}

    def allow(self, needed: Role, node: str, datastore: str) -> bool:
        """Returns whether the caller has this role in a datastore."""
        return allows(self.role, needed) or allows(self.datastores.get(f"{node}/{datastore}", "viewer"), needed)

    def reach(self, needed: Role) -> bool:
        """Returns whether the caller has this role everywhere or in some datastore."""
        return any(allows(one, needed) for one in (self.role, *self.datastores.values()))

    def only_in(self, node: str, needed: Role) -> list[str] | None:
        """Returns the names of the node's datastores where the caller has this role; None if it is not restricted."""
        if allows(self.role, needed):
            return None
        return sorted(
            reference.partition("/")[2]
            for reference, role in self.datastores.items()
            if reference.partition("/")[0] == node and allows(role, needed)
        )


def rights_in(granted: Granted) -> Rights:
    """Returns the rights that a record grants."""
    return Rights(granted.role, granted.datastores)


class Place(NamedTuple):
    """A datastore of a node, by the node's id and its name there."""

    node: str
    datastore: str


def datastores_of(verb: str, node: str, arguments: Mapping[str, Any], records: Records) -> list[Place]:
    """Returns the datastores that an act concerns; none if it concerns the whole node.

    The arguments may be anything: they are not checked yet.
    """
    if verb in _NAMING:
        return [Place(node, name) for name in _names(arguments, _NAMING[verb])]
    kind, argument = _CONCERNING.get(verb, ("", ""))
    identifier, of = arguments.get(argument), arguments.get("of")
    # A disk of another node is converted with its owner's rights, which the node that does it cannot give.
    owner = of if isinstance(of, str) else node
    record = records.get(owner, kind, identifier) if isinstance(identifier, str) else None
    if record is None:
        return []
    return [
        *(Place(owner, name) for name in _names(record.body, "datastore")),
        *(Place(node, name) for name in _names(record.body, "target_datastore")),
        *(Place(node, name) for name in _names(arguments, "target_datastore")),
    ]


_NAMING = {
    "scan": "datastore",
    "datastore-remove": "name",
    "datastore-appoint": "name",
    "datastore-give": "name",
    "datastore-take": "name",
}
"""Verbs about one datastore, and the argument with its name."""

_CONCERNING = {"convert": ("disk", "disk"), "convert-machine": ("vm", "vm"), "cancel": ("job", "job")}
"""Verbs about a record in a datastore: its kind, and the argument with its id."""


def _names(fields: Mapping[str, Any], field: str) -> list[str]:
    value = fields.get(field)
    return [] if value is None else [str(value)]
