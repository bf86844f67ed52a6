"""The process of `Driven`, with workers that stop at a gate.

python gated_node.py GATE PIPE DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path

from vmconv_fleet.jobs import runner
from vmconv_fleet.replication.writing import Writes
from vmconv_fleet.testing import driver

WORKER = (sys.executable, str(Path(__file__).with_name("gated_worker.py")), *sys.argv[1:3])


class GatedRunner(runner.JobRunner):
    def __init__(self, service: Writes, directory: str) -> None:
        super().__init__(service, directory, command=WORKER)


if __name__ == "__main__":
    runner.JobRunner = GatedRunner  # type: ignore[assignment, misc]
    del sys.argv[1:3]
    sys.exit(driver.main())
