"""Five real nodes on a network of their own, with mutual TLS, while everything goes wrong that can.

Each runs in a process and a network namespace of its own, and all of them write and ask each other for changes all the
time. Meanwhile the network is taken apart, a node is killed and started again, one is frozen, and clocks are wrong.
Then everything is to be as if nothing had happened: each request answered once, and the same view everywhere.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from vmconv_fleet.node.backup import restore_backup, write_backup
from vmconv_fleet.replication.database import open_reader
from vmconv_fleet.replication.store import Reader
from vmconv_fleet.testing import PATIENCE, Driven, Lab, Network, agree, ledger_of, view_of, wait_until
from vmconv_fleet.trust import credentials

Drive = Callable[..., Driven]
Connections = Sequence[Sequence[int]]

TOPOLOGIES: dict[str, Connections] = {
    "mesh": [(), (0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)],
    "ring": [(4,), (0,), (1,), (2,), (3,)],
    "line": [(), (0,), (1,), (2,), (3,)],
}
"""To whom each of the five connects; nothing but that makes links."""

DAY_MS = 24 * 3600 * 1000


class Fleet:
    """Nodes of a lab, each on a machine of its own."""

    def __init__(self, lab: Lab, network: Network, drive: Drive, connections: Connections, **options: Any) -> None:
        self.network = network
        self._drive = drive
        for number, others in enumerate(connections):
            connect = [f"{network.address(other)}:7447" for other in others]
            lab.add(host=network.address(number), port=7447, connect=connect, **options)
        self.configs = lab.nodes
        self.ids = [config.node for config in self.configs]
        self.nodes = [self._run(number) for number in range(network.size)]

    def _run(self, number: int) -> Driven:
        return self._drive(self.configs[number], prefix=self.network.prefix(number))

    def restart(self, number: int) -> None:
        self.nodes[number].kill()
        self.nodes[number] = self._run(number)

    def work(self, number: int) -> None:
        self.nodes[number].ask("work", every=0.05, targets=self.ids)

    def neighbours(self, number: int) -> set[int]:
        return {self.ids.index(node) for node in self.nodes[number].ask("state")["neighbours"]}

    def links(self, number: int, other: int) -> list[str]:
        """Returns the addresses of another node, as this node knows them."""
        with closing(Reader(open_reader(self.configs[number].database))) as reader:
            record = reader.get(self.ids[other], "node", self.ids[other])
        return [] if record is None else list(record.body["links"])

    def agree(self) -> bool:
        return agree(self.configs)

    def agree_without(self, number: int) -> Callable[[], bool]:
        return lambda: agree([config for config in self.configs if config != self.configs[number]])

    def rows(self, count: int) -> bool:
        """True if every node has `count` transactions of every other."""
        return all(
            len(found) == len(self.ids) and min(len(numbers) for numbers in found.values()) >= count
            for found in (ledger_of(config).transactions for config in self.configs)
        )


@pytest.fixture
def fleet(
    lab: Lab, network: Callable[[int], Network], drive: Drive, request: pytest.FixtureRequest
) -> Callable[..., Fleet]:
    return lambda connections, **options: Fleet(lab, network(len(connections)), drive, connections, **options)


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_under_faults_each_request_is_answered_once_and_nodes_converge(
    topology: str, fleet: Callable[[Connections], Fleet]
) -> None:
    five = fleet(TOPOLOGIES[topology])
    for number in range(5):
        five.work(number)
    wait_until(lambda: five.rows(3), PATIENCE, "everybody answers everybody")

    five.nodes[1].step_clock(DAY_MS)
    five.network.partition([0, 1], [2, 3, 4])
    lonely = [max(view[1] for view in view_of(config).values()) for config in five.configs]
    wait_until(
        lambda: all(
            max(view[1] for view in view_of(config).values()) > before
            for config, before in zip(five.configs, lonely, strict=True)
        ),
        PATIENCE,
        "both sides go on",
    )
    five.nodes[4].step_clock(-DAY_MS)
    five.nodes[2].signal(signal.SIGSTOP)
    five.restart(3)
    five.work(3)
    # Longer than a link is held without a sign of life.
    time.sleep(4)
    five.network.heal()
    five.nodes[2].signal(signal.SIGCONT)
    five.nodes[1].step_clock(0)
    five.restart(0)
    five.work(0)
    before = min(len(found) for found in ledger_of(five.configs[2]).transactions.values())
    wait_until(lambda: five.rows(before + 3), PATIENCE, "everybody answers everybody again")

    for node in five.nodes:
        node.ask("rest")
    wait_until(lambda: not ledger_of(five.configs[0]).unanswered, PATIENCE, "all is answered")
    wait_until(five.agree, PATIENCE, "all views are the same")
    for config in five.configs:
        ledger = ledger_of(config)
        assert ledger.requests > 100
        assert (ledger.unanswered, ledger.answered_twice) == ([], [])
        assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in ledger.transactions.values())
    states: list[dict[str, Any]] = [node.ask("state") for node in five.nodes]
    assert not [kind for state in states for kind in state["kinds"] if kind in ("fork", "cloned", "forged", "internal")]


def test_records_of_a_dead_node_reach_nodes_that_were_never_linked_to_it(fleet: Callable[[Connections], Fleet]) -> None:
    three = fleet([(), (0,), (1,)])
    three.network.partition([0, 1], [2])
    three.nodes[0].ask("write", count=300, batch=10)
    owner = three.ids[0]
    wait_until(
        lambda: view_of(three.configs[1]).get(owner) == view_of(three.configs[0])[owner],
        PATIENCE,
        "the ferry is loaded",
    )
    three.nodes[0].kill()
    last = view_of(three.configs[1])[owner]
    three.network.partition([0], [1, 2])
    wait_until(lambda: view_of(three.configs[2]).get(owner) == last, PATIENCE, "the last one has them too")


def test_a_node_without_its_database_continues_from_its_last_position(fleet: Callable[[Connections], Fleet]) -> None:
    two = fleet([(), (0,)])
    two.nodes[1].ask("write", count=50)
    wait_until(two.agree, PATIENCE, "the other one has it")
    before = view_of(two.configs[0])[two.ids[1]]
    two.network.partition([0], [1])
    two.nodes[1].kill()
    for suffix in ("", "-wal", "-shm"):
        Path(two.configs[1].database + suffix).unlink(missing_ok=True)
    two.nodes[1] = two._run(1)
    assert not two.nodes[1].ask("state")["serving"]
    two.network.heal()
    two.nodes[1].ask("write", count=1)
    wait_until(two.agree, PATIENCE, "they agree")
    after = view_of(two.configs[0])[two.ids[1]]
    assert after[:2] > before[:2]
    assert two.nodes[0].ask("state")["kinds"] == []


@pytest.mark.slow
def test_a_fleet_goes_on_without_its_founder(fleet: Callable[..., Fleet]) -> None:
    three = fleet([(), (0,), (0,)], gossip=True, moves=True, join="[::]:7448")
    wait_until(three.agree, PATIENCE, "all know each other")
    for node in three.nodes:
        node.kill()
    shutil.copytree(three.configs[0].path("authority"), three.configs[1].path("authority"))
    three.nodes[1:] = [three._run(number) for number in (1, 2)]
    wait_until(lambda: three.neighbours(1) == {2}, PATIENCE, "the others find each other")

    founder = three.ids[0]
    response = three.nodes[1].ask("request", target=three.ids[1], verb="retire", arguments={"node": founder})
    assert response["ok"]
    wait_until(lambda: founder not in view_of(three.configs[2]), PATIENCE, "the founder is retired")
    # The sessions are opened anew, without the founder.
    wait_until(lambda: three.nodes[2].ask("state")["counters"]["opened"] > 1, PATIENCE, "it is refused")
    three.nodes[2].ask("write", count=1)
    wait_until(lambda: three.neighbours(1) == {2}, PATIENCE, "the others stay neighbours")
    last = view_of(three.configs[2])[three.ids[2]]
    wait_until(lambda: view_of(three.configs[1])[three.ids[2]] >= last, PATIENCE, "records flow")

    # Its certificate comes from the authority that it knows by a record.
    three.network.move(2, "10.77.0.77")
    wait_until(lambda: three.links(1, 2) == ["10.77.0.77:7447"], PATIENCE, "its new address is known")
    assert "10.77.0.77" in credentials.load(three.configs[2]).bound.addresses
    three.restart(1)
    wait_until(lambda: three.neighbours(1) == {2}, PATIENCE, "they are neighbours again")

    # The machine with the authority is lost, and made again from an old backup.
    backup = f"{three.configs[1].directory}.backup"
    write_backup(three.configs[1], backup)
    three.nodes[1].ask("write", count=20)
    wait_until(three.agree_without(0), PATIENCE, "the other one has the new records")
    last = view_of(three.configs[2])[three.ids[1]]
    three.network.partition([1], [0, 2])
    three.nodes[1].kill()
    shutil.rmtree(three.configs[1].directory)
    os.mkdir(three.configs[1].directory, 0o700)
    restore_backup(backup, three.configs[1].directory)
    three.nodes[1] = three._run(1)
    assert not three.nodes[1].ask("state")["serving"]
    three.network.heal()
    wait_until(lambda: view_of(three.configs[1])[three.ids[1]] > last, PATIENCE, "it continues its records")
    wait_until(three.agree_without(0), PATIENCE, "they agree")
    for node in three.nodes[1:]:
        assert not {"fork", "lost", "cloned", "forged"} & {*node.ask("state")["kinds"]}
    renew = [sys.executable, "-m", "vmconv", "node", "renew", "--directory", three.configs[2].directory]
    before = credentials.load(three.configs[2]).bound.serial
    subprocess.run([*three.network.prefix(2), *renew], check=True)
    assert credentials.load(three.configs[2]).bound.serial != before


@pytest.mark.slow
def test_a_full_disk_costs_nothing_once_there_is_room(
    fleet: Callable[..., Fleet], request: pytest.FixtureRequest
) -> None:
    three = fleet([(), (0,), (0, 1)])
    room = Path(three.configs[1].directory)
    three.nodes[1].kill()
    kept = room.rename(f"{room}.kept")
    room.mkdir(0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=700", "tmpfs", room], check=True)
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", room], check=True))
    shutil.copytree(kept, room, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.sock", "log"))
    # The log is not on the disk that is full.
    os.symlink(f"{room}.log", room / "log")
    three.nodes[1] = three._run(1)
    for number in range(3):
        three.work(number)
    wait_until(lambda: three.rows(3), PATIENCE, "everybody answers everybody")

    with open(room / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    wait_until(lambda: "store" in three.nodes[1].ask("state")["kinds"], PATIENCE, "it says that its disk is full")
    other = three.ids[2]
    before = len(ledger_of(three.configs[0]).transactions[other])
    wait_until(lambda: len(ledger_of(three.configs[0]).transactions[other]) > before + 3, PATIENCE, "the others go on")
    (room / "filler").unlink()
    before = max(len(found) for found in ledger_of(three.configs[0]).transactions.values())
    wait_until(lambda: three.rows(before), PATIENCE, "it goes on")

    for node in three.nodes:
        node.ask("rest")
    wait_until(lambda: not ledger_of(three.configs[0]).unanswered, PATIENCE, "all is answered")
    wait_until(three.agree, PATIENCE, "all views are the same")
    for config in three.configs:
        ledger = ledger_of(config)
        assert (ledger.unanswered, ledger.answered_twice) == ([], [])
        assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in ledger.transactions.values())
    # Neither a restart nor an administrator was needed.
    assert three.nodes[1].ask("state")["kinds"] == []


def test_loss_of_a_neighbour_is_noticed(fleet: Callable[[Connections], Fleet]) -> None:
    two = fleet([(), (0,)])
    wait_until(lambda: two.nodes[0].ask("state")["neighbours"] == [two.ids[1]], PATIENCE, "neighbours")
    two.network.partition([0], [1])
    wait_until(lambda: two.nodes[0].ask("state")["neighbours"] == [], PATIENCE, "the loss is noticed")
    two.network.heal()
    wait_until(lambda: two.nodes[0].ask("state")["neighbours"] == [two.ids[1]], PATIENCE, "neighbours again")
