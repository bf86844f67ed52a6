"""The cases, each a function from a setting to figures."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from statistics import median

from fleet_flood import flood
from fleet_measure import Figure, Setting, percentiles
from vmconv_fleet.cli.client import NodeClient
from vmconv_fleet.config import NodeConfig
from vmconv_fleet.testing import Driven, agree, summaries_of, view_of

_CALLS = 20

RECORD = 330
"""Bytes of text in a record of the cases, as in what they are compared with."""


def update(setting: Setting) -> list[Figure]:
    setting.mesh(5)
    return percentiles(
        "update, commit to commit", _updates(setting, 200 if setting.quick else 1000, 0.01), p50=5, p99=100
    )


def _updates(setting: Setting, count: int, every: float) -> list[float]:
    """Returns the time from the owner's commit to that of each other, for records one after the other."""
    for node in setting.nodes:
        node.ask("record")
    owner = setting.ids[0]
    setting.nodes[0].ask("write", count=count, size=RECORD, every=every, timeout=300)
    setting.wait(lambda: _same(setting.lab.nodes, owner), "all have it")
    seen = [{id: at for o, id, at in node.ask("recorded")["seen"] if o == owner} for node in setting.nodes]
    return [other[id] - at for other in seen[1:] for id, at in seen[0].items()]


def _same(configs: list[NodeConfig], owner: str) -> bool:
    return len({view_of(config).get(owner) for config in configs}) == 1


def request(setting: Setting) -> list[Figure]:
    setting.mesh(5)
    times = setting.nodes[1].ask("ask", target=setting.ids[0], count=100 if setting.quick else 500)["times"]
    return percentiles("request to response", times, p50=10)


def throughput(setting: Setting) -> list[Figure]:
    setting.mesh(5)
    count = 500 if setting.quick else 3000
    seconds = setting.nodes[1].ask("ask", target=setting.ids[0], count=count, threads=32, timeout=300)["seconds"]
    at_owner, everywhere = zip(*(_batches(setting, 5_000 if setting.quick else 50_000) for _ in range(3)), strict=True)
    return [
        Figure("transactions of one record, answered", count / seconds, "1/s", 300, least=True),
        Figure("batches of 100, records durable at their owner", median(at_owner), "1/s"),
        Figure("batches of 100, records durable everywhere", median(everywhere), "1/s", 10_000, least=True),
        Figure("the same, slowest of three times", min(everywhere), "1/s"),
    ]


def _batches(setting: Setting, records: int) -> tuple[float, float]:
    """Returns how many records of one node become durable in a second, there and with all."""
    begin = time.monotonic()
    setting.nodes[2].ask("write", count=records, size=RECORD, batch=100, timeout=300)
    durable = time.monotonic() - begin
    owner, nodes = setting.ids[2], setting.lab.nodes
    last = _position(setting.config(2), owner)
    # To compare all records would take as much processor time as to replicate them.
    setting.wait(lambda: all(_position(config, owner) >= last for config in nodes), "all have come as far")
    everywhere = time.monotonic() - begin
    setting.wait(lambda: _same(nodes, owner), "all have them")
    return records / durable, records / everywhere


def partition(setting: Setting) -> list[Figure]:
    setting.mesh(5)
    assert setting.network is not None, "partitions need namespaces"
    took = []
    for _ in range(3 if setting.quick else 20):
        for node in setting.nodes:
            node.ask("work", every=0.1, targets=setting.ids)
        setting.network.partition([0, 1], [2, 3, 4])
        time.sleep(5 if setting.quick else 20)
        for node in setting.nodes:
            node.ask("rest")
        setting.network.heal()
        # To compare all records takes as long as to replicate them: it is done after the timing.
        took.append(setting.wait(lambda: agree(setting.lab.nodes, summaries_of), "all say that they have the same"))
        setting.wait(lambda: agree(setting.lab.nodes), "the views are the same")
    within = sum(one <= 3 for one in took)
    return [
        Figure("heal to the same views, median", sorted(took)[len(took) // 2], "s"),
        Figure("heal to the same views, longest", max(took), "s", 3),
        Figure(f"of {len(took)} heals within 3 s", within, "", len(took), least=True),
    ]


def late(setting: Setting) -> list[Figure]:
    records = 10_000 if setting.quick else 100_000
    setting.mesh(4, started=2)
    owner = setting.ids[0]
    setting.nodes[0].ask("write", count=records, size=RECORD, batch=500, timeout=600)
    setting.wait(lambda: _same(setting.lab.nodes[:2], owner), "the other one has them")
    found = []
    for number, name in ((2, "alive"), (3, "dead")):
        if name == "dead":
            setting.nodes[0].kill()
        target = view_of(setting.config(1))[owner][1]
        begin = time.monotonic()
        setting.start(number)

        def caught_up(number: int = number, target: int = target) -> bool:
            return _position(setting.config(number), owner) >= target

        setting.wait(caught_up, "it has all")
        seconds = time.monotonic() - begin
        assert view_of(setting.config(number))[owner][1] >= target
        found.append(Figure(f"late joiner, {records} records, owner {name}, with its start", seconds, "s", 20))
    return found


def _position(config: NodeConfig, owner: str) -> int:
    """Returns how far the node has the owner's records, without reading them."""
    if not os.path.exists(config.database):
        return 0
    with closing(sqlite3.connect(f"file:{config.database}?mode=ro", uri=True, timeout=10)) as database:
        try:
            rows = database.execute("SELECT seq FROM owners WHERE owner = ?", (owner,)).fetchall()
        except sqlite3.OperationalError:
            # It has just been made.
            return 0
    return int(rows[0][0]) if rows else 0


def loss(setting: Setting) -> list[Figure]:
    setting.mesh(3)
    assert setting.network is not None, "cutting a cable needs namespaces"
    took = []
    for _ in range(2 if setting.quick else 5):
        setting.network.partition([0, 1], [2])
        took.append(setting.wait(lambda: setting.ids[2] not in setting.neighbours(0), "the loss is noticed"))
        setting.network.heal()
        setting.wait(lambda: len(setting.neighbours(0)) == 2, "neighbours again")
    return [Figure("loss noticed, longest", max(took), "s", 5)]


def idle(setting: Setting) -> list[Figure]:
    setting.mesh(5)
    figures = _at_rest(setting.nodes, "five nodes at rest", 10 if setting.quick else 60)
    with NodeClient(setting.config(0).directory) as client:
        client.get("/api/v1/nodes")
    return [*figures, Figure("the same after the first read by the API", setting.nodes[0].memory() / 1e6, "MB")]


def _at_rest(nodes: list[Driven], name: str, seconds: float) -> list[Figure]:
    # What the start has left to do.
    time.sleep(10)
    before = [node.processor_time() for node in nodes]
    begin = time.monotonic()
    time.sleep(seconds)
    spent = time.monotonic() - begin
    shares = [(node.processor_time() - one) / spent * 100 for node, one in zip(nodes, before, strict=True)]
    memory = [node.memory() / 1e6 for node in nodes]
    return [
        Figure(f"{name}: memory, median", sorted(memory)[len(memory) // 2], "MB"),
        Figure(f"{name}: memory, largest", max(memory), "MB", 60),
        Figure(f"{name}: processor, mean", sum(shares) / len(shares), "%"),
        Figure(f"{name}: processor, busiest", max(shares), "%", 1),
    ]


def fifty(setting: Setting) -> list[Figure]:
    size = 10 if setting.quick else 50
    first = setting.lab.add(gossip=True)
    for _ in range(size - 1):
        setting.lab.add(gossip=True, connect=first.listen)
    setting.lab.introduce()
    begin = time.monotonic()
    for number in range(size):
        setting.start(number, ready=False)
    for node in setting.nodes:
        node.answer(180)
    setting.wait(lambda: all(len(node.ask("state")["neighbours"]) == size - 1 for node in setting.nodes), "mesh")
    linked = time.monotonic() - begin
    rest = _at_rest(setting.nodes, f"{size} nodes at rest", 10 if setting.quick else 60)
    times = _updates(setting, 50 if setting.quick else 200, 0.2)
    setting.wait(lambda: agree(setting.lab.nodes), "all views are the same")
    return [
        Figure(f"{size} nodes: from the start to links of all with all", linked, "s"),
        *rest,
        *percentiles(f"{size} nodes: update, commit to commit", times),
    ]


def exits(setting: Setting) -> list[Figure]:
    rounds = 10 if setting.quick else 100
    peer = setting.lab.add()
    config = setting.lab.add()
    setting.start(0)
    ways: list[tuple[str, int, Callable[[Driven], None]]] = [
        ("SIGTERM", 0, lambda node: node.signal(signal.SIGTERM)),
        ("SIGINT", 0, lambda node: node.signal(signal.SIGINT)),
        ("exception", 1, lambda node: node.tell("fail")),
    ]
    good, longest = 0, 0.0
    for number in range(rounds):
        name, expected, end = ways[number % len(ways)]
        node = Driven(config)
        setting.nodes.append(node)
        node.answer()
        if number % 2:
            node.ask("work", every=0.0, targets=[peer.node, config.node])
        begin = time.monotonic()
        end(node)
        try:
            code = node.process.wait(30)
        except subprocess.TimeoutExpired:
            print(f"  {name}: hangs")
            continue
        finally:
            node.kill()
        longest = max(longest, time.monotonic() - begin)
        good += code == expected
        if code != expected:
            print(f"  {name}: exit code {code}\n{node.log()[-1500:]}")
    return [
        Figure(f"of {rounds} exits without a hang and with the right code", good, "", rounds, least=True),
        Figure("longest exit", longest, "s"),
    ]


def size(setting: Setting) -> list[Figure]:
    """A catalogue of 100,000 disks in 1,000 datastores; of few nodes, because all are on this machine."""
    nodes, disks = 4, 4_000 if setting.quick else 100_000
    setting.mesh(nodes)
    for node in setting.nodes:
        node.ask("catalogue", disks=disks // nodes, datastores=1000 // nodes, timeout=1200)
    setting.wait(lambda: agree(setting.lab.nodes, summaries_of), "all have all disks", 1200)
    figures = []
    directory = setting.config(0).directory
    with NodeClient(directory) as client:
        for what, path, most in (
            ("API page of 100 disks", "/api/v1/disks?limit=100", 100),
            ("the same, selected by name", "/api/v1/disks?limit=100&select=name%3D*0999*", 100),
            ("the same, by size", "/api/v1/disks?limit=100&sort=-size", 100),
            ("console page of disks", "/disks", 1000),
            ("console page of nodes", "/", 1000),
        ):
            # The first call loads the API.
            times, used = [], _processor_seconds(client)
            for _ in range(_CALLS):
                begin = time.monotonic()
                list(client.lines(path))
                times.append((time.monotonic() - begin) * 1000)
            spent = (_processor_seconds(client) - used) / _CALLS
            figures.append(Figure(f"{what}, median", median(times), "ms", most))
            figures.append(Figure(f"{what}, processor time of the node", spent * 1000, "ms"))
        begin, used = time.monotonic(), _processor_seconds(client)
        assert len(client.everything("/api/v1/disks")) == disks
        figures.append(Figure(f"all {disks} disks", time.monotonic() - begin, "s", 20))
        figures.append(Figure("the same, processor time of the node", _processor_seconds(client) - used, "s"))
    command = [sys.executable, "-m", "vmconv", "fleet", "disks", "--node", directory]
    begin = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        for _ in range(100):
            process.stdout.readline()
        figures.append(Figure("first page of vmconv fleet disks", (time.monotonic() - begin) * 1000, "ms", 1000))
        process.kill()
    return figures


def _processor_seconds(client: NodeClient) -> float:
    lines = client.lines("/metrics")
    return next(float(line.split()[1]) for line in lines if line.startswith("vmconv_fleet_cpu_seconds_total "))


CASES: dict[str, Callable[[Setting], list[Figure]]] = {
    "update": update,
    "request": request,
    "throughput": throughput,
    "partition": partition,
    "late": late,
    "loss": loss,
    "idle": idle,
    "fifty": fifty,
    "exits": exits,
    "flood": flood,
    "size": size,
}
