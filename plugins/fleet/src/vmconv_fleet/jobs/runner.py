"""The job runner: runs the conversions of job records, each in a process of its own.

A job's record goes queued -> planned -> running -> done, failed or cancelled. Only this module advances it; handlers
create it and request its end. If a node dies, the record stays as it is. At the next start the journal tells whether
the job is done; otherwise it restarts.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from vmconv_fleet.errors import ClosedError
from vmconv_fleet.jobs.job import Job
from vmconv_fleet.jobs.journal import JobJournal
from vmconv_fleet.jobs.policy import policy_of
from vmconv_fleet.jobs.run import WORKER, Run, bandwidth_directory
from vmconv_fleet.jobs.schedule import Schedule
from vmconv_fleet.replication.clock import wall_ms
from vmconv_fleet.replication.indexing import Where
from vmconv_fleet.replication.records import Change, Record
from vmconv_fleet.replication.store import ReplicaView
from vmconv_fleet.replication.writing import Writes, settled
from vmconv_fleet.supervision import Supervised

_log = logging.getLogger("vmconv_fleet.jobs")

MAX_ATTEMPTS = 3
"""Limit of attempts of a job that end with the node."""

_LOOK_AT_CLOCK = 30.0
_WORKER_STEP = 0.05


def _remove(directory: str) -> None:
    # With two compression libraries; few starts need it.
    from shutil import rmtree

    rmtree(directory, ignore_errors=True)


class JobRunner:
    """Runs the node's jobs; `directory` is the node's own."""

    def __init__(self, service: Writes, directory: str, *, command: Sequence[str] = WORKER) -> None:
        self._service = service
        self._directory = os.path.join(directory, "jobs")
        self._command = command
        self._events: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._waiting: dict[str, Job] = {}
        self._next_ms = 0
        self._running: dict[str, Run] = {}
        self._ending = threading.Event()
        self._interrupted: set[str] = set()
        self._recovered = False
        self.thread = Supervised("jobs", self._run, self._ending)
        self._unsubscribe: Callable[[], None] = lambda: None

    def start(self) -> None:
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        if os.path.exists(bandwidth := bandwidth_directory(self._directory)):
            # The times in it are those of an earlier start of the machine, maybe.
            _remove(bandwidth)
        self._unsubscribe = self._service.subscribe(self._notice)
        self.thread.start()

    def stop(self) -> None:
        """Stops running jobs, which the next start restarts; returns when nothing runs."""
        self._ending.set()
        self._unsubscribe()
        self._events.put(None)
        self.thread.join()
        for run in list(self._running.values()):
            run.end()

    # On the replica's thread

    def _notice(self, records: list[Record]) -> None:
        for one in records:
            if one.owner == self._service.node and one.kind in ("job", "policy"):
                self._events.put(one)

    # On the runner's own thread

    def _run(self, works: Callable[[], None]) -> None:
        if not self._recovered:
            self._recover()
            self._recovered = True
        while not self._ending.is_set():
            self._settle_interrupted()
            self._begin_due()
            works()
            self._wait()

    def _recover(self) -> None:
        """Settles the jobs of the last process: done, cancelled, restarted, or failed."""
        # Before the node serves, it may lack its own latest records.
        settled(self._service.update(lambda _view: ()), self._ending)
        for record in self._open():
            job = Job(record.id, record.body)
            if job.was_begun:
                self._settle(job.id)
        for record in self._open():
            self._look_at(record)

    def _open(self) -> list[Record]:
        """Returns the node's jobs that have not ended."""
        view = self._service.view()
        where = Where("owner = ? AND NOT ended", (view.numbers().get(self._service.node, -1),))
        return [record for record, _ in view.listed("job", where)]

    def _settle(self, job: str) -> None:
        """Settles a job whose run was interrupted."""
        journal = self._journal(job)
        self._wait_for_worker(journal)
        change = partial(_left_over, self._service.node, job, journal.made())
        settled(self._service.update(change), self._ending)
        journal.remove()

    def _settle_interrupted(self) -> None:
        """Settles the jobs of runs that failed. Raises the error of such a run first."""
        for identifier, run in list(self._running.items()):
            if run.is_over:
                del self._running[identifier]
                if run.error is not None:
                    self._interrupted.add(identifier)
                    # For the delay: whatever failed may fail again.
                    raise run.error
        for identifier in sorted(self._interrupted):
            self._settle(identifier)
            self._interrupted.discard(identifier)
            record = self._service.view().get(self._service.node, "job", identifier)
            if record is not None:
                self._look_at(record)

    def _wait_for_worker(self, journal: JobJournal) -> None:
        """Waits until a worker of the last process has ended, as it does without its node."""
        while not journal.lock():
            if self._ending.wait(_WORKER_STEP):
                raise ClosedError("the node ends")
        journal.unlock()

    def _wait(self) -> None:
        """Handles changed records; also returns when a job may be due."""
        until = (self._next_ms - wall_ms()) / 1000
        with suppress(queue.Empty):
            record = self._events.get(timeout=min(until, _LOOK_AT_CLOCK) if until > 0 else _LOOK_AT_CLOCK)
            while True:
                if record:
                    self._look_at(record)
                record = self._events.get_nowait()

    def _look_at(self, record: Record) -> None:
        if record.kind != "job":
            return
        job = Job(record.id, record.body)
        if record.deleted or job.state != "queued":
            self._waiting.pop(record.id, None)
            if job.was_begun and not (record.deleted or job.is_over or record.id in self._running):
                # Of another history of this node, which was merged.
                self._interrupted.add(record.id)
        elif record.id not in self._running:
            self._waiting[record.id] = job
        run = self._running.get(record.id)
        if run and (record.deleted or job.cancel):
            run.cancel()

    def _begin_due(self) -> None:
        """Starts the due jobs, as many at a time as policy and batches allow."""
        self._next_ms = 0
        if not self._waiting:
            return
        policy = policy_of(self._service.node, self._service.view())
        schedule = Schedule(policy, wall_ms())
        for job in sorted(self._waiting.values(), key=Job.order):
            if self._ending.is_set() or len(self._running) >= policy.max_parallel:
                break
            running = [run.datastores for run in self._running.values()]
            if not self._batch_allows(job) or schedule.is_full(job, running) or not schedule.is_due(job):
                continue
            run = Run(
                self._service,
                job,
                self._journal(job.id),
                policy=policy,
                command=self._command,
                over=lambda: self._events.put(None),
            )
            run.start()
            del self._waiting[job.id]
            self._running[job.id] = run
        self._next_ms = schedule.next_ms

    def _batch_allows(self, job: Job) -> bool:
        if job.batch is None or job.max_parallel is None:
            return True
        return sum(run.batch == job.batch for run in self._running.values()) < job.max_parallel

    def _journal(self, job: str) -> JobJournal:
        return JobJournal(os.path.join(self._directory, f"{job}.json"))


def _left_over(node: str, identifier: str, made: str | None, view: ReplicaView) -> list[Change]:
    """Returns the changes of an interrupted job; `made` is the target that it had made."""
    record = view.get(node, "job", identifier)
    if record is None or Job(identifier, record.body).is_over:
        return []
    body = {key: value for key, value in record.body.items() if key not in ("plan", "progress", "started_ms", "file")}
    return [Change("job", identifier, _recovered(Job(identifier, record.body), Job(identifier, body), made))]


def _recovered(interrupted: Job, job: Job, made: str | None) -> Mapping[str, Any]:
    """Returns the record of an interrupted job after the start of its node; `job` has no trace of the attempt."""
    if made:
        return interrupted.logged("found done", state="done", ended_ms=wall_ms(), recovered=True)
    if job.cancel:
        return job.cancelled()
    if job.body.get("attempts", 0) >= MAX_ATTEMPTS:
        return job.failed(message=f"failed: the job was interrupted {MAX_ATTEMPTS} times")
    return job.logged("interrupted: the node ended", state="queued")
