"""Fleets of real nodes for the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fleet.desk import Desk, enter, seated
from support.requirements import missing
from vmconv_fleet.config import NodeConfig
from vmconv_fleet.testing import Driven, Lab, Network, why_no_namespaces


@pytest.fixture
def desk(tmp_path: Path, browser: Any) -> Iterator[Desk]:
    """A browser before the console of a node."""
    with seated(tmp_path, browser) as made:
        yield made


@pytest.fixture
def entered(desk: Desk) -> Desk:
    """The desk of an administrator, who may do everything."""
    enter(desk, "admin")
    return desk


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A fleet without nodes, below a directory of its own."""
    return Lab(str(tmp_path))


@pytest.fixture
def drive() -> Iterator[Callable[..., Driven]]:
    """Runs a node in a process of its own, which is killed after the test if it still runs."""
    running: list[Driven] = []

    def run(config: NodeConfig, **options: Any) -> Driven:
        driven = Driven(config, **options)
        running.append(driven)
        driven.answer()
        return driven

    yield run
    for driven in running:
        driven.kill()


@pytest.fixture
def network() -> Iterator[Callable[[int], Network]]:
    """Makes networks of some machines, removed after the test."""
    if (reason := why_no_namespaces()) is not None:
        missing("namespaces", reason)
    made: list[Network] = []

    def make(size: int) -> Network:
        made.append(Network(size))
        return made[-1]

    yield make
    for one in made:
        one.close()
