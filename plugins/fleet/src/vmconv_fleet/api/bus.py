"""Tells coroutines of the API what was committed on the replica's thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from vmconv_fleet.replication.records import Record
from vmconv_fleet.replication.service import NodeService

MAX_WAITING = 2000
"""Records that a listener may be behind; one that is further behind has lost some, and is told so."""

MAX_LISTENERS = 256


class Listener:
    """The records that somebody has not taken yet."""

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
        """Returns what has come, after `timeout` seconds at most, and whether some of it was lost before."""
        try:
            await asyncio.wait_for(self._arrived.wait(), timeout)
        except TimeoutError:
            return [], False
        self._arrived.clear()
        taken, lost = self._waiting, self._lost
        self._waiting, self._lost = [], False
        return taken, lost


class Bus:
    """Listeners of one node, on any number of loops."""

    def __init__(self, service: NodeService) -> None:
        self._listeners: set[Listener] = set()
        self.close = service.subscribe(self._committed)

    def _committed(self, records: list[Record]) -> None:
        for listener in tuple(self._listeners):
            try:
                listener.loop.call_soon_threadsafe(listener.add, records)
            except RuntimeError:
                # Its loop has ended, and with it whoever listened.
                self._listeners.discard(listener)

    @property
    def is_full(self) -> bool:
        return len(self._listeners) >= MAX_LISTENERS

    @asynccontextmanager
    async def listener(self) -> AsyncIterator[Listener]:
        """Hears what is committed from now on."""
        listener = Listener(asyncio.get_running_loop())
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)
