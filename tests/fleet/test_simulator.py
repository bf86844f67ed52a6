"""The simulator's seeds that every change has to pass; `sim.py` runs as many as one has time for."""

from __future__ import annotations

from collections import Counter

import pytest

from fleet.sim import simulate

SEEDS = 200
GROUP = 20

_total: Counter[str] = Counter()


@pytest.mark.parametrize("first", range(0, SEEDS, GROUP))
def test_nothing_happens_that_must_never_happen(first: int) -> None:
    for seed in range(first, first + GROUP):
        _total.update(simulate(seed))


def test_everything_was_tried() -> None:
    """A simulator that tries nothing finds nothing; runs after the seeds, on what they have counted."""
    if not _total:
        pytest.skip("no seeds were run before")
    expected = {
        "amnesias",
        "cleanings",
        "clock jumps",
        "clones",
        "clock steps",
        "crashes",
        "crashes in a commit",
        "forged retirements",
        "deletions of request",
        "deletions of response",
        "deletions of transaction",
        "garbled",
        "lost",
        "merges",
        "older databases",
        "partitions",
        "requests",
        "responses",
        "retirements",
        "states",
        "stops",
        "transactions",
        "views checked",
        "withdrawals",
        "writes",
    }
    assert {name for name in expected if _total[name] < _total["seeds"] // 20} == set()


def test_a_seed_is_repeatable() -> None:
    assert simulate(7) == simulate(7)
