"""System calls that fail: a sample of `inject/run.py`, and the proof that its table knows each call that is made."""

from __future__ import annotations

import fcntl
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from inject.scenarios import SCENARIOS
from inject.table import ALIASES, FCNTLS, IOCTLS, SEEKS, TABLE
from support.requirements import oracle_program

HERE = Path(__file__).parent
CASES = 700

NOT_ON_FILES = {"execve", "getcwd", "mmap", "epoll_wait", "epoll_ctl", "poll", "umask", "exit_group"}
"""What strace counts as calls on files and descriptors, and what cannot fail for reasons of a file."""

INSIDE = {"fcntl:GETFL", "lseek:SET"}
"""What the C library does inside of fdopendir and rewinddir, where no other library is asked."""


@pytest.fixture
def run(xfs_dir: Path) -> list[str]:
    for program in ("gcc", "strace", "qemu-img"):
        oracle_program(program)
    (xfs_dir / "base").mkdir()
    return [sys.executable, str(HERE / "run.py"), "--directory", str(xfs_dir / "base")]


def test_a_sample_of_failing_calls(run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([*run, "--count", str(CASES)], capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    with capsys.disabled():
        print(f"\nfailing calls: {done.stdout.splitlines()[1]}")


def test_each_call_that_is_made_has_a_row_and_is_seen(run: list[str], xfs_dir: Path) -> None:
    done = subprocess.run([*run, "--calls"], capture_output=True, text=True, check=True, timeout=600)
    seen = json.loads(done.stdout)
    for scenario in SCENARIOS:
        if scenario.kind == "stream":
            # What is written there are no files.
            continue
        directory = xfs_dir / scenario.name
        directory.mkdir()
        scenario.build(directory)
        log = xfs_dir / f"{scenario.name}.log"
        command = ["strace", "-f", "-y", "-X", "raw", "-s", "1", "-e", "trace=%file,%desc", "-o", str(log)]
        program = [sys.executable, str(HERE / "run.py"), "--undisturbed", scenario.name, str(directory)]
        subprocess.run([*command, *program], capture_output=True, check=False, timeout=600)
        made = set(_calls(log.read_text(errors="replace"), str(directory)))
        assert made <= TABLE.keys(), f"{scenario.name}: calls without a row in inject/table.py"
        assert made - INSIDE <= set(seen[scenario.name]), f"{scenario.name}: calls that inject/shim.c does not see"


def _calls(log: str, directory: str) -> Iterator[str]:
    """Yields the calls on files of a directory, by the names of the table."""
    for line in log.splitlines():
        found = re.match(r"\d+ +(\w+)\((.*)", line)
        if not found or directory not in found[2] or found[1] in NOT_ON_FILES:
            continue
        name, arguments = found[1], found[2].split(", ")
        if name == "ioctl":
            yield IOCTLS.get(int(arguments[1].rstrip(")"), 0), f"ioctl:{arguments[1]}")
        elif name == "fcntl":
            command = int(arguments[1].split(")")[0], 0)
            if command not in (fcntl.F_GETFD, fcntl.F_SETFD):
                yield FCNTLS.get(command, f"fcntl:{command}")
        elif name == "lseek":
            yield SEEKS[int(arguments[2].split(")")[0], 0)]
        else:
            yield ALIASES.get(name, name)
