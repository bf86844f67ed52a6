"""What a block of a test costs: processor time, and memory at its peak."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from vmconv.testing.malformed import memory_limit

LIMIT = 4 << 30
"""Bytes; more makes an allocation fail instead of the machine."""


class Cost:
    """The cost of a block, known at its end."""

    seconds: float
    """Processor time of this process."""
    memory: int
    """Bytes resident at the peak, less those resident before."""


@contextlib.contextmanager
def cost() -> Iterator[Cost]:
    """Measures a block; an allocation that would make it much larger fails with `MemoryError`."""
    # 5 sets the peak of resident memory to what is resident now: proc_pid_clear_refs(5).
    Path("/proc/self/clear_refs").write_text("5")
    before, began = _status("VmRSS"), time.process_time()
    spent = Cost()
    with memory_limit(LIMIT):
        yield spent
    spent.seconds = time.process_time() - began
    spent.memory = _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))
