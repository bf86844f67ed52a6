"""`vmconv fleet demo`: three nodes on this machine, a conversion on another node, a partition, and its end."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from typing import Any

from vmconv.plugin import BackendError, UsageError, print_table, size_text
from vmconv_fleet.cli.local_fleet import LocalNode, local_fleet, wait_for, wait_until_agreed
from vmconv_fleet.words import age_text, plan_text

_SMALLEST = 8 << 20
_NAMES = ["n01", "n02", "n03"]
_PATIENCE = 60.0
_TARGETS = ("qcow2", "vmdk", "vdi", "vhdx")
"""The target formats, as far as they are installed."""
_NEEDED = 3


def demo(options: argparse.Namespace) -> int:
    from vmconv.plugin import parse_size

    try:
        size = parse_size(options.size)
    except ValueError as exc:
        raise UsageError(f"--size: {exc}") from exc
    if size < _SMALLEST:
        raise UsageError(f"--size: {options.size} is less than {_SMALLEST >> 20}M")
    where = options.directory or "."
    if not os.path.isdir(where):
        raise BackendError(f"{where}: is not a directory")
    targets = _installed_targets()
    # The path of a socket must be short; the disks lie where the user wants to see blocks shared.
    with (
        tempfile.TemporaryDirectory(prefix="vmconv-fleet-") as directory,
        tempfile.TemporaryDirectory(prefix="vmconv-fleet-demo-", dir=where) as disks,
    ):
        with local_fleet(_NAMES, directory, disks, web=options.keep) as nodes:
            code = _Story(nodes, size, targets).tell()
            if options.keep:
                _keep(nodes)
        print("All nodes have ended, and their directories are removed.")
    return code


def _installed_targets() -> list[str]:
    from vmconv.plugin import RAW_NAME, installed

    formats = installed().formats
    targets = [name for name in _TARGETS if name in formats and formats[name].can_write]
    if RAW_NAME not in formats or len(targets) < _NEEDED:
        missing = [name for name in (RAW_NAME, *_TARGETS) if name not in formats][: _NEEDED + 1]
        raise UsageError(
            f"the demo converts raw disks to {_NEEDED} formats; installed are {', '.join(sorted(formats)) or 'none'}",
            hint=f"pip install {' '.join(f'vmconv-{name}' for name in missing)}",
        )
    return targets


def _keep(nodes: list[LocalNode]) -> None:
    made = nodes[0].client.call("POST", "/api/v1/tokens", {"label": "demo", "role": "admin"}).content
    print(f"\nConsoles, until ^C (token {made['token']}):")
    for node in nodes:
        print(f"  {node.name}  {node.web}")
    try:
        for node in nodes:
            node.process.wait()
    except KeyboardInterrupt:
        print()


class _Story:
    """The steps of the demo."""

    def __init__(self, nodes: list[LocalNode], size: int, targets: list[str]) -> None:
        self._nodes = nodes
        self._first, self._second, self._third = nodes
        self._size = size
        self._targets = targets
        self._step = 0

    def tell(self) -> int:
        for node in self._nodes:
            _make_disk(os.path.join(node.datastore, f"web-{node.name}.raw"), self._size)
        self._say("Three nodes, each with a directory, a process and a certificate of its own; links by mutual TLS")
        self._show_nodes(self._first)
        self._catalogue()
        self._convert_elsewhere()
        self._cut()
        late = self._work_on_both_sides()
        self._heal(late)
        return self._agree()

    def _say(self, text: str) -> None:
        self._step += 1
        print(f"\n{self._step}. {text}", flush=True)

    def _show_nodes(self, seen_by: LocalNode) -> None:
        rows = [["SEEN BY", "NODE", "STATE", "HEARD", "BEHIND"]]
        for one in seen_by.client.get("/api/v1/nodes")["items"]:
            heard = "-" if one["state"] == "here" else age_text(one["age_ms"])
            rows.append([seen_by.name, one["name"], one["state"], heard, str(one["lag"])])
        print_table(rows, "   ")

    def _catalogue(self) -> None:
        self._say(f"Each has a disk of {size_text(self._size)}; {self._first.name} lists them all")
        for node in self._nodes:
            node.client.call("POST", f"/api/v1/nodes/{node.id()}/scan", {})
        wait_for(self._first.client, self._knows_all_disks, _PATIENCE, "disks are known")
        rows = [["SEEN BY", "ID", "OWNER", "FORMAT", "SIZE", "NAME"]]
        for one in _disks(self._first):
            body = one["body"]
            cells = [one["id"], one["node"], body["format"], size_text(body["virtual_size"]), body["name"]]
            rows.append([self._first.name, *cells])
        print_table(rows, "   ")

    def _knows_all_disks(self) -> bool:
        return len(_disks(self._first)) >= len(self._nodes)

    def _convert_elsewhere(self) -> None:
        owner, asked = self._second, self._first
        self._say(f"{asked.name} requests a conversion of the disk of {owner.name}, its owner")
        began = time.monotonic()
        answer = _ask(asked, owner, self._targets[0], wait=30)
        milliseconds = (time.monotonic() - began) * 1000
        print(f"   answered in {milliseconds:.0f} ms: {_words(answer)}")
        self._show_end(asked, owner, answer["body"]["job"])

    def _show_end(self, seen_by: LocalNode, owner: LocalNode, job: str) -> None:
        owner_id = owner.id()
        body = wait_for(seen_by.client, lambda: _ended(seen_by, owner_id, job), _PATIENCE, "the job ends")
        what = f"{body['source']} -> {body.get('file')}"
        print(f"   seen by {seen_by.name}: {what}: {body['state']}, {plan_text(body['plan'])}")
        for copy in body["plan"]["copies"]:
            print(f"   copied because {copy['reason']}")

    def _cut(self) -> None:
        cut = self._second
        self._say(f"{cut.name} is disconnected from the others")
        cut.client.call("PUT", "/api/v1/link", {"connected": False})
        wait_for(self._first.client, lambda: self._state_of(cut, "silent"), _PATIENCE, "the disconnection is noticed")
        self._show_nodes(self._first)

    def _state_of(self, node: LocalNode, state: str) -> bool:
        items = self._first.client.get("/api/v1/nodes")["items"]
        return any(one["name"] == node.name and one["state"] == state for one in items)

    def _work_on_both_sides(self) -> dict[str, Any]:
        self._say("Reads and writes continue on both sides")
        (one,) = [
            one for one in _disks(self._first) if one["node"] == self._second.name and one["body"]["format"] == "raw"
        ]
        age = next(
            n["age_ms"] for n in self._first.client.get("/api/v1/nodes")["items"] if n["name"] == self._second.name
        )
        print(
            f"   {self._first.name} still reads {one['body']['name']} of {self._second.name}, as of {age_text(age)} ago"
        )
        job = _ask(self._first, self._third, self._targets[-1], wait=30)["body"]["job"]
        self._show_end(self._first, self._third, job)
        job = _ask(self._second, self._second, self._targets[1], wait=30)["body"]["job"]
        self._show_end(self._second, self._second, job)
        late = _ask(self._first, self._second, self._targets[2], wait=0)
        print(f"   {self._first.name} asks {self._second.name} for one more conversion: {_words(late)}")
        return late

    def _heal(self, late: dict[str, Any]) -> None:
        self._say(f"{self._second.name} is reconnected")
        began = time.monotonic()
        self._second.client.call("PUT", "/api/v1/link", {"connected": True})
        path = f"/api/v1/requests/{late['requester']}/{late['request']}"
        answer = wait_for(
            self._first.client, lambda: _answered(self._first, path), _PATIENCE, "the request is answered"
        )
        print(f"   after {time.monotonic() - began:.1f} s the queued request is answered: {_words(answer)}")
        self._show_end(self._first, self._second, answer["body"]["job"])

    def _agree(self) -> int:
        self._say("All three have the same records of every owner (heartbeats left out)")
        counts = wait_until_agreed(self._nodes)
        print_table([["NODE", "RECORDS", "SAME"], *([c["node"], str(c["records"]), "yes"] for c in counts)], "   ")
        self._show_nodes(self._first)
        print()
        return 0


def _make_disk(path: str, size: int) -> None:
    """Writes a sparse disk, half of which is payload."""
    with open(path, "wb") as file:
        file.truncate(size)
        for at in range(0, size // 2, 1 << 20):
            file.seek(at)
            file.write(os.urandom(min(1 << 20, size // 2 - at)))
        file.flush()
        os.fsync(file.fileno())


def _disks(node: LocalNode) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = node.client.get("/api/v1/disks")["items"]
    return items


def _ask(asked: LocalNode, owner: LocalNode, target: str, *, wait: float) -> dict[str, Any]:
    (disk,) = [one for one in _disks(asked) if one["node"] == owner.name and one["body"]["format"] == "raw"]
    path = f"/api/v1/disks/{disk['owner']}/{disk['id']}/convert"
    answer: dict[str, Any] = asked.client.call("POST", path, {"format": target}, query={"wait": wait}).content
    return answer


def _words(answer: dict[str, Any]) -> str:
    if answer.get("ok") is None:
        return "its request is queued"
    return f"transaction {answer['transaction']}" if answer["ok"] else f"refused, {answer['reason']}"


def _answered(node: LocalNode, path: str) -> dict[str, Any] | None:
    answer: dict[str, Any] = node.client.call("GET", path).content
    return answer if answer.get("ok") is not None else None


def _ended(node: LocalNode, owner: str, job: str) -> dict[str, Any] | None:
    from vmconv_fleet.cli.client import NotThereError

    try:
        body: dict[str, Any] = node.client.get(f"/api/v1/records/{owner}/job/{job}")["body"]
    except NotThereError:
        return None
    return body if body["state"] in ("done", "failed", "cancelled") else None
