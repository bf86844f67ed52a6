"""`vmconv node`, as an administrator uses it: found a fleet, let a node in, look, renew, revoke, leave."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from vmconv_fleet.config import load, save
from vmconv_fleet.testing import PATIENCE, free_port, wait_until


class Machine:
    """A node's directory and the commands that are run on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.process: subprocess.Popen[str] | None = None

    def node(self, action: str, *arguments: str, code: int = 0) -> str:
        """Runs `vmconv node ACTION` and returns what it printed, on the stream that goes with the exit code."""
        command = [sys.executable, "-m", "vmconv", "node", action, "--directory", str(self.directory), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr if code else done.stdout

    def run(self) -> None:
        command = [sys.executable, "-m", "vmconv", "node", "run", "--directory", str(self.directory)]
        with open(self.directory.parent / f"{self.directory.name}.log", "a", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        assert "runs" in self.process.stdout.readline()

    def end(self) -> None:
        if self.process is not None:
            self.process.terminate()
            with self.process:
                assert self.process.wait(30) == 0
            self.process = None

    def status(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.node("status", "--output", "json"))
        return found


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Callable[[str], Machine]]:
    made: list[Machine] = []

    def make(name: str) -> Machine:
        made.append(Machine(tmp_path / name))
        return made[-1]

    yield make
    for one in made:
        one.end()


def ports(*names: str) -> list[str]:
    return [part for name in names for part in (f"--{name}", f"127.0.0.1:{free_port()}")]


LOCAL = ["--address", "127.0.0.1", "--no-api"]


@pytest.fixture
def founder(machine: Callable[[str], Machine], tmp_path: Path) -> Machine:
    """A running node that founded a fleet and declares a datastore."""
    (tmp_path / "images").mkdir()
    first = machine("first")
    first.node(
        "init", *ports("listen", "join"), *LOCAL, "--name", "first", "--fleet", "house", str(tmp_path / "images")
    )
    first.run()
    return first


@pytest.mark.slow
def test_a_node_joins_is_seen_renews_and_leaves(founder: Machine, machine: Callable[[str], Machine]) -> None:
    second = machine("second")
    invitation = founder.node("invite", "--address", "127.0.0.1").strip()
    assert "joined fleet house" in second.node("join", invitation, *ports("listen"), *LOCAL, "--name", "second")
    second.run()
    nodes = founder.status()["node"], second.status()["node"]
    wait_until(lambda: founder.status()["neighbours"] == [nodes[1]], PATIENCE, "the first one has a neighbour")
    wait_until(lambda: second.status()["neighbours"] == [nodes[0]], PATIENCE, "and the second")
    assert second.status()["problems"] == []

    until = second.status()["certificate-until"]
    second.node("renew", "--new-keys")
    assert str(second.status()["certificate-until"]) >= str(until)
    wait_until(lambda: second.status()["neighbours"] == [nodes[0]], PATIENCE, "neighbours with new keys")

    assert "is running" in second.node("leave", code=1)
    second.end()
    assert "has left" in second.node("leave")
    assert not second.directory.exists()
    wait_until(lambda: founder.status()["neighbours"] == [], PATIENCE, "it has gone")


@pytest.mark.slow
def test_a_node_that_dials_nobody_is_dialled_by_the_one_where_it_joined(
    founder: Machine, machine: Callable[[str], Machine]
) -> None:
    """As when strangers hold all places of the founder's port."""
    second = machine("second")
    invitation = founder.node("invite", "--address", "127.0.0.1").strip()
    second.node("join", invitation, *ports("listen"), *LOCAL)
    settings = load(str(second.directory))
    assert settings.connect
    save(replace(settings, connect=[]))
    second.run()
    wait_until(lambda: second.status()["neighbours"] == [founder.status()["node"]], PATIENCE, "it has a link")


@pytest.mark.slow
def test_an_invitation_admits_one_node(founder: Machine, machine: Callable[[str], Machine]) -> None:
    invitation = founder.node("invite", "--address", "127.0.0.1").strip()
    machine("second").node("join", invitation, *ports("listen"), *LOCAL)
    third = machine("third")
    error = third.node("join", invitation, *ports("listen"), *LOCAL, "--name", "third", code=1)
    assert error.splitlines()[0] == "vmconv: refused: the token is unknown or was used before"
    assert list(third.directory.iterdir()) == []


@pytest.mark.slow
def test_the_authority_moves_to_another_node(
    founder: Machine, machine: Callable[[str], Machine], tmp_path: Path
) -> None:
    second, third = machine("second"), machine("third")
    invitation = founder.node("invite", "--address", "127.0.0.1").strip()
    second.node("join", invitation, *ports("listen"), *LOCAL)
    assert "does not hold the fleet's authority" in second.node("invite", code=1)
    founder.node("authority", "export", str(tmp_path / "key"))
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    second.node("authority", "import", str(tmp_path / "key"))
    toml = second.directory / "node.toml"
    toml.write_text(toml.read_text().replace('join = "[::]:7448"', f'join = "127.0.0.1:{free_port()}"'))
    second.run()
    wait_until(lambda: second.status()["neighbours"], PATIENCE, "the second one is in")
    founder.end()
    invitation = second.node("invite", "--address", "127.0.0.1").strip()
    third.node("join", invitation, *ports("listen"), *LOCAL, "--name", "third")
    third.run()
    wait_until(lambda: third.status()["neighbours"], PATIENCE, "the third one is in")


def test_init_refuses_what_makes_no_sense(machine: Callable[[str], Machine], tmp_path: Path) -> None:
    one = machine("one")
    assert "is not a directory" in one.node("init", str(tmp_path / "missing"), code=2)
    assert "is not the name of a fleet" in one.node("init", "--fleet", "a/b", code=2)
    assert "is not the name of a node: it begins with '-'" in one.node("init", "--name=-rf", code=2)
    assert "is not an address" in one.node("init", "--listen", "nowhere", code=2)
    one.node("init", *LOCAL)
    assert "is not empty" in one.node("init", *LOCAL, code=1)


def test_a_lost_authority_is_restored_from_its_backup(machine: Callable[[str], Machine], tmp_path: Path) -> None:
    one, backup = machine("one"), str(tmp_path / "backup")
    one.node("init", *LOCAL, "--name", "one")
    assert "backup of node" in one.node("backup", backup)
    assert "File exists" in one.node("backup", backup, code=1)
    before = one.status()
    assert "is not empty" in one.node("restore", backup, code=1)
    shutil.rmtree(one.directory)
    (tmp_path / "junk").write_bytes(b"no tar")
    assert "is no backup" in one.node("restore", str(tmp_path / "junk"), code=1)
    assert list(one.directory.iterdir()) == []
    assert "is restored" in one.node("restore", backup)
    assert one.status() == before
    assert before["authority"]


@pytest.mark.parametrize("action", ["run", "status", "invite", "renew", "leave"])
def test_an_action_without_a_node_is_one_line_and_a_hint(machine: Callable[[str], Machine], action: str) -> None:
    one = machine("nothing")
    assert one.node(action, code=1).splitlines() == [
        f"vmconv: {one.directory}: is not a node",
        "  hint: vmconv node init creates a fleet, vmconv node join joins one",
    ]


def test_the_node_with_the_authority_does_not_just_leave(machine: Callable[[str], Machine]) -> None:
    one = machine("one")
    one.node("init", *LOCAL)
    assert "holds the fleet's authority" in one.node("leave", code=1)
    one.node("leave", "--force")
    assert not one.directory.exists()


def test_revoking_an_unknown_node_is_refused_by_name(founder: Machine) -> None:
    error = founder.node("revoke", "f" * 32, code=1)
    assert error.splitlines()[0] == f"vmconv: no node '{'f' * 32}'"


@pytest.mark.slow
def test_one_key_of_a_node_is_revoked(founder: Machine) -> None:
    (old,) = json.loads(founder.node("keys", "--output", "json"))
    assert (old["name"], old["state"]) == ("first", "in use")
    assert f"this node signs with key {old['key']}" in founder.node("revoke", "first", "--key", old["key"], code=1)
    assert "has no key nosuch" in founder.node("revoke", "first", "--key", "nosuch", code=1)
    founder.node("renew", "--new-keys")

    def states() -> dict[str, str]:
        return {one["key"]: one["state"] for one in json.loads(founder.node("keys", "first", "--output", "json"))}

    wait_until(lambda: states()[old["key"]] == "unused", PATIENCE, "it signs with the new key")
    assert "is revoked" in founder.node("revoke", "first", "--key", old["key"])
    assert sorted(states().values()) == ["in use", "revoked"]
    assert any(old["key"] in line and "revoked" in line for line in founder.node("keys").splitlines())
    assert founder.status()["process"]


def test_revoking_needs_a_running_node(machine: Callable[[str], Machine]) -> None:
    one = machine("one")
    one.node("init", *LOCAL)
    assert f"{one.directory}: no node runs here" in one.node("revoke", "f" * 32, code=1)


def test_a_node_sends_its_events_and_reports_a_webhook_that_fails(
    machine: Callable[[str], Machine], tmp_path: Path
) -> None:
    one = machine("n01")
    (tmp_path / "images").mkdir()
    one.node("init", str(tmp_path / "images"), "--no-api", "--fleet", "f", "--name", "n01")
    settings = one.directory / "node.toml"
    more = f'syslog = "{tmp_path / "log"}"\nwebhook_networks = ["127.0.0.0/8"]\n'
    settings.write_text(settings.read_text().replace('syslog = ""\n', "").replace("webhook_networks = []\n", more))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log, socket.create_server(("127.0.0.1", 0)) as nobody:
        log.bind(str(tmp_path / "log"))
        log.settimeout(PATIENCE)
        one.run()
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/"
        nobody.close()
        fleet(one, "webhook", "add", url, "--events", "transaction.*", "--allow-http")
        assert b"webhook-add" in next(text for text in iter(lambda: log.recv(1 << 16), b"") if b"transaction." in text)
        assert "no problems" in fleet(one, "doctor")
        fleet(one, "scan")
        wait_until(lambda: "webhook" in fleet(one, "doctor", code=None), PATIENCE, "the doctor shows the webhook")
        assert "the last time with: Connection refused" in fleet(one, "doctor", code=1)
    one.end()
    settings.write_text(settings.read_text().replace(str(tmp_path / "log"), "nonsense"))
    assert "setting 'syslog': 'nonsense' is not /dev/log" in one.node("run", code=1)


def fleet(machine: Machine, *arguments: str, code: int | None = 0) -> str:
    """Runs `vmconv fleet` on the machine's node and returns what it printed."""
    command = [sys.executable, "-m", "vmconv", "fleet", *arguments, "--node", str(machine.directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert code in (None, done.returncode), done.stdout + done.stderr
    return done.stdout
