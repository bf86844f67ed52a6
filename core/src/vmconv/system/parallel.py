"""A thread pool with a bounded number of pieces in flight and results in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

WORKERS = max(4, min(8, os.cpu_count() or 4))
"""Threads; possibly more than processors, because most wait for storage."""

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def in_order(work: Callable[[Piece], Result], pieces: Iterable[Piece]) -> Iterator[Result]:
    """Yields `work(piece)` for each piece, in order; cancels queued pieces if the caller stops early."""
    from concurrent.futures import Future, ThreadPoolExecutor

    with ThreadPoolExecutor(WORKERS) as pool:
        flying: deque[Future[Result]] = deque()
        try:
            for piece in pieces:
                flying.append(pool.submit(work, piece))
                # Bounds memory: results wait for their turn.
                if len(flying) >= 2 * WORKERS:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        finally:
            for future in flying:
                future.cancel()
