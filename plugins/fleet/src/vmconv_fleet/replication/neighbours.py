"""What a replica knows of its neighbours: who is there, who is theirs, and how far each has come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vmconv_fleet.replication.messages import Summary
from vmconv_fleet.replication.records import START, Position

MAX_OWNERS = 4096
"""What a neighbour says of more owners than this is not remembered."""


class Neighbour:
    """A directly connected node. `told`: it has said how far it has everything since it is connected."""

    def __init__(self) -> None:
        self.told = False
        self.near: frozenset[str] = frozenset()
        self.answered = -(1 << 60)
        self._heard: dict[str, Position] = {}

    def hear(self, owner: str, position: Position) -> None:
        if owner in self._heard or len(self._heard) < MAX_OWNERS:
            self._heard[owner] = position

    def hear_all(self, at: Mapping[str, Summary], whole: bool) -> None:
        if whole:
            self._heard.clear()
        for owner, summary in at.items():
            self.hear(owner, summary.position)

    def position(self, owner: str) -> Position:
        """Returns how far it had the owner's records when it was last heard."""
        return self._heard.get(owner, START)

    def forget(self, owner: str) -> None:
        self._heard.pop(owner, None)


class NeighbourTable:
    """Those that are connected."""

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

    def all_told(self) -> bool:
        """Whether all have said how far they are."""
        return all(peer.told for peer in self._peers.values())

    def ahead(self, owner: str, position: Position) -> list[str]:
        """Returns who has more of an owner's records."""
        return [id for id, peer in self._peers.items() if peer.position(owner) > position]

    def behind(self, owner: str, position: Position) -> list[str]:
        """Returns who, as far as is known, has fewer, and does not hear from the owner itself."""
        return [
            id
            for id, peer in self._peers.items()
            if id != owner and owner not in peer.near and peer.position(owner) < position
        ]

    def beyond(self, source: str, owner: str) -> Iterable[str]:
        """Yields who does not hear from the owner, or from who passed it on, what has just come from there."""
        near = self._peers[source].near if source in self._peers else frozenset()
        return (id for id in self._peers if id not in (source, owner) and id not in near)
