"""The guides of running nodes: each command in them is run, in a network of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from vmconv_fleet.testing import PATIENCE, Network

ROOT = Path(__file__).parents[2]
GUIDES = [page for page in sorted(ROOT.glob("docs/**/*.md")) if "\n<!-- two nodes:" in page.read_text()]


def commands_of(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields each command of a guide with the lines that it prints; `...` stands for any."""
    for block in re.findall(r"^```console\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *output = part.splitlines()
            yield command, output


@pytest.fixture
def machine(network: Callable[[int], Network]) -> Iterator[list[str]]:
    """Returns the prefix of commands that see no network but their own; their processes are ended afterwards."""
    prefix = network(1).prefix(0)
    yield prefix
    listed = subprocess.run(["ip", "netns", "pids", prefix[-1]], capture_output=True, text=True, check=True)
    for process in map(int, listed.stdout.split()):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_the_commands_of_a_guide_do_what_it_says(page: Path, machine: list[str], xfs_dir: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("VMCONV_NODE", None)
    for command, output in commands_of(page):
        with open(xfs_dir / "printed", "w+", encoding="utf-8") as printed:
            done = subprocess.run(
                [*machine, "bash", "-c", command],
                cwd=xfs_dir,
                env=environment,
                stdout=printed,
                stderr=subprocess.STDOUT,
                timeout=PATIENCE,
                check=False,
            )
            printed.seek(0)
            said = printed.read()
        assert done.returncode == 0, f"$ {command}\n{said}"
        assert output == ["..."] or said.splitlines() == output, f"$ {command}\n{said}"


def test_there_is_a_guide_whose_commands_are_run() -> None:
    assert any(len(list(commands_of(page))) > 20 for page in GUIDES)
