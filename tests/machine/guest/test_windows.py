"""Windows guests are found by their registry. Oracles: ntfs-3g writes the filesystem, hivexregedit the hives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from support.guest_systems import disk_of, write_tree
from support.requirements import oracle_module
from support.toy_machines import machine
from support.windows_guests import hive, ntfs
from vmconv.cli.main import main

pytestmark = pytest.mark.usefixtures("toys", "libraries")

Keys = Mapping[str, Mapping[str, int | str]]

PART = "disks[0] partition 2 (ntfs)"
NAME = "Windows Server 2019 Standard"


@pytest.fixture(scope="session")
def libraries() -> None:
    for name in ("pyfsntfs", "pyregf"):
        oracle_module(name)


def windows(directory: Path, services: Keys, *, other: dict[str, str | bytes | Path] | None = None) -> Path:
    """Makes a machine whose first disk has a Windows with these drivers, and returns its configuration."""
    keys: dict[str, Mapping[str, int | str]] = {
        # The current set is not always the first one.
        "Select": {"Current": 2, "Default": 2},
        "ControlSet001\\Services\\viostor": {"Start": 0},
        "ControlSet002\\Services\\null": {"Start": 1},
    }
    for name, values in services.items():
        keys[f"ControlSet002\\Services\\{name}"] = values
    made = directory / "hives"
    made.mkdir()
    system = hive(made / "SYSTEM", keys).read_bytes()
    edition = {"Microsoft\\Windows NT\\CurrentVersion": {"ProductName": NAME}}
    software = hive(made / "SOFTWARE", edition).read_bytes()
    files: dict[str, str | bytes | Path] = {
        "Windows/System32/config/SYSTEM": system,
        "Windows/System32/config/SOFTWARE": software,
        "Windows/System32/drivers/viostor.sys": b"MZ",
        "Windows/System32/drivers/stornvme.sys": b"MZ",
        "Windows/System32/drivers/netkvm.sys": b"MZ",
        **(other or {}),
    }
    disk_of(directory / "system.raw", [ntfs(directory / "fs", write_tree(directory / "tree", files))])
    return directory


def checked(directory: Path, capsys: pytest.CaptureFixture[str], bus: str, **changes: Any) -> list[tuple[str, str]]:
    """Returns level and text of what is found in the Windows, with its disk at a controller of this bus."""
    disk = {"file": "system.raw", "bus": bus}
    kept = (directory / "system.raw").rename(directory / "kept.raw")
    config = machine(directory, firmware={"kind": "uefi"}, disks=[disk], **changes)
    kept.rename(directory / "system.raw")
    capsys.readouterr()
    main(["machine", "check", "--output", "json", str(config)])
    found = json.loads(capsys.readouterr().out)
    assert {one["path"] for one in found} <= {PART, "disks"}
    return [(one["level"], one["text"]) for one in found if one["path"] == PART]


IMAGE = "\\SystemRoot\\System32\\drivers\\viostor.sys"
NEEDED = "which disks[0] needs"


@pytest.mark.parametrize(
    ("services", "bus", "found"),
    [
        ({"viostor": {"Start": 0, "ImagePath": IMAGE}}, "virtio", []),
        ({"viostor": {"Start": 0, "ImagePath": "System32\\drivers\\viostor.sys"}}, "virtio", []),
        ({"viostor": {"Start": 0}}, "virtio", []),
        ({"VIOSTOR": {"Start": 0}}, "virtio", []),
        ({}, "virtio", [("error", f"has no driver viostor, {NEEDED}")]),
        ({"viostor": {"Start": 3}}, "virtio", [("error", f"has viostor, {NEEDED}, and its Start is 3, not 0")]),
        ({"viostor": {"Start": 4}}, "virtio", [("error", f"has viostor, {NEEDED}, and it is disabled")]),
        ({"viostor": {"Tag": 1}}, "virtio", [("error", f"has viostor, {NEEDED}, and its Start is not set, not 0")]),
        (
            {"viostor": {"Start": 0, "ImagePath": "System32\\drivers\\gone.sys"}},
            "virtio",
            [("error", f"has viostor, {NEEDED}, and its file is missing")],
        ),
        (
            {"stornvme": {"Start": 0}, "stornvme\\StartOverride": {"0": 3}},
            "nvme",
            [("error", f"has stornvme, {NEEDED}, and its StartOverride is 3, not 0")],
        ),
        ({"stornvme": {"Start": 0}, "stornvme\\StartOverride": {"0": 0}}, "nvme", []),
    ],
    ids=[
        *("boots", "relative", "no-path", "case", "none", "demand", "disabled", "unset", "no-file"),
        *("override", "no-override"),
    ],
)
def test_the_driver_of_the_disk_has_to_start_with_the_kernel(
    services: Keys, bus: str, found: list[tuple[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked(windows(tmp_path, services), capsys, bus) == [("note", f"has {NAME}"), *found]


def test_drivers_of_network_cards_and_hibernation_are_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    services = {"viostor": {"Start": 0}, "netkvm": {"Start": 3}}
    directory = windows(tmp_path, services, other={"hiberfil.sys": b"HIBR" + bytes(4092)})
    nics = [{"model": "virtio"}, {"model": "vmxnet3"}]
    assert checked(directory, capsys, "virtio", nics=nics) == [
        ("note", f"has {NAME}"),
        ("warning", "is hibernated: it will be resumed, with the devices it had"),
        ("warning", "has no driver vmxnet3ndis6, which nics[1] needs"),
    ]


def test_names_of_files_may_have_any_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys: Keys = {"Select": {"Current": 1}, "ControlSet001\\Services\\viostor": {"Start": 0}}
    system = hive(tmp_path / "hive", keys).read_bytes()
    files = {"WINDOWS/system32/config/system": system, "WINDOWS/system32/DRIVERS/VIOSTOR.SYS": b"MZ"}
    disk_of(tmp_path / "system.raw", [ntfs(tmp_path / "fs", write_tree(tmp_path / "tree", {**files}))])
    assert checked(tmp_path, capsys, "virtio") == [("note", "has Windows")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"regf" + bytes(8000), "cannot be read"),
        (None, "its SYSTEM hive does not name the current control set"),
    ],
    ids=["damaged", "empty"],
)
def test_a_damaged_registry_is_a_problem(
    content: bytes | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is None:
        content = hive(tmp_path / "empty", {"Other": {"x": 1}}).read_bytes()
    tree = write_tree(tmp_path / "tree", {"Windows/System32/config/SYSTEM": content})
    disk_of(tmp_path / "system.raw", [ntfs(tmp_path / "fs", tree)])
    found = checked(tmp_path, capsys, "virtio")
    assert [level for level, _ in found] == ["note"]
    assert said in found[0][1]
