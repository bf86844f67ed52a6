"""Fixtures of the tests of packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.wheels import DISTRIBUTIONS


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel of each distribution, by the name of its folder."""
    directory = tmp_path_factory.mktemp("wheels")
    built = {}
    for path in DISTRIBUTIONS:
        out = directory / path.name
        # This environment has hatchling and no other backend.
        command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(out), str(path)]
        subprocess.run(command, check=True, capture_output=True)
        (built[path.name],) = out.glob("*.whl")
    return built
