"""Nodes of one fleet in this process: the production service, with keys and links that cost nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from fleet.plain import PlainSigner, PlainTrust
from vmconv_fleet.catalogue.indexes import INDEXES
from vmconv_fleet.catalogue.terms import SCHEMA
from vmconv_fleet.jobs.handlers import make_handlers
from vmconv_fleet.replication.engine import Events
from vmconv_fleet.replication.problems import NodeProblem
from vmconv_fleet.replication.records import Change, Position, Record
from vmconv_fleet.replication.service import NodeService
from vmconv_fleet.testing import PATIENCE

T = TypeVar("T")


class TrustsAll(PlainTrust):
    """Needs no certificates: a signature by an owner's key is the owner's. `others` are further members."""

    def __init__(self, others: Iterable[str] = ()) -> None:
        super().__init__()
        self._others = frozenset(others)

    def members(self) -> set[str]:
        return {*super().members(), *self._others}

    def verify(self, owner: str, key_id: str, signed: Sequence[tuple[bytes, bytes]], position: Position) -> bool:
        return all(PlainSigner(owner, key_id).sign(payload) == signature for payload, signature in signed)


class Wire:
    """The links of one node; `peers` are reached unless one of the two is cut."""

    def __init__(self, node: str, wires: dict[str, Wire]) -> None:
        self.node = node
        self.is_disconnected = False
        self._wires = wires
        self._events: Events | None = None

    def start(self, events: Events) -> None:
        self._events = events
        self.reconnect()

    def send(self, peer: str | None, message: bytes) -> None:
        for other in self._reached():
            if peer in (None, other.node) and other._events:
                other._events.received(self.node, message)

    def close(self) -> None:
        self.disconnect()
        self._events = None

    def disconnect(self) -> None:
        for other in self._reached():
            for one, peer in ((self, other), (other, self)):
                if one._events:
                    one._events.disconnected(peer.node)
        self.is_disconnected = True

    def reconnect(self) -> None:
        self.is_disconnected = False
        for other in self._reached():
            for one, peer in ((self, other), (other, self)):
                if one._events:
                    one._events.connected(peer.node)

    def problems(self) -> list[NodeProblem]:
        return [NodeProblem("disconnected", "disconnected by the administrator")] if self.is_disconnected else []

    def neighbours(self) -> list[str]:
        return [other.node for other in self._reached()]

    def _reached(self) -> list[Wire]:
        if self.is_disconnected or self._events is None:
            return []
        return [one for one in self._wires.values() if one is not self and one._events and not one.is_disconnected]


class Node:
    """One node: its service, its link, its directory."""

    def __init__(
        self, number: int, directory: Path, wires: dict[str, Wire], *, restored_with: Iterable[str] | None = None
    ) -> None:
        """`restored_with`: its database was restored, and these are the other members."""
        self.id = f"{number:x}" * 32
        self.directory = directory / f"n{number:02}"
        self.directory.mkdir(exist_ok=True)
        self.wire = wires[self.id] = Wire(self.id, wires)
        self.service = NodeService(
            fleet="test",
            database=str(self.directory / "store.sqlite"),
            signer=PlainSigner(self.id),
            trust=TrustsAll(restored_with or ()),
            transport=self.wire,
            handlers=make_handlers(str(self.directory)),
            schema=SCHEMA,
            patience_ms=0 if restored_with is None else None,
            indexes=INDEXES,
        )

    def start(self) -> None:
        self.service.start()
        self.write(Change("node", self.id, {"name": self.directory.name, "fleet": "test"}))

    def write(self, *changes: Change) -> list[Record]:
        return self.service.update(lambda _view: changes).result(PATIENCE)

    def until(self, look: Callable[[], T | None]) -> T:
        """Returns what `look` finds once it finds something; it looks whenever something was committed here."""
        changed = threading.Event()
        unsubscribe = self.service.subscribe(lambda _records: changed.set())
        try:
            while True:
                found = look()
                if found:
                    return found
                assert changed.wait(PATIENCE), "what was waited for did not come"
                changed.clear()
        finally:
            unsubscribe()

    def body_when(self, owner: str, kind: str, identifier: str, holds: Callable[[Record], bool]) -> Record:
        """Returns a record once it is there and as it should be."""

        def look() -> Record | None:
            record = self.service.view().get(owner, kind, identifier)
            return record if record and holds(record) else None

        return self.until(look)


@contextmanager
def nodes(count: int, directory: Path) -> Iterator[Sequence[Node]]:
    """Yields running nodes that are all connected."""
    wires: dict[str, Wire] = {}
    with ExitStack() as stack:
        made = []
        for number in range(1, count + 1):
            node = Node(number, directory, wires)
            stack.callback(node.service.close)
            node.start()
            made.append(node)
        yield made
