"""Signals that end a run: the word and the exit code for each."""

from __future__ import annotations

import signal

from vmconv.system.signals import Stopped

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM
EXIT_HUNG_UP = 128 + signal.SIGHUP


_STOPS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
"""Signals that end a run after its cleanup, and the word for each."""


def _number(exc: KeyboardInterrupt) -> int:
    return exc.number if isinstance(exc, Stopped) else signal.SIGINT


def word_for(exc: KeyboardInterrupt) -> str:
    """Returns the effect of a signal in one word."""
    return _STOPS.get(_number(exc), "stopped")


def code_for(exc: KeyboardInterrupt) -> int:
    """Returns the exit code that shells report for a program killed by the signal."""
    return 128 + _number(exc)
