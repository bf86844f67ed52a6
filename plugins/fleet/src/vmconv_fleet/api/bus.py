"""Passes commits from the replica's thread to coroutines of the API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from vmconv_fleet.replication.records import Record
from vmconv_fleet.replication.service import NodeService

MAX_WAITING = 2000
"""Limit of records that wait for a listener; beyond it they are dropped, with the event `lost`."""

MAX_LISTENERS = 256


class Listener:
    """The pending records of one listener."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._waiting: list[Record] = []
        self._lost = False
        self._arrived = asyncio.Event()

    def add(self, records: list[Record]) -> None:
        if len(self._waiting) + len(records) > MAX_WAITING:
            self._lost = True
        else:
            self._waiting += records
        self._arrived.set()

    async def take(self, timeout: float) -> tuple[list[Record], bool]:
        """Returns the records of up to `timeout` seconds, and whether some were lost before."""
        try:
            await asyncio.wait_for(self._arrived.wait(), timeout)
        except TimeoutError:
            return [], False
        self._arrived.clear()
        taken, lost = self._waiting, self._lost
        self._waiting, self._lost = [], False
        return taken, lost


class Bus:
    """The listeners of one node, on any number of loops."""

    def __init__(self, service: NodeService) -> None:
        self._listeners: set[Listener] = set()
        self.close = service.subscribe(self._committed)

    def _committed(self, records: list[Record]) -> None:
        for listener in tuple(self._listeners):
            try:
                listener.loop.call_soon_threadsafe(listener.add, records)
            except RuntimeError:
                # Its loop has ended, and the listener with it.
                self._listeners.discard(listener)

    @property
    def is_full(self) -> bool:
        return len(self._listeners) >= MAX_LISTENERS

    @asynccontextmanager
    async def listener(self) -> AsyncIterator[Listener]:
        """Listens to commits while the block runs."""
        listener = Listener(asyncio.get_running_loop())
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)
