"""Processes that work beside each other, whose parent is killed."""

from __future__ import annotations

import signal
import subprocess
import sys

KILLED = """
import os, signal, time
from vmconv.system.children import run_beside

parent = os.getpid()

def work(piece):
    os.kill(parent, signal.SIGKILL)
    while os.getppid() == parent:
        time.sleep(0.01)
    return piece

run_beside([1, 2], work, lambda piece, how: piece, print, 2)
"""


def test_processes_of_a_killed_parent_end_without_a_traceback() -> None:
    # Its pipes are closed when the last process has ended.
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGKILL, b"", b"")
