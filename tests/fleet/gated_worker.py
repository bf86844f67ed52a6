"""The worker of jobs, which stops at a gate: when it has said what it will do, or when it has done it all but told so.

    python gated_worker.py GATE PIPE

GATE is `begun` (files are being made) or `made` (they are named). It writes a line into PIPE and continues when
it is given one back by `PIPE.go`.
"""

from __future__ import annotations

import os
import sys

from vmconv.api import MachineResult, Result
from vmconv_fleet.jobs import worker
from vmconv_fleet.jobs.conversion import Conversion
from vmconv_fleet.jobs.journal import JobJournal


def wait(gate: str) -> None:
    if sys.argv[1] == gate:
        with open(sys.argv[2], "w", encoding="ascii") as told:
            told.write("here\n")
        with open(f"{sys.argv[2]}.go", encoding="ascii") as go:
            go.read()


def main() -> int:
    create, finish = Conversion._created, Conversion._finish

    def created(self: Conversion, name: str, descriptor: int) -> None:
        create(self, name, descriptor)
        if os.path.exists(self._journal.path):
            wait("begun")

    write_object = JobJournal.write_object

    def announced(self: JobJournal, container: str, name: str, version: str) -> None:
        write_object(self, container, name, version)
        wait("begun")

    def finished(self: Conversion, source: str, result: Result | MachineResult) -> None:
        wait("made")
        finish(self, source, result)

    JobJournal.write_object = announced  # type: ignore[method-assign]
    Conversion._created = created  # type: ignore[method-assign]
    Conversion._finish = finished  # type: ignore[method-assign]
    return worker.main()


if __name__ == "__main__":
    os._exit(main())
