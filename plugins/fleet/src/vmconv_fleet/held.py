"""Live records that came before those that precede them: kept for a moment, so that what was pulled meets them."""

from __future__ import annotations

from collections.abc import Sequence

from vmconv_fleet.records import Position, Record

MAX_HELD = 2 << 20
"""Bytes, of all owners together."""


class Held:
    """By owner and the position that each group of records follows."""

    def __init__(self) -> None:
        self._held: dict[str, dict[Position, tuple[str, Sequence[Record]]]] = {}
        self._size = 0

    def keep(self, owner: str, peer: str, records: Sequence[Record]) -> None:
        """Keeps records that came from a peer, unless there is too much already."""
        size = _size(records)
        follows = Position(records[0].epoch, records[0].seq - 1)
        groups = self._held.setdefault(owner, {})
        if follows not in groups and self._size + size <= MAX_HELD:
            groups[follows] = peer, records
            self._size += size

    def following(self, owner: str, position: Position) -> tuple[str, Sequence[Record]] | None:
        """Removes and returns what follows a position, and from whom it is; forgets what cannot follow any more."""
        groups = self._held.get(owner)
        if groups is None:
            return None
        found = groups.pop(position, None)
        if found is not None:
            self._size -= _size(found[1])
            return found
        for follows in [follows for follows in groups if follows < position]:
            self._size -= _size(groups.pop(follows)[1])
        if not groups:
            del self._held[owner]
        return None


def _size(records: Sequence[Record]) -> int:
    return sum(len(record.wire) for record in records)
