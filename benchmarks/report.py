"""What is printed and what is written as json: tables, expectations and the machine they were measured on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from measure import Measured

_MIB = 1 << 20
_TIMES = ("min", "median", "max", "durable", "inside", "cpu")
_COLUMNS = ("", "runs", *_TIMES, "peak", "rchar", "wchar", "written", "factor")


@dataclass(frozen=True)
class Expectation:
    """A figure and what it should be: `value` at most `limit`, or at least where `at_least`."""

    case: str
    place: str
    text: str
    value: float
    limit: float
    unit: str
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def line(self) -> str:
        relation = ">=" if self.at_least else "<="
        verdict = "met" if self.met else "NOT MET"
        return f"{verdict:<8}{self.value:>9.3f} {self.unit:<4} {relation} {self.limit:g}  {self.text}"


def print_measured(measured: Measured) -> None:
    """Prints programs side by side: medians (but min, max), in seconds and MiB, and as a factor of the first."""
    print(f"\n{measured.case} ({measured.place}): {measured.title}")
    first = next(iter(measured.samples))
    rows = [_COLUMNS, *(_row(measured, name, first) for name in measured.samples)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  " + "  ".join(cells))
    sys.stdout.flush()


def _row(measured: Measured, name: str, first: str) -> tuple[str, ...]:
    seconds = measured.figures(name)
    inside = [sample.inner for sample in measured.samples[name] if sample.inner is not None]
    return (
        name,
        str(len(seconds)),
        f"{min(seconds):.3f}",
        f"{measured.median(name):.3f}",
        f"{max(seconds):.3f}",
        f"{measured.median(name, 'durable'):.3f}",
        f"{measured.median(name, 'inner'):.4f}" if inside else "-",
        f"{measured.median(name, 'processor'):.2f}",
        f"{max(measured.figures(name, 'peak')) / _MIB:.0f}",
        *(f"{measured.median(name, figure) / _MIB:.1f}" for figure in ("rchar", "wchar", "write_bytes")),
        f"{measured.median(name) / measured.median(first):.2f}",
    )


def print_expectations(expectations: list[Expectation], *, quick: bool) -> None:
    print(f"\nExpectations{' (made for full sizes; this was a quick run)' if quick else ''}")
    case = None
    for expectation in expectations:
        if (expectation.case, expectation.place) != case:
            case = (expectation.case, expectation.place)
            print(f" {expectation.case} ({expectation.place})")
        print(f"  {expectation.line()}")
    print(f"{sum(e.met for e in expectations)} of {len(expectations)} met")


def machine() -> dict[str, Any]:
    """Returns what the figures depend on."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("vmconv", "vmconv-raw", "vmconv-qcow2", "numpy", "isal")},
        "qemu-img": _first_line("qemu-img", "--version"),
        "xfsprogs": _first_line("mkfs.xfs", "-V"),
        "btrfs-progs": _first_line("mkfs.btrfs", "--version"),
    }


def write_json(path: str, facts: dict[str, Any], results: list[Measured], expectations: list[Expectation]) -> None:
    """Writes everything that was measured, each run of it."""
    document = {
        **facts,
        "results": [asdict(measured) for measured in results],
        "expectations": [{**asdict(expectation), "met": expectation.met} for expectation in expectations],
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
        file.write("\n")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return (done.stdout or done.stderr).partition("\n")[0]
