"""Forks: two records that one owner signed for one position. Both are kept."""

from __future__ import annotations

from collections.abc import Iterable

from vmconv_fleet.replication.clones import Clones
from vmconv_fleet.replication.messages import Summary
from vmconv_fleet.replication.records import Record, payload_of, restore
from vmconv_fleet.replication.store import Store

_KNOWN = 1000


class Forks:
    """Detects forks and keeps the evidence."""

    def __init__(self, store: Store, clones: Clones) -> None:
        self._store = store
        self._clones = clones
        self._examined: set[tuple[str, str, Summary]] = set()

    def unexamined(self, peer: str, owner: str, theirs: Summary) -> bool:
        """Returns whether this pair was not checked before."""
        if len(self._examined) >= _KNOWN:
            self._examined.clear()
        before = len(self._examined)
        self._examined.add((peer, owner, theirs))
        return len(self._examined) > before

    def counterpart(self, record: Record) -> Record | None:
        """Returns the stored record of the same position with other content."""
        wire = self._store.at(record.owner, record.seq)
        if wire is None or payload_of(wire) == record.payload:
            return None
        ours = restore(wire)
        return ours if ours.epoch == record.epoch else None

    def keep(self, records: Iterable[Record], at_ms: int) -> list[Record]:
        """Quarantines verified records that contradict stored ones, and their counterparts.

        Returns the new ones of both.
        """
        news = []
        for record in records:
            ours = self.counterpart(record)
            if ours is None:
                continue
            with self._store.atomic():
                new = self._store.quarantine((ours, record), at_ms)
            if new:
                news += [ours, record]
        if news:
            self._clones.refresh()
        return news
