"""A node with a job runner, in a process of its own, for being killed.

python node_to_kill.py DIRECTORY GATE PIPE
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from fleet.in_memory import Node
from vmconv_fleet.jobs.runner import JobRunner


def main() -> None:
    node = Node(1, Path(sys.argv[1]), {})
    node.start()
    worker = (sys.executable, str(Path(__file__).with_name("gated_worker.py")), *sys.argv[2:])
    JobRunner(node.service, str(node.directory), command=worker).start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
