"""Strangers: 2,000 idle and slow connections to each port of a node, and what it still does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from fleet_measure import LONG, Figure, Setting, percentiles
from vmconv_fleet import config as settings
from vmconv_fleet.cli.client import NodeClient
from vmconv_fleet.config import NodeConfig, split_address
from vmconv_fleet.limiter import raise_descriptor_limit
from vmconv_fleet.testing import free_port, wait_until
from vmconv_fleet.trust import joining
from vmconv_fleet.trust.identity import Keys, new_node_id

STRANGERS = 2000
REOPENED_S = 10.0
"""After a member has joined, the node opens its links again. Its port refuses connections for a moment, and all that it
had are gone: strangers who come before are no flood.
"""
HELLO = b"\x16\x03\x01\x02\x00\x01"
"""The first bytes of a handshake."""


def flood(setting: Setting) -> list[Figure]:
    raise_descriptor_limit()
    images = os.path.join(setting.lab.directory, "images")
    os.mkdir(images)
    host = "127.0.0.1"
    config = setting.lab.add(api=f"{host}:{free_port()}", join=f"{host}:{free_port()}")
    config = replace(config, datastores={"ds": images})
    settings.save(config)
    ports = {"nobody": None, "API": config.api, "join": config.join, "link": config.listen[0]}
    figures: list[Figure] = []
    with running(config):
        for number, (name, address) in enumerate(ports.items()):
            with open(os.path.join(images, f"{number}.raw"), "wb") as disk:
                disk.truncate(1 << 20)
            time.sleep(REOPENED_S)
            with strangers(address, 200 if setting.quick else STRANGERS):
                figures += _figures(setting, config, name, f"{number}.raw")
    return figures


def _figures(setting: Setting, config: NodeConfig, name: str, disk: str) -> list[Figure]:
    what = f"strangers at {name}"
    with NodeClient(config.directory) as local:
        made = local.call("POST", "/api/v1/tokens", {"label": "a benchmark", "role": "viewer"}).content
        reader = NodeClient(f"https://{config.api}", ca=config.path("ca.pem"), token=made["token"])
        times = [_timed(lambda: reader.get("/api/v1/fleet")) for _ in range(100)]
        local.call("POST", "/api/v1/nodes/node0/scan", {})
        wait_until(lambda: disk in _disks(local), LONG, "the disk is listed")
    convert = ["fleet", "convert", f"node0:{disk}", "--to", "qcow2", "--follow", "--node", config.directory]
    conversion = _timed(lambda: _vmconv(*convert))
    # Before a new member, for which the node opens its links again.
    link = _link(setting)
    return [
        *percentiles(f"{what}: a read over HTTPS", times, p99=1000),
        Figure(f"{what}: a conversion, by the command line", conversion, "s", 10),
        Figure(f"{what}: a link of a member", link, "s", 10),
        Figure(f"{what}: joining", _timed(lambda: _join(setting, config)), "s", 10),
    ]


def _disks(client: NodeClient) -> list[str]:
    return [str(one["body"]["name"]) for one in client.everything("/api/v1/disks")]


def _join(setting: Setting, config: NodeConfig) -> None:
    assert setting.lab.authority is not None
    invitation = setting.lab.authority.invite(config, host="127.0.0.1", lifetime=600)
    joining.join(invitation, Keys.generate().request(new_node_id(), setting.lab.fleet, ["127.0.0.1"]))


def _link(setting: Setting) -> float:
    """Returns the seconds until a new member has a link, `LONG` if it gets none; it starts 12 s after the flood."""
    time.sleep(12)
    config = setting.lab.add()
    with running(config), NodeClient(config.directory) as client:
        try:
            return wait_until(
                lambda: any(one["neighbour"] for one in client.get("/api/v1/nodes")["items"]), 60, "a link"
            )
        except AssertionError:
            return LONG


def _timed(call: Callable[[], object]) -> float:
    begin = time.monotonic()
    call()
    return time.monotonic() - begin


def _vmconv(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "vmconv", *arguments], check=True, stdout=subprocess.DEVNULL, timeout=LONG)


@contextmanager
def strangers(address: str | None, number: int) -> Iterator[None]:
    """Connects, half of them with the first bytes of a handshake."""
    with ExitStack() as stack:
        for index in range(number if address else 0):
            one = stack.enter_context(socket.create_connection(split_address(address or ""), 10))
            if index % 2:
                one.sendall(HELLO)
        yield


@contextmanager
def running(config: NodeConfig) -> Iterator[None]:
    command = [sys.executable, "-m", "vmconv", "node", "run", "--directory", config.directory]
    with (
        open(config.path("log"), "wb") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as node,
    ):
        try:
            assert node.stdout is not None
            assert "runs" in node.stdout.readline()
            yield
        finally:
            node.terminate()
