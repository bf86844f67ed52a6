"""Runs programs and says what each run took: wall time, time until durable, processor, peak memory, bytes of I/O."""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


class BenchmarkError(Exception):
    """A program failed or made something wrong: its figures do not count."""


@dataclass(frozen=True)
class Sample:
    """One run: seconds of the whole process, the same until its target was durable, and what the kernel counted.

    `inner` is what the program measured in itself, where it does. `peak` is in bytes; `io` has the keys of
    /proc/PID/io.
    """

    seconds: float
    durable: float
    inner: float | None
    processor: float
    peak: int
    io: dict[str, int]


@dataclass(frozen=True)
class Contender:
    """A program that takes part: it makes `target`, which is removed again after each run, or turned `back`.

    `before` makes what the program finds as its target, outside the timing. `device` is a block device that it writes
    instead of a target, and that stays.

    `durable` says that the program flushes what it writes. A `heavy` one takes part in every second round only.
    `check` is called once with the target and raises `BenchmarkError` when that is not what it should be.
    """

    name: str
    command: Sequence[str]
    target: str | None = None
    durable: bool = True
    heavy: bool = False
    check: Callable[[str], None] | None = None
    back: Sequence[str] | None = None
    before: Sequence[str] | None = None
    device: str | None = None


@dataclass
class Measured:
    """What was measured side by side; `title` says what the programs were asked to do."""

    case: str
    place: str
    title: str
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def median(self, name: str, figure: str = "seconds") -> float:
        return statistics.median(self.figures(name, figure))

    def figures(self, name: str, figure: str = "seconds") -> list[float]:
        """Returns one figure of each run: a field of `Sample`, or one of its `io`."""
        return [s.io[figure] if figure in s.io else getattr(s, figure) for s in self.samples[name]]

    def times_faster(self, name: str, other: str, figure: str = "seconds") -> float:
        """Returns how many times faster the program `name` is than `other`, by medians."""
        return self.median(other, figure) / self.median(name, figure)


def side_by_side(
    measured: Measured, contenders: Sequence[Contender], runs: int, settle: Callable[[], None]
) -> Measured:
    """Fills in `measured`: the contenders take turns (A B A B), each from the same state of the filesystem."""
    for turn in range(runs):
        for contender in contenders:
            if contender.heavy and turn % 2:
                continue
            remove(contender.target)
            if contender.before:
                subprocess.run(contender.before, stdout=subprocess.DEVNULL, check=True)
            settle()
            try:
                measured.samples.setdefault(contender.name, []).append(run(contender))
                made = contender.target or contender.device
                if contender.check and made and turn == 0:
                    contender.check(made)
            finally:
                if contender.back and contender.target and os.path.lexists(contender.target):
                    subprocess.run(contender.back, stdout=subprocess.DEVNULL, check=True)
                remove(contender.target)
    settle()
    return measured


def run(contender: Contender) -> Sample:
    """Runs a program once; raises `BenchmarkError` with what it said when it fails."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        child = subprocess.Popen(contender.command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
        try:
            # The process is left unreaped for a moment: /proc still knows what it read and wrote.
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        except BaseException:
            child.kill()
            child.wait()
            raise
        seconds = time.perf_counter() - began
        io = _io(child.pid)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()
            raise BenchmarkError(f"{' '.join(contender.command)}: exit status {child.returncode}: {said}")
        began_flush = time.perf_counter()
        made = contender.target or contender.device
        if made and not contender.durable:
            flush(made)
        durable = seconds + time.perf_counter() - began_flush
        output.seek(0)
        inner = _inner(output.read())
    # Linux counts the peak from before exec too, so this program's own peak is the floor: it stays small.
    return Sample(seconds, durable, inner, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, io)


def peak() -> int:
    """Returns the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def flush(path: str) -> None:
    """Makes a file and its name durable."""
    for name, flags in ((path, os.O_RDONLY), (os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)):
        descriptor = os.open(name, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: str | None) -> None:
    if path and os.path.isdir(path):
        shutil.rmtree(path)
    elif path and os.path.lexists(path):
        os.unlink(path)


def _io(pid: int) -> dict[str, int]:
    with open(f"/proc/{pid}/io", encoding="ascii") as lines:
        return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def _inner(output: bytes) -> float | None:
    try:
        said: Any = json.loads(output)
    except ValueError:
        return None
    return float(said["inner_seconds"]) if isinstance(said, dict) and "inner_seconds" in said else None
