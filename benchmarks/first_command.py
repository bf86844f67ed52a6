"""Times the README's first command where nothing of it is: a new environment and home, without pip's cache.

    python benchmarks/first_command.py [--python /usr/bin/python3] [--runs 3]

Needs what pip needs to fetch packages; no root. Each step's wall clock and processor time is printed, children
included, and the machine's load before it: with a load above the number of processors the wall clock says little.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 60
"""Seconds of wall clock on two idle processors."""


def first_command() -> list[str]:
    """Returns the commands of the README's first block of code, one by one."""
    found = re.search(r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    if not found:
        sys.exit("README.md has no block of code")
    return [command.strip() for line in found[1].splitlines() for command in line.split("&&")]


def copied(directory: Path) -> Path:
    """Returns a copy of the files of the repository, as a fresh clone has them."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    target = directory / "vmconv"
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def processor_time() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(python: str) -> tuple[float, float]:
    """Runs the command once; returns wall clock and processor time, seconds."""
    with tempfile.TemporaryDirectory(prefix="vmconv-first-") as name:
        directory = Path(name)
        checkout = copied(directory)
        programs = directory / "bin"
        programs.mkdir()
        (programs / "python3").symlink_to(python)
        home = directory / "home"
        home.mkdir()
        # What configures pip on this machine (an index, certificates) stays; its cache and constraints do not.
        environment = {key: value for key, value in os.environ.items() if key not in ("PIP_CONSTRAINT", "VIRTUAL_ENV")}
        environment |= {"HOME": str(home), "PATH": f"{programs}:{os.environ['PATH']}", "PIP_NO_CACHE_DIR": "1"}
        whole = [0.0, 0.0]
        for command in first_command():
            load, wall, processor = os.getloadavg()[0], time.monotonic(), processor_time()
            done = subprocess.run(
                command, shell=True, cwd=checkout, env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
            spent = time.monotonic() - wall, processor_time() - processor
            whole = [whole[0] + spent[0], whole[1] + spent[1]]
            print(f"{spent[0]:7.1f} s, processor {spent[1]:5.1f} s, load {load:5.1f}: {command[:90]}", flush=True)
        return whole[0], whole[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="the interpreter that the environment is made from")
    parser.add_argument("--runs", type=int, default=1)
    given = parser.parse_args()
    results = [run(os.path.realpath(given.python)) for _ in range(given.runs)]
    wall, processor = min(results)
    print(f"best of {given.runs}: {wall:.1f} s, processor {processor:.1f} s; limit on two idle processors: {LIMIT} s")


if __name__ == "__main__":
    main()
