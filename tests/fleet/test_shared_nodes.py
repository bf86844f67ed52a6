"""Two nodes in processes of their own, each on a machine of its own and on its own mount of one volume of JuiceFS.

Both convert the disks of one of them. Meanwhile a node or a mount is killed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.disks import MIB, make_disk
from support.domains import SHOP
from support.juicefs import Volume
from support.requirements import oracle_program
from vmconv_fleet import config as settings
from vmconv_fleet.catalogue.sharing import FILE
from vmconv_fleet.cli.client import NodeClient
from vmconv_fleet.testing import PATIENCE, Driven, Lab, Network, wait_until
from vmconv_fleet.testing.process import DRIVER

MOUNTS = ("one", "other")
OWNER, APPOINTED = 0, 1
GATED = str(Path(__file__).with_name("gated_node.py"))


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Volume]:
    made = Volume(tmp_path_factory.mktemp("juicefs"), "redis")
    try:
        for name in MOUNTS:
            made.mount(name)
        yield made
    finally:
        made.close()


class Pair:
    """Two nodes with a datastore `ds`, of which the first is the owner and the second is appointed.

    Each sees its mount of the volume `at` this path, or where it is.
    """

    def __init__(
        self, lab: Lab, network: Network, drive: Callable[..., Driven], volume: Volume, at: Path | None = None
    ) -> None:
        self.volume = volume
        self._drive = drive
        self._prefixes = []
        for number, mount in enumerate(MOUNTS):
            # Not `ip netns exec`: a mount that is made later would not be seen.
            prefix, path = ["nsenter", f"--net=/run/netns/{network.prefix(number)[-1]}"], volume.mounts[mount]
            if at:
                bind = ["sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', str(path), str(at)]
                prefix, path = [*prefix, "unshare", "--mount", *bind], at
            self._prefixes.append(prefix)
            connect = [f"{network.address(0)}:7447"] if number else []
            made = lab.add(host=network.address(number), port=7447, connect=connect)
            settings.save(replace(made, datastores={"ds": str(path / "images")}))
        self.configs = [settings.load(one.directory) for one in lab.nodes]
        self.nodes: list[Driven] = []
        for number in (OWNER, APPOINTED):
            self.nodes.append(self._run(number))
            wait_until(lambda: self.datastore(OWNER, OWNER).get("owner"), PATIENCE, "the first owns the storage")

    @property
    def folder(self) -> Path:
        return self.volume.mounts["one"] / "images"

    def _run(self, number: int, *gated: str) -> Driven:
        return self._drive(
            self.configs[number], prefix=self._prefixes[number], program=(GATED, *gated) if gated else DRIVER
        )

    def id(self, number: int) -> str:
        return self.configs[number].node

    def get(self, number: int, path: str) -> list[dict[str, Any]]:
        """Returns all records of a list, as a node knows them."""
        with NodeClient(self.configs[number].directory) as client:
            return client.everything(path)

    def datastore(self, number: int, of: int) -> dict[str, Any]:
        found = [one["body"] for one in self.get(number, "/api/v1/datastores") if one["owner"] == self.id(of)]
        return found[0] if found else {}

    def fleet(self, number: int, *arguments: str, code: int = 0) -> str:
        """Runs a command on a node, and returns what it prints."""
        command = [sys.executable, "-m", "vmconv", "fleet", *arguments, "--node", self.configs[number].directory]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def appoint(self) -> None:
        self.fleet(OWNER, "datastore", "appoint", "ds", "--nodes", "node1")
        wait_until(lambda: self.datastore(APPOINTED, OWNER).get("converters"), PATIENCE, "the other one knows it")

    def see(self, *names: str) -> None:
        """Makes disks, and waits until both nodes list them."""
        for name in names:
            make_disk(self.folder / name, 4 * MIB)
        self.fleet(OWNER, "scan")
        for number in (OWNER, APPOINTED):
            wait_until(lambda: {*names} <= {*self.disks(number)}, PATIENCE, "the disks are listed")  # noqa: B023

    def disks(self, number: int) -> dict[str, str]:
        """Returns the ids of the owner's disks by their names."""
        return {one["body"]["name"]: one["id"] for one in self.get(number, "/api/v1/disks")}

    def convert(self, number: int, name: str, job: str) -> None:
        """Asks a node for the conversion of a disk of the owner's."""
        of = {} if number == OWNER else {"of": self.id(OWNER)}
        arguments = {"disk": self.disks(number)[name], "format": "qcow2", "job": job, **of}
        answer = self.nodes[number].ask("request", target=self.id(number), verb="convert", arguments=arguments)
        assert answer["ok"], answer

    def ended(self, number: int, job: str) -> dict[str, Any]:
        """Returns a job of a node once it has ended."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            jobs = [one for one in self.get(number, "/api/v1/jobs") if one["owner"] == self.id(number)]
            found[:] = [one["body"] for one in jobs if one["id"] == job and one["body"].get("ended_ms")]
            return bool(found)

        wait_until(look, PATIENCE, f"job {job} ends")
        return found[0]

    def gate(self, number: int) -> Path:
        """Starts a node again, so that its next worker stops before its file has its name; returns where it says so."""
        pipe = Path(self.configs[number].directory) / "pipe"
        os.mkfifo(pipe)
        os.mkfifo(f"{pipe}.go")
        self.nodes[number].end()
        self.nodes[number] = self._run(number, "begun", str(pipe))
        return pipe

    def kill(self, number: int, *, workers: bool) -> None:
        """Kills a node as the kernel would, or with its workers as a power failure would."""
        node = self.nodes[number]
        if workers:
            # It must not see that they end.
            node.signal(signal.SIGSTOP)
            for listed in Path(f"/proc/{node.process.pid}/task").glob("*/children"):
                for process in listed.read_text().split():
                    os.kill(int(process), signal.SIGKILL)
        node.kill()

    def restart(self, number: int) -> None:
        self.nodes[number] = self._run(number)

    def names(self) -> set[str]:
        """Returns the names in the directory, without the note of the owner."""
        return {*os.listdir(self.folder)} - {FILE}

    def is_whole(self, source: str) -> bool:
        """Compares a target with its source by QEMU, on the other mount."""
        folder = self.volume.mounts["other"] / "images"
        target = (folder / source).with_suffix(".qcow2")
        command = [oracle_program("qemu-img"), "compare", "-f", "raw", "-F", "qcow2"]
        return subprocess.run([*command, folder / source, target], check=False, capture_output=True).returncode == 0


@pytest.fixture
def folder(volume: Volume) -> Iterator[Path]:
    """An empty directory of the volume."""
    made = volume.mounts["one"] / "images"
    made.mkdir()
    yield made
    shutil.rmtree(made)


@pytest.fixture
def pair(
    lab: Lab, network: Callable[[int], Network], drive: Callable[..., Driven], volume: Volume, folder: Path
) -> Pair:
    return Pair(lab, network(2), drive, volume)


def test_conversions_of_many_disks_are_spread_and_copy_nothing(pair: Pair) -> None:
    names = [f"{number}.raw" for number in range(8)]
    pair.see(*names)
    pair.appoint()
    before = pair.volume.names()
    said = pair.fleet(
        OWNER, "convert", "--select", "datastore=ds", "--to", "qcow2", "--yes", "--follow", "--output", "json"
    )
    results = [one["result"] for one in json.loads(said)]
    assert [(one["state"], one["plan"]["backend"], one["plan"]["copied"]) for one in results] == [
        ("done", "juicefs", 0)
    ] * len(names)
    assert pair.volume.added(before) < len(names) * MIB
    jobs = [one["owner"] for one in pair.get(OWNER, "/api/v1/jobs")]
    assert (jobs.count(pair.id(OWNER)), jobs.count(pair.id(APPOINTED))) == (4, 4)
    assert pair.names() == {*names, *(f"{number}.qcow2" for number in range(8))}
    assert all(pair.is_whole(name) for name in names)


@pytest.mark.parametrize("workers", [False, True], ids=["node", "node and worker"])
@pytest.mark.parametrize("killed", [OWNER, APPOINTED], ids=["owner", "appointed"])
def test_a_killed_node_ends_its_job_later_while_the_other_one_goes_on(pair: Pair, killed: int, workers: bool) -> None:
    other = 1 - killed
    pair.see("a.raw", "b.raw")
    pair.appoint()
    pipe = pair.gate(killed)
    pair.convert(killed, "a.raw", "first")
    assert pipe.read_text() == "here\n"
    # What is being made has a temporary name there.
    assert {name for name in pair.names() if not name.startswith(".vmconv-")} == {"a.raw", "b.raw"}
    pair.kill(killed, workers=workers)
    pair.convert(other, "b.raw", "second")
    assert pair.ended(other, "second")["state"] == "done"
    pair.restart(killed)
    body = pair.ended(killed, "first")
    assert (body["state"], body["attempts"], body["plan"]["copied"]) == ("done", 2, 0)
    assert pair.names() == {"a.raw", "a.qcow2", "b.raw", "b.qcow2"}
    assert pair.is_whole("a.raw")
    assert pair.is_whole("b.raw")


def test_without_its_mount_a_node_fails_its_job_and_with_it_converts_again(pair: Pair) -> None:
    pair.see("a.raw", "b.raw")
    pair.appoint()
    pipe = pair.gate(APPOINTED)
    pair.convert(APPOINTED, "a.raw", "first")
    assert pipe.read_text() == "here\n"
    pair.volume.kill("other")
    Path(f"{pipe}.go").write_text("")
    body = pair.ended(APPOINTED, "first")
    assert (body["state"], body["hint"]) == ("failed", "what serves this mount has ended: mount it again")
    assert "Transport endpoint is not connected" in body["error"]
    pair.convert(OWNER, "b.raw", "meanwhile")
    assert pair.ended(OWNER, "meanwhile")["state"] == "done"
    assert not (pair.folder / "a.qcow2").exists()
    pair.volume.unmount("other")
    pair.volume.mount("other")
    pair.convert(APPOINTED, "a.raw", "again")
    assert pipe.read_text() == "here\n"
    Path(f"{pipe}.go").write_text("")
    assert pair.ended(APPOINTED, "again")["state"] == "done"
    assert pair.is_whole("a.raw")


def test_a_job_stays_in_its_directory_and_is_finished_when_its_appointment_ends(pair: Pair) -> None:
    """The directory is renamed from the other mount, and another one gets its name."""
    pair.see("a.raw")
    pair.appoint()
    pipe = pair.gate(APPOINTED)
    pair.convert(APPOINTED, "a.raw", "first")
    assert pipe.read_text() == "here\n"
    pair.fleet(OWNER, "datastore", "appoint", "ds", "--nodes", "none")
    moved = pair.folder.rename(pair.folder.with_name("moved"))
    pair.folder.mkdir()
    try:
        Path(f"{pipe}.go").write_text("")
        body = pair.ended(APPOINTED, "first")
        assert body["state"] == "done", body
        assert pair.names() == set()
        assert {*os.listdir(moved)} - {FILE} == {"a.raw", "a.qcow2"}
    finally:
        shutil.rmtree(pair.folder)
        moved.rename(pair.folder)
    assert pair.is_whole("a.raw")
    wait_until(lambda: not pair.datastore(APPOINTED, OWNER).get("converters"), PATIENCE, "the other one knows it")
    again = pair.nodes[APPOINTED].ask(
        "request",
        target=pair.id(APPOINTED),
        verb="convert",
        arguments={"disk": pair.disks(APPOINTED)["a.raw"], "format": "vhdx", "of": pair.id(OWNER)},
    )
    assert "has not appointed this node" in again["reason"]


def test_machines_are_spread_where_the_storage_has_one_path(
    lab: Lab,
    network: Callable[[int], Network],
    drive: Callable[..., Driven],
    volume: Volume,
    folder: Path,
    tmp_path: Path,
) -> None:
    at = tmp_path / "volume"
    at.mkdir()
    pair = Pair(lab, network(2), drive, volume, at)
    names = ["one", "two", "three", "four"]
    for name in names:
        make_disk(folder / f"{name}.raw", 4 * MIB)
        # As libvirt writes it: with the path from the root.
        (folder / f"{name}.xml").write_text(SHOP.format(disk=at / "images" / f"{name}.raw"))
    pair.fleet(OWNER, "scan")
    for number in (OWNER, APPOINTED):
        wait_until(lambda: len(pair.get(number, "/api/v1/vms")) == len(names), PATIENCE, "the machines are listed")  # noqa: B023
    pair.appoint()
    before = volume.names()
    said = pair.fleet(
        OWNER, "convert", "--select", "datastore=ds", "-O", "vmx", "--yes", "--follow", "--output", "json"
    )
    results = [one["result"] for one in json.loads(said)]
    assert [(one["state"], one["plan"]["copied"]) for one in results] == [("done", 0)] * len(names)
    assert volume.added(before) < len(names) * MIB
    jobs = [one["owner"] for one in pair.get(OWNER, "/api/v1/jobs")]
    assert (jobs.count(pair.id(OWNER)), jobs.count(pair.id(APPOINTED))) == (2, 2)
    made = {f"{name}.vmx": ["shop-disk1.vmdk", "shop.vmx"] for name in names}
    assert {path.name: sorted(os.listdir(path)) for path in folder.glob("*.vmx")} == made
    # The owner lists those that the other one has made.
    wait_until(lambda: len(pair.get(OWNER, "/api/v1/vms")) == 2 * len(names), PATIENCE, "the new machines are listed")
