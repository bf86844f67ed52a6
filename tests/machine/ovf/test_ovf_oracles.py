"""New packages as other programs read them: virt-v2v the descriptor, QEMU the disks where they lie in the archive."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

import vmconv
from support.disks import MIB, make_disk
from support.ovf_packages import CONTROLLER, descriptor, item
from support.requirements import oracle_program
from vmconv.machine import Machine
from vmconv.testing import image_file
from vmconv_ovf.tar import Header, headers

SIZES = (4 * MIB, 3 * MIB, 8 * MIB)


@pytest.fixture
def source(reflink_dir: Path) -> Path:
    """An OVF with three raw disks, a CD drive and two network cards."""
    directory = reflink_dir / "old"
    directory.mkdir()
    for number, size in enumerate(SIZES):
        make_disk(directory / f"disk{number}.raw", size, seed=number)
    numbers = range(len(SIZES))
    settings = "".join(
        f'<vmw:Config ovf:required="false" vmw:key="{key}" vmw:value="{value}"/>'
        for key, value in (("firmware", "efi"), ("bootOptions.efiSecureBootEnabled", "true"))
    )
    items = [
        item(1, 3, VirtualQuantity=4),
        item(2, 4, VirtualQuantity=3, AllocationUnits="byte * 2^30"),
        CONTROLLER,
        item(9, 20, Address=0, ResourceSubType="vmware.sata.ahci"),
        *(item(10 + at, 17, Parent=3, AddressOnParent=at, HostResource=f"ovf:/disk/d{at}") for at in numbers),
        item(20, 15, Parent=9, AddressOnParent=0, AutomaticAllocation="false"),
        item(21, 10, Address="00:50:56:01:02:03", ResourceSubType="VmxNet3", Connection="LAN &amp; more"),
        item(22, 10, ResourceSubType="E1000", Connection="NAT"),
    ]
    content = descriptor(
        "".join(items),
        files="".join(f'<File ovf:href="disk{at}.raw" ovf:id="f{at}"/>' for at in numbers),
        disks="".join(
            f'<Disk ovf:capacity="{size}" ovf:diskId="d{at}" ovf:fileRef="f{at}"/>' for at, size in enumerate(SIZES)
        ),
        system="<Name>web &lt;1&gt;</Name>",
        settings=settings,
    )
    (directory / "web.ovf").write_bytes(content)
    return directory / "web.ovf"


def members(path: Path) -> dict[str, Header]:
    return {each.name: each for each in headers(image_file(path.read_bytes(), path.name))}


def source_of(path: Path) -> dict[str, str]:
    """Returns what virt-v2v reads of a package."""
    command = [oracle_program("virt-v2v"), "-i", "ova", path, "--print-source"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    values = dict(re.findall(r"^ *([^:\n]+): (.*)$", done.stdout, re.MULTILINE))
    values["disks"] = ", ".join(re.findall(r"^\t\d+ \[(.*)\]$", done.stdout, re.MULTILINE))
    values["nics"] = "; ".join(re.findall(r"^\tBridge (.*)$", done.stdout, re.MULTILINE))
    values["removable"] = ", ".join(re.findall(r"^\t(CD-ROM.*)$", done.stdout, re.MULTILINE))
    return values


@pytest.mark.parametrize("manifest", ["none", "sha256"])
def test_a_package_shares_all_payload_and_others_read_it(manifest: str, source: Path, reflink_dir: Path) -> None:
    target = reflink_dir / "web.ova"
    result = vmconv.machine_convert(source, target, options={"manifest": manifest})
    assert result.plan.totals.copied == 0
    assert result.plan.totals.shared > 0
    found = source_of(target)
    assert found["source name"] == "web <1>"
    assert found["memory"].startswith(f"{3 << 30} ")
    assert found["nr vCPUs"] == "4"
    assert found["firmware"] == "uefi"
    assert found["disks"] == "scsi, scsi, scsi"
    assert found["nics"] == '"LAN & more" mac: 00:50:56:01:02:03 [vmxnet3]; "NAT" [e1000]'
    for at in range(len(SIZES)):
        assert_same_disk(target, members(target)[f"web-1-disk{at + 1}.vmdk"], source.parent / f"disk{at}.raw")


def assert_same_disk(package: Path, member: Header, raw: Path) -> None:
    """Fails unless QEMU reads the VMDK inside a package as the raw disk."""
    inside = {
        "driver": "vmdk",
        "file": {
            "driver": "raw",
            "offset": member.start,
            "size": member.size,
            "file": {"driver": "file", "filename": str(package)},
        },
    }
    program = oracle_program("qemu-img")
    command = [program, "compare", f"json:{json.dumps(inside)}", str(raw)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_stream_optimized_disks_are_written_whole(source: Path, reflink_dir: Path) -> None:
    target = reflink_dir / "web.ova"
    vmconv.machine_convert(source, target, options={"disk_format": "streamOptimized"})
    for at in range(len(SIZES)):
        member = members(target)[f"web-1-disk{at + 1}.vmdk"]
        assert_same_disk(target, member, source.parent / f"disk{at}.raw")
    subprocess.run([oracle_program("tar"), "-xf", str(target)], cwd=reflink_dir, check=True)
    info = subprocess.run(
        [oracle_program("qemu-img"), "info", "--output=json", str(reflink_dir / "web-1-disk1.vmdk")],
        capture_output=True,
        check=True,
    )
    assert json.loads(info.stdout)["format-specific"]["data"]["create-type"] == "streamOptimized"


def test_a_package_comes_back_as_a_descriptor(source: Path, reflink_dir: Path) -> None:
    package, back = reflink_dir / "web.ova", reflink_dir / "back"
    vmconv.machine_convert(source, package)
    result = vmconv.machine_convert(package, back, target_format="ovf")
    assert result.plan.totals.copied == 0

    def without_files(machine: Machine) -> Machine:
        disks = tuple(each.model_copy(update={"file_size": None, "file": None}) for each in machine.disks)
        return machine.model_copy(update={"disks": disks})

    assert without_files(vmconv.machine_info(result.target)) == without_files(vmconv.machine_info(package))
    for at in range(len(SIZES)):
        assert vmconv.compare(back / f"web-1-disk{at + 1}.vmdk", source.parent / f"disk{at}.raw")
