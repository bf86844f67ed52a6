"""One run of a job: starts the worker, writes its events to the job's record, and stops it on demand."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from vmconv_fleet.catalogue.appointing import own_datastore
from vmconv_fleet.catalogue.places import is_container
from vmconv_fleet.catalogue.windows import WindowError, parsed, windows_of
from vmconv_fleet.errors import Refusal
from vmconv_fleet.jobs.job import Job
from vmconv_fleet.jobs.journal import JobJournal
from vmconv_fleet.jobs.policy import policy_of, refuse_beside, refuse_ruled_out
from vmconv_fleet.jobs.task import Task
from vmconv_fleet.jobs.throttle import Bandwidth
from vmconv_fleet.replication.clock import wall_ms
from vmconv_fleet.replication.indexing import Where
from vmconv_fleet.replication.records import Change
from vmconv_fleet.replication.store import ReplicaView
from vmconv_fleet.replication.writing import Writes, settled

if TYPE_CHECKING:
    from vmconv_fleet.catalogue.conversion import ConversionPolicy
    from vmconv_fleet.catalogue.kinds import JobBody

_log = logging.getLogger("vmconv_fleet.jobs")

WORKER = (sys.executable, "-m", "vmconv_fleet.jobs.worker")
PROGRESS_SECONDS = 0.5
"""The interval of progress updates in the record."""

_PATIENCE = 10.0
_LONGEST_LINE = 1 << 20
_MAX_NOISE = 500


class Run:
    """A run on a thread of its own; `over` is called at its end. After an `error` the job has not ended."""

    def __init__(
        self,
        service: Writes,
        job: Job,
        journal: JobJournal,
        *,
        policy: ConversionPolicy,
        command: Sequence[str],
        over: Callable[[], None],
    ) -> None:
        self.job = job.id
        self.batch = job.batch
        self.datastores = job.datastores
        self.error: Exception | None = None
        self._service = service
        self._job = job.id
        self._journal = journal
        self._policy = policy
        self._command = list(command)
        self._over = over
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._cancelled = False
        self._node_ends = threading.Event()
        self._last_update = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"job {job.id}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return self._is_over.is_set()

    def cancel(self) -> None:
        """Cancels the job permanently."""
        self._cancelled = True
        self._stop_child()

    def end(self) -> None:
        """Stops the run because the node stops; the record stays as it is for the next start."""
        self._node_ends.set()
        self._stop_child()
        self._thread.join()

    def _stop_child(self) -> None:
        with self._lock:
            child = self._child
        if child and child.poll() is None:
            with suppress(ProcessLookupError):
                child.terminate()
            # Storage may block the worker; the next run of the job removes what it leaves.
            timer = threading.Timer(_PATIENCE, child.kill)
            timer.daemon = True
            timer.start()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as exc:
            # Its record could not be written, or there was no process or memory for it.
            self.error = exc
        finally:
            self._is_over.set()
            self._over()

    def _work(self) -> None:
        body = self._update(Job.begun)
        if body is None:
            return
        try:
            task = self._task(body)
        except (AttributeError, LookupError, TypeError, ValueError):
            if not (of := body.get("of")):
                raise
            # What another node says may be anything, and must not hold up the jobs of this one.
            _log.exception("records of node %s are not valid: job %s", of, self._job)
            self._update(partial(Job.failed, message=f"what node {of} says about the source or its rules is not valid"))
            return
        except Refusal as exc:
            self._update(partial(Job.failed, message=str(exc)))
            return
        said = self._run_worker(task)
        if self._node_ends.is_set() and said is None and not self._journal.made():
            return
        ended = self._update(self._outcome(said))
        self._journal.remove()
        if ended and ended["state"] == "done":
            self._ask_for_scan({body["datastore"], body.get("target_datastore")})
        _log.info("job ended", extra={"fields": {"job": self._job, "outcome": (said or {}).get("event", "ended")}})

    def _ask_for_scan(self, datastores: set[str | None]) -> None:
        """Requests a scan of the datastores, which have a new file."""

        def decide(view: ReplicaView) -> list[Change]:
            found = [view.get(self._service.node, "datastore", name) for name in datastores if name is not None]
            return [Change("datastore", one.id, {**one.body, "scan_asked_ms": wall_ms()}) for one in found if one]

        settled(self._service.update(decide), self._node_ends)

    def _task(self, body: Mapping[str, Any]) -> Task:
        """Returns the worker's task.

        Raises Refusal if the record is not valid, or if the catalogue has changed since the request.
        """
        job = _checked(body)
        node, view = self._service.node, self._service.view()
        roots = {one.id: str(one.body["path"]) for one in view.find("datastore", node)}
        kind, identifier = ("disk", job.disk) if job.vm is None else ("vm", job.vm)
        source = view.get(job.of or node, kind, identifier or "")
        if source is None:
            raise Refusal(f"{kind} {identifier} no longer exists")
        if problem := source.body.get("problem"):
            raise Refusal(f"{kind} {identifier} cannot be read: {problem}")
        datastore, owners, rules = str(source.body["datastore"]), [node], self._policy
        if job.of is not None:
            datastore, owners = own_datastore(view, node, job.of, source), [job.of]
            rules = policy_of(job.of, view)
            refuse_ruled_out(rules, job.disk_format if job.vm else job.format, keep_source=True)
        for name in (datastore, job.target_datastore):
            if name is not None and name not in roots:
                raise Refusal(f"datastore {name} no longer exists")
        refuse_beside(roots[datastore], job.target_datastore and roots[job.target_datastore], keeps=job.keep_source)
        within = _still_allowed(node, job, view, self._policy)
        usable = roots if within is None else {name: roots[name] for name in within if name in roots}
        if job.of is not None or is_container(roots[datastore]):
            if datastore not in usable:
                raise Refusal(f"not allowed any more: datastore {datastore}")
            # Whoever writes another node's records or storage reads nothing else of this node.
            usable = {datastore: roots[datastore]}
        # The worker asks a store whose it is.
        if not is_container(roots[datastore]):
            for name in filter(None, (datastore, job.target_datastore)):
                _refuse_of_another(roots[name], owners)
            # A directory on the way to the source may be a datastore of another node.
            own = source.body.get("name") or source.body["file"]
            _refuse_of_another(os.path.dirname(os.path.join(os.path.realpath(roots[datastore]), own)), owners)
        _refuse_unknown_zones(windows_of(body, {"between": self._policy.between}))
        return Task(
            job=self._job,
            root=roots[datastore],
            name=source.body["file" if job.vm else "name"],
            roots=[path for path in usable.values() if not is_container(path)],
            format=job.format,
            options=job.options,
            target=job.target,
            target_root=roots[job.target_datastore] if job.target_datastore else None,
            naming=rules.naming,
            zero_copy="require" if "require" in (rules.zero_copy, self._policy.zero_copy) else job.zero_copy,
            journal=self._journal.path,
            dry_run=job.dry_run,
            removable=not job.keep_source and job.vm is None and job.of is None and not self._is_parent(job.disk),
            is_machine=job.vm is not None,
            disk_format=job.disk_format,
            disk_options=job.disk_options,
            strict=job.strict,
            keep=job.keep,
            uuid=job.uuid,
            new_identity=job.new_identity,
            bandwidth=self._bandwidth(),
            owners=owners,
        )

    def _bandwidth(self) -> list[Bandwidth]:
        directory = bandwidth_directory(os.path.dirname(self._journal.path))
        found = {name: rate for name, rate in self._policy.bandwidth.items() if name in self.datastores}
        if found:
            os.makedirs(directory, mode=0o700, exist_ok=True)
        return [Bandwidth(os.path.abspath(os.path.join(directory, name)), rate) for name, rate in found.items()]

    def _is_parent(self, disk: str | None) -> bool:
        """Returns whether another disk of the catalogue needs this one."""
        return self._service.view().count("disk", self._service.node, Where("instr(parents, ?)", (f" {disk} ",))) > 0

    def _run_worker(self, task: Task) -> Mapping[str, Any] | None:
        """Runs the worker; returns its last event, None if it had none."""
        last: Mapping[str, Any] | None = None
        noise = ""
        with subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        ) as child:
            with self._lock:
                self._child = child
            if self._cancelled or self._node_ends.is_set():
                self._stop_child()
            try:
                self._send_line(child, json.dumps(task._asdict()))
                for said in _lines(child):
                    if isinstance(said, str):
                        noise = said
                    elif said["event"] in ("done", "error") or task.dry_run:
                        last = said
                    else:
                        self._handle_event(child, said)
            except BaseException:
                child.kill()
                raise
        if last is None and not (self._cancelled or self._node_ends.is_set()):
            how = f"signal {-child.returncode}" if child.returncode < 0 else f"code {child.returncode}"
            last = {"event": "error", "message": f"the worker ended with {how} {noise}".strip()[:_MAX_NOISE]}
        return last

    def _send_line(self, child: subprocess.Popen[bytes], line: str) -> None:
        assert child.stdin
        # A dead worker is noticed by its missing last event.
        try:
            child.stdin.write(line.encode() + b"\n")
            child.stdin.flush()
        except BrokenPipeError:
            # Closing drops what is buffered, which the end of the block would write again.
            with suppress(BrokenPipeError):
                child.stdin.close()

    def _handle_event(self, child: subprocess.Popen[bytes], said: Mapping[str, Any]) -> None:
        if said["event"] == "plan":
            if self._update(partial(Job.planned, event=said)) is None:
                # The job was cancelled, or its record is gone.
                self.cancel()
            else:
                self._send_line(child, "go")
            return
        now = time.monotonic()
        if now - self._last_update >= PROGRESS_SECONDS or said["done"] == 0:
            self._last_update = now
            self._update(partial(Job.running, done=said["done"], total=said["total"]))

    def _outcome(self, said: Mapping[str, Any] | None) -> Callable[[Job], Mapping[str, Any]]:
        """Returns the change of the record at the end. A cancellation after the target was made is ignored."""
        if said is not None and said["event"] == "error" and not self._cancelled:
            return partial(Job.failed, message=said["message"], hint=said.get("hint"))
        if said is not None and said["event"] == "plan":
            return partial(Job.planned, event=said, ended=True)
        if (said is not None and said["event"] == "done") or self._journal.made():
            return partial(Job.done, event=said or {})
        return Job.cancelled

    def _update(self, change: Callable[[Job], Mapping[str, Any] | None]) -> Mapping[str, Any] | None:
        """Changes the current record of the job and waits until that is durable; returns the new body."""

        def decide(view: ReplicaView) -> list[Change]:
            record = view.get(self._service.node, "job", self._job)
            job = Job(self._job, record.body) if record else None
            if job is None or job.is_over:
                return []
            body = change(job)
            return [] if body is None else [Change("job", self._job, body)]

        records = settled(self._service.update(decide), self._node_ends)
        return records[0].body if records else None


def bandwidth_directory(jobs: str) -> str:
    """Returns the directory of the files that workers share to keep bandwidths."""
    return os.path.join(jobs, "bandwidth")


def _still_allowed(node: str, job: JobBody, view: ReplicaView, policy: ConversionPolicy) -> list[str] | None:
    """Returns the datastores that a job may open; raises Refusal if it may not begin any more."""
    from vmconv.plugin import AccessError
    from vmconv_fleet.jobs.starting import openable

    try:
        return openable(node, job, view, policy)
    except (AccessError, Refusal) as exc:
        raise Refusal(f"not allowed any more: {exc}") from exc


def _refuse_unknown_zones(windows: Sequence[str]) -> None:
    """Raises Refusal if the time zone of a window has become unknown on this machine."""
    try:
        for text in windows:
            parsed(text)
    except WindowError as exc:
        raise Refusal(str(exc)) from exc


def _refuse_of_another(root: str, owners: Sequence[str]) -> None:
    """Raises Refusal if the storage belongs to another node than these by now."""
    from vmconv.plugin import AccessError
    from vmconv_fleet.catalogue.sharing import refuse_unless_owner

    try:
        refuse_unless_owner(root, *owners)
    except AccessError as exc:
        raise Refusal(str(exc)) from exc


def _checked(body: Mapping[str, Any]) -> JobBody:
    """Returns a job's record as its model; raises Refusal if it is not valid."""
    from pydantic import ValidationError

    from vmconv_fleet.catalogue.complaints import complaint
    from vmconv_fleet.catalogue.kinds import JobBody

    try:
        return JobBody.model_validate(body)
    except ValidationError as exc:
        raise Refusal(complaint(exc.errors())) from exc


def _lines(child: subprocess.Popen[bytes]) -> Iterator[Mapping[str, Any] | str]:
    """Yields the worker's events, and other output as text."""
    assert child.stdout
    while line := child.stdout.readline(_LONGEST_LINE):
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if isinstance(said, dict) and "event" in said:
            yield said
        else:
            yield line.decode(errors="replace").strip()
