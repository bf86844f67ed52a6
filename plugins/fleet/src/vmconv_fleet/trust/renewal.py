"""Renews the node's certificate: after two thirds of its lifetime, and when the machine's addresses have changed."""

from __future__ import annotations

import datetime
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable

from vmconv.plugin import VmconvError
from vmconv_fleet.config import NodeConfig
from vmconv_fleet.supervision import Supervised
from vmconv_fleet.trust.addresses import names_of
from vmconv_fleet.trust.credentials import request_new
from vmconv_fleet.trust.names import name_key

LOOK_EVERY = 10.0
AGAIN_AFTER, AGAIN_BEFORE = 5.0, 600.0
"""Seconds between attempts: the first, and the longest after failures."""
_log = logging.getLogger("vmconv_fleet.renewal")


class Renewal:
    """Checks periodically on a thread of its own; calls `renewed` after a renewal.

    `config` returns the present settings. `certified` are the name and the addresses that the authority was last asked
    for: those that it does not allow are missing in the certificate, and not asked for again.
    """

    def __init__(
        self,
        config: Callable[[], NodeConfig],
        due: Callable[[], datetime.datetime],
        certified: Iterable[str],
        renewed: Callable[[], None],
    ) -> None:
        self._config = config
        self._due = due
        self._certified = {*certified}
        self._renewed = renewed
        self._ended = threading.Event()
        self.thread = Supervised("renewal", self._run, self._ended)

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        self._ended.set()
        self.thread.join(15)

    def _run(self, works: Callable[[], None]) -> None:
        pause, asked = AGAIN_AFTER, 0.0
        # At random, because nodes that were made together would always ask together.
        while not self._ended.wait(min(LOOK_EVERY, pause) * random.uniform(1.0, 1.2)):
            works()
            if time.monotonic() < asked + pause or not self.is_due():
                continue
            asked = time.monotonic()
            pause = AGAIN_AFTER if self.renew() else min(2 * pause, AGAIN_BEFORE)

    def is_due(self) -> bool:
        return datetime.datetime.now(datetime.UTC) >= self._due() or self._wanted() != self._certified

    def _wanted(self) -> set[str]:
        config = self._config()
        return {*names_of(config), name_key(config.name)}

    def renew(self) -> bool:
        """Returns whether the node has a new certificate."""
        config = self._config()
        try:
            names = self._wanted()
            request_new(config)
            self._certified = names
            self._renewed()
        except (VmconvError, TimeoutError) as exc:
            _log.warning("the certificate could not be renewed: %s", exc)
            return False
        return True
