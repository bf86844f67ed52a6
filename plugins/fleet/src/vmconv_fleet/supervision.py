"""Threads that continue after failures: logged, shown to administrators, and repeated after a growing delay."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

SOONEST, LATEST = 1.0, 60.0
"""Seconds until a failed thread continues: doubled with each failure in a row."""

_log = logging.getLogger("vmconv_fleet.supervision")


class Supervised:
    """A thread that runs `body` until `ending` is set, and again after each failure.

    The body gets a function, which it calls whenever a piece of its work has succeeded: that ends the problem and
    resets the delay. A body that returns before `ending` is set has failed too.
    """

    kind = "failing"

    def __init__(self, name: str, body: Callable[[Callable[[], None]], None], ending: threading.Event) -> None:
        self.name = name
        self.counters = {"failures": 0}
        self._body = body
        self._ending = ending
        self._in_a_row = 0
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout: float | None = None) -> None:
        """Waits for the end of the thread, if it was started."""
        if self._thread.is_alive():
            self._thread.join(timeout)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def problem(self) -> str | None:
        """Returns why the thread does not work at present."""
        return self._problem

    def works(self) -> None:
        self._in_a_row = 0
        self._problem = None

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                self._body(self.works)
                if not self._ending.is_set():
                    raise RuntimeError("it has ended by itself")
            # uvicorn exits on some failures.
            except (Exception, SystemExit) as exc:
                if not self._ending.is_set():
                    self._ending.wait(self._failed(exc))

    def _failed(self, exc: BaseException) -> float:
        """Reports a failure and returns the delay in seconds."""
        self._in_a_row += 1
        self.counters["failures"] += 1
        delay: float = min(SOONEST * 2 ** min(self._in_a_row - 1, 16), LATEST)
        times = "once" if self._in_a_row == 1 else f"{self._in_a_row} times in a row"
        self._problem = f"{self.name} failed {times}, the last time with: {str(exc) or type(exc).__name__}"
        _log.error("%s; it continues in %g s", self._problem, delay, exc_info=exc)
        return delay
