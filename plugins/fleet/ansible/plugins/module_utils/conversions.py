"""A conversion that is done once: its target exists, its job runs, or it is requested."""

from __future__ import annotations

import posixpath
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

from ansible_collections.vmconv.fleet.plugins.module_utils.asking import FleetError, Node

OPEN = "queued,planned,running"

TARGET: dict[str, dict[str, Any]] = {
    "format": {"type": "str", "required": True},
    "target": {"type": "str", "required": True},
    "target_datastore": {"type": "str"},
    "options": {"type": "dict", "default": {}},
}
"""The options of a target."""


class Conversion:
    """One target of a disk of the catalogue; `wish` has the options in `TARGET` and `zero_copy`."""

    def __init__(self, node: Node, source: dict[str, Any], wish: dict[str, Any]) -> None:
        self._node = node
        self._source = source
        self._wish = wish
        body = source["body"]
        if wish["target_datastore"]:
            self._place = wish["target_datastore"], wish["target"]
        else:
            self._place = body["datastore"], posixpath.join(posixpath.dirname(body["name"]), wish["target"])
        self._job: str | None = None

    def made(self) -> dict[str, Any] | None:
        """Returns the target if it is in the catalogue. Raises FleetError if it is something else."""
        found: dict[str, Any] | None = self._node.disk_at(self._source["owner"], *self._place)
        if found is None:
            return None
        body, wanted = found["body"], self._source["body"].get("virtual_size")
        name = f"{found['node']}:{body['name']}"
        if body.get("problem"):
            raise FleetError(f"{name} exists and cannot be read: {body['problem']}")
        if body.get("format") != self._wish["format"]:
            raise FleetError(f"{name} exists and is {body.get('format')}, not {self._wish['format']}")
        if wanted and body.get("virtual_size") != wanted:
            raise FleetError(f"{name} exists with {body.get('virtual_size')} bytes, and the source has {wanted}")
        return found

    def request(self) -> None:
        """Requests the conversion, unless it is under way."""
        self._job = self._under_way() or self._requested()

    def finish(self) -> dict[str, Any]:
        """Returns the target once the conversion has ended and a scan has found it."""
        body: dict[str, Any] = self._node.until(self._ended)
        if body["state"] != "done":
            hint = f" ({body['hint']})" if body.get("hint") else ""
            raise FleetError(f"job {self._job} is {body['state']}: {body.get('error', 'cancelled')}{hint}")
        target: dict[str, Any] = self._node.until(self.made)
        return target

    def _under_way(self) -> str | None:
        """Returns the open job for this target, also that of a request, once its owner has answered it."""
        for job in self._node.everything("/jobs", node=self._source["owner"], states=OPEN):
            if self._is_this(job["body"]) and not job["body"].get("cancel"):
                return str(job["id"])
        for request in self._node.everything("/requests", unanswered="true"):
            body = request["body"]
            is_ours = (body.get("verb"), body.get("target")) == ("convert", self._source["owner"])
            if is_ours and self._is_this(body.get("arguments") or {}):
                return str(self._node.settled(request["answer"])["body"]["job"])
        return None

    def _is_this(self, fields: dict[str, Any]) -> bool:
        names = ("target", "target_datastore")
        same = all(fields.get(name) == self._wish[name] for name in names)
        return same and fields.get("disk") == self._source["id"] and not fields.get("dry_run")

    def _requested(self) -> str:
        job = f"ansible-{secrets.token_hex(8)}"
        given = {name: value for name, value in self._wish.items() if value not in (None, {})}
        path = f"/disks/{self._source['owner']}/{self._source['id']}/convert"
        self._node.send("POST", path, {**given, "job": job})
        return job

    def _ended(self) -> dict[str, Any] | None:
        found = self._node.get(f"/records/{self._source['owner']}/job/{self._job}")
        body: dict[str, Any] = found["body"]
        return body if body["state"] in ("done", "failed", "cancelled") else None


class Done(NamedTuple):
    """The targets of some conversions before and after; None for one that is not there."""

    before: list[dict[str, Any] | None]
    after: list[dict[str, Any] | None]

    @property
    def changed(self) -> bool:
        """Whether a target was missing, which check mode does not make."""
        return None in self.before


def converge(conversions: Sequence[Conversion], *, check: bool) -> Done:
    """Makes the missing targets, all at a time."""
    before = [one.made() for one in conversions]
    if check:
        return Done(before, before)
    missing = [one for one, made in zip(conversions, before, strict=True) if made is None]
    for one in missing:
        one.request()
    finished = iter([one.finish() for one in missing])
    return Done(before, [next(finished) if made is None else made for made in before])


def described(target: dict[str, Any]) -> dict[str, Any]:
    """Returns a disk for the result of a module."""
    body = target["body"]
    names = ("datastore", "name", "format", "virtual_size", "actual_size")
    return {"id": target["id"], "node": target["node"], **{name: body.get(name) for name in names}}


def difference(wishes: Sequence[dict[str, Any]], done: Done) -> dict[str, str]:
    """Returns the diff of a module: names of targets, before and after."""
    names = [one["target"] for one in wishes]
    before = [name for name, one in zip(names, done.before, strict=True) if one is not None]
    return {"before": "".join(f"{name}\n" for name in before), "after": "".join(f"{name}\n" for name in names)}
