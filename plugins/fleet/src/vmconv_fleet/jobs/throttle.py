"""The bandwidth of a datastore: bytes per second that all conversions of a node together copy and write there.

Each worker notes in a file, under a lock, until when its bytes take up the datastore, and waits until then. The files
hold times of the machine's monotonic clock, which all processes share.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

_TIME = struct.Struct("<d")


class Bandwidth(NamedTuple):
    """The bytes per second of a datastore, and the file that its jobs share."""

    path: str
    rate: int


class Throttle:
    """Limits the speed of one worker."""

    def __init__(
        self,
        limits: Sequence[Bandwidth],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._sleep = sleep
        self._done = 0

    def moved(self, done: int) -> None:
        """Waits as long as the bytes since the last call take; `done` begins at 0 again with each disk."""
        step = done - self._done if done >= self._done else done
        self._done = done
        if step:
            until = max((_reserve(limit.path, step / limit.rate, self._clock()) for limit in self._limits), default=0.0)
            if (seconds := until - self._clock()) > 0:
                self._sleep(seconds)


def _reserve(path: str, seconds: float, now: float) -> float:
    """Returns the end of the time that begins once all reserved time is over."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        held = os.pread(descriptor, _TIME.size, 0)
        (free,) = _TIME.unpack(held) if len(held) == _TIME.size else (0.0,)
        end: float = max(free, now) + seconds
        os.pwrite(descriptor, _TIME.pack(end), 0)
        return end
    finally:
        os.close(descriptor)
