"""Each machine format to each other one: the same disks, and the fields that both carry."""

from __future__ import annotations

from pathlib import Path

import pytest

import vmconv
from support.disks import MIB, make_disk
from support.hyperv_storage import configuration_beside
from support.toy_machines import machine
from vmconv.io.registry import installed_machines
from vmconv.machine import Machine, stated
from vmconv.testing import image_file

MACHINES = installed_machines().machines
SOURCES = sorted(name for name, one in MACHINES.items() if one.can_read and one.can_write)
TARGETS = sorted(name for name, one in MACHINES.items() if one.can_write)

NOT_READ = {"hyperv": configuration_beside}
"""Formats that do not read what they write, and a maker of what they read, beside the disks."""

WEB = {
    "name": "web",
    "description": "the shop, 2 lines\nand <this>",
    "os": {"id": "debian12", "architecture": "x86_64"},
    "cpu": {"count": 4, "sockets": 2, "cores": 2, "threads": 1},
    "memory": {"size": 2048 * MIB},
    "firmware": {"kind": "uefi", "secure_boot": False},
    "identity": {"uuid": "421f245c-7fa8-60fa-1122-334455667788"},
    "controllers": [{"bus": "sata", "index": 0}],
    "disks": [
        {"file": "system.raw", "bus": "sata", "controller": 0, "unit": 0},
        {"file": "data.qcow2", "bus": "sata", "controller": 0, "unit": 1},
    ],
    "nics": [{"mac": "00:50:56:01:02:03", "mac_origin": "static", "model": "e1000"}],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the same machine in each format that can be read."""
    return tmp_path_factory.mktemp("machines")


def source(sources: Path, name: str, toys: object) -> Path:
    """Returns the configuration of the machine in a format; made by its writer."""
    directory = sources / name
    if not directory.exists():
        config = machine(sources / f"{name}-toy", **WEB)
        result = vmconv.machine_convert(config, directory, target_format=name)
        if name in NOT_READ:
            NOT_READ[name](Path(result.target))
    suffixes = MACHINES[name].suffixes
    files = (path for path in directory.rglob("*") if path.name.endswith(suffixes) and path.is_file())
    return next(path for path in files if MACHINES[name].probe(image_file(path.read_bytes())))


def essentials(found: Machine) -> dict[str, object]:
    wanted = ("name", "cpu.count", "memory.size", "nics[0].mac", "identity.uuid", "firmware.kind")
    return {path: value for path, value in stated(found) if path in wanted}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("origin", SOURCES)
def test_any_machine_becomes_any_other(origin: str, target: str, sources: Path, tmp_path: Path, toys: object) -> None:
    config = source(sources, origin, toys)
    before = vmconv.machine_info(config)
    plan = vmconv.machine_plan(config, tmp_path / "new", target_format=target)
    result = vmconv.machine_convert(config, tmp_path / "new", target_format=target)
    assert result.plan.losses == plan.losses
    content = make_disk(tmp_path / "content.raw", 4 * MIB)
    assert len(result.plan.disks) == 2
    if not MACHINES[target].is_package:
        for disk in result.plan.disks:
            assert vmconv.compare(Path(result.target).parent / disk.target, content)
    if MACHINES[target].can_read and MACHINES[target].probe(image_file(Path(result.target).read_bytes())):
        after = vmconv.machine_info(result.target)
        explained = {one.path for one in plan.substitutions} | {loss.path for loss in plan.losses}
        for path, value in essentials(before).items():
            assert essentials(after).get(path) == value or path in explained, path


def test_the_formats_of_the_project_are_installed() -> None:
    folders = Path(__file__).parents[2] / "plugins"
    shipped = {path.name for path in folders.iterdir() if 'entry-points."vmconv.machines"' in _project(path)}
    assert shipped <= {one.replace("ova", "ovf") for one in MACHINES}


def _project(folder: Path) -> str:
    path = folder / "pyproject.toml"
    return path.read_text() if path.exists() else ""
