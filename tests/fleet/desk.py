"""A browser before the console of a node, and another node with records of hostile names."""

from __future__ import annotations

import http.client
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

from fleet.in_memory import Node, nodes
from fleet.serving import Served, served
from vmconv_fleet.replication.clock import wall_ms
from vmconv_fleet.replication.records import Change

EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>.vmdk"
JOB = {
    "state": "running",
    "disk": "d1",
    "datastore": "ds",
    "source": EVIL,
    "format": "qcow2",
    "created_ms": 1,
    "plan": {
        "backend": "reflink",
        "shared": 3 << 30,
        "copied": 1 << 30,
        "copies": [{"reason": "<b>odd</b>", "bytes": 5}],
    },
    "progress": {"done": 25, "total": 100},
}
MACHINE_JOB = {
    "state": "failed",
    "vm": "v1",
    "datastore": "ds",
    "source": "x.vmx",
    "format": "libvirt",
    "error": EVIL,
    "plan": {"losses": [EVIL], "changes": [EVIL]},
}
VM = {
    "datastore": "ds",
    "file": "x.vmx",
    "name": EVIL,
    "format": "vmx",
    "system": EVIL,
    "os": "debian12",
    "memory": 2 << 30,
    "processors": 4,
    "firmware": "uefi",
    "disks": [{"name": EVIL, "disk": "d1"}, {"name": EVIL, "capacity": 1 << 30}],
    "nics": [{"mac": "00:50:56:00:00:01", "network": EVIL}],
}
CAPABILITIES = {
    "formats": {"qcow2": {"writes": True}, "vmdk": {"writes": True}},
    "machines": {"libvirt": {"writes": True, "disks": "qcow2"}, "old": {"writes": False}},
}


class Desk(NamedTuple):
    """A browser before a node, and another node that has a disk and a job."""

    page: Any
    api: Served
    here: Node
    other: Node

    def go(self, path: str) -> None:
        self.page.goto(f"{self.api.url}{path}")

    def text(self, selector: str = "main") -> str:
        said: str = self.page.locator(selector).first.inner_text()
        return said


def enter(desk: Desk, role: str) -> None:
    desk.go("/")
    assert "/login" in desk.page.url
    desk.page.fill("#token", desk.api.token(role)["token"])
    desk.page.click("text=Enter")
    desk.page.wait_for_selector("h1:has-text('Nodes')")


def jobs_of(node: str) -> list[str]:
    return [f"/jobs/{node}/{job}" for job in ("j1", "j2")]


PAGES = ["/", "/datastores", "/disks", "/vms", "/jobs", "/requests", "/history", "/policies", "/tokens", "/tokens/new"]
PAGES += ["/webhooks", "/webhooks/new"]


def pages_of(node: str) -> list[str]:
    """Returns the pages about a node and its records, those that ask before an act among them."""
    single = ["nodes", "policies"]
    found = [f"/{name}/{node}" for name in single]
    found += [f"/datastores/{node}/ds", f"/disks/{node}/d1", f"/vms/{node}/v1", *jobs_of(node)]
    found += [f"/jobs/{node}/j1/cancel", f"/nodes/{node}/scan", f"/datastores/{node}/ds/scan"]
    found += [f"/convert?kind={kind}&item={node}/{id}" for kind, id in (("disk", "d1"), ("vm", "v1"))]
    return [*found, f"/convert/review?kind=disk&item={node}/d1&format=qcow2"]


@contextmanager
def seated(tmp_path: Path, browser: Any) -> Iterator[Desk]:
    """Yields the desk; afterwards no page has reported an error."""
    with nodes(2, tmp_path) as (here, other), served(here) as api:
        other.write(
            Change("datastore", "ds", {"path": "/srv/images", "size": 100, "free": 50, "filesystem": "xfs"}),
            Change("disk", "d1", {"datastore": "ds", "name": EVIL, "format": "vmdk", "virtual_size": 1 << 30}),
            Change("vm", "v1", VM),
            Change("capabilities", "installed", CAPABILITIES),
            Change("job", "j1", JOB),
            Change("job", "j2", MACHINE_JOB),
            Change("heartbeat", other.id, {"at_ms": wall_ms(), "interval_s": 5, "problems": [EVIL]}),
        )
        here.body_when(other.id, "heartbeat", other.id, lambda _one: True)
        context = browser.new_context(ignore_https_errors=True)
        page = context.new_page()
        wrong: list[str] = []
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        yield Desk(page, api, here, other)
        context.close()
        # A door that stays shut is what a test may be about.
        assert [text for text in wrong if not re.search("status of (401|403|422)|ERR_FAILED", text)] == []


def post(api: Served, path: str, fields: dict[str, str], **headers: str) -> int:
    context = ssl.create_default_context(cafile=api.ca)
    connection = http.client.HTTPSConnection(api.url.removeprefix("https://"), context=context)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    content = {"Content-Type": "application/x-www-form-urlencoded"}
    connection.request("POST", path, urlencode(fields), content | named)
    status = connection.getresponse().status
    connection.close()
    return status
