"""One conversion: a program that the job runner starts, so that it can be cancelled, and ends with its node.

    python -m vmconv_fleet.jobs.worker

The first line of standard input is the `Task`, as JSON. It reports events on standard output, one JSON document per
line, with the key `event`:

    plan      name of the target, bytes to share, copy and write; then it waits for `go` on standard input
    progress  bytes done and to do
    done      the target exists
    error     one line and a hint; nothing was created

It also ends, and leaves nothing behind, on SIGTERM and at the end of standard input, so if its node is killed. Before
the target is renamed into place, the journal identifies its file.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys

from vmconv.plugin import VmconvError, printable
from vmconv_fleet.catalogue.places import DECLARE, is_container
from vmconv_fleet.jobs.conversion import Conversion, emit
from vmconv_fleet.jobs.journal import JobJournal
from vmconv_fleet.jobs.task import Task

_OPTION = re.compile(r"(?<!\S)--([a-z-]+)")
_OPTIONS = {name.replace("_", "-") for name in Task._fields}


class _Stopped(BaseException):
    """The conversion must stop. Not an `Exception`, which readers and writers catch."""


def _stop(_number: int, _frame: object) -> None:
    raise _Stopped


def main() -> int:
    """Runs the task on standard input; returns the exit code."""
    signal.signal(signal.SIGTERM, _stop)
    # ^C on the terminal is for the node, which stops its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    task = Task(**json.loads(sys.stdin.readline()))
    # The conversion changes the working directory.
    journal = JobJournal(os.path.abspath(task.journal))
    if not journal.lock():
        emit("error", message="another worker runs this job", hint=None)
        return 1
    code = _done(task, journal)
    if code and not journal.made():
        journal.remove()
    return code


def _conversion(task: Task, journal: JobJournal) -> Conversion:
    if task.is_machine:
        from vmconv_fleet.jobs.machines import MachineConversion

        return MachineConversion(task, journal)
    if is_container(task.root):
        from vmconv_fleet.jobs.objects import ObjectConversion

        return ObjectConversion(task, journal)
    from vmconv_fleet.jobs.disks import DiskConversion

    return DiskConversion(task, journal)


def _done(task: Task, journal: JobJournal) -> int:
    try:
        _conversion(task, journal).run()
    except _Stopped:
        return 143
    except VmconvError as exc:
        emit("error", message=str(exc), hint=_mounting(exc) or _hint(exc))
        return 1
    except OSError as exc:
        emit("error", message=printable(f"{exc.filename or 'storage'}: {exc.strerror or exc}"), hint=_mounting(exc))
        return 1
    except Exception as exc:
        emit("error", message=printable(f"internal error: {type(exc).__name__}: {exc}"), hint=None)
        return 1
    return 0


def _mounting(exc: Exception) -> str | None:
    """Returns the hint of a job whose filesystem is served by a process that has ended."""
    cause = exc if isinstance(exc, OSError) else exc.__cause__
    if isinstance(cause, OSError) and cause.errno == errno.ENOTCONN:
        return "what serves this mount has ended: mount it again"
    return None


def _hint(exc: VmconvError) -> str | None:
    """Returns the hint of a failed job; core's may name options that jobs do not have."""
    named = set(_OPTION.findall(exc.hint or ""))
    if "allow-external" in named:
        return DECLARE
    return exc.hint if named <= _OPTIONS else None


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # As in the program: destroying numpy's modules takes longer than the rest.
    os._exit(code)
