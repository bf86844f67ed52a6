"""A whole machine is converted as one: its settings, its disks, all of its files or none."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import vmconv
from machine.toy import Toy
from support.disks import MIB, make_disk
from support.toy_machines import machine, names
from vmconv.api import machine_format_of
from vmconv.errors import AccessError, BackendError, ImageError, PlanError, PluginError, UsageError, ZeroCopyError
from vmconv.interface.machines import Adapted
from vmconv.io.registry import Registry
from vmconv.machine import Machine

pytestmark = pytest.mark.usefixtures("toys")


def test_all_disks_share_the_blocks_of_the_source(reflink_dir: Path) -> None:
    config = machine(reflink_dir / "old")
    result = vmconv.machine_convert(config, reflink_dir / "new", target_format="toy", disk_format="qcow2")
    assert result.target == str(reflink_dir / "new/web.toy")
    assert names(reflink_dir / "new") == ["web-disk1.qcow2", "web-disk2.qcow2", "web-disk3.qcow2", "web.toy"]
    assert result.plan.totals.copied == 0
    assert result.plan.totals.shared > 0
    for before, after in zip(("system.raw", "data.qcow2", "old.vmdk"), names(reflink_dir / "new"), strict=False):
        assert vmconv.compare(reflink_dir / "old" / before, reflink_dir / "new" / after)
        assert vmconv.prove(reflink_dir / "old" / before, reflink_dir / "new" / after)
    found = vmconv.machine_info(result.target)
    assert found.name == "web"
    assert [(disk.file, disk.format, disk.capacity) for disk in found.disks] == [
        (f"web-disk{number}.qcow2", "qcow2", 4 * MIB) for number in (1, 2, 3)
    ]


def test_the_target_may_name_the_configuration(tmp_path: Path) -> None:
    config = machine(tmp_path / "old")
    (tmp_path / "new").mkdir()
    result = vmconv.machine_convert(config, tmp_path / "new/other.toy")
    assert result.target == str(tmp_path / "new/other.toy")
    assert names(tmp_path / "new") == ["other-disk1.raw", "other-disk2.raw", "other-disk3.raw", "other.toy"]


def test_a_plan_says_what_becomes_of_each_setting_and_changes_nothing(tmp_path: Path) -> None:
    config = machine(tmp_path / "old", nics=[{"model": "e1000"}], sound="hda", extra={"vmx": {"a": "b", "c": "d"}})
    plan = vmconv.machine_plan(config, tmp_path / "new", target_format="toy")
    assert names(tmp_path) == ["old"]
    assert {"name", "cpu.count", "memory.size"} <= set(plan.carried)
    assert [(one.path, one.before, one.after) for one in plan.substitutions] == [("nics[0].model", "e1000", "virtio")]
    assert [(loss.path, loss.value) for loss in plan.losses] == [("sound", "hda"), ("extra.vmx", "2 settings (a, c)")]
    assert [(disk.source, disk.target) for disk in plan.disks] == [
        ("system.raw", "web-disk1.raw"),
        ("data.qcow2", "web-disk2.raw"),
        ("old.vmdk", "web-disk3.raw"),
    ]


@pytest.mark.parametrize("wanted", [{"strict": True}, {"keep": ["sound"]}], ids=["strict", "keep"])
def test_losses_are_refused_on_request(wanted: dict[str, Any], tmp_path: Path) -> None:
    config = machine(tmp_path / "old", sound="hda")
    with pytest.raises(PlanError, match="sound hda would be lost"):
        vmconv.machine_convert(config, tmp_path / "new", target_format="toy", **wanted)
    assert names(tmp_path) == ["old"]
    vmconv.machine_convert(config, tmp_path / "new", target_format="toy", keep=["nics.mac"])


def test_media_memory_and_secrets_stay_with_the_source(tmp_path: Path) -> None:
    config = machine(
        tmp_path / "old",
        removables=[{"kind": "cdrom", "file": "/srv/install.iso"}],
        memory_state="web.vmss",
        tpm={"version": "2.0", "state": "tpm"},
        snapshots=["before"],
    )
    plan = vmconv.machine_plan(config, tmp_path / "new", target_format="toy")
    reasons = {loss.path: loss.reason for loss in plan.losses}
    assert "insert it again" in reasons["removables[0].file"]
    assert "BitLocker" in reasons["tpm.state"]
    assert {"memory_state", "snapshots"} <= reasons.keys()


def test_a_clone_gets_a_new_identity(tmp_path: Path, toys: Registry) -> None:
    toys.machines["toy"].carries = Toy.carries | {"identity"}
    before = "12345678-1234-1234-1234-123456789abc"
    config = machine(tmp_path / "old", identity={"uuid": before}, nics=[{"mac": "00:50:56:00:00:01"}])
    kept = vmconv.machine_convert(config, tmp_path / "kept", target_format="toy")
    assert str(vmconv.machine_info(kept.target).identity.uuid) == before
    clone = vmconv.machine_convert(config, tmp_path / "clone", target_format="toy", new_identity=True)
    found = vmconv.machine_info(clone.target)
    assert str(found.identity.uuid) not in (before, "None")
    assert found.nics[0].mac is None
    assert [one.path for one in clone.plan.substitutions] == ["identity.uuid", "nics[0].mac"]


def test_files_that_exist_are_replaced_on_request_only(tmp_path: Path) -> None:
    config = machine(tmp_path / "old")
    vmconv.machine_convert(config, tmp_path / "new", target_format="toy")
    before = {name: (tmp_path / "new" / name).stat().st_ino for name in names(tmp_path / "new")}
    with pytest.raises(PlanError, match="already exists"):
        vmconv.machine_convert(config, tmp_path / "new", target_format="toy")
    assert {name: (tmp_path / "new" / name).stat().st_ino for name in names(tmp_path / "new")} == before
    vmconv.machine_convert(config, tmp_path / "new", target_format="toy", force=True)
    assert names(tmp_path / "new") == sorted(before)


def test_a_machine_is_not_made_over_its_own_source(tmp_path: Path) -> None:
    config = machine(tmp_path / "old")
    with pytest.raises(PlanError, match="is part of the source"):
        vmconv.machine_convert(config, tmp_path / "old", target_format="toy", force=True)


def test_nothing_is_left_when_a_disk_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = machine(tmp_path / "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", fail)
    with pytest.raises(BackendError, match="No space left"):
        vmconv.machine_convert(config, tmp_path / "new/images/101", target_format="toy")
    assert names(tmp_path) == ["old"]


def test_a_configuration_that_is_read_back_wrong_is_not_named(
    tmp_path: Path, toys: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = machine(tmp_path / "old")
    write = Toy.write

    def forgetful(self: Toy, machine: Machine, options: Any) -> Any:
        return write(self, machine.model_copy(update={"name": "other"}), options)

    monkeypatch.setattr(Toy, "write", forgetful)
    with pytest.raises(vmconv.VerifyError, match="name is read back as 'other'"):
        vmconv.machine_convert(config, tmp_path / "new", target_format="toy")
    assert names(tmp_path) == ["old"]


@pytest.mark.parametrize("reference", ["../../secret.raw", "/etc/shadow"], ids=["above", "absolute"])
def test_a_configuration_does_not_lead_out_of_its_directory(reference: str, tmp_path: Path) -> None:
    make_disk(tmp_path / "secret.raw", MIB)
    config = machine(tmp_path / "old/machine", disks=[{"file": reference, "format": "raw"}])
    with pytest.raises(AccessError, match="lies outside"):
        vmconv.machine_convert(config, tmp_path / "new", target_format="toy")
    assert not (tmp_path / "new").exists()


def test_a_physical_disk_is_named_and_not_opened(tmp_path: Path, toys: Registry) -> None:
    config = machine(tmp_path / "old", disks=[{"device": "/dev/sda"}])
    plan = vmconv.machine_plan(config, tmp_path / "new", target_format="toy")
    assert plan.disks == ()
    assert [(loss.path, loss.value) for loss in plan.losses] == [("disks[0]", "physical disk /dev/sda")]


def test_an_empty_disk_is_made_with_its_size(tmp_path: Path) -> None:
    config = machine(tmp_path / "old", disks=[{"capacity": 3 * MIB}])
    vmconv.machine_convert(config, tmp_path / "new", target_format="toy")
    assert (tmp_path / "new/web-disk1.raw").stat().st_size == 3 * MIB


def test_copies_are_refused_where_zero_copy_is_required(tmp_path: Path) -> None:
    config = machine(tmp_path / "old")
    with pytest.raises(ZeroCopyError):
        vmconv.machine_convert(config, tmp_path / "new", target_format="toy", zero_copy="require", backend="copy")
    assert names(tmp_path) == ["old"]


def test_names_of_machines_become_plain_file_names(tmp_path: Path) -> None:
    config = machine(tmp_path / "old", name="../../etc/x", disks=[])
    result = vmconv.machine_convert(config, tmp_path / "new", target_format="toy")
    assert result.target == str(tmp_path / "new/_.-..-etc-x.toy")
    config = machine(tmp_path / "long", name="x" * 500, disks=[])
    result = vmconv.machine_convert(config, tmp_path / "new", target_format="toy")
    assert len(Path(result.target).name) == 200


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"target": "new/web.nonsense"}, "no machine format's suffix"),
        ({"target": "new", "target_format": "nonsense"}, "is not installed"),
        ({"target": "new", "target_format": "toy", "disk_format": "nonsense"}, "is not installed"),
        ({"target": "new", "target_format": "toy", "options": {"x": "y"}}, "x"),
    ],
    ids=["suffix", "format", "disk format", "option"],
)
def test_requests_that_make_no_sense_are_refused(given: dict[str, Any], problem: str, tmp_path: Path) -> None:
    config = machine(tmp_path / "old")
    target = tmp_path / given.pop("target")
    with pytest.raises(UsageError, match=problem):
        vmconv.machine_convert(config, target, **given)
    assert names(tmp_path) == ["old"]


def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.raw", MIB)
    with pytest.raises(ImageError, match="not a configuration"):
        vmconv.machine_info(disk)
    assert machine_format_of(str(disk)) is None
    assert machine_format_of(str(machine(tmp_path))) == "toy"


def test_a_plan_names_the_files_that_it_has_read(tmp_path: Path) -> None:
    config = machine(tmp_path / "old")
    plan = vmconv.machine_plan(config, tmp_path / "new", target_format="toy")
    opened = {"web.toy", "system.raw", "data.qcow2", "old.vmdk"}
    assert set(plan.opened) == {os.path.realpath(tmp_path / "old" / name) for name in opened}


def test_a_plugin_that_changes_a_setting_without_a_reason_is_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = machine(tmp_path / "old")
    monkeypatch.setattr(Toy, "adapt", lambda _self, one, _: Adapted(one.model_copy(update={"name": "other"})))
    with pytest.raises(PluginError, match="changes name from 'web' without a reason"):
        vmconv.machine_plan(config, tmp_path / "new", target_format="toy")


def test_a_target_with_the_suffix_of_another_format_is_refused(tmp_path: Path) -> None:
    config = machine(tmp_path / "old")
    with pytest.raises(UsageError, match=r"web\.ova: has the suffix of ova, not of toy"):
        vmconv.machine_convert(config, tmp_path / "web.ova", target_format="toy")
    assert names(tmp_path) == ["old"]
    vmconv.machine_convert(config, f"{tmp_path}/web.ova/", target_format="toy")
    assert "web.toy" in names(tmp_path / "web.ova")


def test_files_of_a_machine_with_a_long_name_differ(tmp_path: Path) -> None:
    config = machine(tmp_path / "old", name="\u00fc" * 900)
    vmconv.machine_convert(config, tmp_path / "new", target_format="toy")
    assert [name.strip("\u00fc") for name in names(tmp_path / "new")] == [
        *(f"-disk{number}.raw" for number in (1, 2, 3)),
        ".toy",
    ]


def test_files_of_the_host_are_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = [{"kind": "file", "target": "/srv/log"}, {"kind": "pty", "target": "/dev/pts/1"}, {"kind": "none"}]
    config = machine(tmp_path / "old", serials=ports)
    assert vmconv.machine_plan(config, tmp_path / "new", target_format="toy").warnings == ()
    monkeypatch.setattr(Toy, "carries", Toy.carries | {"serials"})
    (port,) = vmconv.machine_plan(config, tmp_path / "new", target_format="toy").warnings
    assert port == "serials[0] writes to the file /srv/log of the new machine's host"


@pytest.mark.parametrize(("carries", "says"), [(set(), "does not have it"), ({"disks.device"}, "on its host")])
def test_a_physical_disk_is_missing_in_the_new_machine(
    carries: set[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Toy, "carries", Toy.carries | carries)
    config = machine(tmp_path / "old", disks=[{"file": "system.raw"}, {"device": "/dev/sda"}])
    plan = vmconv.machine_plan(config, tmp_path / "new", target_format="toy")
    (loss,) = plan.losses
    assert loss[:2] == ("disks[1]", "physical disk /dev/sda")
    assert loss.reason.endswith(says) and "content is not converted" in loss.reason
    for wanted in ({"strict": True}, {"keep": ["disks.device"]}, {"keep": ["disks"]}):
        with pytest.raises(PlanError, match="physical disk /dev/sda would be lost"):
            vmconv.machine_convert(config, tmp_path / "new", target_format="toy", **wanted)
    assert names(tmp_path) == ["old"]


@pytest.mark.parametrize("second", ["system.raw", "link.raw", "hard.raw", "system.vmdk"])
def test_one_file_for_two_disks_is_refused(second: str, tmp_path: Path) -> None:
    config = machine(tmp_path / "old", disks=[{"file": "system.raw"}, {"file": "data.qcow2"}, {"file": second}])
    (tmp_path / "old/link.raw").symlink_to("system.raw")
    (tmp_path / "old/hard.raw").hardlink_to(tmp_path / "old/system.raw")
    vmconv.convert(tmp_path / "old/data.qcow2", tmp_path / "old/flat.vmdk", options={"subformat": "monolithicFlat"})
    (tmp_path / "old/system.vmdk").write_text(
        (tmp_path / "old/flat.vmdk").read_text().replace("flat-flat.vmdk", "system.raw")
    )
    for run in (vmconv.machine_plan, vmconv.machine_convert):
        with pytest.raises(PlanError, match=r"disks\[0\] and disks\[2\] are the same file, .*\.raw"):
            run(config, tmp_path / "new", target_format="toy")
    assert names(tmp_path) == ["old"]


def test_disks_on_one_backing_file_are_two_disks(tmp_path: Path) -> None:
    config = machine(tmp_path / "old", disks=[{"file": "a.qcow2"}, {"file": "b.qcow2"}])
    for name in "ab":
        make = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "system.raw", "-F", "raw"]
        subprocess.run([*make, tmp_path / f"old/{name}.qcow2"], check=True)
    assert len(vmconv.machine_plan(config, tmp_path / "new", target_format="toy").disks) == 2


def test_files_are_named_after_the_configuration_that_the_user_names(tmp_path: Path) -> None:
    config = machine(tmp_path / "old")
    (tmp_path / "new").mkdir()
    for name in ("web", "web-2", "a.b"):
        vmconv.machine_convert(config, tmp_path / f"new/{name}.toy")
    assert names(tmp_path / "new") == sorted(
        [f"{name}{end}" for name in ("web", "web-2", "a.b") for end in (".toy", *(f"-disk{n}.raw" for n in (1, 2, 3)))]
    )
    assert vmconv.machine_info(tmp_path / "new/a.b.toy").name == "web"


@pytest.mark.parametrize("same", ["uuid", "name"])
def test_the_files_of_another_machine_are_not_offered_for_replacement(
    same: str, tmp_path: Path, toys: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Toy, "carries", Toy.carries | {"identity"})
    first, second = ("12345678-1234-1234-1234-123456789ab" + end for end in "ab")
    by_uuid = same == "uuid"
    one = machine(tmp_path / "one", **({"identity": {"uuid": first}} if by_uuid else {}))
    two = machine(tmp_path / "two", **({"identity": {"uuid": second}} if by_uuid else {"name": "Web"}))
    new = tmp_path / "new"

    def hint(config: Path, target: Path = new) -> str:
        with pytest.raises(PlanError, match="already exists") as caught:
            vmconv.machine_convert(config, target, target_format="toy")
        return str(caught.value.hint)

    vmconv.machine_convert(one, new, target_format="toy")
    # Without a UUID, it may also be another machine of the same name.
    other = "" if by_uuid else f"; if it is another machine's: name the new configuration, such as {new / 'web-2.toy'}"
    assert hint(one) == f"--force replaces it{other}"
    if not by_uuid:
        (new / "Web.toy").write_bytes((new / "web.toy").read_bytes())
    named = new / ("web-2.toy" if by_uuid else "Web-2.toy")
    assert hint(two) == f"it may be another machine's: name the new configuration, such as {named}"
    # A disk of a machine whose configuration has another name, or is damaged.
    (new / "web.toy").rename(new / "other.toy")
    assert "another machine's" in hint(one)
    (new / "web.toy").write_text('{"toy": 7}')
    assert "another machine's" in hint(one)
    assert hint(one, new / "web.toy").endswith("new/web-2.toy")


def test_disk_options_that_the_configuration_relies_on_cannot_be_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = machine(tmp_path / "old")
    monkeypatch.setattr(Toy, "disk_format", "vmdk")
    monkeypatch.setattr(Toy, "disk_options", lambda *_: {"subformat": "monolithicSparse"})
    with pytest.raises(UsageError, match="toy states that its disks have subformat=monolithicSparse"):
        vmconv.machine_convert(
            config, tmp_path / "new", target_format="toy", disk_options={"subformat": "monolithicFlat"}
        )
    same = {"subformat": "monolithicSparse"}
    vmconv.machine_convert(config, tmp_path / "new", target_format="toy", disk_options=same)
