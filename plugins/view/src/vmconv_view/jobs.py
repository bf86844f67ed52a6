"""Work on an image that may take long or never end, with a limit on the wait.

A mount has few threads and its images are untrusted. So each image is read and planned in a thread of its own. A
request waits for the result up to a limit, then fails. Later requests fail at once, until there is a result.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from vmconv.plugin import BackendError

PATIENCE = 10.0
"""Seconds that a request waits for a job."""

MAX_LATE = 8
"""Late jobs of one owner. At this number no other job is started for the owner."""

T = TypeVar("T")


class _Job:
    def __init__(self, owner: Hashable, work: Callable[[], Any]) -> None:
        self.owner = owner
        self.done = threading.Event()
        self.is_late = False
        self.result: Any = None
        self.error: Exception | None = None
        self._work = work

    def run(self) -> None:
        try:
            self.result = self._work()
        except Exception as exc:
            self.error = exc


class Jobs:
    """Runs jobs by key; requests for a running job share its result."""

    def __init__(self) -> None:
        self._jobs: dict[Hashable, _Job] = {}
        self._lock = threading.Lock()

    def result(self, key: Hashable, owner: Hashable, name: str, work: Callable[[], T]) -> T:
        """Returns the result of `work`, or raises its exception. Raises `BackendError` if it takes too long."""
        job = self._job(key, owner, name, work)
        if job.is_late or not job.done.wait(PATIENCE):
            job.is_late = not job.done.is_set()
        if job.is_late:
            raise BackendError(f"{name}: takes longer than {PATIENCE:g} seconds", hint="look again later")
        if job.error:
            raise job.error
        found: T = job.result
        return found

    def _job(self, key: Hashable, owner: Hashable, name: str, work: Callable[[], Any]) -> _Job:
        with self._lock:
            job = self._jobs.get(key)
            if job is None:
                if sum(other.is_late and other.owner == owner for other in self._jobs.values()) >= MAX_LATE:
                    raise BackendError(f"{name}: {MAX_LATE} others take too long", hint="look again later")
                job = self._jobs[key] = _Job(owner, work)
                try:
                    # A daemon, because a job may hang in the kernel and must not block the exit.
                    threading.Thread(target=self._run, args=(key, job), daemon=True).start()
                except RuntimeError as exc:
                    del self._jobs[key]
                    raise BackendError(f"{name}: cannot be read: {exc}") from exc
            return job

    def _run(self, key: Hashable, job: _Job) -> None:
        job.run()
        with self._lock:
            del self._jobs[key]
        job.done.set()
