"""Daemonizing for `--fork`: the command exits when its child is ready."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def fork() -> Callable[[], None]:
    """Forks, and returns in the child a function that reports readiness to the parent.

    The parent never returns: it exits with 0 once the child is ready, or with the exit code of a child that ended
    before. Reporting readiness also detaches the child from the terminal.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        # No byte means that the child has ended.
        os._exit(0 if os.read(reader, 1) else _exit_code(child))
    os.close(reader)
    os.setsid()

    def ready() -> None:
        sys.stdout.flush()
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        os.close(nothing)
        os.write(writer, b"+")
        os.close(writer)

    return ready


def _exit_code(child: int) -> int:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code >= 0 else 1


@contextmanager
def ended_by_signals(handler: Callable[[int, object], None] | signal.Handlers) -> Iterator[None]:
    """Handles SIGINT and SIGTERM with `handler` during the block: they end a view normally."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
