"""The guides of running nodes: each command in them is run, in a network of its own."""

from __future__ import annotations

import datetime
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from vmconv_fleet import config as settings
from vmconv_fleet.node.lock import running
from vmconv_fleet.testing import PATIENCE, Network, wait_until
from vmconv_fleet.trust import credentials
from vmconv_fleet.trust.authority import Authority
from vmconv_fleet.trust.identity import Keys

ROOT = Path(__file__).parents[2]
GUIDES = [page for page in sorted(ROOT.glob("docs/**/*.md")) if "\n<!-- two nodes:" in page.read_text()]


_STEP = re.compile(r"^```console\n(.*?)^```$|^<!-- expired: (\S+) (\d+) -->$", re.MULTILINE | re.DOTALL)


def commands_of(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields each command of a guide with the lines that it prints; `...` stands for any.

    `<!-- expired: DIRECTORY DAYS -->` stops a node, whose certificate has expired so many days ago when it runs again.
    """
    for block, directory, days in _STEP.findall(page.read_text()):
        if directory:
            yield f"{shlex.quote(sys.executable)} {shlex.quote(__file__)} n01 {directory} {days}", []
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


def expire(authority: str, directory: str, days: int) -> None:
    """Stops a node, and gives it a certificate that has expired, made by another node that holds the authority."""
    config = settings.load(directory)
    if process := running(config):
        os.kill(process, signal.SIGTERM)
        wait_until(lambda: running(config) is None, PATIENCE, "the node ends")
    keys = Keys.load(config.path("identity"))
    lifetime = datetime.timedelta(days=-days)
    request = keys.request(config.node, config.fleet, list(config.addresses))
    certificate = Authority.load(authority).issue(request, lifetime=lifetime)
    credentials.install(config.directory, keys, certificate)


def test_there_is_a_guide_whose_commands_are_run() -> None:
    assert any(len(list(commands_of(page))) > 20 for page in GUIDES)
    assert sum("vmconv node renew" in command for page in GUIDES for command, _ in commands_of(page)) == 3


if __name__ == "__main__":
    expire(sys.argv[1], sys.argv[2], int(sys.argv[3]))
