"""`pytest tests/formats/qcow2` runs all tests of qcow2: also those in `shared` that run for each format."""

from __future__ import annotations

import pytest

from support.times import FORMATS, SHARED, format_of


def _chosen(config: pytest.Config) -> set[str]:
    """Returns the formats whose folders are named on the command line."""
    named = [(config.invocation_params.dir / argument).resolve() for argument in config.args]
    return {path.name for path in named if path.parent == FORMATS and path != SHARED and path.is_dir()}


def pytest_configure(config: pytest.Config) -> None:
    if _chosen(config) and str(SHARED) not in config.args:
        config.args.append(str(SHARED))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = _chosen(config)
    if not chosen or SHARED in [config.invocation_params.dir / argument for argument in config.invocation_params.args]:
        return
    others = [item for item in items if SHARED in item.path.parents and format_of(item) not in chosen]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in set(others)]
