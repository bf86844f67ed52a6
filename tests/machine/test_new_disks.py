"""The disks of a new machine: their ids, their layers, and the digests of packages."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tarfile
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import vmconv
from support.toy_machines import machine, names
from vmconv.cli.machine.report import plan_lines
from vmconv.errors import ImageError, PlanError, UsageError, VmconvError
from vmconv.machine.digests import check_manifest
from vmconv.machine.source import opened

pytestmark = pytest.mark.usefixtures("toys")


def test_vmdks_of_virtualbox_have_the_ids_of_its_settings(tmp_path: Path) -> None:
    config = machine(tmp_path / "old")
    result = vmconv.machine_convert(config, tmp_path / "new", target_format="vbox", disk_format="vmdk")
    disks = vmconv.machine_info(result.target).disks
    assert len({disk.image_uuid for disk in disks}) == 3
    for disk in disks:
        assert disk.format == "vmdk"
        assert disk.file
        stated = re.findall(rb'ddb\.uuid\.image = "(.*)"', (tmp_path / "new" / disk.file).read_bytes())
        assert stated == [str(disk.image_uuid).encode()]


def test_a_plan_says_what_is_read_for_the_digests_of_a_package(tmp_path: Path) -> None:
    config = machine(tmp_path / "old")
    payload = sum(disk.totals.shared + disk.totals.copied for disk in vmconv.machine_plan(config, "web.ova").disks)
    for manifest, expected in (("none", 0), ("sha256", payload)):
        plan = vmconv.machine_plan(config, tmp_path / "web.ova", options={"manifest": manifest})
        # Headers and tables of the disks are small.
        assert expected <= plan.digested < expected + 3 * 65536
        said = [line for line in plan_lines(plan) if line.startswith("read for the digests of the manifest")]
        assert len(said) == bool(expected)


def test_a_certificate_does_not_sign_the_new_machine(tmp_path: Path) -> None:
    config = machine(tmp_path / "old")
    result = vmconv.machine_convert(config, tmp_path / "ovf", target_format="ovf")
    name = Path(result.target).name
    digest = hashlib.sha256((tmp_path / "ovf" / name).read_bytes()).hexdigest()
    (tmp_path / "ovf/web.mf").write_text(f"SHA256({name})= {digest}\n")
    assert "certificate" not in {loss.path for loss in vmconv.machine_plan(result.target, tmp_path / "web.ova").losses}
    (tmp_path / "ovf/web.cert").write_text("-")
    losses = vmconv.machine_plan(result.target, tmp_path / "web.ova").losses
    assert ("certificate", "web.cert") in {(loss.path, loss.value) for loss in losses}
    (tmp_path / "ovf/web.mf").write_text(f"SHA256({name})= {'0' * 64}\n")
    with pytest.raises(ImageError, match="sha256 of the descriptor"):
        vmconv.machine_plan(result.target, tmp_path / "web.ova")


def with_layers(directory: Path) -> Path:
    """Makes a machine whose disks have three layers, two, and one, and returns its configuration."""
    config = machine(directory)
    for name, below in (("middle", "data"), ("top", "middle"), ("second", "old")):
        kind = "vmdk" if below == "old" else "qcow2"
        base, made = directory / f"{below}.{kind}", directory / f"{name}.{kind}"
        subprocess.run(["qemu-img", "create", "-q", "-f", kind, "-F", kind, "-b", base.name, made], check=True)
        write = f"write -q -P {len(name)} {len(name) * 65536} 65536"
        subprocess.run(["qemu-io", "-f", kind, "-c", write, made], check=True)
    toy = json.loads(config.read_text())
    toy["toy"]["disks"] = [{"file": name} for name in ("top.qcow2", "second.vmdk", "system.raw")]
    config.write_text(json.dumps(toy))
    return config


def layers_of(image: Path) -> list[str]:
    """Returns the names of the layers that QEMU finds, the top first."""
    command = ["qemu-img", "info", "--backing-chain", "--output", "json", str(image)]
    listed = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return [Path(one["filename"]).name for one in listed]


@pytest.mark.parametrize("target", ["libvirt", "vmx", "hyperv", "vbox"])
def test_layers_of_disks_stay_layers(target: str, reflink_dir: Path) -> None:
    config = with_layers(reflink_dir / "old")
    result = vmconv.machine_convert(config, reflink_dir / "new", target_format=target, chain=True)
    assert result.plan.totals.copied == 0
    assert result.plan.totals.shared > 0
    for disk, count in zip(result.plan.disks, (3, 2, 1), strict=True):
        own, new = reflink_dir / "old" / disk.source, reflink_dir / "new" / disk.target
        assert vmconv.compare(own, new)
        stem = new.name.removesuffix(new.suffix)
        names = [f"{stem}-layer{depth}{new.suffix}" for depth in range(1, count)]
        assert all((reflink_dir / "new" / name).exists() for name in names)
        if target in ("libvirt", "vmx"):
            assert layers_of(new) == [new.name, *names]
            subprocess.run(["qemu-img", "compare", "-q", str(own), str(new)], check=True)
    disks = vmconv.machine_info(result.target).disks if target == "vbox" else ()
    for found in disks:
        assert found.file
        # The UUID of a VDI is at 0x188 (VDICore.h, VDIHEADER1).
        files = [reflink_dir / "new" / name for name in (found.file, *(layer.file for layer in found.layers))]
        ids = [UUID(bytes_le=file.read_bytes()[0x188:0x198]) for file in files]
        assert ids == [found.image_uuid, *(layer.image_uuid for layer in found.layers)]
    assert [len(found.layers) for found in disks] in ([2, 1, 0], [])


@pytest.mark.parametrize(
    ("target", "reason"),
    [("proxmox", "snapshots inside of a disk"), ("kubevirt", "takes one image"), ("ova", "no delta disks")],
)
def test_layers_that_a_platform_cannot_have_are_refused(target: str, reason: str, tmp_path: Path) -> None:
    config = with_layers(tmp_path / "old")
    with pytest.raises(PlanError, match=f"top.qcow2: has layers below it, .*: .*{reason}") as caught:
        vmconv.machine_convert(config, tmp_path / "new", target_format=target, chain=True)
    assert caught.value.hint == "without --chain, each disk becomes one image"
    assert not (tmp_path / "new").exists()
    flat = machine(tmp_path / "flat")
    vmconv.machine_convert(flat, tmp_path / "new", target_format=target, chain=True)


def test_a_format_without_parents_is_refused_for_layers(tmp_path: Path) -> None:
    config = with_layers(tmp_path / "old")
    with pytest.raises(UsageError, match="raw cannot have a backing file"):
        vmconv.machine_convert(config, tmp_path / "new", target_format="libvirt", disk_format="raw", chain=True)
    with pytest.raises(UsageError, match="--chain and --in-place exclude each other"):
        vmconv.machine_convert(config, tmp_path / "old", target_format="libvirt", chain=True, in_place=True)


def test_all_layers_appear_or_none(tmp_path: Path) -> None:
    config = with_layers(tmp_path / "old")
    (tmp_path / "new").mkdir()
    (tmp_path / "new/web-disk2-layer1.qcow2").write_bytes(b"kept")
    with pytest.raises(VmconvError, match=r"web-disk2-layer1\.qcow2"):
        vmconv.machine_convert(config, tmp_path / "new", target_format="libvirt", chain=True)
    assert names(tmp_path / "new") == ["web-disk2-layer1.qcow2"]
    assert (tmp_path / "new/web-disk2-layer1.qcow2").read_bytes() == b"kept"


STREAM = {"disk_format": "streamOptimized", "manifest": "sha256"}


def members_of(package: Path) -> dict[str, bytes]:
    with tarfile.open(package) as tar:
        return {one.name: tar.extractfile(one).read() for one in tar}  # type: ignore[union-attr]


def digests_of(package: Path) -> dict[str, str]:
    """Returns the digests in the manifest of a package."""
    found = members_of(package)
    text = next(content for name, content in found.items() if name.endswith(".mf")).decode()
    return dict(re.findall(r"SHA256\((.*)\)= (.*)", text))


@pytest.mark.parametrize("verify", [True, "bytes"])
def test_compressed_disks_go_from_package_to_package_as_they_are(verify: Any, reflink_dir: Path) -> None:
    old, new = reflink_dir / "old.ova", reflink_dir / "new.ova"
    vmconv.machine_convert(machine(reflink_dir / "old"), old, options=STREAM)
    result = vmconv.machine_convert(old, new, options={**STREAM, "hardware": "vmx-19"}, verify=verify)
    before, after = members_of(old), members_of(new)
    disks = [name for name in before if name.endswith(".vmdk")]
    assert len(disks) == 3
    assert list(after.values())[1:4] == [before[name] for name in disks]
    assert b"vmx-19" in after["new.ovf"]
    assert result.plan.digested == 0
    assert result.plan.totals.shared > 0
    # Only blocks that the disks share with their neighbours in the archive.
    assert result.plan.totals.copied < 2 * 3 * 4096
    del after["new.mf"]
    assert digests_of(new) == {name: hashlib.sha256(content).hexdigest() for name, content in after.items()}


def test_a_digest_that_is_carried_over_reveals_a_damaged_disk(tmp_path: Path) -> None:
    old, new = tmp_path / "old.ova", tmp_path / "new.ova"
    vmconv.machine_convert(machine(tmp_path / "old"), old, options=STREAM)
    content = members_of(old)["web-disk1.vmdk"]
    with tarfile.open(old) as tar:
        at = tar.getmember("web-disk1.vmdk").offset_data + len(content) // 2
    with old.open("r+b") as file:
        file.seek(at)
        file.write(bytes([content[len(content) // 2] ^ 1]))
    vmconv.machine_convert(old, new, options=STREAM)
    for package in (old, new):
        with opened(str(package)) as source:
            assert [one.level for one in check_manifest(source)] == ["error", "note"]


@pytest.mark.parametrize(
    "changes",
    [{"options": {"manifest": "sha256"}}, {"options": STREAM, "disk_options": {"hwversion": "10"}}],
    ids=["sparse", "options"],
)
def test_disks_that_change_are_written_and_read_for_their_digests(changes: Any, tmp_path: Path) -> None:
    old, new = tmp_path / "old.ova", tmp_path / "new.ova"
    vmconv.machine_convert(machine(tmp_path / "old"), old, options=STREAM)
    result = vmconv.machine_convert(old, new, **changes)
    before, after = members_of(old), members_of(new)
    disks = [name for name in before if name.endswith(".vmdk")]
    assert len(disks) == 3
    assert all(before[name] != after[name] for name in disks)
    assert digests_of(new).keys() == after.keys() - {"new.mf"}
    assert result.plan.digested > 3 * 65536
