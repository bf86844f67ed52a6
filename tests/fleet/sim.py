"""A deterministic simulator of fleets: it drives the production replica and requests code through what can go wrong.

    python tests/fleet/sim.py --seeds 200        seeds 0 to 199, and what was tried
    python tests/fleet/sim.py --seed 17          one seed, with its trace

All time is virtual and every choice comes from the seed. The network loses, duplicates, delays and reorders, and is cut
into parts; nodes crash before, between and after commits, lose their database, get an older one back, are stopped for a
while, and have clocks that jump. An oracle that shares no code with the replica knows every state that owners were in.
"""

from __future__ import annotations

import argparse
import heapq
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from multiprocessing import Pool
from pathlib import Path
from random import Random
from typing import Any, ClassVar
from unittest.mock import patch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fleet.oracle import Oracle, Violation
from fleet.plain import PlainSigner, PlainTrust, certificate, node_id, retirement
from vmconv_fleet.catalogue.joining import join
from vmconv_fleet.errors import NotReadyError, Refusal
from vmconv_fleet.replication import anti_entropy, epochs, messages, requests
from vmconv_fleet.replication.clock import MAX_AHEAD_MS
from vmconv_fleet.replication.merging import merge
from vmconv_fleet.replication.messages import Send
from vmconv_fleet.replication.records import Change
from vmconv_fleet.replication.replica import Replica, Timing
from vmconv_fleet.replication.requests import Context, IncomingRequest, Outcome, Requests
from vmconv_fleet.replication.retention import Keep, Retention
from vmconv_fleet.replication.store import Store

WALL = 1_700_000_000_000
CHAOS_MS = 20_000
HEALING_MS = 180_000
GRACE_MS = 4000
YEAR_MS = 365 * 86_400_000
HONEST = ("internal", "malformed", "forged", "torn", "fork", "cloned", "clock")
"""Problems that no node may report as long as all are honest and the network does not garble."""
FEW_EPOCHS = 3


class Crash(BaseException):
    """The power has failed: nothing of the process is left."""


class Disk(sqlite3.Connection):
    """A database that outlives its node; a commit is where the power fails, shortly before or after it."""

    fuse = 0
    after = False

    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        if sql != "COMMIT" or not self.fuse:
            return super().execute(sql, parameters)
        self.fuse -= 1
        if not self.fuse and not self.after:
            raise Crash
        cursor = super().execute(sql, parameters)
        if not self.fuse:
            raise Crash
        return cursor


def new_disk() -> Disk:
    return sqlite3.connect(":memory:", isolation_level=None, factory=Disk, cached_statements=256)


class Node:
    """A machine: its disk and clock stay, its process comes and goes."""

    def __init__(self, number: int) -> None:
        self.id = node_id(number)
        self.signer = PlainSigner(self.id)
        self.trust = PlainTrust(self.signer)
        self.disk = new_disk()
        self.offset = 0
        self.jumped = False
        self.backups: list[bytes] = []
        self.replica: Replica | None = None
        self.requests: Requests | None = None
        self.stopped = False
        self.waiting: list[Callable[[], None]] = []
        self.alarm = 0
        self.number = 0
        self.retired = False
        self.may_be_retired = False
        self.changed: set[str] = set()


class World:
    """One seed: nodes, a network and a plan of mishaps."""

    def __init__(self, seed: int, *, trace: bool = False) -> None:
        self.random = Random(seed)
        self.counts: Counter[str] = Counter()
        self.oracle = Oracle()
        self._trace = trace
        self.time = 1000
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._sequence = 0
        self.nodes = {node.id: node for node in map(Node, range(self.random.randint(2, 5)))}
        self._parted: set[str] = set()
        """The nodes whose histories cannot be merged any more."""
        self._links = self._topology()
        self._connected: dict[frozenset[str], int] = {}
        self._parts: dict[str, int] = dict.fromkeys(self.nodes, 0)
        self._loss = self.random.choice((0.0, 0.02, 0.1, 0.3))
        self._duplication = self.random.choice((0.0, 0.05, 0.2))
        self._delay = self.random.choice((2, 20, 200))
        self._garble = 0.02 if self.random.random() < 0.1 else 0.0
        self._large = self.random.choice((30, 30, 300, 3000))
        self._healing = False
        self._cloned: str | None = None
        # Of its own, so that all other seeds stay what they are.
        self._cleaning = Random(f"cleaning {seed}") if seed % 4 == 3 else None
        self.counts["seeds"] = 1

    def run(self) -> None:
        """Raises Violation at the first thing that must not be."""
        page = self.random.choice((1 << 10, 4 << 10, 192 << 10) if self._loss < 0.2 else (8 << 10,))
        with (
            patch.object(messages, "PAGE_BYTES", page),
            patch.object(epochs, "MAX_EPOCHS", self.random.choice((FEW_EPOCHS, 64))),
            patch.object(requests, "BURST", self.random.choice((1, 64))),
            patch.object(anti_entropy, "KEPT", self.random.choice((0, 2000, anti_entropy.KEPT))),
            patch.object(requests, "KEPT_MS", GRACE_MS),
        ):
            if self._cleaning:
                self._at(1000, self._clean)
            for node in self.nodes.values():
                self._boot(node, patience=self.random.randint(0, 3000))
            self._at(self.random.randint(50, 500), self._mishap)
            self._advance(self.time + CHAOS_MS)
            self._heal_all()
            self._converge()
            if not self._garble and self.random.random() < 0.25:
                self._clone()

    # The clockwork

    def _at(self, delay: int, what: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (self.time + delay, self._sequence, what))

    def _advance(self, until: int) -> None:
        while self._events and self._events[0][0] <= until:
            self.time, _, what = heapq.heappop(self._events)
            self.counts["events"] += 1
            what()
        self.time = until

    def _say(self, *words: object) -> None:
        if self._trace:
            print(self.time, *words)

    # The network

    def _topology(self) -> list[frozenset[str]]:
        ids = list(self.nodes)
        line = [frozenset(pair) for pair in pairwise(ids)]
        ring = sorted({*line, frozenset((ids[0], ids[-1]))}, key=sorted)
        return self.random.choice((self._mesh(), line, ring))

    def _mesh(self) -> list[frozenset[str]]:
        ids = list(self.nodes)
        return [frozenset((one, other)) for index, one in enumerate(ids) for other in ids[:index]]

    def _possible(self, link: frozenset[str]) -> bool:
        one, other = link
        return self._parts[one] == self._parts[other] and all(self.nodes[id].replica for id in link)

    def _rewire(self) -> None:
        """Breaks and makes connections as parts and nodes are now; each end hears of it in its own time."""
        for link in self._links:
            possible, connected = self._possible(link), link in self._connected
            if possible == connected:
                continue
            self._sequence += 1
            if possible:
                self._connected[link] = self._sequence
            else:
                del self._connected[link]
            for id, peer in (sorted(link), sorted(link, reverse=True)):
                node = self.nodes[id]
                self._at(self.random.randint(1, 300), self._noticing(node, node.number, peer, link, possible))

    def _noticing(
        self, node: Node, number: int, peer: str, link: frozenset[str], connected: bool
    ) -> Callable[[], None]:
        def notice(replica: Replica) -> list[Send]:
            if connected != (link in self._connected):
                return []
            gone = replica.disconnected(peer) if peer in replica.neighbours else []
            return [*gone, *replica.connected(peer)] if connected else gone

        def noticed() -> None:
            if node.number == number:
                self._step(node, notice)

        return noticed

    def _transmit(self, node: Node, sends: Sequence[Send]) -> None:
        assert node.replica is not None
        for peer, message, _ in messages.merged(sends) if self.random.random() < 0.5 else sends:
            for target in node.replica.neighbours.ids() if peer is None else [peer]:
                self._carry(node.id, target, message)

    def _carry(self, source: str, target: str, message: bytes) -> None:
        link = frozenset((source, target))
        self.counts["messages"] += 1
        generation = self._connected.get(link)
        copies = 1 + (self.random.random() < self._duplication)
        if generation is None or self.random.random() < self._loss:
            self.counts["lost"] += 1
            return
        if self._garble and self.random.random() < self._garble:
            message = self._garbled(message)
        for _ in range(copies):
            delay = self.random.randint(1, self._delay)
            self._at(delay, self._delivery(link, generation, source, self.nodes[target], message))

    def _delivery(
        self, link: frozenset[str], generation: int, source: str, target: Node, message: bytes
    ) -> Callable[[], None]:
        def deliver() -> None:
            if self._connected.get(link) == generation and target.replica:
                self._step(target, lambda replica: replica.received(source, message))

        return deliver

    def _garbled(self, message: bytes) -> bytes:
        self.counts["garbled"] += 1
        spoiled = bytearray(message)
        spoiled[self.random.randrange(len(spoiled))] ^= 1 << self.random.randrange(8)
        return bytes(spoiled[: self.random.randrange(1, len(spoiled) + 1)] if self.random.random() < 0.2 else spoiled)

    # Nodes

    def _boot(self, node: Node, *, patience: int | None) -> None:
        assert node.replica is None
        node.number += 1
        node.disk.executescript("DROP TABLE IF EXISTS temp.staged")
        node.trust = trust = PlainTrust(node.signer)
        timing = Timing(patience=patience, settle=500, digest=2000, grace=GRACE_MS, floor=1500)

        def wall() -> int:
            return WALL + self.time + node.offset

        try:
            store = Store(node.disk, node.id)
        except Crash:
            self.counts["crashes in a commit"] += 1
            node.disk.fuse = 0
            node.disk.rollback()
            self._at(self.random.randint(10, 4000), self._restart(node))
            return
        replica = Replica(
            store,
            node.signer,
            trust,
            wall,
            monotonic=lambda: self.time,
            timing=timing,
            introduction=[certificate(node.id, node.signer.key_id)],
            random=self.random,
        )
        node.replica = replica
        handlers = {"add": self._add, "refuse": _refuse, "break": _break}
        node.requests = Requests(replica, handlers, wall, retention=self._retention())
        node.changed.clear()
        replica.subscribe(lambda records: node.changed.update(record.owner for record in records))
        if node.id != self._cloned:
            self.oracle.attach(replica)
        self._alarm(node)
        self._rewire()
        self._say("boot", node.id[:4], "patience", patience)

    def _kill(self, node: Node) -> None:
        if node.replica is None:
            return
        node.disk.fuse = 0
        if node.disk.in_transaction:
            node.disk.rollback()
        self.oracle.detach(node.replica)
        self._honest(node)
        node.replica = node.requests = None
        node.stopped = False
        node.waiting.clear()
        node.number += 1
        self._rewire()
        self._say("dead", node.id[:4])

    def _step(self, node: Node, action: Callable[[Replica], list[Send]]) -> None:
        """Lets the node do something, then execute requests, and looks at what has become of its views."""
        if node.replica is None:
            return
        if node.stopped:
            node.waiting.append(lambda: self._step(node, action))
            return
        try:
            assert node.requests is not None
            if self.random.random() < 0.5:
                # As the engine does it.
                with node.replica.batch():
                    sends = [*action(node.replica), *node.requests.run()]
            else:
                sends = action(node.replica)
            self._transmit(node, sends)
            while node.requests.waiting() and self.random.random() < 0.9:
                self._transmit(node, node.requests.run())
        except Crash:
            self.counts["crashes in a commit"] += 1
            self._kill(node)
            self._at(self.random.randint(10, 4000), self._restart(node))
            return
        self._look(node)
        self._alarm(node)

    def _look(self, node: Node) -> None:
        assert node.replica is not None
        for owner in self.nodes:
            if node.trust.retired(owner) and not self.nodes[owner].may_be_retired:
                raise Violation(f"{node.id[:4]} takes {owner[:4]} for retired, which the authority has not said")
        for owner in sorted(node.changed - {self._cloned}):
            self.oracle.look(node.replica, owner)
            # An owner's history is remembered for a number of its starts.
            if epochs.MAX_EPOCHS > FEW_EPOCHS and not node.trust.retired(owner):
                self.oracle.remember(node.replica, owner)
            self.counts["views checked"] += 1
        node.changed.clear()

    def _alarm(self, node: Node) -> None:
        assert node.replica is not None
        due = max(node.replica.due(), self.time + 1)
        if node.alarm <= self.time or due < node.alarm:
            node.alarm = due
            number = node.number

            def ring() -> None:
                if node.number == number and node.replica is not None:
                    self._step(node, lambda replica: replica.tick())

            self._at(due - self.time, ring)

    def _restart(self, node: Node) -> Callable[[], None]:
        def restart() -> None:
            if node.replica is None:
                self._boot(node, patience=self.random.choice((0, 500, 3000)))

        return restart

    def _honest(self, node: Node) -> None:
        assert node.replica is not None
        problems = node.replica.problems
        self.counts.update({f"replica: {name}": count for name, count in problems.counters.items()})
        found = {"internal"} if self._garble else set(HONEST) - ({"clock"} if self.counts["clock jumps"] else set())
        bad = [problem for problem in problems.all() if problem.kind in found]
        forked = {id for id in self.nodes if self.oracle.may_have_forked(id)}
        bad = [one for one in bad if one.kind != "fork" or not any(id in one.text for id in forked)]
        if bad:
            raise Violation(f"{node.id[:4]} reports {bad[0]}")

    # What happens

    def _mishap(self) -> None:
        if self._healing:
            return
        node = self.random.choice(list(self.nodes.values()))
        (what,) = self.random.choices(list(self._mishaps), list(self._mishaps.values()))
        self._say(what.__name__, node.id[:4])
        what(self, node)
        self._at(self.random.randint(1, 250), self._mishap)

    def _write(self, node: Node) -> None:
        count = self.random.choice((1, 1, 1, 2, 5, 20))
        changes = []
        for _ in range(count):
            body = {"value": self.random.getrandbits(30), "filling": "x" * self.random.randint(0, self._large)}
            deleted = self.random.random() < 0.3
            changes.append(Change("thing", f"t{self.random.randrange(12)}", None if deleted else body))
        self._own(node, "writes", lambda replica: replica.write(changes)[1])

    def _submit(self, node: Node) -> None:
        target = self.random.choice(list(self.nodes))
        verb = self.random.choice(("add", "add", "add", "refuse", "break", "unknown"))
        arguments = {"key": f"c{self.random.randrange(4)}", "order": self._sequence}

        def submit(replica: Replica) -> list[Send]:
            assert node.requests is not None
            id = f"r{self.random.getrandbits(60):x}"
            return node.requests.submit(target, verb, arguments, {"user": "somebody"}, id=id)[1]

        self._own(node, "requests", submit)

    def _withdraw(self, node: Node) -> None:
        if node.replica is None or node.requests is None:
            return
        mine = node.replica.store.find("request", node.id)
        if mine:
            id, requests = self.random.choice(mine).id, node.requests
            self._own(node, "withdrawals", lambda _: requests.withdraw(id))

    def _retention(self) -> Retention:
        """Returns how much a node keeps from this start on: the shortest time that is safe, or a number."""
        if self._cleaning is None:
            return Retention()
        keep = Keep(GRACE_MS, self._cleaning.choice((2, 10, 1000)))
        return Retention(keep=lambda _view: keep)

    def _clean(self) -> None:
        """Lets a node delete what is old; others may be away. Like the engine, it waits after a jump of the clock."""
        if self._cleaning is None or self._healing:
            return
        node = self._cleaning.choice(list(self.nodes.values()))
        if node.requests is not None and not node.jumped:
            self._own(node, "cleanings", lambda _: node.requests.clean() if node.requests else [])
        self._at(self._cleaning.randint(50, 1000), self._clean)

    def _own(self, node: Node, name: str, action: Callable[[Replica], list[Send]]) -> None:
        def attempt(replica: Replica) -> list[Send]:
            try:
                sends = action(replica)
            except NotReadyError:
                self.counts[f"{name} too early"] += 1
                return []
            self.counts[name] += 1
            return sends

        if node.replica is not None:
            self._step(node, attempt)

    def _crash(self, node: Node) -> None:
        self.counts["crashes"] += node.replica is not None
        self._kill(node)
        self._at(self.random.randint(10, 6000), self._restart(node))

    def _power_failure(self, node: Node) -> None:
        node.disk.fuse = self.random.randint(1, 4)
        node.disk.after = self.random.random() < 0.5

    def _back_up(self, node: Node) -> None:
        if node.disk.execute("PRAGMA page_count").fetchone()[0]:
            node.backups.append(node.disk.serialize())

    def _amnesia(self, node: Node) -> None:
        self._kill(node)
        self.counts["amnesias"] += 1
        self.oracle.lose(node.id)
        node.disk = new_disk()
        self._come_back(node)

    def _restore(self, node: Node) -> None:
        if not node.backups:
            return
        self._kill(node)
        self.counts["older databases"] += 1
        self.oracle.lose(node.id)
        node.disk = new_disk()
        node.disk.deserialize(self.random.choice(node.backups))
        self._come_back(node)

    def _come_back(self, node: Node) -> None:
        # The last two as after a virtual machine went back to a snapshot: nobody has said that it was restored.
        patience = self.random.choice((None, None, 3000, 0))

        def boot() -> None:
            if node.replica is None:
                self._boot(node, patience=patience)

        self._at(self.random.randint(10, 3000), boot)

    def _partition(self, node: Node) -> None:
        self.counts["partitions"] += 1
        self._parts = {id: self.random.randrange(2) for id in self.nodes}
        self._rewire()

    def _heal(self, node: Node) -> None:
        self._parts = dict.fromkeys(self.nodes, 0)
        self._rewire()

    def _step_clock(self, node: Node) -> None:
        self.counts["clock steps"] += 1
        node.offset = self.random.randint(-200_000, 200_000)

    def _jump_clock(self, node: Node) -> None:
        """Lets a clock jump for some seconds, by a year or decades."""
        if node.jumped:
            return
        self.counts["clock jumps"] += 1
        node.jumped, before = True, node.offset
        node.offset = self.random.choice((1, -1, 25)) * YEAR_MS

        def right_again() -> None:
            node.jumped, node.offset = False, before

        self._at(self.random.randint(100, 8000), right_again)

    def _stop(self, node: Node) -> None:
        if node.replica is None or node.stopped:
            return
        self.counts["stops"] += 1
        node.stopped = True
        number = node.number
        self._at(self.random.randint(100, 5000), lambda: self._continue(node, number))

    def _continue(self, node: Node, number: int) -> None:
        if node.number != number:
            return
        node.stopped = False
        waiting, node.waiting = node.waiting, []
        for action in waiting:
            action()

    def _retire(self, node: Node) -> None:
        others = [other for other in self.nodes.values() if other is not node and not other.retired]
        if len(others) >= 2 and not any(other.retired for other in self.nodes.values()) and self.random.random() < 0.5:
            self._retire_by(others, node)

    def _retire_by(self, others: list[Node], node: Node) -> None:
        witness = self.random.choice(others)

        def retire(replica: Replica) -> list[Send]:
            node.may_be_retired = True
            sends = replica.write([retirement(node.id)])[1]
            node.retired = True
            return sends

        self._own(witness, "retirements", retire)

    def _forge(self, node: Node) -> None:
        """Lets a member say of another what only the authority may say."""
        victim = self.random.choice(list(self.nodes))
        said = {"node": victim, "name": "gone", "retired": True, "ca": "0" * 32}
        kind, id = self.random.choice((("retirement", victim), ("revocation", victim), ("revocation", "any")))
        self._own(node, "forged retirements", lambda replica: replica.write([Change(kind, id, said)])[1])

    def _resume(self, node: Node) -> None:
        """Lets an administrator give up a member, which may turn up later."""
        if node.replica is not None and node.replica.is_restored and node.replica.awaited():
            self.counts["resumed"] += 1
            node.replica.excuse([min(node.replica.awaited())], alone=self.random.random() < 0.3)
            self._alarm(node)

    def _merge(self, node: Node) -> None:
        """Lets an administrator make one history of two."""
        if node.replica is None or not node.replica.is_forked or node.stopped:
            return

        def attempt(replica: Replica) -> list[Send]:
            assert node.requests is not None
            try:
                sends = merge(replica, node.requests, None, join).sends
            except NotReadyError:
                self.counts["merges too early"] += 1
                return []
            except Refusal:
                self.counts["merges too late"] += 1
                self._parted.add(node.id)
                return []
            self.counts["merges"] += 1
            return sends

        self._step(node, attempt)
        others = [other for other in self.nodes.values() if other is not node and not other.retired]
        if node.id in self._parted and others:
            self._retire_by(others, node)

    _mishaps: ClassVar[dict[Callable[[World, Node], None], int]] = {
        _write: 40,
        _submit: 30,
        _withdraw: 2,
        _crash: 4,
        _power_failure: 4,
        _back_up: 4,
        _amnesia: 2,
        _restore: 2,
        _partition: 5,
        _heal: 5,
        _step_clock: 3,
        _jump_clock: 2,
        _stop: 3,
        _resume: 2,
        _merge: 2,
        _retire: 1,
        _forge: 1,
    }

    # Handlers of the requests

    def _add(self, context: Context, request: IncomingRequest) -> Outcome:
        key = str(request.arguments["key"])
        before = context.get(context.node, "count", key)
        value = before.body["value"] + 1 if before else 1
        return Outcome(
            [Change("count", key, {"value": value, "last": request.id})],
            {"value": value, "order": request.arguments["order"]},
        )

    # The end

    def _heal_all(self) -> None:
        self._healing = True
        self._parts = dict.fromkeys(self.nodes, 0)
        for node in self.nodes.values():
            node.jumped, node.offset = False, 0 if node.jumped else node.offset // 100
            node.disk.fuse = 0
            if node.stopped:
                self._continue(node, node.number)
            if node.replica is None:
                self._boot(node, patience=1000)
        if self._alive() != list(self.nodes):
            self._links = self._mesh()
        self._rewire()
        self._say("healed")

    def _alive(self) -> list[str]:
        """Returns the nodes not known to be retired: those that knew may have lost their disks."""
        return [id for id in self.nodes if not any(node.trust.retired(id) for node in self.nodes.values())]

    def _converge(self) -> None:
        begin = self.time
        while (why := self._differences()) is not None:
            if self.time > begin + HEALING_MS:
                raise Violation(f"no convergence {HEALING_MS} ms after all was healed: {why}")
            self._advance(self.time + 250)
            self._resume_far_ones()
            if any(node.replica is not None and node.replica.is_forked for node in self.nodes.values()):
                # A relay keeps the history that it has.
                self._links = self._mesh()
                self._rewire()
            for node in self.nodes.values():
                self._merge(node)
            if self._parted.issuperset(self._alive()):
                # None can write, so none can retire another one.
                self.counts["fleets lost"] += 1
                return
        self.counts["convergence ms"] += self.time - begin
        alive = self._alive()
        for id in alive:
            node = self.nodes[id]
            assert node.replica is not None
            for owner in alive:
                self.oracle.look(node.replica, owner)
            self._honest(node)
            self.oracle.check_requests(node.replica.store, alive)
            self._check_clock(node)
        self.counts.update(self.oracle.counts)

    def _resume_far_ones(self) -> None:
        """Lets administrators give up the members that a restored node waits for and that it has no link with."""
        for node in self.nodes.values():
            if node.replica is None or not node.replica.is_restored:
                continue
            far = [other for other in node.replica.awaited() if frozenset((node.id, other)) not in self._links]
            if far:
                self.counts["resumed"] += 1
                node.replica.excuse(far, alone=False)
                self._alarm(node)

    def _check_clock(self, node: Node) -> None:
        """Checks that a jump of a clock is over when the clock is right again."""
        assert node.replica is not None
        (record,) = node.replica.write([Change("thing", "clock", {})])[0]
        wall = WALL + self.time
        if abs((record.clock >> 16) - wall) > 2 * MAX_AHEAD_MS:
            raise Violation(f"{node.id[:4]} writes with the clock {record.clock >> 16}, it is {wall}")

    def _clone(self) -> None:
        """Starts a copy of a node's disk as another machine; now one and now the other has the links of both.

        All nodes have to show it, and keep it until the authority has retired the node.
        """
        alive = self._alive()
        if len(alive) < 2:
            return
        self.counts["clones"] += 1
        original = self.nodes[self.random.choice(alive)]
        id = self._cloned = original.id
        copy = Node(list(self.nodes).index(id))
        copy.offset = self.random.randint(-200_000, 200_000)
        copy.disk.deserialize(original.disk.serialize())
        if self.random.random() < 0.5:
            self._swap(original, copy)
        self._boot(copy, patience=self.random.choice((0, 3000)))
        begin = self.time
        others = [self.nodes[other] for other in alive if other != id]
        while missing := [other for other in others if not self._shows_clone(other)]:
            if self.time > begin + HEALING_MS:
                raise Violation(f"{missing[0].id[:4]} does not show the clone of {id[:4]}")
            self._write(original)
            self._write(copy)
            # On a slow link, a long history takes some seconds.
            self._advance(self.time + self.random.randint(1000, 20_000))
            linked = self.nodes[id]
            self._swap(linked, copy if linked is original else original)
        self.counts["clone ms"] += self.time - begin
        original.may_be_retired = copy.may_be_retired = True
        self._own(others[0], "retirements of clones", lambda replica: replica.write([retirement(id)])[1])
        while left := [other for other in others if other.replica is None or id in other.replica.store.forked()]:
            if self.time > begin + 2 * HEALING_MS:
                raise Violation(f"{left[0].id[:4]} still shows the clone of {id[:4]}, which is retired")
            self._advance(self.time + 1000)

    def _swap(self, linked: Node, other: Node) -> None:
        """Gives the links of a machine to the other one with the same keys: they cannot be linked at the same time."""
        for link in [link for link in self._connected if linked.id in link]:
            del self._connected[link]
            (peer,) = link - {linked.id}
            self._step(linked, partial(Replica.disconnected, peer=peer))
        self.nodes[linked.id] = other
        self._rewire()

    def _shows_clone(self, node: Node) -> bool:
        if node.replica is None or self._cloned not in node.replica.store.forked():
            return False
        return any(one.kind == "fork" and self._cloned in one.text for one in node.replica.problems.all())

    def _differences(self) -> str | None:
        """Returns what is not yet as it has to be."""
        alive = [self.nodes[id] for id in self._alive()]
        if any(node.replica is None for node in alive):
            return "a node is down"
        replicas = [node.replica for node in alive if node.replica is not None]
        if forked := [replica.node for replica in replicas if replica.store.forked() & {*self._alive()}]:
            return f"{forked[0][:4]} shows a fork"
        if not all(replica.serving for replica in replicas):
            return "a node does not serve"
        expected = {replica.node: replica.store.position(replica.node) for replica in replicas}
        for replica in replicas:
            positions = replica.store.positions()
            if positions != expected:
                return f"{replica.node[:4]} has {positions}, not {expected}"
        return self.oracle.unanswered(replicas[0].store, list(expected))


def _refuse(context: Context, request: IncomingRequest) -> Outcome:
    raise Refusal("no")


def _break(context: Context, request: IncomingRequest) -> Outcome:
    raise ValueError("a mistake in a handler")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the log of what is broken on purpose."""
    import logging

    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def simulate(seed: int, *, trace: bool = False) -> Counter[str]:
    """Runs a seed and returns what was tried; AssertionError: the seed has found a mistake."""
    world = World(seed, trace=trace)
    with quiet():
        try:
            world.run()
        except Violation as violation:
            raise AssertionError(f"seed {seed} at {world.time} ms: {violation}") from violation
    return world.counts


def _attempt(seed: int) -> tuple[Counter[str], str | None]:
    try:
        return simulate(seed), None
    except AssertionError as violation:
        return Counter({"seeds": 1}), str(violation)
    except Exception as exc:
        return Counter({"seeds": 1}), f"seed {seed}: {exc!r}"


def main() -> int:
    """Runs seeds, prints what was tried and every violation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200, help="how many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="one seed only, with its trace")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.seed is not None:
        print(dict(simulate(arguments.seed, trace=True)))
        return 0
    begin, total, violations = time.monotonic(), Counter[str](), []
    with Pool(arguments.processes) as pool:
        seeds = range(arguments.first, arguments.first + arguments.seeds)
        for counts, violation in pool.imap_unordered(_attempt, seeds, chunksize=8):
            total.update(counts)
            if violation:
                violations.append(violation)
                print(violation, flush=True)
    for name, count in sorted(total.items()):
        print(f"{name:32}{count:>14,}")
    print(f"{len(violations)} violations in {arguments.seeds} seeds, {time.monotonic() - begin:.0f} s")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
