"""Threads that verify signatures: the cryptography library releases the interpreter's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from vmconv_fleet.replication.records import Record

FEW = 16
MAX_THREADS = 4


class VerifierPool:
    """A few threads, started on demand. Close it."""

    def __init__(self) -> None:
        self._count = max(1, min(MAX_THREADS, os.cpu_count() or 1))
        self._pool = ThreadPoolExecutor(self._count, thread_name_prefix="fleet-verify")

    def __call__(
        self, predicate: Callable[[Sequence[Record]], bool], groups: Sequence[Sequence[Record]]
    ) -> Iterable[bool]:
        if len(groups) < FEW or self._count == 1:
            return map(predicate, groups)
        size = -(-len(groups) // self._count)
        parts = [groups[start : start + size] for start in range(0, len(groups), size)]
        return chain.from_iterable(self._pool.map(lambda part: [predicate(group) for group in part], parts))

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
