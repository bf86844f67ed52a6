"""Time: the wall clock of a node in milliseconds, and the hybrid logical clock of its records.

A hybrid logical clock (Kulkarni et al., 2014) is one integer, `ms << 16 | counter`: it is later than all that its node
has seen, and stays close to the wall clock. It goes back only if it is further ahead than MAX_AHEAD_MS: then the wall
clock was wrong, and is right again.
"""

from __future__ import annotations

import os
import time

COUNTER_BITS = 16
MAX_CLOCK = (1 << 63) - 1
MAX_AHEAD_MS = 10 * 60 * 1000
"""A clock that is further ahead is wrong, and is not followed: a peer's, or the node's own earlier one."""

OFFSET_FILE = "VMCONV_FLEET_CLOCK_OFFSET"
"""Environment variable for tests: a file with an offset of the wall clock in milliseconds, reread when it changes."""


class WallClock:
    """Milliseconds since 1970; callable."""

    def __init__(self) -> None:
        self._file = os.environ.get(OFFSET_FILE)
        self._changed = 0
        self._offset = 0

    def __call__(self) -> int:
        if self._file is not None:
            self._read_offset(self._file)
        return time.time_ns() // 1_000_000 + self._offset

    def _read_offset(self, path: str) -> None:
        try:
            changed = os.stat(path).st_mtime_ns
            if changed != self._changed:
                with open(path, encoding="ascii") as file:
                    self._offset = int(file.read().strip() or 0)
                self._changed = changed
        except (OSError, ValueError):
            return


wall_ms = WallClock()


class HybridClock:
    """The clock of a node's records: each value is later than all that were read or observed, except wrong ones."""

    def __init__(self, last: int = 0) -> None:
        self.last = last

    def tick(self, now_ms: int) -> int:
        """Returns the clock of a new record."""
        last = 0 if is_ahead(self.last, now_ms) else self.last
        self.last = min(max(last + 1, now_ms << COUNTER_BITS), MAX_CLOCK)
        return self.last

    def observe(self, clock: int, now_ms: int) -> bool:
        """Merges another node's clock. Returns False, and does nothing, if it is too far ahead of the wall clock."""
        if is_ahead(clock, now_ms):
            return False
        self.last = max(self.last, clock)
        return True


def is_ahead(clock: int, now_ms: int) -> bool:
    """Returns whether a hybrid clock is too far ahead of the wall clock to be right."""
    return clock > (now_ms + MAX_AHEAD_MS) << COUNTER_BITS


def describe_ms(duration: int) -> str:
    """Returns a duration as text, roughly: in days, hours or minutes."""
    for unit, size in (("days", 86_400_000), ("hours", 3_600_000)):
        if duration >= 2 * size:
            return f"{duration // size} {unit}"
    return f"{duration // 60_000} minutes"


def milliseconds(clock: int) -> int:
    """Returns the wall clock part of a hybrid clock."""
    return clock >> COUNTER_BITS
