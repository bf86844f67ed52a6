"""The environments of the test run: a folder in plugins/ is enough for a new plugin."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("environment", ["all", "fleet", "docs", "lint", "types", "mutation"])
def test_a_new_plugin_is_installed(environment: str, tmp_path: Path) -> None:
    for name in ("tox.ini", "toxfile.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("one", "two"):
        (tmp_path / "plugins" / name).mkdir(parents=True)
        (tmp_path / "plugins" / name / "pyproject.toml").touch()
    command = [sys.executable, "-m", "tox", "config", "-e", environment, "-k", "deps"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(re.findall(r"-e .*plugins/(\w+)$", done.stdout, re.MULTILINE)) == {"one", "two"}
