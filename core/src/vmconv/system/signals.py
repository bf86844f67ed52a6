"""Defers terminating signals while files are renamed, so that a commit is not torn."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
"""Signals with which users, terminals and service managers terminate a program."""


class Stopped(KeyboardInterrupt):
    """A signal other than SIGINT terminated the run."""

    # A BaseException like KeyboardInterrupt: code of plugins may catch Exception.

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def held() -> Iterator[None]:
    """Defers the signals of `ENDING` until the block ends, then delivers them. May be nested.

    Outside the main thread it only blocks them in the calling thread.
    """
    # Python runs handlers in the main thread only, and lets no other thread install them.
    if threading.current_thread() is not threading.main_thread():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    came: list[int] = []
    handlers = {each: signal.getsignal(each) for each in ENDING}
    # A handler that was not installed from Python is None and could not be restored.
    delayed = {each: handler for each, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
    for each in delayed:
        signal.signal(each, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        # Blocked, because a handler that is restored early could raise before the others are restored.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        for each, handler in delayed.items():
            signal.signal(each, handler)
        for number in came:
            signal.raise_signal(number)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
