"""Faults of the soak: each begins on a node, or on the network, and is over when it is undone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from random import Random
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from soak import Fleet

DAY_MS = 24 * 3600 * 1000
JUMPS = (-400 * DAY_MS, -DAY_MS, -3600_000, 3600_000, DAY_MS, 400 * DAY_MS, 9000 * DAY_MS)
FILLING = "filler"
UNPLUGGED_S = 0.2

Undo = Callable[[], None]


class Fault(NamedTuple):
    """A kind of fault: how it begins, and for how many seconds it lasts. `down`: the node does nothing meanwhile."""

    begin: Callable[[Fleet, int, Random], Undo]
    least: float
    most: float
    down: bool = False
    whole: bool = False
    """Of the whole network, not of one node."""


def _partition(fleet: Fleet, _number: int, random: Random) -> Undo:
    parts: list[list[int]] = [[], [], []]
    for number in range(fleet.size):
        parts[random.randrange(random.choice((2, 2, 3)))].append(number)
    fleet.network.partition(*parts)
    return fleet.network.heal


def _kill(fleet: Fleet, number: int, _random: Random) -> Undo:
    fleet.nodes[number].kill()
    return lambda: fleet.start(number)


def _restart(fleet: Fleet, number: int, _random: Random) -> Undo:
    # A node that has not started yet has no handler of the signal.
    fleet.ask(number, "state")
    code = fleet.nodes[number].end(60)
    if code:
        fleet.anomalies.append(f"node {number} ended with the code {code}")
    return lambda: fleet.start(number)


def _freeze(fleet: Fleet, number: int, _random: Random) -> Undo:
    fleet.nodes[number].signal(signal.SIGSTOP)
    return lambda: fleet.nodes[number].signal(signal.SIGCONT)


def _fill(fleet: Fleet, number: int, _random: Random) -> Undo:
    """Fills the filesystem of the node's database to the last block."""
    path = fleet.configs[number].path(FILLING)
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    with open(path, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(512))
    return lambda: os.unlink(path)


def _jump(fleet: Fleet, number: int, random: Random) -> Undo:
    fleet.nodes[number].step_clock(random.choice(JUMPS))
    return lambda: fleet.nodes[number].step_clock(0)


def _bad_cable(fleet: Fleet, number: int, random: Random) -> Undo:
    """Loses and delays packets: by netem, or where the kernel has none by unplugging the cable for moments."""
    loss, delay = random.choice((1, 5, 20)), random.choice((5, 50, 200))
    device = [*fleet.network.prefix(number), "tc", "qdisc"]
    netem = ["root", "netem", "delay", f"{delay}ms", f"{delay // 2}ms", "loss", f"{loss}%"]
    if fleet.has_netem:
        _run([*device, "add", "dev", "eth0", *netem])
        return partial(_run, [*device, "del", "dev", "eth0", "root"])
    fleet.loose.add(number)

    def plug() -> None:
        fleet.loose.discard(number)
        fleet.network.plug(number, connected=True)

    return plug


FAULTS: dict[str, Fault] = {
    "partition": Fault(_partition, 3, 25, whole=True),
    "kill -9": Fault(_kill, 0, 8, down=True),
    "restart": Fault(_restart, 0, 3, down=True),
    "freeze": Fault(_freeze, 2, 15, down=True),
    "full disk": Fault(_fill, 3, 20),
    "clock jump": Fault(_jump, 3, 20),
    "bad cable": Fault(_bad_cable, 5, 25),
}


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True)


def has_netem(prefix: list[str]) -> bool:
    """Returns whether the kernel can lose and delay packets."""
    add = [*prefix, "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    if subprocess.run(add, check=False, capture_output=True).returncode:
        return False
    _run([*prefix, "tc", "qdisc", "del", "dev", "lo", "root"])
    return True
