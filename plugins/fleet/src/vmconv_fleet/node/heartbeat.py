"""The node's own telemetry: its record at the start, then a heartbeat every few seconds."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from vmconv_fleet.catalogue.terms import SCHEMA
from vmconv_fleet.config import NodeConfig
from vmconv_fleet.links.peers import links_of
from vmconv_fleet.replication.clock import wall_ms
from vmconv_fleet.replication.records import Change, Record
from vmconv_fleet.supervision import Supervised
from vmconv_fleet.trust.addresses import names_of

if TYPE_CHECKING:
    from vmconv_fleet.links.zenoh_link import ZenohLink
    from vmconv_fleet.replication.service import NodeService

INTERVAL = 5.0
PER_NODE = 0.4
"""Seconds by which each node of a large fleet lengthens the interval, to limit the total traffic."""
MAX_INTERVAL = 60.0
SETTLE = 0.2
"""Seconds that a change of neighbours waits for more changes, besides a fifth of the lengthening of the interval."""


def node_record(config: NodeConfig, api_port: int | None, authority: list[str], started_ms: int) -> Change:
    """Returns the record of the node itself; `authority` are the addresses of its service for joining, if it runs."""
    # `importlib.metadata` would take three megabytes of memory.
    from vmconv.plugin import version

    host = config.api.rpartition(":")[0]
    body: dict[str, Any] = {
        "name": config.name,
        "fleet": config.fleet,
        "version": version("vmconv-fleet"),
        "api": None if api_port is None else f"https://{host}:{api_port}",
        "addresses": names_of(config),
        "links": links_of(config),
        "authority": authority,
        "started_ms": started_ms,
        "schema_revision": SCHEMA,
    }
    return Change("node", config.node, {name: value for name, value in body.items() if value is not None})


def _memory() -> int:
    """Returns the resident memory of this process in bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class HeartbeatWriter:
    """Writes heartbeats on a thread of its own, and one soon after `changed`."""

    def __init__(self, service: NodeService, link: ZenohLink) -> None:
        self._service = service
        self._link = link
        self._written: Future[list[Record]] | None = None
        self._changed = threading.Event()
        self._ended = threading.Event()
        self.thread = Supervised("heartbeat", self._run, self._ended)

    def start(self) -> None:
        self.thread.start()

    def changed(self) -> None:
        self._changed.set()

    def close(self) -> None:
        self._ended.set()
        self._changed.set()
        self.thread.join(10)

    def _run(self, works: Callable[[], None]) -> None:
        while not self._ended.is_set():
            interval = self._beat()
            works()
            if self._changed.wait(interval) and not self._ended.wait(max(SETTLE, (interval - INTERVAL) / 5)):
                self._changed.clear()

    def _beat(self) -> float:
        """Writes a heartbeat unless the last one still waits; returns the seconds until the next."""
        positions = self._service.view().positions()
        interval = min(max(INTERVAL, PER_NODE * len(positions)), MAX_INTERVAL)
        if self._written is not None and not self._written.done():
            # The node still recovers its records, or storage is slow: one pending heartbeat is enough.
            return interval
        problems = [problem.text for problem in (*self._link.problems(), *self._service.problems())]
        body = {
            "at_ms": wall_ms(),
            "interval_s": interval,
            "positions": {
                owner: list(position) for owner, position in positions.items() if owner != self._service.node
            },
            "neighbours": self._link.neighbours(),
            "problems": problems[-20:],
            "memory": _memory(),
        }
        self._written = self._service.write([Change("heartbeat", self._service.node, body)])
        return interval
