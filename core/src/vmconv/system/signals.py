"""Signals that end a run are delayed while files get their names: what was committed is finished first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
"""Signals by which users, terminals and service managers end a program."""


class Stopped(KeyboardInterrupt):
    """Another signal than SIGINT ended the run; like that one it is no `Exception`, which plugins' code may catch."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def held() -> Iterator[None]:
    """Delays the signals of `ENDING` until the block has ended, and delivers them then: Ctrl-C raises afterwards.

    Python runs handlers in the main thread only. In any other thread the thread's signal mask is set instead, which
    keeps signals of the whole process from this thread and not from others. May be nested.
    """
    if threading.current_thread() is not threading.main_thread():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    came: list[int] = []
    handlers = {each: signal.getsignal(each) for each in ENDING}
    # A handler that was not installed from Python is None and cannot be restored.
    delayed = {each: handler for each, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
    for each in delayed:
        signal.signal(each, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        # Blocked, because a handler that is restored first would raise before the others are restored.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        for each, handler in delayed.items():
            signal.signal(each, handler)
        for number in came:
            signal.raise_signal(number)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
