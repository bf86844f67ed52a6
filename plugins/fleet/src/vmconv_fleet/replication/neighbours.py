"""The neighbours of a replica: the connected nodes, their neighbours, and their positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vmconv_fleet.replication.messages import Summary
from vmconv_fleet.replication.records import START, Position

MAX_OWNERS = 4096
"""Limit of positions stored for a neighbour."""


class Neighbour:
    """A directly connected node. `reported`: it has sent a whole digest since it connected."""

    def __init__(self) -> None:
        self.reported = False
        self.near: frozenset[str] = frozenset()
        self.answered = -(1 << 60)
        self._positions: dict[str, Position] = {}

    def note_position(self, owner: str, position: Position) -> None:
        if owner in self._positions or len(self._positions) < MAX_OWNERS:
            self._positions[owner] = position

    def note_digest(self, at: Mapping[str, Summary], whole: bool) -> None:
        if whole:
            self._positions.clear()
        for owner, summary in at.items():
            self.note_position(owner, summary.position)

    def position(self, owner: str) -> Position:
        """Returns the last known position of the neighbour in an owner's records."""
        return self._positions.get(owner, START)

    def forget(self, owner: str) -> None:
        self._positions.pop(owner, None)


class NeighbourTable:
    """The connected neighbours."""

    def __init__(self) -> None:
        self._peers: dict[str, Neighbour] = {}

    def __contains__(self, peer: object) -> bool:
        return peer in self._peers

    def __getitem__(self, peer: str) -> Neighbour:
        return self._peers[peer]

    def __len__(self) -> int:
        return len(self._peers)

    def connect(self, peer: str) -> None:
        self._peers[peer] = Neighbour()

    def disconnect(self, peer: str) -> None:
        self._peers.pop(peer, None)

    def ids(self) -> list[str]:
        return sorted(self._peers)

    def reported(self) -> set[str]:
        """Returns the neighbours that have sent a whole digest."""
        return {id for id, peer in self._peers.items() if peer.reported}

    def ahead(self, owner: str, position: Position) -> list[str]:
        """Returns the neighbours that have more of an owner's records."""
        return [id for id, peer in self._peers.items() if peer.position(owner) > position]

    def behind(self, owner: str, position: Position) -> list[str]:
        """Returns the neighbours that are behind, as far as known, and not linked to the owner."""
        return [
            id
            for id, peer in self._peers.items()
            if id != owner and owner not in peer.near and peer.position(owner) < position
        ]

    def beyond(self, source: str, owner: str) -> Iterable[str]:
        """Yields neighbours linked to neither owner nor source: forward to these."""
        near = self._peers[source].near if source in self._peers else frozenset()
        return (id for id in self._peers if id not in (source, owner) and id not in near)
