"""The corpus lies beside the project, unless `VMCONV_CORPUS` says where."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def found(requirements: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from support.corpus import CORPUS, ROWS; print(CORPUS, len(ROWS))"
    env = {"PYTHONPATH": str(TESTS), "VMCONV_REQUIRE": requirements, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def test_it_lies_beside_the_project() -> None:
    done = found("")
    assert done.stdout.split()[0] == str(TESTS.parents[1] / "shared" / "corpus"), done.stderr


def test_it_lies_where_the_environment_says(tmp_path: Path) -> None:
    (tmp_path / "expected.tsv").write_text("name\tformat\na.vhd\tvhd-dyn\n")
    assert found("corpus", VMCONV_CORPUS=str(tmp_path)).stdout.split() == [str(tmp_path), "1"]


@pytest.mark.parametrize(("requirements", "ok"), [("", True), ("corpus", False)])
def test_one_that_is_required_is_not_left_out(requirements: str, ok: bool, tmp_path: Path) -> None:
    done = found(requirements, VMCONV_CORPUS=str(tmp_path))
    assert (done.returncode == 0) == ok
    assert ok or "expected.tsv" in done.stderr
