"""Live messages that arrived too early, kept until the records before them are pulled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vmconv_fleet.replication.records import Position, Record

MAX_BUFFERED = 2 << 20
"""Bytes of all owners together."""


class EarlyMessage(NamedTuple):
    """A live message, of which only the first record was decoded, and its sender."""

    peer: str
    wires: Sequence[bytes]


class ReorderBuffer:
    """Messages by owner and by the position that they follow."""

    def __init__(self) -> None:
        self._buffer: dict[str, dict[Position, EarlyMessage]] = {}
        self._size = 0

    def keep(self, first: Record, early: EarlyMessage) -> None:
        """Keeps a message that begins with this record, unless the buffer is full."""
        size = _size(early)
        follows = Position(first.epoch, first.seq - 1)
        messages = self._buffer.setdefault(first.owner, {})
        if follows not in messages and self._size + size <= MAX_BUFFERED:
            messages[follows] = early
            self._size += size

    def following(self, owner: str, position: Position) -> EarlyMessage | None:
        """Removes and returns the message that follows a position; drops the messages that no longer can."""
        messages = self._buffer.get(owner)
        if messages is None:
            return None
        found = messages.pop(position, None)
        if found is not None:
            self._size -= _size(found)
            return found
        for follows in [follows for follows in messages if follows < position]:
            self._size -= _size(messages.pop(follows))
        if not messages:
            del self._buffer[owner]
        return None


def _size(early: EarlyMessage) -> int:
    return sum(map(len, early.wires))
