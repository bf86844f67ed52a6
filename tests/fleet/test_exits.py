"""The daemon ends on a signal in any state; benchmarks/fleet measures how reliably.

A daemon that hangs gives up after 20 s, with another exit code.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vmconv_fleet import config as settings
from vmconv_fleet.node.lock import running
from vmconv_fleet.testing import PATIENCE, Driven, Lab, wait_until

Drive = Callable[..., Driven]


def pair(lab: Lab, drive: Drive) -> tuple[Driven, Driven]:
    """Returns two nodes that are neighbours."""
    first, second = drive(lab.add()), drive(lab.add())
    wait_until(lambda: first.ask("state")["neighbours"] and second.ask("state")["neighbours"], PATIENCE, "neighbours")
    return first, second


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_success(lab: Lab, drive: Drive, number: int) -> None:
    node, _ = pair(lab, drive)
    node.signal(number)
    assert node.process.wait(PATIENCE) == 0, node.log()
    assert running(node.config) is None


def test_an_exception_in_a_thread_ends_it_with_failure(lab: Lab, drive: Drive) -> None:
    node, _ = pair(lab, drive)
    node.tell("fail")
    assert node.process.wait(PATIENCE) == 1, node.log()
    assert "failure on command" in node.log()


def test_it_ends_while_it_writes_and_is_written_to(lab: Lab, drive: Drive) -> None:
    one, other = pair(lab, drive)
    for node in (one, other):
        node.ask("work", every=0.0, targets=[one.config.node, other.config.node])
    wait_until(lambda: one.ask("state")["requests"] > 20, PATIENCE, "work continues")
    one.signal(signal.SIGTERM)
    assert one.process.wait(PATIENCE) == 0, one.log()


def test_it_ends_while_its_neighbour_is_frozen(lab: Lab, drive: Drive) -> None:
    one, other = pair(lab, drive)
    other.signal(signal.SIGSTOP)
    one.tell("write", count=2000, size=2000, batch=10)
    one.signal(signal.SIGTERM)
    assert one.process.wait(PATIENCE) == 0, one.log()


def test_it_stops_while_it_waits_for_a_missing_neighbour(lab: Lab, drive: Drive) -> None:
    """Its database is new and it did not found the fleet: it must not write, and has to end all the same."""
    lab.add()
    node = drive(lab.add(founded=False))
    assert not node.ask("state")["serving"]
    node.signal(signal.SIGTERM)
    assert node.process.wait(PATIENCE) == 0, node.log()


@pytest.mark.parametrize(("order", "code"), [("signal", 0), ("fail", 1)])
def test_it_ends_though_the_session_of_its_links_does_not_close(lab: Lab, drive: Drive, order: str, code: int) -> None:
    node, _ = pair(lab, drive)
    node.ask("stick")
    if order == "signal":
        node.signal(signal.SIGTERM)
    else:
        node.tell("fail")
    assert node.process.wait(PATIENCE) == code, node.log()
    assert "a session of the links open" in node.log()


def test_it_ends_at_once_after_it_began(lab: Lab, drive: Drive) -> None:
    node = drive(lab.add())
    node.signal(signal.SIGTERM)
    node.signal(signal.SIGTERM)
    assert node.process.wait(PATIENCE) == 0, node.log()


def run(directory: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vmconv", "node", "run", "--directory", directory]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_a_start_that_fails_ends_it_with_one_line(lab: Lab) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = replace(lab.add(), api=f"127.0.0.1:{taken.getsockname()[1]}")
        settings.save(config)
        done = run(config.directory)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert lines == [f"vmconv: {config.api}: cannot listen: Address already in use", "  hint: set api in node.toml"]


def test_a_node_runs_once(lab: Lab, drive: Drive) -> None:
    node = drive(lab.add())
    assert running(node.config) == node.process.pid
    done = run(node.config.directory)
    assert done.returncode == 1
    assert f"the node is already running, as process {node.process.pid}" in done.stderr
    assert node.ask("state")["serving"] or node.process.poll() is None


def test_a_directory_without_a_node_is_reported_in_one_line(tmp_path: Path) -> None:
    done = run(str(tmp_path))
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, f"vmconv: {tmp_path}: is not a node")


def test_the_command_line_daemon_says_that_it_runs_and_ends(lab: Lab) -> None:
    config = lab.add()
    command = [sys.executable, "-m", "vmconv", "node", "run", "--directory", config.directory]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == f"node {config.node} runs\n"
            os.kill(process.pid, signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
