"""Machines in a backup repository, read through the mounts of restic and Borg, before anything is restored."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import vmconv
from support.disks import MIB, QemuImg, qemu_io
from support.mounting import PATIENCE, mounted
from support.requirements import missing, oracle_program

PAYLOAD = 64 * MIB
SIZE = 10 << 30
METADATA = PAYLOAD // 2
"""More than a repository has to read for the tables of the images, and less than their payload.

Tables lie at up to four places. The programs read whole chunks, of at most 8 MiB; where they end depends on the content
and on the repository.
"""


class Repository:
    """A mounted repository: `machine` is the directory of the backed-up machine in it."""

    def __init__(self, process: subprocess.Popen[bytes], machine: Path) -> None:
        self._process = process
        self.machine = machine

    def bytes_read(self) -> int:
        """Returns what the program of the mount has read and received so far."""
        fields = dict(line.split(": ") for line in Path(f"/proc/{self._process.pid}/io").read_text().splitlines())
        return int(fields["rchar"])


@pytest.fixture
def machine(tmp_path: Path, qemu_img: QemuImg) -> Path:
    """A machine with 10 GiB for its guest, 65 MiB of them written, on two layers."""
    directory = tmp_path / "vm"
    directory.mkdir()
    base, top, noise = directory / "base.qcow2", directory / "top.qcow2", tmp_path / "noise"
    noise.write_bytes(os.urandom(PAYLOAD))
    qemu_img("create", "-f", "qcow2", base, str(SIZE))
    qemu_io(base, f"write -q -s {noise} 1G {PAYLOAD}")
    qemu_img("create", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top)
    qemu_io(top, "write -q -P 7 1G 1M", "write -q -P 8 9G 512")
    return directory


@contextlib.contextmanager
def _mounted(command: list[str], environment: Mapping[str, str], point: Path, found: str) -> Iterator[Repository]:
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + PATIENCE
            while not os.path.ismount(point):
                assert process.poll() is None, command
                assert time.monotonic() < until
                time.sleep(0.05)
            yield Repository(process, next(point.glob(found)).parent)
        finally:
            subprocess.run(["fusermount3", "-u", "-z", str(point)], check=True)
            process.wait(PATIENCE)


@contextlib.contextmanager
def restic(machine: Path, point: Path) -> Iterator[Repository]:
    environment = {**os.environ, "RESTIC_PASSWORD": "secret", "HOME": str(machine.parent)}
    program = [oracle_program("restic"), "-r", str(machine.parent / "repository"), "--no-cache"]
    for command in (["init"], ["backup", machine.name]):
        done = [*program, *command]
        subprocess.run(done, env=environment, cwd=machine.parent, check=True, capture_output=True)
    with _mounted([*program, "mount", str(point)], environment, point, "snapshots/latest/vm/top.qcow2") as repository:
        yield repository


@contextlib.contextmanager
def borg(machine: Path, point: Path) -> Iterator[Repository]:
    allowed = "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK"
    environment = {**os.environ, allowed: "yes", "HOME": str(machine.parent)}
    program, repository = oracle_program("borg"), str(machine.parent / "repository")
    for command in (["init", "-e", "none", repository], ["create", f"{repository}::first", machine.name]):
        done = [program, *command]
        subprocess.run(done, env=environment, cwd=machine.parent, check=True, capture_output=True)
    command = [program, "mount", "-f", f"{repository}::first", str(point)]
    with _mounted(command, environment, point, "vm/top.qcow2") as mounted_one:
        yield mounted_one


Mounting = Callable[[Path, Path], contextlib.AbstractContextManager[Repository]]


@pytest.fixture(params=[restic, borg], ids=["restic", "borg"])
def repository(request: pytest.FixtureRequest, machine: Path, tmp_path: Path) -> Iterator[Repository]:
    if not (os.path.exists("/dev/fuse") and shutil.which("fusermount3")):
        missing("fuse", "FUSE cannot be used: /dev/fuse or fusermount3 is not there")
    point = tmp_path / "repository.mounted"
    point.mkdir()
    mounting: Mounting = request.param
    with mounting(machine, point) as found:
        yield found


def test_a_machine_is_a_view_in_another_format_before_it_is_restored(
    repository: Repository, machine: Path, point: Path, qemu_img: QemuImg
) -> None:
    before = repository.bytes_read()
    with mounted(repository.machine, point):
        view = point / "top.qcow2" / "vhdx" / "top.vhdx"
        assert "virtual size: 10 GiB" in qemu_img("info", "-f", "vhdx", view).stdout
        assert repository.bytes_read() - before < METADATA
        qemu_img("compare", "-f", "vhdx", "-F", "qcow2", view, machine / "top.qcow2")
        # Else the figure above says nothing.
        assert repository.bytes_read() - before > PAYLOAD


def test_a_reference_reads_no_payload_of_the_repository(
    repository: Repository, machine: Path, qemu_img: QemuImg
) -> None:
    before = repository.bytes_read()
    target = machine.parent / "new.vmdk"
    source, allowed = repository.machine / "top.qcow2", [str(repository.machine)]
    result = vmconv.convert(source, target, options={"subformat": "reference"})
    assert result.totals.copied == 0
    assert repository.bytes_read() - before < METADATA
    assert vmconv.info(target, allow_external=allowed)["virtual-size"] == SIZE
    qemu_img("compare", "-f", "vmdk", "-F", "qcow2", target, machine / "top.qcow2")


def test_an_incremental_chain_is_converted_layer_by_layer(
    repository: Repository, machine: Path, qemu_img: QemuImg
) -> None:
    target = machine.parent / "new.vmdk"
    result = vmconv.convert(repository.machine / "top.qcow2", target, chain=True)
    assert (result.layers, result.totals.shared) == (("base.vmdk",), 0)
    qemu_img("compare", "-f", "vmdk", "-F", "qcow2", target, machine / "top.qcow2")
