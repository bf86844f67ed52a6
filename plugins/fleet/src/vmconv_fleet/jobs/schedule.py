"""When a waiting job may begin: its time, the windows of the job and of its node, and the limits of datastores."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from vmconv_fleet.catalogue.windows import WindowError, next_open_ms, windows_of
from vmconv_fleet.jobs.job import Job

if TYPE_CHECKING:
    from vmconv_fleet.catalogue.conversion import ConversionPolicy


class Schedule:
    """What may begin at one moment. `next_ms` is when the next of the jobs is due that were looked at, 0 for none."""

    def __init__(self, policy: ConversionPolicy, now_ms: int) -> None:
        self.next_ms = 0
        self._policy = policy
        self._now_ms = now_ms
        self._openings: dict[tuple[str, ...], int | None] = {}

    def is_due(self, job: Job) -> bool:
        """Returns whether the time of a job has come, and its windows are open."""
        if job.at_ms > self._now_ms:
            self._note(job.at_ms)
            return False
        opening = self._opening(windows_of(job.body, {"between": self._policy.between}))
        if opening is not None and opening > self._now_ms:
            self._note(opening)
        return opening == self._now_ms

    def is_full(self, job: Job, running: Iterable[Collection[str]]) -> bool:
        """Returns whether a datastore of the job has as many running jobs as it may."""
        limits = self._policy.datastore_parallel
        begun = list(running)
        return any(sum(name in one for one in begun) >= limits[name] for name in job.datastores if name in limits)

    def _opening(self, windows: tuple[str, ...]) -> int | None:
        if windows not in self._openings:
            try:
                self._openings[windows] = next_open_ms(windows, self._now_ms)
            except WindowError:
                # The run fails with the reason.
                self._openings[windows] = self._now_ms
        return self._openings[windows]

    def _note(self, moment_ms: int) -> None:
        self.next_ms = min(self.next_ms or moment_ms, moment_ms)
