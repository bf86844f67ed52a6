"""Runs five nodes with random faults for a long time, and prints what has become of them. See README.md.

python benchmarks/fleet/soak.py --minutes 30 --seed 1
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from soak_faults import FAULTS, UNPLUGGED_S, Fault, Undo, has_netem
from vmconv.plugin import VmconvError
from vmconv_fleet import config as settings
from vmconv_fleet.cli.client import NodeClient, UnreachableError
from vmconv_fleet.config import NodeConfig
from vmconv_fleet.replication.clock import OFFSET_FILE
from vmconv_fleet.testing import Driven, Lab, Network, agree, wait_until

PROGRAM = (str(Path(__file__).with_name("soak_node.py")),)
ROOM = "96M"
STEADY = 0
"""The node that is never restarted, so that its memory would show a leak."""
SETTLED_S = 180.0
SAMPLE_S = 15.0
CONVERT_S, READ_S = 20.0, 0.3
MOST = 2
"""Other faults at the time when a node goes down."""
CABLES = ("partition", "bad cable")
BAD = ("fork", "cloned", "forged", "malformed", "torn", "internal", "lost", "retired")
LISTS = tuple(f"/api/v1/{name}?limit=100" for name in ("disks", "requests", "transactions", "jobs"))
PATHS = (*LISTS, "/api/v1/nodes", "/api/v1/fleet", "/metrics")


class Fleet:
    """Nodes in namespaces, each with a filesystem of its own for its database, and a datastore."""

    def __init__(self, directory: str, network: Network, stack: ExitStack, *, every: float) -> None:
        self.network, self.size = network, network.size
        self.anomalies: list[str] = []
        self.loose: set[int] = set()
        self.has_netem = has_netem(network.prefix(0))
        self._every = every
        lab = Lab(directory)
        for number in range(self.size):
            connect = [f"{network.address(other)}:7447" for other in range(number)]
            lab.add(host=network.address(number), port=7447, connect=connect, gossip=True)
        self.configs = [self._equipped(config, directory, stack) for config in lab.nodes]
        self.ids = [config.node for config in self.configs]
        self._due: Counter[int] = Counter()
        self.nodes = [self._run(number) for number in range(self.size)]
        stack.callback(self._end)
        for number in range(self.size):
            wait_until(lambda number=number: self.ask(number, "state")["serving"], SETTLED_S, "it serves")
            self._load(number)

    def _equipped(self, config: NodeConfig, directory: str, stack: ExitStack) -> NodeConfig:
        """Returns the settings with a datastore; the node's directory becomes a filesystem."""
        images = os.path.join(directory, f"{config.name}-images")
        os.mkdir(images)
        for number in range(3):
            with open(os.path.join(images, f"{number}.raw"), "wb") as disk:
                disk.truncate(1 << 20)
        config = replace(config, datastores={"ds": images})
        settings.save(config)
        image, kept = f"{config.directory}.img", f"{config.directory}.kept"
        with open(image, "wb"):
            os.truncate(image, int(ROOM[:-1]) << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", image], check=True)
        os.rename(config.directory, kept)
        os.mkdir(config.directory)
        subprocess.run(["mount", "-o", "loop", image, config.directory], check=True)
        stack.callback(lambda: subprocess.run(["umount", "-l", config.directory], check=True))
        shutil.copytree(kept, config.directory, dirs_exist_ok=True)
        os.chmod(config.directory, 0o700)
        os.symlink(f"{config.directory}.log", config.path("log"))
        return config

    def _run(self, number: int) -> Driven:
        config = self.configs[number]
        # Neither the clock nor the log is on the disk that is full.
        clock = f"{config.directory}.clock"
        node = Driven(config, prefix=self.network.prefix(number), environment={OFFSET_FILE: clock}, program=PROGRAM)
        node.clock = clock
        # Its first answer: it is ready.
        self._due[number] = 1
        return node

    def _load(self, number: int) -> None:
        self.nodes[number].tell("load", every=self._every, targets=self.ids)
        self._due[number] += 1

    def _end(self) -> None:
        for node in self.nodes:
            node.kill()

    def start(self, number: int) -> None:
        """Starts an ended node, and does not wait for it."""
        self.nodes[number] = self._run(number)
        self._load(number)

    def ask(self, number: int, do: str, **arguments: Any) -> dict[str, Any]:
        """Returns the answer of a node, once it has started."""
        while self._due[number]:
            self.nodes[number].answer()
            self._due[number] -= 1
        return self.nodes[number].ask(do, **arguments)

    def shake(self, random: Random) -> None:
        """Unplugs and plugs the bad cables."""
        for number in tuple(self.loose):
            if random.random() < 0.3:
                self.network.plug(number, connected=False)
                time.sleep(random.uniform(0, UNPLUGGED_S))
                self.network.plug(number, connected=True)

    def database(self, number: int) -> int:
        """Returns the bytes of the database."""
        path = self.configs[number].database
        return sum(os.path.getsize(path + end) for end in ("", "-wal") if os.path.exists(path + end))


class Active(NamedTuple):
    name: str
    number: int
    fault: Fault
    undo: Undo


class Sample(NamedTuple):
    minute: float
    memory: list[float]
    database: list[float]
    executed: int


class Reader(threading.Thread):
    """Reads by the API of any node, and requests plans of conversions."""

    def __init__(self, fleet: Fleet, random: Random) -> None:
        super().__init__(daemon=True)
        self.ending = threading.Event()
        self.done: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.longest = 0.0
        self._fleet, self._random = fleet, random

    def run(self) -> None:
        next_conversion = time.monotonic() + CONVERT_S
        while not self.ending.wait(READ_S):
            number = self._random.randrange(self._fleet.size)
            with NodeClient(self._fleet.configs[number].directory) as client:
                try:
                    begin = time.monotonic()
                    for _ in client.lines(self._random.choice(PATHS)):
                        pass
                    self.longest = max(self.longest, time.monotonic() - begin)
                    self.done["reads"] += 1
                    if time.monotonic() > next_conversion:
                        next_conversion = time.monotonic() + CONVERT_S
                        self._convert(client)
                except UnreachableError:
                    self.done["reads of nodes that were down"] += 1
                except (VmconvError, OSError) as exc:
                    # Of a conversion: the node's disk is full.
                    self.failed[str(exc)[:120]] += 1

    def _convert(self, client: NodeClient) -> None:
        disks = client.get("/api/v1/disks", limit=100)["items"]
        if disks:
            disk = self._random.choice(disks)
            path = f"/api/v1/disks/{disk['owner']}/{disk['id']}/convert"
            client.call("POST", path, {"format": "qcow2", "dry_run": True})
            self.done["plans asked for"] += 1


class Soak:
    """Begins and ends faults, and keeps the figures."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self._fleet = fleet
        self._random = Random(seed)
        self._begin = time.monotonic()
        self._active: list[tuple[float, Active]] = []
        self.counts: Counter[str] = Counter()
        self.samples: list[Sample] = []
        self.reader = Reader(fleet, Random(seed))

    def run(self, seconds: float) -> None:
        self.reader.start()
        end, next_fault, next_sample = self._begin + seconds, self._begin + 10, self._begin
        while (now := time.monotonic()) < end:
            self._undo(now)
            if now >= next_fault:
                next_fault = now + self._random.uniform(1, 6)
                self._fault(now)
            if now >= next_sample:
                next_sample = now + SAMPLE_S
                self._sample()
            self._fleet.shake(self._random)
            time.sleep(0.1)
        self._undo(float("inf"))
        # The reader's last call may wait for a node that was frozen.
        self.reader.ending.set()
        self.reader.join(60)

    def _fault(self, now: float) -> None:
        name, number = self._random.choice(list(FAULTS)), self._random.randrange(self._fleet.size)
        if not self._fits(name, number):
            return
        self._say("begins", name, number)
        fault = FAULTS[name]
        undo = fault.begin(self._fleet, number, self._random)
        self.counts[name] += 1
        until = now + self._random.uniform(fault.least, fault.most)
        self._active.append((until, Active(name, number, fault, undo)))

    def _fits(self, name: str, number: int) -> bool:
        """Returns whether a fault can begin beside the present ones."""
        fault, active = FAULTS[name], [one for _, one in self._active]
        here = [one for one in active if one.number == number and not one.fault.whole]
        if name in CABLES and any(one.name in CABLES for one in active):
            return False
        if fault.down and (here or len(active) > MOST or (number == STEADY and name != "freeze")):
            return False
        return not any(one.fault.down or one.name == name for one in here)

    def _undo(self, now: float) -> None:
        for until, one in list(self._active):
            if until <= now:
                self._active.remove((until, one))
                self._say("ends", one.name, one.number)
                one.undo()

    def _say(self, what: str, name: str, number: int) -> None:
        print(f"{time.monotonic() - self._begin:8.1f} {what} {name} {number}", file=sys.stderr, flush=True)

    def _sample(self) -> None:
        down = {one.number for _, one in self._active if one.fault.down}
        ended = down - {one.number for _, one in self._active if one.name == "freeze"}
        memory = [0.0 if n in ended else node.memory() / 1e6 for n, node in enumerate(self._fleet.nodes)]
        databases = [self._fleet.database(number) / 1e6 for number in range(self._fleet.size)]
        executed = 0
        with contextlib.suppress(AssertionError):
            ledger = self._fleet.ask(STEADY, "ledger") if STEADY not in down else {}
            executed = sum(one["last"] for one in ledger.get("tallies", {}).values())
        self.samples.append(Sample((time.monotonic() - self._begin) / 60, memory, databases, executed))

    def settle(self) -> float:
        """Waits until everything is answered and all views are the same; returns the seconds."""
        fleet = self._fleet
        for number in range(fleet.size):
            fleet.ask(number, "rest")
        begin = time.monotonic()
        try:
            wait_until(lambda: not any(map(self._open, range(fleet.size))), SETTLED_S, "all is answered")
            wait_until(lambda: agree(fleet.configs), SETTLED_S, "all views are the same")
        except AssertionError as exc:
            fleet.anomalies.append(str(exc))
        return time.monotonic() - begin

    def _open(self, number: int) -> bool:
        ledger = self._fleet.ask(number, "ledger")
        return not ledger["serving"] or bool(ledger["unanswered"] or ledger["open jobs"])


def verdict(fleet: Fleet) -> dict[str, Any]:
    """Returns the sums over all pairs of nodes, and whether all views are equal."""
    ledgers = [fleet.ask(number, "ledger") for number in range(fleet.size)]
    asked = lost = again = 0
    for requester, ledger in zip(fleet.ids, ledgers, strict=True):
        for target, serial in ledger["asked"].items():
            tally = ledgers[fleet.ids.index(target)]["tallies"].get(requester, {"last": 0, "missing": 0, "again": 0})
            asked += serial
            lost += serial - tally["last"] + tally["missing"]
            again += tally["again"]
    states = [fleet.ask(number, "state") for number in range(fleet.size)]
    return {
        "requests": asked,
        "lost": lost,
        "executed twice": again,
        "stuck": sum(ledger["unanswered"] for ledger in ledgers),
        "refused": sorted({reason for ledger in ledgers for reason in ledger["refused"]}),
        "open jobs": sum(len(ledger["open jobs"]) for ledger in ledgers),
        "views equal": _agree(fleet),
        "problems": sorted({f"{kind}: {text}" for state in states for kind, text in _problems(state)}),
        "anomalies": fleet.anomalies,
        "failures in logs": dict(_failures(fleet)),
    }


def _agree(fleet: Fleet) -> bool:
    """Returns whether all views are the same at some moment: each node still writes heartbeats."""
    try:
        return wait_until(lambda: agree(fleet.configs), SETTLED_S, "all views are the same") >= 0
    except AssertionError:
        return False


def _problems(state: dict[str, Any]) -> Iterator[tuple[str, str]]:
    return ((kind, text) for kind, text in zip(state["kinds"], state["problems"], strict=True) if kind in BAD)


def _failures(fleet: Fleet) -> Counter[str]:
    """Counts the errors in the logs: lines with a trace, and those that are no log at all."""
    found: Counter[str] = Counter()
    for config in fleet.configs:
        with open(config.path("log"), encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    said = json.loads(line)
                    if "trace" in said or said["level"] in ("error", "critical"):
                        found[f"{said['message']}: {said.get('trace', '').strip().rpartition(chr(10))[2]}"[:200]] += 1
                except (ValueError, KeyError, TypeError):
                    found[line.strip()[:200]] += 1
    return found


def table(samples: list[Sample]) -> None:
    """Prints memory and database over time, about twenty rows."""
    size = len(samples[0].memory)
    heads = [f"MB {what}{number}" for what in ("rss", "db") for number in range(size)]
    print("minute " + " ".join(f"{head:>8}" for head in heads) + " executed")
    for one in samples[:: max(1, len(samples) // 20)]:
        cells = " ".join(f"{value:8.1f}" for value in (*one.memory, *one.database))
        print(f"{one.minute:6.1f} {cells} {one.executed:8}")


def report(soak: Soak, settled: float, result: Mapping[str, Any]) -> None:
    """Prints all figures."""
    table(soak.samples)
    print("growth of memory, %", growth(soak.samples, "memory"))
    print("growth of databases, %", growth(soak.samples, "database"))
    print("faults", dict(soak.counts))
    print("API", dict(soak.reader.done), f"longest {soak.reader.longest:.1f} s")
    print("failed calls", dict(soak.reader.failed))
    print(f"settled within {settled:.1f} s")
    for name, value in result.items():
        print(f"{name}: {value}")


def growth(samples: list[Sample], values: str) -> list[float]:
    """Returns for each node how much larger the last third is than the middle one, in percent of their medians."""
    third = max(1, len(samples) // 3)
    parts = [[getattr(one, values) for one in part] for part in (samples[third : 2 * third], samples[-third:])]
    found = []
    for number in range(len(getattr(samples[0], values))):
        before, after = (sorted(v for row in part if (v := row[number])) or [0.0] for part in parts)
        middle = before[len(before) // 2]
        found.append(round((after[len(after) // 2] / middle - 1) * 100, 1) if middle else 0.0)
    return found


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="vmconv-soak-", dir=options.directory) as work, ExitStack() as stack:
        network = Network(options.nodes)
        stack.callback(network.close)
        fleet = Fleet(work, network, stack, every=options.every)
        soak = Soak(fleet, options.seed)
        try:
            soak.run(options.minutes * 60)
            settled = soak.settle()
            result = verdict(fleet)
        finally:
            if options.keep_logs:
                for number, config in enumerate(fleet.configs):
                    shutil.copy(config.path("log"), os.path.join(options.keep_logs, f"node{number}.log"))
    report(soak, settled, result)
    wrong = ("lost", "executed twice", "stuck", "refused", "open jobs", "problems", "anomalies")
    return int(any(result[name] for name in wrong) or not result["views equal"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--every", type=float, default=0.1, help="seconds between two requests of a node")
    parser.add_argument("--directory", metavar="DIR", help="where the nodes' filesystems are")
    parser.add_argument("--keep-logs", metavar="DIR")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
