"""A machine is converted in place: its own disks become the new ones, or all are as they were."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.disks import MIB, make_disk
from support.toy_machines import machine, names
from vmconv.conversion import pipeline
from vmconv.errors import PlanError, UsageError, VmconvError
from vmconv.interface.machines import ConfigFile
from vmconv.machine.layout import named

pytestmark = pytest.mark.usefixtures("toys")

DISKS = [{"file": "system.raw"}, {"file": "data.qcow2"}]


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.fixture(params=["xfs", "ext4"])
def directory(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(f"{request.param}_dir")
    return found / "machine"


def test_the_disks_of_a_machine_become_the_new_ones(directory: Path) -> None:
    config = machine(directory, disks=DISKS)
    os.unlink(directory / "old.vmdk")
    content = make_disk(directory.parent / "copy.raw", 4 * MIB).read_bytes()
    config.chmod(0o640)
    result = vmconv.machine_convert(config, directory / "new.toy", disk_format="qcow2", in_place=True)
    assert names(directory) == ["new-disk1.qcow2", "new-disk2.qcow2", "new.toy", "web.toy"]
    assert result.plan.totals.copied <= 2 * 64 * 1024
    for number in (1, 2):
        vmconv.convert(directory / f"new-disk{number}.qcow2", directory / "back.raw", force=True)
        assert (directory / "back.raw").read_bytes() == content
    assert (directory / "new.toy").stat().st_mode & 0o777 == 0o640
    assert [disk.file for disk in vmconv.machine_info(result.target).disks] == ["new-disk1.qcow2", "new-disk2.qcow2"]


def test_undo_files_are_kept_on_request(directory: Path) -> None:
    config = machine(directory, disks=DISKS)
    before = digests(directory)
    vmconv.machine_convert(config, directory / "new.toy", disk_format="qcow2", in_place=True, keep_undo=True)
    for number in (1, 2):
        vmconv.undo(directory / f"new-disk{number}.qcow2")
    (directory / "new.toy").unlink()
    assert digests(directory) == before


@pytest.mark.parametrize("fails", ["second disk", "configuration"])
def test_a_failure_turns_all_disks_back(fails: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = machine(directory, disks=DISKS)
    before = digests(directory)
    if fails == "second disk":
        run, calls = pipeline.run, []

        def failing(request: Any, **given: Any) -> Any:
            calls.append(request)
            if len(calls) == 2:
                raise VmconvError("storage failed")
            return run(request, **given)

        monkeypatch.setattr(pipeline, "run", failing)
    else:
        monkeypatch.setattr(
            "vmconv.machine.in_place.named", lambda *given: (*named(*given)[:-1], _wrong(named(*given)[-1]))
        )
    with pytest.raises(VmconvError):
        vmconv.machine_convert(config, directory / "new.toy", disk_format="qcow2", in_place=True)
    assert digests(directory) == before


def _wrong(config: ConfigFile) -> ConfigFile:
    return config._replace(content=config.content + b"garbage")


def test_a_plan_changes_nothing(directory: Path) -> None:
    config = machine(directory, disks=DISKS)
    before = digests(directory)
    plan = vmconv.machine_plan(config, directory / "new.toy", disk_format="qcow2", in_place=True)
    assert [disk.target for disk in plan.disks] == ["new-disk1.qcow2", "new-disk2.qcow2"]
    assert digests(directory) == before


@pytest.mark.parametrize(
    "given",
    [{"force": True}, {"mode": 0o600}, {"cache": "unsafe"}, {"force_share": True}, {"backend": "copy"}],
    ids=lambda given: next(iter(given)),
)
def test_options_that_exclude_each_other_are_refused(given: dict[str, Any], tmp_path: Path) -> None:
    config = machine(tmp_path, disks=DISKS)
    with pytest.raises(UsageError, match="exclude each other"):
        vmconv.machine_convert(config, tmp_path / "new.toy", in_place=True, **given)
    with pytest.raises(UsageError, match="for conversions in place"):
        vmconv.machine_convert(config, tmp_path / "new.toy", keep_undo=True)


def test_one_file_for_two_disks_is_refused(tmp_path: Path) -> None:
    config = machine(tmp_path, disks=[{"file": "system.raw"}, {"file": "system.raw"}])
    before = digests(tmp_path)
    with pytest.raises(PlanError, match="are the same file"):
        vmconv.machine_convert(config, tmp_path / "new.toy", in_place=True)
    assert digests(tmp_path) == before


@pytest.mark.parametrize("name", ["web.toy", "other.toy"])
def test_a_configuration_that_exists_is_refused_before_any_disk_is_changed(name: str, xfs_dir: Path) -> None:
    config = machine(xfs_dir / "machine", disks=DISKS)
    (xfs_dir / "machine" / "other.toy").write_text("another machine")
    before = digests(xfs_dir / "machine")
    target = xfs_dir / "machine" / name
    for run in (vmconv.machine_plan, vmconv.machine_convert):
        with pytest.raises(PlanError, match="already exists") as caught:
            run(config, target, target_format="toy", disk_format="qcow2", in_place=True)
        assert "--force" not in str(caught.value.hint)
    assert digests(xfs_dir / "machine") == before


def test_the_adapter_of_a_disk_is_stated_by_the_machine(directory: Path) -> None:
    config = machine(directory, disks=[{"file": "old.vmdk"}])
    plan = vmconv.machine_plan(config, directory / "new.toy", disk_format="qcow2", in_place=True)
    assert not any("adapter" in loss for loss in plan.disks[0].losses)


def test_a_hint_names_no_option_that_machines_lack(directory: Path) -> None:
    config = machine(directory, disks=[{"file": "top.qcow2"}])
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "data.qcow2", "-F", "qcow2", directory / "top.qcow2"],
        check=True,
    )
    with pytest.raises(PlanError) as caught:
        vmconv.machine_convert(config, directory / "new.toy", disk_format="vmdk", in_place=True)
    assert caught.value.hint == "convert without --in-place"


def test_another_directory_is_refused(tmp_path: Path) -> None:
    config = machine(tmp_path / "old", disks=DISKS)
    before = digests(tmp_path / "old")
    with pytest.raises(PlanError, match="another directory than toy keeps its disks in"):
        vmconv.machine_convert(config, tmp_path / "new", target_format="toy", disk_format="qcow2", in_place=True)
    assert digests(tmp_path / "old") == before
    assert names(tmp_path) == ["old"]
