"""A node in a process of its own, driven by commands on standard input, one JSON object per line."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vmconv_fleet.config import NodeConfig
from vmconv_fleet.replication.clock import OFFSET_FILE

PATIENCE = 600.0
"""Seconds that a test waits for an event that comes within seconds on an idle machine."""


DRIVER = ("-m", "vmconv_fleet.testing.driver")


class Driven:
    """A running node. `prefix` goes before the command, to run it in a namespace; `program` is what Python runs."""

    def __init__(
        self,
        config: NodeConfig,
        *,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = DRIVER,
    ) -> None:
        self.config = config
        self.clock = config.path("clock-offset")
        environment = {**os.environ, OFFSET_FILE: self.clock, **(environment or {})}
        command = [*prefix, sys.executable, *program, config.directory]
        self._log = open(config.path("log"), "ab")  # noqa: SIM115 - closed by `end`
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment
        )
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put(None)

    def tell(self, do: str, **arguments: Any) -> None:
        """Sends a command; `answer` returns its result later."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self, timeout: float = PATIENCE) -> dict[str, Any]:
        """Returns the next answer. Fails with the end of the log if the process has ended or is late."""
        try:
            found = self._answers.get(timeout=timeout)
        except queue.Empty:
            found = None
        if found is None or "error" in found:
            raise AssertionError(f"{self.config.name}: {found or 'no answer'}\n{self.log()[-3000:]}")
        return found

    def ask(self, do: str, timeout: float = PATIENCE, **arguments: Any) -> dict[str, Any]:
        self.tell(do, **arguments)
        return self.answer(timeout)

    def log(self) -> str:
        with open(self.config.path("log"), encoding="utf-8", errors="replace") as file:
            return file.read()

    def step_clock(self, milliseconds: int) -> None:
        """Sets the offset of the node's wall clock."""
        with open(self.clock + ".new", "w", encoding="ascii") as file:
            file.write(str(milliseconds))
        os.replace(self.clock + ".new", self.clock)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kills the node, as a power failure would, if it still runs."""
        self.process.kill()
        self._ended(10)

    def end(self, timeout: float = PATIENCE) -> int:
        """Stops the node and returns the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        return self._ended(timeout)

    def _ended(self, timeout: float) -> int:
        code = self.process.wait(timeout)
        self._reader.join(10)
        for pipe in (self.process.stdin, self.process.stdout, self._log):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        return code

    def memory(self) -> int:
        """Returns the resident memory in bytes."""
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as file:
            (line,) = (line for line in file if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024

    def processor_time(self) -> float:
        """Returns the processor time of the node in seconds."""
        with open(f"/proc/{self.process.pid}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_until(condition: Any, timeout: float, what: str) -> float:
    """Returns the seconds until the condition held; fails after `timeout`."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > timeout:
            raise AssertionError(f"not within {timeout:g} s: {what}")
        time.sleep(0.02)
    return time.monotonic() - begin
