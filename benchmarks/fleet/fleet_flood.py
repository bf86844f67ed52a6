"""Strangers: 2,000 idle and slow connections to each port of a node, and what it still does."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

from fleet_measure import LONG, Figure, Setting, percentiles
from vmconv_fleet import config as settings
from vmconv_fleet.cli.client import NodeClient
from vmconv_fleet.config import NodeConfig, split_address
from vmconv_fleet.limiter import raise_descriptor_limit
from vmconv_fleet.testing import free_port, wait_until
from vmconv_fleet.trust import joining
from vmconv_fleet.trust.authority import Invitation
from vmconv_fleet.trust.identity import Keys, new_node_id

STRANGERS = 2000
MACHINES = 8
"""The number of addresses that they have."""
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
    config = setting.lab.add(api=f"{host}:{free_port()}", join=f"{host}:{free_port()}", gossip=True)
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
    link = _link(setting, config)
    return [
        *percentiles(f"{what}: a read over HTTPS", times, p99=1000),
        Figure(f"{what}: a conversion, by the command line", conversion, "s", 10),
        Figure(f"{what}: a link of a member", link, "s", 10),
        Figure(f"{what}: joining", _timed(lambda: _join(setting, config)), "s", 10),
    ]


def _disks(client: NodeClient) -> list[str]:
    return [str(one["body"]["name"]) for one in client.everything("/api/v1/disks")]


def _join(setting: Setting, config: NodeConfig) -> None:
    joining.join(_invitation(setting, config), Keys.generate().request(new_node_id(), setting.lab.fleet, ["127.0.0.1"]))


def _invitation(setting: Setting, config: NodeConfig) -> Invitation:
    assert setting.lab.authority is not None
    return setting.lab.authority.invite(config, host="127.0.0.1", lifetime=600)


def _link(setting: Setting, founder: NodeConfig) -> float:
    """Returns the seconds until a new member has a link, `LONG` if it gets none. Its own port is not flooded.

    It starts when the node has opened its links again for it, and strangers hold the places since.
    """
    directory = tempfile.mkdtemp(dir=setting.lab.directory)
    listen = f"127.0.0.1:{free_port()}"
    member = [
        "--directory",
        directory,
        "--name",
        os.path.basename(directory),
        "--address",
        "127.0.0.1",
        "--listen",
        listen,
        "--no-api",
    ]
    _vmconv("node", "join", str(_invitation(setting, founder)), *member)
    time.sleep(REOPENED_S + 12)
    with running(settings.load(directory)), NodeClient(directory) as client:
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
    """Connects, half of them with the first bytes of a handshake; those that are ended connect again."""
    ended = threading.Event()
    with selectors.DefaultSelector() as held:
        for index in range(number if address else 0):
            held.register(_stranger(address or "", index), selectors.EVENT_READ, index)
        returning = threading.Thread(target=_return, args=(held, address, ended))
        returning.start()
        try:
            yield
        finally:
            ended.set()
            returning.join()
            for key in list(held.get_map().values()):
                held.unregister(key.fileobj)
                cast("socket.socket", key.fileobj).close()


def _stranger(address: str, number: int) -> socket.socket:
    one = socket.create_connection(split_address(address), 10, (f"127.0.1.{1 + number % MACHINES}", 0))
    if number % 2:
        one.sendall(HELLO)
    return one


def _return(held: selectors.BaseSelector, address: str | None, ended: threading.Event) -> None:
    """Replaces connections that were ended, and those that were refused when they returned."""
    lost: list[int] = []
    while not ended.wait(0.2):
        for key, _ in held.select(0):
            one = cast("socket.socket", key.fileobj)
            with contextlib.suppress(OSError):
                if one.recv(1 << 16, socket.MSG_DONTWAIT):
                    continue
            held.unregister(one)
            one.close()
            lost.append(key.data)
        while lost and not ended.is_set():
            try:
                again = _stranger(address or "", lost[-1])
            except OSError:
                break
            held.register(again, selectors.EVENT_READ, lost.pop())


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
