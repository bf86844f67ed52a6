"""Unanswered requests to this node, in the order in which they are executed."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from vmconv_fleet.replication.records import Record
from vmconv_fleet.replication.store import Store


class Pending:
    """A queue for each requester in the order of its positions. The head with the earliest clock is next."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._queues: dict[str, list[tuple[int, int, str]]] = {}

    def __bool__(self) -> bool:
        return bool(self._queues)

    def see(self, records: Sequence[Record]) -> None:
        """Adds the requests among new records."""
        for record in records:
            if record.kind == "request" and record.body.get("target") == self._node:
                heapq.heappush(self._queues.setdefault(record.owner, []), (record.seq, record.clock, record.id))

    def next(self, store: Store) -> Record | None:
        """Removes and returns the next request in its current version; skips deleted and rewritten ones."""
        while self._queues:
            requester = min(self._queues, key=lambda owner: (self._queues[owner][0][1], owner))
            queue = self._queues[requester]
            seq, _, id = heapq.heappop(queue)
            if not queue:
                del self._queues[requester]
            record = store.get(requester, "request", id)
            if record is not None and record.seq == seq:
                return record
        return None
