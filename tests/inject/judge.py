"""What is right after a run in which a call failed: asked of the files and of QEMU, never of vmconv."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from inject.scenarios import Scenario, content, write_sparse

State = Mapping[str, tuple[int, bytes]]
"""Files by name: mode and content."""


class Ran(NamedTuple):
    """How a process ended: its exit code (negative: a signal), what it printed, and the files that there are then.

    `broken_pipe`: a call was told that the reader of a pipe has gone.
    """

    code: int
    out: bytes
    err: str
    state: State
    broken_pipe: bool = False


def state_of(directory: Path) -> State:
    found = {}
    for path in sorted(directory.iterdir()):
        status = path.lstat()
        found[path.name] = status.st_mode, path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
    return found


class Oracle:
    """Tells whether an image has the disk; QEMU is asked unless its bytes are those of one that it was asked about."""

    def __init__(self, scratch: Path) -> None:
        self._expected = scratch / "expected.raw"
        self._right: set[tuple[str, bytes]] = set()
        write_sparse(self._expected, content())

    def is_right(self, format_name: str, data: bytes, path: Path) -> bool:
        if format_name == "raw":
            return data == content()
        if (format_name, data) in self._right:
            return True
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        done = subprocess.run(
            ["qemu-img", "compare", "-q", "-f", "raw", "-F", format_name, self._expected, path],
            env=environment,
            capture_output=True,
            check=False,
            timeout=600,
        )
        if done.returncode == 0 and len(self._right) < 200:
            self._right.add((format_name, data))
        return done.returncode == 0


class Judge:
    """Judges the runs of one scenario; `again` runs a command undisturbed in the directory as it is."""

    def __init__(
        self,
        scenario: Scenario,
        directory: Path,
        before: State,
        usual: Ran,
        oracle: Oracle,
        again: Callable[[tuple[str, ...] | None], Ran],
    ) -> None:
        self.scenario = scenario
        self.directory = directory
        self.before = before
        self.usual = usual
        self.oracle = oracle
        self.again = again

    def problems(self, ran: Ran, *, harmless: bool) -> Iterator[str]:
        """Yields what is wrong; `harmless`: nothing failed, so all must be as usual."""
        if ran.code == -14:
            yield "hangs"
        elif ran.code < 0:
            yield f"ended by signal {-ran.code}"
        if harmless and ran.code != self.usual.code:
            yield f"exit code {ran.code} without a failure"
        yield from _said(ran, self.scenario)
        yield from {
            "make": self._made,
            "replace": self._made,
            "in-place": self._in_place,
            "stream": self._streamed,
            "ask": self._asked,
            "serve": self._served,
            "recover": self._recovered,
        }[self.scenario.kind](ran)

    # -- a target that is made beside its source

    def _made(self, ran: Ran) -> Iterator[str]:
        yield from self._kept(ran.state)
        there = [name for name in self.scenario.targets if name in ran.state]
        old = {name for name in there if ran.state[name] == self.before.get(name)}
        if ran.code == 0:
            yield from self._targets(ran.state, "exit code 0")
            yield from self._leftovers(ran.state, "exit code 0")
            return
        if self.scenario.kind == "make" and there:
            yield f"exit code {ran.code}, and {there} are there"
        for name in there:
            if name not in old and not self._right(name, ran.state):
                yield f"exit code {ran.code}, and {name} is another disk"
        after = self.again(None)
        if self.scenario.kind == "make" and there:
            return
        if after.code and "its interrupted conversion has been completed" not in after.err:
            yield f"the next run returns {after.code}: {after.err.strip()}"
        yield from self._targets(after.state, "the next run")
        yield from self._leftovers(after.state, "the next run")
        yield from self._kept(after.state)

    def _targets(self, state: State, when: str) -> Iterator[str]:
        for name in self.scenario.targets:
            if name not in state:
                yield f"{when}: no {name}"
            elif not self._right(name, state):
                yield f"{when}: {name} is another disk"

    def _right(self, name: str, state: State) -> bool:
        return self.oracle.is_right(self.scenario.targets[name], state[name][1], self.directory / name)

    def _leftovers(self, state: State, when: str) -> Iterator[str]:
        left = state.keys() - self.before.keys() - self.usual.state.keys()
        if left:
            yield f"{when}: {sorted(left)} are left"

    def _kept(self, state: State) -> Iterator[str]:
        for name in self.scenario.kept:
            if state.get(name) != self.before[name]:
                yield f"{name} has changed" if name in state else f"{name} is gone"

    # -- a source that becomes the target

    def _in_place(self, ran: Ran) -> Iterator[str]:
        state = ran.state
        if ran.code == 0:
            yield from self._targets(state, "exit code 0")
            yield from self._leftovers(state, "exit code 0")
            return
        (source,), (target,) = self.scenario.kept, self.scenario.targets
        if any(name.endswith((".vmconv-journal", ".vmconv-inplace")) for name in state):
            recovered = self.again(("recover", f"{self.directory}/{source}"))
            if recovered.code:
                yield f"recover returns {recovered.code}: {recovered.err.strip()}"
            state = recovered.state
        if state.get(target) == self.before.get(target) and source in state:
            if state[source] != self.before[source]:
                yield f"{source} has changed"
            after = self.again(None)
            if after.code:
                yield f"the next run returns {after.code}: {after.err.strip()}"
            state = after.state
        yield from self._targets(state, "at last")
        yield from self._leftovers(state, "at last")

    def _recovered(self, ran: Ran) -> Iterator[str]:
        state = ran.state
        if ran.code:
            after = self.again(None)
            (target,) = self.scenario.targets
            if after.code and target in ran.state:
                # All was done but the last sync of the directory: then only the name of what is there is known.
                after = self.again(("recover", f"{self.directory}/{target}"))
            if after.code:
                yield f"the next recover returns {after.code}: {after.err.strip()}"
            state = after.state
        yield from self._targets(state, "recovered")
        left = [name for name in state if ".vmconv-" in name and not name.endswith(".vmconv-undo")]
        if left:
            yield f"recovered: {left} are left"

    # -- what is sent, asked and served

    def _streamed(self, ran: Ran) -> Iterator[str]:
        yield from self._kept(ran.state)
        if ran.code == 0:
            path = self.directory / "out"
            path.write_bytes(ran.out)
            if not self.oracle.is_right(self.scenario.targets["out"], ran.out, path):
                yield "exit code 0, and another disk was sent"
            path.unlink()
        yield from self._leftovers(ran.state, "sent")

    def _asked(self, ran: Ran) -> Iterator[str]:
        yield from self._kept(ran.state)
        yield from self._leftovers(ran.state, "asked")
        if ran.code in self.scenario.shown and not ran.err and not self.scenario.answers(ran.out, self.usual.out):
            yield f"another answer: {_difference(ran.out, self.usual.out)}"
        if ran.code == 0 and 0 not in self.scenario.shown:
            yield "exit code 0, which is no answer here"
        if ran.code == 1 and "vmconv: " in ran.err and self.scenario.argv[0] in ("compare", "prove"):
            yield "exit code 1, which means different, for an error"

    def _served(self, ran: Ran) -> Iterator[str]:
        yield from self._kept(ran.state)
        yield from self._leftovers(ran.state, "served")
        if ran.code == 99:
            yield "other bytes were served"


def _said(ran: Ran, scenario: Scenario) -> Iterator[str]:
    if re.search(r"Traceback|Exception|failed with [A-Z]", ran.err):
        last = [line for line in ran.err.strip().splitlines() if line.strip()][-1]
        yield f"a traceback: {last}"
        return
    lines = [line for line in ran.err.splitlines() if not line.startswith(("warning: ", "  hint: "))]
    # The report of `check` says what it could not look at, and where a file ends that is read as if it were cut off.
    said = ("Not checked: ", "ERROR ")
    lines += [f"vmconv: {line}" for line in ran.out.decode(errors="replace").splitlines() if line.startswith(said)]
    if ran.code > 0 and scenario.kind != "serve" and ran.code not in scenario.shown[scenario.kind != "ask" :]:
        if not lines:
            # The reader of a stream that has gone knows it.
            if not (scenario.name.startswith("stream") and ran.broken_pipe):
                yield f"exit code {ran.code}, and nothing is said"
        elif len(lines) > 1:
            yield f"{len(lines)} lines of error"
        elif not re.match(r"vmconv: .*(/|d\.|o\.|top\.|base\.|standard output|socket)", lines[0]):
            yield f"no file is named: {lines[0]}"
        elif re.search(r"\[Errno|None$", lines[0]):
            yield f"an error of Python: {lines[0]}"


def _difference(one: bytes, other: bytes) -> str:
    mine, usual = one.decode(errors="replace").splitlines(), other.decode(errors="replace").splitlines()
    for left, right in zip(mine, usual, strict=False):
        if left != right:
            return f"{left!r} where {right!r} is usual"
    return f"{len(mine)} lines where {len(usual)} are usual"
