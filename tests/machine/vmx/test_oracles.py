"""VMX against other programs: libvirt's parser, virt-v2v and dissect read what we write, as they read the original."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
from pathlib import Path
from uuid import UUID
from xml.etree import ElementTree

import pytest

from support.corpus import configurations
from support.requirements import oracle_module, oracle_program
from vmconv.machine import (
    Cpu,
    Disk,
    Display,
    Firmware,
    GuestOS,
    Identity,
    Machine,
    Memory,
    Nic,
    Removable,
    Serial,
)
from vmconv.testing import image_file
from vmconv.testing.machines import HOSTILE
from vmconv_vmx import Vmx
from vmconv_vmx.options import Options

FORMAT = Vmx()


def vmx(machine: Machine, options: Options | None = None) -> bytes:
    return FORMAT.write(FORMAT.adapt(machine, options or Options()).machine, options)[-1].content


def rewritten(content: bytes) -> bytes:
    return vmx(FORMAT.read(image_file(content, "a.vmx"), None))  # type: ignore[arg-type]


class Libvirt:
    """libvirt's VMX parser, without a VMware: its driver only asks two programs for their version."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        answers = {"vmware": "VMware Workstation 16.1.2 build-1", "vmrun": "Total running VMs: 0"}
        for name, answer in answers.items():
            program = directory / name
            program.write_text(f"#!/bin/sh\necho '{answer}'\n")
            program.chmod(0o755)

    def xml(self, content: bytes) -> str:
        """Returns the domain XML, or the error."""
        file = self.directory / "a.vmx"
        file.write_bytes(content)
        command = [oracle_program("virsh"), "-c", "vmwarews:///session", "domxml-from-native", "vmware-vmx", str(file)]
        path = f"{self.directory}:{os.environ['PATH']}"
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})
        return done.stdout if done.returncode == 0 else done.stderr.strip()


@pytest.fixture(scope="module")
def libvirt(tmp_path_factory: pytest.TempPathFactory) -> Libvirt:
    return Libvirt(tmp_path_factory.mktemp("libvirt"))


WEB = Machine(
    name="web",
    description="a\nb",
    os=GuestOS(id="debian12", architecture="x86_64"),
    cpu=Cpu(count=4, sockets=2, cores=2, threads=1),
    memory=Memory(size=2 << 30),
    firmware=Firmware(kind="uefi", secure_boot=True, boot_order=("disk", "network")),
    identity=Identity(
        uuid=UUID("5c241f42-a87f-fa60-1122-334455667788"), generation_id=UUID("8312995e-57b8-f814-4013-c1ba795f05ba")
    ),
    disks=(
        Disk(file="a.vmdk", bus="scsi", mode="independent-nonpersistent"),
        Disk(file="sub dir/b.vmdk", bus="sata"),
        Disk(file="c.vmdk", bus="nvme"),
        Disk(file="d.vmdk", bus="ide"),
    ),
    removables=(Removable(kind="cdrom", bus="sata", file="x.iso"), Removable(kind="floppy", file="f.flp")),
    nics=(
        Nic(mac="52:54:00:11:22:33", model="e1000", network="VM Network"),
        Nic(mac="00:0c:29:11:22:33", mac_origin="generated", model="vmxnet3", network_kind="nat"),
        Nic(mac="00:50:56:00:00:01", mac_origin="static", model="vmxnet2", network="LAN", network_kind="bridged"),
        Nic(mac="00:50:56:87:65:43", mac_origin="generated", model="pcnet32", network="DMZ"),
    ),
    serials=(Serial(index=0, kind="file", target="/tmp/serial"),),
    display=Display(model="vmware", memory=16 << 20),
)


def test_libvirt_reads_our_machine(libvirt: Libvirt) -> None:
    """Without the NVMe disk, which its parser does not know."""
    domain = ElementTree.fromstring(libvirt.xml(vmx(WEB)))
    assert domain.findtext("name") == "web"
    assert domain.findtext("description") == "a\nb"
    assert domain.findtext("memory") == str(2 << 20)
    assert domain.findtext("vcpu") == "4"
    assert domain.findtext("uuid") == "421f245c-7fa8-60fa-1122-334455667788"
    topology = domain.find("cpu/topology")
    assert topology is not None and [topology.get(key) for key in ("sockets", "cores", "threads")] == ["2", "2", "1"]
    system = domain.find("os")
    assert system is not None and system.get("firmware") == "efi"
    disks = {
        (disk.get("device"), target.get("bus")): source.get("file")
        for disk in domain.iterfind("devices/disk")
        if (target := disk.find("target")) is not None and (source := disk.find("source")) is not None
    }
    assert disks == {
        ("disk", "scsi"): "a.vmdk",
        ("disk", "sata"): "sub dir/b.vmdk",
        ("disk", "ide"): "d.vmdk",
        ("cdrom", "sata"): "x.iso",
        ("floppy", "fdc"): "f.flp",
    }
    assert domain.find("devices/disk/transient") is not None
    cards = [{child.tag: child.attrib for child in card} for card in domain.iterfind("devices/interface")]
    assert [(card["mac"]["address"], card["mac"]["type"], card["model"]["type"]) for card in cards] == [
        ("52:54:00:11:22:33", "static", "e1000"),
        ("00:0c:29:11:22:33", "generated", "vmxnet3"),
        ("00:50:56:00:00:01", "static", "vmxnet2"),
        ("00:50:56:87:65:43", "generated", "vlance"),
    ]
    assert [card.get("source", {}).get("bridge") for card in cards] == ["VM Network", None, "LAN", "DMZ"]
    video = domain.find("devices/video/model")
    assert video is not None and video.get("vram") == str(16 << 10)
    assert domain.find("devices/serial/source[@path='/tmp/serial']") is not None


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_libvirt_reads_hostile_names_as_they_are(libvirt: Libvirt, name: str) -> None:
    """Libvirt refuses names with a slash, decodes a percent sign, and leaves escapes in names of files and networks."""
    line = re.sub(r"[/%\\]", "_", " ".join(name.split()))
    machine = Machine(
        name=line, description=name, disks=(Disk(file=f"{line}.vmdk", bus="scsi"),), nics=(Nic(network=line),)
    )
    domain = ElementTree.fromstring(libvirt.xml(vmx(machine)))
    left = line.replace("|", "|7C").replace('"', "|22").replace("#", "|23")
    assert domain.findtext("name") == line
    assert domain.findtext("description") == name
    assert domain.find("devices/interface/source").get("bridge") == left  # type: ignore[union-attr]
    assert domain.find("devices/disk/source").get("file") == f"{left}.vmdk"  # type: ignore[union-attr]


def test_libvirt_reads_our_copy_of_each_real_vmx_as_the_original(libvirt: Libvirt) -> None:
    """Lines of XML that come and go, and refusals.

    libvirt leaves out an empty drive in the words of ESXi, which are ours. It does not know that the first floppy drive
    is present by default. A static address outside VMware's range needs its check to be off.
    """
    changed: dict[str, list[str]] = {}
    refused: dict[str, bool] = {}
    for path, content in configurations(".vmx").items():
        before, after = (libvirt.xml(each) for each in (content, rewritten(content)))
        if before.startswith("error"):
            refused[Path(path).name] = after.startswith("error")
        elif before != after:
            lines = difflib.ndiff(before.splitlines(), after.splitlines())
            changed[Path(path).name] = [" ".join(line.split()) for line in lines if line[0] in "+-"]
    assert refused == {
        "esx-in-the-wild-12.vmx": False,
        "esx-in-the-wild-13.vmx": True,
        "esx-in-the-wild-14.vmx": True,
        "ethernet-vds-no-params.vmx": True,
        "test-i-vmx-5.vmx": True,
    }
    for empty in ("cdrom-ide-empty-2", "cdrom-scsi-empty", "xml2vmx-cdrom-ide-empty"):
        lines_of_drive = changed.pop(f"{empty}.vmx")
        assert len(lines_of_drive) == 6 and {line[0] for line in lines_of_drive} == {"-"}
    floppy = changed.pop("test_vmware_config.vmx")
    assert "+ <source dev='A:'/>" in floppy and {line[0] for line in floppy} == {"+"}
    assert changed == {
        "xml2vmx-ethernet-mac-type.vmx": [
            "- <mac address='00:0c:29:dd:ee:fe' type='static' check='yes'/>",
            "+ <mac address='00:0c:29:dd:ee:fe' type='static' check='no'/>",
            "- <mac address='aa:bb:cc:dd:ee:fd' type='generated' check='no'/>",
            "+ <mac address='aa:bb:cc:dd:ee:fd' type='static' check='no'/>",
        ]
    }


def test_virt_v2v_reads_our_machine(tmp_path: Path) -> None:
    """virt-v2v 2.2 knows no SATA and NVMe disks, and no static addresses."""
    (tmp_path / "a.vmx").write_bytes(vmx(WEB))
    _make_disks(tmp_path, ["a.vmdk", "d.vmdk"])
    assert _printed(tmp_path / "a.vmx") == {
        "source name": "web",
        "hypervisor type": "vmware",
        "VM genid": "8312995e-57b8-f814-4013-c1ba795f05ba",
        "memory": "2147483648 (bytes)",
        "nr vCPUs": "4",
        "CPU topology": "sockets: 2 cores/socket: 2 threads/core: 1",
        "firmware": "uefi",
        "disks": ["0 [scsi]", "1 [ide]"],
        "removable media": [],
        "NICs": [
            'Network "VM Network" [e1000]',
            'Network "ethernet1" mac: 00:0c:29:11:22:33 [vmxnet3]',
            'Bridge "LAN" [vmxnet]',
            'Network "DMZ" mac: 00:50:56:87:65:43 [vlance]',
        ],
    }


def _make_disks(directory: Path, names: list[str]) -> None:
    made = directory / "made"
    subprocess.run([oracle_program("qemu-img"), "create", "-q", "-f", "vmdk", str(made), "1M"], check=True)
    for name in names:
        (directory / name).write_bytes(made.read_bytes())


def _printed(file: Path) -> dict[str, str | list[str]]:
    """What virt-v2v prints about a source: values that are not empty, and lists."""
    command = [oracle_program("virt-v2v"), "-i", "vmx", str(file), "--print-source"]
    environment = {**os.environ, "LIBGUESTFS_BACKEND": "direct", "LC_ALL": "C.UTF-8"}
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return printed(text)


def printed(text: str) -> dict[str, str | list[str]]:
    found: dict[str, str | list[str]] = {}
    lists: list[str] = []
    for line in text.partition("option):")[2].splitlines():
        key, colon, value = line.strip().partition(":")
        if line.startswith("\t"):
            lists.append(line.strip())
        elif colon and value.strip():
            found[key] = value.strip()
        elif colon and key in ("disks", "removable media", "NICs"):
            found[key] = lists = []
    return found


def test_virt_v2v_reads_our_copy_of_its_own_samples_as_expected(tmp_path: Path) -> None:
    expected = configurations(".expected")
    samples = {name: content for name, content in configurations(".vmx").items() if name.startswith("virt-v2v/")}
    assert len(samples) == 5
    for name, content in samples.items():
        (tmp_path / "a.vmx").write_bytes(rewritten(content))
        machine = FORMAT.read(image_file(content, "a.vmx"), None)  # type: ignore[arg-type]
        _make_disks(tmp_path, [str(disk.file) for disk in machine.disks])
        found = _printed(tmp_path / "a.vmx")
        wanted = printed(expected[name.replace(".vmx", ".expected")].decode())
        if "UEFI secureboot" not in found:
            # virt-v2v 2.2 knows neither Secure Boot nor NVMe.
            del wanted["UEFI secureboot"]
            wanted["disks"] = [disk for disk in wanted["disks"] if "nvme" not in disk]
        assert found == wanted, name


def test_dissect_reads_our_settings_and_disks() -> None:
    descriptor = oracle_module("dissect.hypervisor.descriptor.vmx")
    found = descriptor.VMX.parse(vmx(WEB).decode())
    assert sorted(found.disks()) == ["a.vmdk", "c.vmdk", "d.vmdk", "sub dir/b.vmdk"]
    assert not found.encrypted
    for name, content in configurations(".vmx").items():
        machine = FORMAT.read(image_file(content, name), None)  # type: ignore[arg-type]
        theirs = descriptor.VMX.parse(content.decode())
        copy = descriptor.VMX.parse(rewritten(content).decode())
        ours = sorted(str(disk.file or disk.device) for disk in machine.disks)
        assert ours == sorted(copy.disks()), name
        assert set(ours) <= set(theirs.disks()), name
