"""The conversion of a worker: what disks and machines have in common. It reports its events on standard output."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vmconv.plugin import printable
from vmconv_fleet.catalogue.places import hold, place_of, refuse_as_file_name, refuse_outside
from vmconv_fleet.jobs.journal import JobJournal
from vmconv_fleet.jobs.task import Task
from vmconv_fleet.jobs.throttle import Bandwidth, Throttle

if TYPE_CHECKING:
    from vmconv.api import MachinePlan, MachineResult, Plan, Result

_PROGRESS_SECONDS = 0.2
_MAX_LISTED = 50
_MAX_TEXT = 300


class Conversion(ABC):
    """Runs one task and reports its events."""

    def __init__(self, task: Task, journal: JobJournal) -> None:
        self._task = task
        self._roots = [os.path.realpath(root) for root in task.roots]
        self._journal = journal
        self._go = threading.Event()
        self._over = threading.Event()
        self._directory = ""
        self._target_directory = "."
        self._names: list[str] = []
        self._made: list[int] = []
        self._last_progress = 0.0
        self._throttle = Throttle([Bandwidth(*one) for one in task.bandwidth])

    def run(self) -> None:
        """Converts the source."""
        source = self._source()
        target = self._target(source)
        self._target_directory = os.path.dirname(target) or "."
        if self._task.dry_run:
            self._plan(source, target)
            return
        threading.Thread(target=self._watch_input, daemon=True).start()
        result = self._convert(source, target)
        self._over.set()
        self._finish(source, result)

    def _source(self) -> str:
        """Returns the source by its name in its directory, which becomes the working directory.

        No path is walked twice, so a directory that is renamed meanwhile changes nothing.
        """
        directory, source = os.path.split(place_of(self._task.root, self._task.name, self._roots))
        held = hold(directory, self._roots)
        os.fchdir(held)
        os.close(held)
        return source

    @abstractmethod
    def _target(self, source: str) -> str:
        """Returns the path to make. Raises PlanError if it exists, AccessError if it lies outside the datastores."""

    @abstractmethod
    def _plan(self, source: str, target: str) -> None:
        """Reports what the conversion would do."""

    @abstractmethod
    def _convert(self, source: str, target: str) -> Result | MachineResult:
        """Converts; announces the plan before anything is made."""

    @abstractmethod
    def _outcome(self, source: str, result: Any) -> dict[str, Any]:
        """Returns the fields of the last event, after `seconds`."""

    def _place(self, stem: str, suffix: str, format_name: str) -> tuple[str, str]:
        """Returns the directory, empty for that of the source, and the name of the target."""
        task = self._task
        directory = os.path.realpath(task.target_root) if task.target_root else ""
        if directory:
            refuse_outside(directory, task.target or task.name, self._roots)
        name = task.target or task.naming.format(stem=stem, suffix=suffix, format=format_name, job=task.job)
        refuse_as_file_name(name)
        return directory, name

    def _watch_input(self) -> None:
        """Waits for `go`, then for the end of standard input: the end of the node."""
        if sys.stdin.readline():
            self._go.set()
            sys.stdin.read()
        if not self._over.is_set():
            # To the main thread: it may wait in a call that no other thread can interrupt.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        self._go.set()

    def _refuse_elsewhere(self, plan: Plan | MachinePlan, names: Sequence[str]) -> None:
        """Raises AccessError if the conversion opened, or would make, a file outside the datastores."""
        for path in plan.opened:
            refuse_outside(path, os.path.basename(path), self._roots)
        refuse_outside(os.path.realpath(plan.directory), names[-1], self._roots)
        self._directory, self._names = plan.directory, list(names)

    def _emit_plan(self, plan: Plan | MachinePlan, file: str, **more: Any) -> None:
        copies = [{"reason": one.reason, "bytes": one.bytes, "ranges": one.ranges} for one in plan.copies]
        common = {**plan.totals._asdict(), "copies": copies[:_MAX_LISTED], "files": listed(self._names)}
        emit("plan", file=file, plan={**common, **more})

    def _created(self, name: str, descriptor: int) -> None:
        """Writes the journal once all outputs exist, before any has its name."""
        self._made.append(descriptor)
        if len(self._made) == len(self._names):
            directory = os.stat(self._target_directory, follow_symlinks=False)
            self._journal.write(os.path.abspath(os.path.join(self._directory, self._names[-1])), directory, self._made)

    def _progress(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._last_progress >= _PROGRESS_SECONDS:
            self._last_progress = now
            emit("progress", done=done, total=total)
        self._throttle.moved(done)

    def _finish(self, source: str, result: Result | MachineResult) -> None:
        emit("done", seconds=round(result.seconds, 3), **self._outcome(source, result))


def listed(texts: Sequence[str]) -> list[str]:
    """Returns texts for a record: escaped, each cut, and not too many."""
    return [printable(text)[:_MAX_TEXT] for text in texts[:_MAX_LISTED]]


def emit(event: str, **values: Any) -> None:
    """Reports an event. One write, so that lines of threads do not mix. A dead node does not read them."""
    with suppress(BrokenPipeError):
        os.write(1, json.dumps({"event": event, **values}).encode() + b"\n")
