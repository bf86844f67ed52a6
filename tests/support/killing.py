"""Runs of a client that is killed at one of its requests."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def killed_at(step: int, run: Callable[[], int], count: Callable[[Callable[[], None]], None]) -> bool:
    """Runs in a child process that is killed at a step; `count` has each step of the child call a function.

    Returns False if it ended before that.
    """
    child = os.fork()
    if child == 0:
        steps = iter(range(1 << 30))

        def reached() -> None:
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        status = 99
        try:
            count(reached)
            status = run()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False
