"""Fuzzes one target with atheris: `python tests/fuzz/run.py TARGET (--seconds N | --runs N) [--corpus DIR]`.

Guided by the coverage of vmconv's own code. What comes out of a target and is no error of vmconv's, what takes too long
or too much memory, is a finding: printed once for each place in the code, and kept as a file. Exit code 1 when there is
one. Without a target, the names of all.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import operator
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from fuzz.target import Target

ROOT = Path(__file__).parents[2]
TOO_LONG = 3.0
"""Seconds of processor time for one input. Coverage makes Python several times slower."""

HANGS = 60
MUCH_MEMORY = 600 << 20
RESTARTS_AT = 2 << 30
"""Bytes of memory: atheris frees not all that it is called with. A process that has so much is replaced by another."""
RESTARTED = "restarted by its memory"
LONGEST = 16 << 10
PACKAGES = ["vmconv", *sorted(path.name for path in ROOT.glob("plugins/*/src/*") if find_spec(path.name))]


class Limit(NamedTuple):
    """How long to fuzz, as libFuzzer counts: 0 seconds and -1 executions are no limits."""

    seconds: int = 0
    runs: int = -1


class Findings:
    """What went wrong, once for each place in the code."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._known: set[str] = set()

    def add(self, target: str, data: bytes, exc: BaseException) -> None:
        place = where(exc)
        if place in self._known:
            return
        self._known.add(place)
        path = self.directory / f"{target}-{hashlib.sha256(data).hexdigest()[:12]}"
        path.write_bytes(data)
        print(f"FINDING {place} ({len(data)} bytes, {path})", flush=True)
        traceback.print_exception(exc, limit=-6)


def where(exc: BaseException) -> str:
    """Returns the kind of the exception and the last place in our own code."""
    frames = traceback.extract_tb(exc.__traceback__)
    ours = [frame for frame in frames if "/vmconv" in frame.filename] or list(frames)
    return f"{type(exc).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}"


class TooLongError(Exception):
    """An input that took more time than any image may."""


def but_arrays(trace: Callable[..., object]) -> Callable[..., object]:
    """Returns the hook for comparisons without those of arrays: atheris never frees a result, and theirs are large."""
    import numpy as np

    compare = (operator.lt, operator.le, operator.eq, operator.ne, operator.gt, operator.ge)

    def hook(left: Any, right: Any, number: int, *where: object) -> object:
        if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
            return compare[number](left, right)
        return trace(left, right, number, *where)

    return hook


def fuzz(name: str, limit: Limit, seed: int, corpus: Path, findings: Findings) -> None:
    """Runs libFuzzer in this process, which ends with it."""
    import atheris

    atheris._trace_cmp = but_arrays(atheris._trace_cmp)
    with atheris.instrument_imports(include=PACKAGES):
        for package in PACKAGES:
            importlib.import_module(package)
        target: Target = importlib.import_module("fuzz.targets").targets()[name]
        # What is imported when it is first used has to be imported here to be instrumented.
        for data in target.seeds():
            target.run(data)
    from vmconv.testing.malformed import memory_limit

    for directory in (corpus, findings.directory):
        directory.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(data)

    executions = 0

    def one(data: bytes) -> None:
        nonlocal executions
        executions += 1
        if resident() > RESTARTS_AT:
            print(f"number_of_executed_units: {executions}\n{RESTARTED}", flush=True)
            os._exit(0)
        began = time.thread_time()
        try:
            with memory_limit(MUCH_MEMORY):
                target.run(data)
            took = time.thread_time() - began
            if took > TOO_LONG:
                raise TooLongError(f"{took:.1f} s")
        except Exception as exc:
            findings.add(name, data, exc)

    options = {
        "max_total_time": limit.seconds,
        "runs": limit.runs,
        "seed": seed,
        "timeout": HANGS,
        "rss_limit_mb": 4096,
        "report_slow_units": HANGS,
        "max_len": LONGEST,
        "print_final_stats": 1,
        "verbosity": 1,
        "artifact_prefix": f"{findings.directory}/{name}-",
    }
    atheris.Setup([sys.argv[0], *(f"-{key}={value}" for key, value in options.items()), str(corpus)], one)
    atheris.Fuzz()


def resident() -> int:
    """Returns the memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run(name: str, limit: Limit, seed: int, corpus: Path, findings: Path) -> tuple[int, int, str]:
    """Runs a target in processes of its own; returns the executions, the findings, and what was printed."""
    ends = time.monotonic() + limit.seconds
    executions, found, said = _run(name, limit, seed, corpus, findings)
    while RESTARTED in said and not found:
        left = Limit(int(ends - time.monotonic()) if limit.seconds else 0, limit.runs - executions)
        left = left if limit.runs >= 0 else left._replace(runs=-1)
        if (limit.seconds and left.seconds <= 0) or (limit.runs >= 0 and left.runs <= 0):
            break
        seed += 1
        more, found, said = _run(name, left, seed, corpus, findings)
        executions += more
    return executions, found, said


def _run(name: str, limit: Limit, seed: int, corpus: Path, findings: Path) -> tuple[int, int, str]:
    command: list[Any] = [
        sys.executable,
        __file__,
        name,
        "--seconds",
        limit.seconds,
        "--runs",
        limit.runs,
        "--seed",
        seed,
    ]
    command += ["--corpus", corpus, "--findings", findings, "--inside"]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=limit.seconds + 3000,
    )
    said = done.stdout + done.stderr
    executions = re.search(r"number_of_executed_units: (\d+)", said)
    found = re.findall(r"^FINDING .*|^.*ERROR: libFuzzer.*", said, re.MULTILINE)
    if executions is None and not found:
        raise RuntimeError(f"{name} did not run:\n{said[-4000:]}")
    return int(executions[1]) if executions else 0, len(found), said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?")
    parser.add_argument("--seconds", type=int, default=0, help="limit of time; 0 for none")
    parser.add_argument("--runs", type=int, default=-1, help="limit of executions; -1 for none")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, help="directory with inputs to begin with; new ones are added")
    parser.add_argument("--findings", type=Path, default=Path("findings"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    if options.target is None:
        print(*importlib.import_module("fuzz.targets").targets(), sep="\n")
        return 0
    limit = Limit(options.seconds, options.runs)
    if not options.seconds and options.runs < 0:
        limit = Limit(seconds=60)
    if options.inside:
        fuzz(options.target, limit, options.seed, options.corpus, Findings(options.findings))
    with tempfile.TemporaryDirectory(prefix="vmconv-fuzz-") as scratch:
        corpus = options.corpus or Path(scratch)
        executions, found, said = run(options.target, limit, options.seed, corpus, options.findings)
    if found:
        print(said[-20_000:])
    print(f"{options.target}: {executions} executions, {found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONHASHSEED", "0")
    sys.exit(main())
