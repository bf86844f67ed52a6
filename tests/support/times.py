"""`pytest --times`: a table of the tests' time by room, as processor time and as time on the clock.

Processor time includes that of the programs a test started and waited for. Other processes of the machine hardly change
it, so that rooms can be compared on a busy machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from support.variants import QEMU_NAMES

TESTS = Path(__file__).parents[1]
FORMATS = TESTS / "formats"
SHARED = FORMATS / "shared"
NAMES = {qemu: name for name, qemu in QEMU_NAMES.items()}


def format_of(item: pytest.Item) -> str | None:
    """Returns the format of a test in `formats/shared`: from its mark, else from its parameters."""
    mark = item.get_closest_marker("of_format")
    if mark:
        return str(mark.args[0])
    match getattr(item, "callspec", None) and item.callspec.params:  # type: ignore[attr-defined]
        case {"row": {"format": str(name)}}:
            return name.split("-")[0]
        case {"opinion": ((str(name), _), _)} | {"variant": (str(name), _)} | {"made": (str(name), _)}:
            return name
        case {"name": str(name)}:
            return NAMES.get(name, name)
    return None


def room_of(item: pytest.Item) -> str:
    """Returns the folder that runs a test: `formats/qcow2` also for shared tests of qcow2."""
    if SHARED in item.path.parents:
        return f"formats/{format_of(item) or 'shared'}"
    first, second, *_ = *item.path.relative_to(TESTS).parts, ""
    return f"{first}/{second}" if first == "formats" else first


def _processor_time() -> float:
    """Returns the seconds that this process and those it waited for have used."""
    return sum(os.times()[:4])


class Times:
    """Measures each test, in the process that runs it, and prints the sums, in the process that reports."""

    def __init__(self) -> None:
        self._since = (_processor_time(), time.monotonic())
        self._tests: list[tuple[float, float, str, str]] = []
        """Of each test the processor time, the time on the clock, its room and its name."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._since = (_processor_time(), time.monotonic())
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        if call.when == "teardown":
            processor, clock = self._since
            took = (_processor_time() - processor, time.monotonic() - clock)
            item.user_properties.append(("times", [room_of(item), *took]))
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "teardown":
            return
        for name, value in report.user_properties:
            if name == "times":
                assert isinstance(value, list)
                room, processor, clock = value
                self._tests.append((processor, clock, room, report.nodeid))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        write = terminalreporter.write_line
        write("")
        write(f"{'room':<24} {'tests':>6} {'processor':>10} {'clock':>8}   (seconds, summed over the tests)")
        for room in sorted({room for _, _, room, _ in self._tests}):
            times = [(processor, clock) for processor, clock, of, _ in self._tests if of == room]
            write(f"{room:<24} {len(times):>6} {sum(p for p, _ in times):>10.1f} {sum(c for _, c in times):>8.1f}")
        for processor, clock, _, test in sorted(self._tests, reverse=True)[: config.option.times]:
            write(f"{processor:>8.2f} {clock:>8.2f}  {test}")
