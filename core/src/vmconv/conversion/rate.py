"""The rate of a conversion: bytes per second that it copies and writes."""

from __future__ import annotations

import time
from collections.abc import Callable

from vmconv.errors import UsageError
from vmconv.model.plan import Progress


def limited(
    progress: Progress | None,
    rate: int,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Progress:
    """Returns a progress callback that waits as long as the bytes take at `rate` bytes per second.

    Raises `UsageError` for a rate that would never end.
    """
    if rate <= 0:
        raise UsageError(f"a rate of {rate} bytes per second copies nothing", hint="give a size such as 50M")
    # Of the last call: the bytes done, and the end of their time.
    before, free = 0, 0.0

    def moved(done: int, to_do: int) -> None:
        nonlocal before, free
        # Several outputs count from 0 each.
        step = done - before if done >= before else done
        now = clock()
        before, free = done, max(free, now) + step / rate
        if free > now:
            sleep(free - now)
        if progress:
            progress(done, to_do)

    return moved
