"""What a killed test run leaves behind is removed by the next run, and nothing of a living run is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.mounts import Mounts
from support.session import Run

TESTS = Path(__file__).parents[1]

CHILD = """
import sys
from pathlib import Path
from support.mounts import Mounts
from support.session import Run

run = Run(Path(sys.argv[1]))
(run.state / "file").write_bytes(b"of the run")
if sys.argv[2] == "mounted":
    Mounts(run.directory).get("ext4")
print(run.directory, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another run, in a process of its own, and its directory."""
    how = getattr(request, "param", "plain")
    command = [sys.executable, "-c", CHILD, str(tmp_path), how]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, text=True, env=environment, stdin=pipe, stdout=pipe) as process:
        assert process.stdout
        yield process, Path(process.stdout.readline().strip())
        process.kill()


@pytest.mark.parametrize("other", ["plain", "mounted"], indirect=True)
def test_a_killed_run_is_removed_and_a_living_one_is_not(
    mounts: Mounts, tmp_path: Path, other: tuple[subprocess.Popen[str], Path], request: pytest.FixtureRequest
) -> None:
    process, directory = other
    is_mounted = "mounted" in request.node.name
    if is_mounted:
        mounts.get("ext4")
    assert is_mounted == os.path.ismount(directory / "ext4")
    Run(tmp_path).end()
    assert (directory / "state/file").exists()
    assert is_mounted == os.path.ismount(directory / "ext4")
    process.kill()
    process.wait()
    Run(tmp_path).end()
    assert not list(tmp_path.iterdir())


def test_a_directory_of_something_else_is_kept(tmp_path: Path) -> None:
    (tmp_path / "vmconv-tests-without-a-lock").mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "lock").touch()
    (tmp_path / "vmconv-tests-link").symlink_to(outside)
    Run(tmp_path).end()
    assert {path.name for path in tmp_path.iterdir()} == {"vmconv-tests-without-a-lock", "vmconv-tests-link", "outside"}
