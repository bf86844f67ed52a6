"""Who owns the directories that a scan meets: the datastore, what is around it, and what is below."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from vmconv.plugin import AccessError
from vmconv_fleet.catalogue.places import opened
from vmconv_fleet.catalogue.sharing import Holding, Note, hold, hold_by, nearest, owner_of, release
from vmconv_fleet.replication.clock import wall_ms


class Ownership:
    """What a node knows of the storages of its fleet; without a node nobody owns anything.

    `acts` are what administrators want of its datastores, `retired` the nodes that have none any more, and `stores` the
    storages of the others.
    """

    def __init__(
        self,
        node: str = "",
        acts: Mapping[str, Mapping[str, Any]] | None = None,
        retired: Collection[str] = (),
        stores: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.node = node
        self._acts = acts or {}
        self._retired = frozenset(retired)
        self._stores = stores or {}

    def held(self, datastore: str, root: str) -> dict[str, Any]:
        """Returns the fields of a datastore about its owner; none where they cannot be noted."""
        found = hold(root, self.node, wall_ms(), **self._wanted(datastore)) if self.node else None
        return found.fields() if found else {}

    def of_container(self, datastore: str, note: Note) -> dict[str, Any]:
        """Returns what `held` does, for a datastore that is known by its note alone."""
        found = hold_by(note, self.node, wall_ms(), **self._wanted(datastore)) if self.node else None
        return found.fields() if found else {}

    def _wanted(self, datastore: str) -> dict[str, Any]:
        act = self._acts.get(datastore, {})
        return {"give_to": act.get("give_to"), "take": bool(act.get("take")), "retired": self._retired}

    def around(self, root: str) -> str | None:
        """Returns the problem of a datastore if another node had a directory above before anybody had this one."""
        if not self.node or owner_of(root):
            return None
        found = nearest(os.path.dirname(root))
        if found is None or not self._is_foreign(found[1]):
            return None
        return f"lies in {found[0]}, a datastore of node {found[1].owner}, which lists its disks"

    def below(self, path: str, roots: Iterable[str]) -> str | None:
        """Returns the problem of a directory that is a datastore of another node; releases one that nobody has."""
        found = owner_of(path) if self.node else None
        if found is None or found.owner == self.node:
            return None
        if self._is_foreign(found):
            return f"is a datastore of node {found.owner}, which lists its disks"
        with suppress(OSError, AccessError), opened(path, roots) as directory:
            release(directory)
        return None

    def _is_foreign(self, holding: Holding) -> bool:
        """Returns whether another node has this storage, as far as the node knows."""
        owner = holding.owner
        is_left = owner in self._retired or (owner in self._stores and holding.storage not in self._stores[owner])
        return owner != self.node and not is_left
