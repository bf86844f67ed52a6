"""A fleet of real nodes on this machine, for the demo: own directories and processes, mutual TLS on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

from vmconv.plugin import BackendError
from vmconv_fleet.cli.client import NodeClient

T = TypeVar("T")

_READY_S = 60.0
_AGREE_S = 120.0
_END_S = 20.0
_FREE = 3
"""Ports of a node: links, joining, HTTPS."""


class LocalNode(NamedTuple):
    """A running node; `client` talks to its socket."""

    name: str
    directory: str
    datastore: str
    process: subprocess.Popen[str]
    client: NodeClient
    web: str

    def id(self) -> str:
        return str(self.client.get("/api/v1/fleet")["node"])


@contextmanager
def local_fleet(names: list[str], directory: str, datastores: str, *, web: bool) -> Iterator[list[LocalNode]]:
    """Yields connected nodes, the first with the fleet's authority; stops them afterwards."""
    with ExitStack() as stack:
        nodes: list[LocalNode] = []
        for name in names:
            node = _start(name, directory, datastores, nodes[0] if nodes else None, stack, web=web)
            nodes.append(node)
        for node in nodes:
            wait_for(node.client, partial(_sees_all, node, len(names)), _READY_S, "all nodes see each other")
        yield nodes


def _sees_all(node: LocalNode, count: int) -> bool:
    items = node.client.get("/api/v1/nodes")["items"]
    return len(items) == count and all(one["state"] in ("here", "up") for one in items)


def _start(
    name: str, directory: str, datastores: str, first: LocalNode | None, stack: ExitStack, *, web: bool
) -> LocalNode:
    own, disks = os.path.join(directory, name), os.path.join(datastores, f"{name}-disks")
    os.makedirs(disks, exist_ok=True)
    link, join, api = _free_ports(_FREE)
    common = ["--directory", own, "--name", name, "--listen", f"127.0.0.1:{link}", "--address", "127.0.0.1"]
    common += ["--api", f"127.0.0.1:{api}"] if web else ["--no-api"]
    if first is None:
        _vmconv("node", "init", *common, "--fleet", "demo", "--join", f"127.0.0.1:{join}", disks)
    else:
        invitation = _vmconv("node", "invite", "--directory", first.directory, "--address", "127.0.0.1").strip()
        _vmconv("node", "join", invitation, disks, *common)
    process = _run(name, own, stack)
    client = stack.enter_context(NodeClient(own))
    return LocalNode(name, own, disks, process, client, f"https://127.0.0.1:{api}/" if web else "")


def _run(name: str, own: str, stack: ExitStack) -> subprocess.Popen[str]:
    with open(f"{own}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            _program("node", "run", "--directory", own),
            stdout=subprocess.PIPE,
            stderr=log,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
    stack.callback(_end, process)
    assert process.stdout
    if not process.stdout.readline():
        with open(f"{own}.log", encoding="utf-8") as log:
            last = log.read().strip().splitlines()[-1:]
        raise BackendError(f"node {name} did not start: {' '.join(last)}")
    return process


def _end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()


def _program(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vmconv", *arguments]


def _vmconv(*arguments: str) -> str:
    done = subprocess.run(_program(*arguments), capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"vmconv {' '.join(arguments[:2])}: {done.stderr.strip()}")
    return done.stdout


def _free_ports(count: int) -> list[int]:
    """Returns unused ports of loopback."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def wait_for(client: NodeClient, look: Callable[[], T | None], seconds: float, what: str) -> T:
    """Returns the result of `look` as soon as it has one; it is called after each change of the node."""
    import time

    until = time.monotonic() + seconds
    with NodeClient(client.where) as listener:
        for line in listener.lines("/api/v1/events"):
            if line.startswith((":", "data: ")):
                found = look()
                if found:
                    return found
            if time.monotonic() > until:
                break
    raise BackendError(f"within {seconds:g} s it did not happen that {what}")


def agreement(nodes: list[LocalNode]) -> list[dict[str, Any]] | None:
    """Returns the number of records on each node once all have the same; None before.

    Heartbeats are left out: a newer one is always on its way.
    """
    seen = []
    for node in nodes:
        records = {
            (one["owner"], one["kind"], one["id"], one["position"])
            for one in _records(node)
            if one["kind"] != "heartbeat"
        }
        seen.append(records)
    if any(one != seen[0] for one in seen):
        return None
    return [
        {"node": node.name, "records": len(records), "same": True} for node, records in zip(nodes, seen, strict=True)
    ]


def _records(node: LocalNode) -> Iterator[dict[str, Any]]:
    import json

    with NodeClient(node.client.where) as client:
        for line in client.lines("/api/v1/export"):
            yield json.loads(line)


def wait_until_agreed(nodes: list[LocalNode]) -> list[dict[str, Any]]:
    """Returns the number of records on each node once all have the same."""
    return wait_for(nodes[0].client, lambda: agreement(nodes), _AGREE_S, "all nodes agree") or []
