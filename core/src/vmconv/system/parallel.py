"""Work in threads with a bounded number of pieces in flight, results in the order of the pieces."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

WORKERS = max(4, min(8, os.cpu_count() or 4))
"""Threads at once: more than processors, because most of them wait for storage."""

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def in_order(work: Callable[[Piece], Result], pieces: Iterable[Piece]) -> Iterator[Result]:
    """Yields `work(piece)` for each piece; what is still waiting is cancelled when the caller stops early."""
    from concurrent.futures import Future, ThreadPoolExecutor

    with ThreadPoolExecutor(WORKERS) as pool:
        flying: deque[Future[Result]] = deque()
        try:
            for piece in pieces:
                flying.append(pool.submit(work, piece))
                if len(flying) >= 2 * WORKERS:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        finally:
            for future in flying:
                future.cancel()
