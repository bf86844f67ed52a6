"""Some executions of every target of tests/fuzz, and again what fuzzing has found."""

from __future__ import annotations

import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fuzz import run
from fuzz.targets import targets
from support.requirements import missing
from vmconv.testing.malformed import memory_limit, time_limit

RUNS = 400
"""Executions of each target. By hand: `python tests/fuzz/run.py TARGET --seconds 3600`."""

FOUND: list[tuple[str, str]] = [
    # A control character in the name of the guest system.
    ("machine-vmx", b'virtualHW.version = "19"\nguestOS = "debian\x0012-64"\n'.hex()),
]
"""Targets, and inputs in hexadecimal for which something else than an error of vmconv's came out."""


@pytest.mark.slow
def test_nothing_but_our_own_errors_comes_out(tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        missing("fuzz", "atheris is not installed")

    def tried(name: str) -> tuple[int, int, str]:
        return run.run(name, run.Limit(runs=RUNS), 1, tmp_path / f"corpus-{name}", tmp_path / "findings")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = dict(zip(targets(), pool.map(tried, targets()), strict=True))
    for name, (executions, found, said) in results.items():
        assert not found, said[-20_000:]
        assert executions >= RUNS, name


def test_earlier_findings_stay_fixed() -> None:
    for name, data in FOUND:
        with memory_limit(), time_limit():
            targets()[name].run(bytes.fromhex(data))


@pytest.mark.parametrize("name", targets())
def test_seeds_are_read(name: str) -> None:
    seeds = targets()[name].seeds()
    assert seeds
    for data in seeds:
        with memory_limit(), time_limit():
            targets()[name].run(data)
