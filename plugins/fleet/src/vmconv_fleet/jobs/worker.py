"""One conversion: a program that the job runner starts, so that it can be cancelled, and ends with its node.

    python -m vmconv_fleet.jobs.worker

The first line of standard input is the `Task`, as JSON. It reports events on standard output, one JSON document per
line, with the key `event`:

    plan      bytes to share, copy and write; then it waits for `go` on standard input
    progress  bytes done and to do
    done      the target exists
    error     one line and a hint; nothing was created

It also ends, and leaves nothing behind, on SIGTERM and at the end of standard input, so if its node is killed. Before
the target is renamed into place, the journal identifies its file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from vmconv.plugin import PlanError, VmconvError, printable
from vmconv_fleet.catalogue.places import place_of, refuse_as_file_name, refuse_outside
from vmconv_fleet.jobs.journal import JobJournal

if TYPE_CHECKING:
    from vmconv.api import Result
    from vmconv.plugin import Plan

_PROGRESS_SECONDS = 0.2
_MAX_LISTED = 20


class Task(NamedTuple):
    """A conversion: the disk `name` below the datastore at `root`; only files below `roots` may be touched.

    `target` is the name of the file to make, at `target_root` or beside the source (None); without it `naming` makes
    the name. `journal` is the path of the job's journal. `removable`: the source may be removed afterwards.
    """

    job: str
    root: str
    name: str
    roots: list[str]
    format: str
    options: dict[str, str]
    target: str | None
    target_root: str | None
    naming: str
    zero_copy: str
    journal: str
    dry_run: bool
    removable: bool


class _Stopped(BaseException):
    """The conversion must stop. Not an `Exception`, which readers and writers catch."""


class Worker:
    """Runs one task and reports its events."""

    def __init__(self, task: Task, journal: JobJournal) -> None:
        self._task = task
        self._roots = [os.path.realpath(root) for root in task.roots]
        self._journal = journal
        self._go = threading.Event()
        self._over = threading.Event()
        self._directory = ""
        self._names: list[str] = []
        self._made: list[int] = []
        self._last_progress = 0.0

    def run(self) -> None:
        from vmconv.api import convert

        task = self._task
        source = place_of(task.root, task.name, self._roots)
        target = self._target(source)
        # The opener restricts files to the datastores; the files that it opened are checked again.
        wanted: dict[str, Any] = {
            "target_format": task.format,
            "options": task.options,
            "zero_copy": task.zero_copy,
            "allow_external": self._roots,
        }
        if task.dry_run:
            self._plan(source, target, wanted)
            return
        threading.Thread(target=self._watch_input, daemon=True).start()
        result = convert(
            source, target, announce=self._announce, created=self._created, progress=self._progress, **wanted
        )
        self._over.set()
        self._finish(source, result)

    def _plan(self, source: str, target: str, wanted: Mapping[str, Any]) -> None:
        from vmconv.api import Request, prepared, refuse_copies

        with prepared(Request(source, target, **wanted)) as ready:
            self._refuse_elsewhere(ready.plan)
            self._emit_plan(ready.plan)
            refuse_copies(target, self._task.zero_copy, ready.plan)

    def _target(self, source: str) -> str:
        from vmconv.api import new_name
        from vmconv.plugin import installed

        task = self._task
        directory = os.path.realpath(task.target_root) if task.target_root else os.path.dirname(source)
        refuse_outside(directory, task.target or task.name, self._roots)
        registry = installed()
        one = registry.format(task.format)
        own = os.path.basename(task.name)
        new = new_name(own, one, registry)
        stem = registry.stem(own)
        name = task.target or task.naming.format(
            stem=stem, suffix=new.removeprefix(stem), format=one.name, job=task.job
        )
        refuse_as_file_name(name)
        path = os.path.join(directory, name)
        if os.path.lexists(path):
            # A link is not followed: it could lead anywhere.
            raise PlanError(f"{name}: already exists", hint="name another target")
        return path

    def _watch_input(self) -> None:
        """Waits for `go`, then for the end of standard input: the end of the node."""
        if sys.stdin.readline():
            self._go.set()
            sys.stdin.read()
        if not self._over.is_set():
            # To the main thread: it may wait in a call that no other thread can interrupt.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        self._go.set()

    def _announce(self, plan: Plan) -> None:
        self._refuse_elsewhere(plan)
        self._emit_plan(plan)
        self._go.wait()

    def _refuse_elsewhere(self, plan: Plan) -> None:
        """Raises AccessError if the conversion opened, or would make, a file outside the datastores."""
        for path in plan.opened:
            refuse_outside(path, os.path.basename(path), self._roots)
        refuse_outside(plan.directory, plan.files[-1].name, self._roots)
        self._directory, self._names = plan.directory, [file.name for file in plan.files]

    def _emit_plan(self, plan: Plan) -> None:
        copies = [{"reason": one.reason, "bytes": one.bytes, "ranges": one.ranges} for one in plan.copies]
        _emit(
            "plan",
            target=os.path.join(plan.directory, plan.files[-1].name),
            plan={
                "backend": plan.way,
                **plan.totals._asdict(),
                "copies": copies[:_MAX_LISTED],
                "losses": [printable(loss) for loss in plan.losses[:_MAX_LISTED]],
                "files": [printable(file.name) for file in plan.files[:_MAX_LISTED]],
            },
        )

    def _created(self, name: str, descriptor: int) -> None:
        """Writes the journal once all outputs exist, before any has its name."""
        self._made.append(descriptor)
        if len(self._made) == len(self._names):
            self._journal.write(os.path.join(self._directory, self._names[-1]), self._made)

    def _progress(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._last_progress >= _PROGRESS_SECONDS:
            self._last_progress = now
            _emit("progress", done=done, total=total)

    def _finish(self, source: str, result: Result) -> None:
        kept = None
        if self._task.removable:
            kept = _remove(source, result)
        _emit(
            "done",
            seconds=round(result.seconds, 3),
            warnings=[printable(text) for text in result.warnings[:_MAX_LISTED]],
            source_kept=kept,
        )


def _remove(source: str, result: Result) -> str | None:
    """Removes the source of a finished conversion; returns the reason if it has to stay."""
    from vmconv.plugin import Opener, installed

    if result.totals.referenced:
        return "the target refers to it"
    with Opener(installed()) as opener:
        image = opener.image(source, result.source_format)
        if any(one is not image.file for one in image.guest.sources) or image.dependencies:
            return "it consists of several files"
        if image.file.changed():
            return "it has changed"
        os.unlink(source)
    return None


def _emit(event: str, **values: Any) -> None:
    # One write, so that lines of threads do not mix. A dead node does not read them.
    with suppress(BrokenPipeError):
        os.write(1, json.dumps({"event": event, **values}).encode() + b"\n")


def _stop(_number: int, _frame: object) -> None:
    raise _Stopped


def main() -> int:
    """Runs the task on standard input; returns the exit code."""
    signal.signal(signal.SIGTERM, _stop)
    # ^C on the terminal is for the node, which stops its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    task = Task(**json.loads(sys.stdin.readline()))
    journal = JobJournal(task.journal)
    if not journal.lock():
        _emit("error", message="another worker runs this job", hint=None)
        return 1
    code = _done(task, journal)
    if code and not journal.made():
        journal.remove()
    return code


def _done(task: Task, journal: JobJournal) -> int:
    try:
        Worker(task, journal).run()
    except _Stopped:
        return 143
    except VmconvError as exc:
        _emit("error", message=str(exc), hint=exc.hint)
        return 1
    except OSError as exc:
        _emit("error", message=printable(f"{exc.filename or 'storage'}: {exc.strerror or exc}"), hint=None)
        return 1
    except Exception as exc:
        _emit("error", message=printable(f"internal error: {type(exc).__name__}: {exc}"), hint=None)
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # As in the program: destroying numpy's modules takes longer than the rest.
    os._exit(code)
