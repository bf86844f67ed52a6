"""Renews the node's certificate after two thirds of its lifetime; repeats until it has a new one."""

from __future__ import annotations

import datetime
import logging
import random
import threading
from collections.abc import Callable

from vmconv.plugin import VmconvError
from vmconv_fleet.config import NodeConfig
from vmconv_fleet.supervision import Supervised
from vmconv_fleet.trust.credentials import request_new

LOOK_EVERY = 600.0
_log = logging.getLogger("vmconv_fleet.renewal")


class Renewal:
    """Checks periodically on a thread of its own; calls `renewed` after a renewal."""

    def __init__(self, config: NodeConfig, due: Callable[[], datetime.datetime], renewed: Callable[[], None]) -> None:
        self._config = config
        self._due = due
        self._renewed = renewed
        self._ended = threading.Event()
        self.thread = Supervised("renewal", self._run, self._ended)

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        self._ended.set()
        self.thread.join(15)

    def _run(self, works: Callable[[], None]) -> None:
        # At random, because nodes that were made together would always ask together.
        while not self._ended.wait(self._wait()):
            works()
            if datetime.datetime.now(datetime.UTC) < self._due():
                continue
            try:
                request_new(self._config)
                self._renewed()
            except (VmconvError, TimeoutError) as exc:
                _log.warning("the certificate could not be renewed: %s", exc)

    def _wait(self) -> float:
        left = (self._due() - datetime.datetime.now(datetime.UTC)).total_seconds()
        return min(LOOK_EVERY, max(left, 5.0)) * random.uniform(1.0, 1.2)
