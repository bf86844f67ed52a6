"""Replicas in one process, whose messages a test carries by hand, or lets flow."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from fleet.plain import PlainSigner, PlainTrust, certificate, node_id
from vmconv_fleet.catalogue.indexes import INDEXES
from vmconv_fleet.replication.messages import Send
from vmconv_fleet.replication.records import Change, Record
from vmconv_fleet.replication.replica import Replica, Timing
from vmconv_fleet.replication.requests import Handler, Requests
from vmconv_fleet.replication.store import Store

WALL = 1_700_000_000_000


def copy_of(disk: sqlite3.Connection) -> sqlite3.Connection:
    copy = sqlite3.connect(":memory:", isolation_level=None)
    copy.deserialize(disk.serialize())
    return copy


class Machine:
    """A node of a test: its database, its clocks, its replica."""

    def __init__(self, fleet: Fleet, number: int, disk: sqlite3.Connection | None = None, **timing: Any) -> None:
        self.fleet = fleet
        self.id = node_id(number)
        self.disk = disk or sqlite3.connect(":memory:", isolation_level=None)
        self.signer = PlainSigner(self.id)
        self.trust = PlainTrust(self.signer)
        self.offset = 0
        self.news: list[Record] = []
        self.replica = Replica(
            Store(self.disk, self.id, indexes=INDEXES),
            self.signer,
            self.trust,
            self.wall,
            monotonic=lambda: fleet.time,
            timing=Timing(**{"patience": 0, **timing}),
            introduction=[certificate(self.id, self.signer.key_id)],
            random=Random(number),
        )
        self.requests: Requests | None = None
        self.replica.subscribe(self.news.extend)

    def wall(self) -> int:
        return WALL + self.fleet.time + self.offset

    def handle(self, handlers: Mapping[str, Handler], **options: Any) -> Requests:
        """Lets the node execute requests."""
        self.requests = Requests(self.replica, handlers, self.wall, **options)
        return self.requests

    def write(self, kind: str, id: str, body: Mapping[str, Any] | None) -> Record:
        """Writes a record and lets all hear of it."""
        (record,), sends = self.replica.write([Change(kind, id, body)])
        self.fleet.send(self, sends)
        return record

    def body(self, owner: Machine, kind: str, id: str) -> Mapping[str, Any] | None:
        record = self.replica.store.get(owner.id, kind, id)
        return None if record is None else record.body

    @property
    def counters(self) -> Mapping[str, int]:
        return self.replica.problems.counters

    def problems(self) -> list[str]:
        return [problem.kind for problem in self.replica.problems.all()]


class Fleet:
    """Machines and their links; `flow` lets time pass and delivers all there is."""

    def __init__(self) -> None:
        self.time = 1000
        self.machines: dict[str, Machine] = {}
        self.links: set[frozenset[str]] = set()
        self._flying: list[tuple[str, str, bytes]] = []

    def add(self, number: int, **options: Any) -> Machine:
        machine = Machine(self, number, **options)
        self.machines[machine.id] = machine
        return machine

    def link(self, one: Machine, other: Machine) -> None:
        self.links.add(frozenset((one.id, other.id)))
        for machine, peer in ((one, other), (other, one)):
            self.send(machine, machine.replica.connected(peer.id))

    def cut(self, one: Machine, other: Machine) -> None:
        self.links.discard(frozenset((one.id, other.id)))
        for machine, peer in ((one, other), (other, one)):
            self.send(machine, machine.replica.disconnected(peer.id))

    def send(self, source: Machine, sends: Sequence[Send]) -> None:
        for peer, message, _ in sends:
            for target in source.replica.neighbours.ids() if peer is None else [peer]:
                self._flying.append((source.id, target, message))

    def drop(self) -> list[tuple[str, str, bytes]]:
        """Loses all messages under way, and returns them."""
        lost, self._flying = self._flying, []
        return lost

    def flow(self, milliseconds: int = 0) -> None:
        """Delivers all messages, and what they lead to, while time passes."""
        end = self.time + milliseconds
        while True:
            self._deliver()
            if self.time >= end:
                return
            self.time = min(end, self.time + 50)
            for machine in self.machines.values():
                self.send(machine, machine.replica.tick())
                self._execute(machine)

    def flow_until(self, reached: Callable[[], bool]) -> None:
        """Delivers one message after the other until a condition holds."""
        while not reached():
            if self._flying:
                self._deliver(1)
                continue
            self.time += 50
            for machine in self.machines.values():
                self.send(machine, machine.replica.tick())

    def _deliver(self, most: int = 1 << 30) -> None:
        while self._flying and most:
            most -= 1
            source, target, message = self._flying.pop(0)
            if frozenset((source, target)) in self.links:
                machine = self.machines[target]
                self.send(machine, machine.replica.received(source, message))
                self._execute(machine)

    def _execute(self, machine: Machine) -> None:
        if machine.requests is not None:
            self.send(machine, machine.requests.run())


def pair(**timing: Any) -> tuple[Fleet, Machine, Machine]:
    """Returns two linked machines that serve and know each other."""
    fleet = Fleet()
    one, other = fleet.add(0, **timing), fleet.add(1, **timing)
    fleet.flow(100)
    fleet.link(one, other)
    fleet.flow(500)
    assert one.replica.store.positions() == other.replica.store.positions()
    return fleet, one, other
