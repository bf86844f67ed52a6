"""Machines of a network on this one: a network namespace for each, connected by bridges that can be separated.

 namespace HUB:   bridge part0   bridge part1   ...
                    |    |          |
 namespaces:       n0    n1         n2            one cable each, connected to the bridge of its part

A partition moves cables to other bridges; nothing is sent to addresses outside of these namespaces.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

ADDRESS = "10.77.0.{}"


def why_no_namespaces() -> str | None:
    """Returns why this process cannot create network namespaces; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    from shutil import which

    if which("ip") is None:
        return "ip (iproute2) is not installed"
    name = f"vmfleet{os.getpid()}t"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"ip netns add: {done.stderr.strip()}"
    try:
        bridge = ["ip", "-n", name, "link", "add", "name", "bridge0", "type", "bridge"]
        done = subprocess.run(bridge, capture_output=True, text=True, check=False)
        return f"{' '.join(bridge)}: {done.stderr.strip()}" if done.returncode else None
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)


class Network:
    """Connected machines; `close` removes them, even with running processes."""

    def __init__(self, size: int) -> None:
        self._stem = f"vmfleet{os.getpid()}"
        self._hub = f"{self._stem}hub"
        self.size = size
        self._namespaces: list[str] = []
        self._parts: set[int] = set()
        try:
            self._make(self._hub)
            self._part(0)
            for number in range(size):
                self._add(number)
        except BaseException:
            self.close()
            raise

    def address(self, number: int) -> str:
        return ADDRESS.format(number + 1)

    def prefix(self, number: int) -> list[str]:
        """Returns the prefix of commands to run on this machine."""
        return ["ip", "netns", "exec", f"{self._stem}n{number}"]

    def partition(self, *parts: Sequence[int]) -> None:
        """Connects each machine with those of its part only."""
        for part, members in enumerate(parts):
            self._part(part)
            for number in members:
                _ip("-n", self._hub, "link", "set", f"c{number}", "master", f"part{part}")

    def plug(self, number: int, *, connected: bool) -> None:
        """Plugs the cable of this machine in or out, at its other end."""
        _ip("-n", self._hub, "link", "set", f"c{number}", "up" if connected else "down")

    def move(self, number: int, address: str) -> None:
        """Gives this machine another address instead of its present one."""
        name = f"{self._stem}n{number}"
        _ip("-n", name, "-4", "addr", "flush", "dev", "eth0")
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")

    def heal(self) -> None:
        self.partition(range(self.size))

    def close(self) -> None:
        for name in self._namespaces:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        self._namespaces.clear()

    def _make(self, name: str) -> None:
        _ip("netns", "add", name)
        self._namespaces.append(name)
        _ip("-n", name, "link", "set", "lo", "up")

    def _part(self, number: int) -> None:
        if number not in self._parts:
            _ip("-n", self._hub, "link", "add", "name", f"part{number}", "type", "bridge")
            _ip("-n", self._hub, "link", "set", f"part{number}", "up")
            self._parts.add(number)

    def _add(self, number: int) -> None:
        name = f"{self._stem}n{number}"
        self._make(name)
        _ip("-n", self._hub, "link", "add", "name", f"c{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("-n", self._hub, "link", "set", f"c{number}", "master", "part0", "up")
        _ip("-n", name, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
