"""The change feed: delivers the records of each commit to subscribers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from vmconv_fleet.replication.records import Record, restore
from vmconv_fleet.replication.store import Store

PAGE = 256 << 10

Callback = Callable[[list[Record]], None]


class _Item(NamedTuple):
    records: Sequence[Record]
    owner: str = ""
    after: int = 0
    observed: bool = False


_log = logging.getLogger(__name__)


class ChangeFeed:
    """Delivers after the commit: few records from memory, many from the database, page by page."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._callbacks: list[Callback] = []
        self._observers: list[Callback] = []
        self._items: list[_Item] = []

    def subscribe(self, callback: Callback) -> Callable[[], None]:
        self._callbacks.append(callback)

        def end() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return end

    def observe(self, callback: Callback) -> None:
        """Registers a callback that runs before the commit, which may still fail.

        What `add_stored` adds, and what follows it, is observed after the commit.
        """
        self._observers.append(callback)

    def add(self, records: Sequence[Record]) -> None:
        if not records:
            return
        # Records behind an unread `add_stored` wait for it: requests are executed in their order.
        at_once = not any(item.owner for item in self._items)
        self._items.append(_Item(records, observed=at_once))
        if at_once:
            self._observe(records)

    def add_stored(self, owner: str, after: int) -> None:
        """Adds the records of an owner behind a seq, to be read from the database."""
        self._items.append(_Item((), owner, after))

    def mark(self) -> int:
        """Returns the place behind what was added, for `forget`."""
        return len(self._items)

    def forget(self, behind: int = 0) -> None:
        del self._items[behind:]

    def deliver(self) -> None:
        """Calls the subscribers. An exception in one is logged and does not reach the others."""
        news, self._items = self._items, []
        for records in self._pages(news):
            for callback in tuple(self._callbacks):
                try:
                    callback(records)
                except Exception:
                    _log.exception("a subscriber failed")

    def _pages(self, news: Sequence[_Item]) -> Iterator[list[Record]]:
        small: list[Record] = []
        for records, owner, after, observed in news:
            small += records
            if not observed:
                self._observe(records)
            if owner:
                for page in self._stored(owner, after):
                    self._observe(page)
                    yield page
        if small:
            yield small

    def _observe(self, records: Sequence[Record]) -> None:
        for observer in self._observers:
            observer(list(records))

    def _stored(self, owner: str, after: int) -> Iterator[list[Record]]:
        while True:
            wires, after = self._store.after(owner, after, PAGE)
            if not wires:
                return
            yield [restore(wire) for wire in wires]
