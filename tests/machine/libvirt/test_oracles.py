"""libvirt's own opinion of domains that vmconv writes, and libosinfo's of ids. QEMU starts them, stopped."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings

from support.libvirt_host import LibvirtHost, short_directory
from support.requirements import oracle_program
from vmconv.errors import PlanError
from vmconv.machine import (
    Board,
    Controller,
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
    Tpm,
)
from vmconv.testing import machines
from vmconv_libvirt import Libvirt
from vmconv_libvirt.options import Options
from vmconv_libvirt.words import DISPLAYS, NICS, SCSI, SOUNDS, WATCHDOGS, osinfo_short, osinfo_url

LIBVIRT = Libvirt()


class Host(LibvirtHost):
    """The host, with machines on it."""

    def written(self, machine: Machine, name: str = "a") -> Path:
        """Returns the domain of a machine, and makes its disks."""
        options = Options(directory=str(self.directory), type="qemu")
        adapted = LIBVIRT.adapt(machine, options).machine
        path = self.directory / f"{name}.xml"
        path.write_bytes(LIBVIRT.write(adapted, options)[-1].content)
        for disk in adapted.disks:
            if disk.file:
                (self.directory / disk.file).write_bytes(bytes(1 << 20))
        return path

    def starts(self, machine: Machine) -> str:
        """Starts a machine without running its processors; returns QEMU's list of block devices."""
        path = self.written(machine)
        name = "vmconv-test"
        text = re.sub("<name>.*</name>", f"<name>{name}</name>", path.read_text())
        # Two hosts, of two processes of tests, would choose the same port.
        text = re.sub("<graphics [^>]*/>", "", text)
        path.write_text(text)
        block = f"qemu-monitor-command {name} --hmp 'info block'"
        return self.run(f"create --paused --validate {path}", block, f"destroy {name}")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    # One for all tests: libvirt asks QEMU once for its capabilities.
    with short_directory() as directory:
        yield Host(directory)


def validate(path: Path) -> None:
    done = subprocess.run([oracle_program("virt-xml-validate"), path, "domain"], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode() + path.read_text()


def machine(**values: Any) -> Machine:
    return Machine(**{"name": "x", "memory": Memory(size=128 << 20), **values})


def disk(number: int, bus: str, controller: int = 0, unit: int = 0) -> Disk:
    values = {"file": f"d{number}.img", "format": "raw", "bus": bus, "controller": controller, "unit": unit}
    return Disk.model_validate(values)


ALL_BUSES = machine(
    controllers=tuple(
        Controller(bus="scsi", index=at, model=model)
        for at, model in enumerate(["lsi53c895a", "pvscsi", "lsisas1068", "virtio-scsi", "am53c974"])
    ),
    disks=(
        *(disk(0, "scsi", 0, 0), disk(1, "scsi", 0, 6), disk(2, "scsi", 1, 15), disk(3, "scsi", 2, 7)),
        *(disk(4, "scsi", 3, 15), disk(5, "scsi", 4, 6), disk(6, "ide", 0, 1), disk(7, "ide", 1, 0)),
        *(disk(8, "sata", 0, 5), disk(9, "sata", 1, 0), disk(10, "virtio", 0, 2), disk(11, "usb")),
    ),
    removables=(
        Removable(kind="cdrom", bus="ide", controller=1, unit=1, connected=False),
        Removable(kind="floppy", bus="floppy"),
    ),
    usb="xhci",
)
# igb needs QEMU 8.0.
DEVICES = machine(
    os=GuestOS(id="debian12"),
    cpu=Cpu(count=4, sockets=2, cores=2),
    nics=tuple(Nic(model=model, network_kind="nat", connected=True) for model in NICS if model != "igb"),
    display=Display(model="vmware", memory=16 << 20),
    rng=True,
    usb="ehci",
    serials=(Serial(index=0, kind="pty"), Serial(index=1, kind="network", target="telnet://127.0.0.1:0?server")),
    tpm=Tpm(version="2.0"),
    watchdog="i6300esb",
)
SECURE = machine(
    os=GuestOS(id="win2k22"),
    firmware=Firmware(kind="uefi", secure_boot=True, boot_order=("disk", "cdrom")),
    controllers=(Controller(bus="scsi", index=0, model="lsisas1068"),),
    disks=(disk(0, "scsi"),),
    tpm=Tpm(),
    usb="uhci",
)


def test_qemu_has_a_disk_at_each_place_that_the_domain_names(host: Host) -> None:
    found = host.starts(ALL_BUSES)
    places = re.findall(r"d(\d+)\.img \(raw\)\s+Attached to:\s+(\S+)", found)
    assert {int(number): place for number, place in places} == {
        0: "scsi0-0-0",
        1: "scsi0-0-6",
        2: "scsi1-0-15-0",
        3: "scsi2-0-7-0",
        4: "scsi3-0-15-0",
        5: "scsi4-0-6-0",
        6: "ide0-0-1",
        7: "ide0-1-0",
        8: "sata0-0-5",
        9: "sata1-0-0",
        10: "/machine/peripheral/virtio-disk2/virtio-backend",
        11: dict(places)["11"],
    }
    assert "usb-disk" in dict(places)["11"]


@pytest.mark.parametrize("subject", [DEVICES, machine()], ids=["all", "none"])
def test_qemu_starts_with_the_devices_of_a_domain(host: Host, subject: Machine) -> None:
    host.starts(subject)


@pytest.mark.parametrize("model", [model for model in SCSI if not model.startswith("virtio")])
def test_qemu_has_each_scsi_controller(host: Host, model: str) -> None:
    host.starts(machine(controllers=(Controller(bus="scsi", model=model),), disks=(disk(0, "scsi"),)))


def test_qemu_has_each_graphics_and_sound_card(host: Host) -> None:
    cards = [(display, sound) for display in DISPLAYS for sound in SOUNDS]
    for display, sound in cards[:: len(SOUNDS) + 1]:
        host.starts(machine(display=Display(model=display), sound=sound, watchdog=WATCHDOGS[1]))


@pytest.mark.parametrize(
    ("subject", "image"),
    [
        (SECURE, "OVMF_CODE_4M.ms.fd"),
        (machine(firmware=Firmware(kind="uefi", secure_boot=False)), "OVMF_CODE_4M.fd"),
        (machine(firmware=Firmware(kind="uefi")), "OVMF_CODE_4M.fd"),
        (machine(firmware=Firmware(kind="uefi"), board=Board(chipset="i440fx")), "OVMF_CODE_4M.fd"),
    ],
    ids=["secure", "not secure", "silent", "i440fx"],
)
def test_libvirt_chooses_the_firmware_that_the_domain_asks_for(host: Host, subject: Machine, image: str) -> None:
    assert f"/usr/share/OVMF/{image} (raw" in host.starts(subject)


def test_qemu_gets_the_identity_of_the_machine(host: Host) -> None:
    uuid, generation = UUID(int=0x421F245C << 96 | 1), UUID(int=7)
    identity = Identity(
        uuid=uuid,
        generation_id=generation,
        serial='VMware-42 1f, "24"',
        board_serial="B=1,2",
        chassis_serial="C",
        manufacturer="VMware, Inc.",
        product="$(x) <p> & ü",
        asset_tag="A",
    )
    mac = "00:50:56:aa:bb:cc"
    nics = (Nic(mac=mac, model="vmxnet3", network_kind="nat"),)
    path = host.written(machine(identity=identity, nics=nics, cpu=Cpu(count=2, sockets=1, cores=2)))
    line = host.run(f"domxml-to-native qemu-argv --xml {path}")
    assert f"-uuid {uuid}" in line and str(generation) in line
    assert f'"driver":"vmxnet3","netdev":"hostnet0","id":"net0","mac":"{mac}"' in line
    assert "-smp 2,sockets=1,dies=1,cores=2,threads=1" in line and "-m 128" in line
    # QEMU doubles commas in values, and virsh quotes for a shell.
    assert 'manufacturer=VMware,, Inc.,product=$(x) <p> & ü,serial=VMware-42 1f,, "24"' in line
    assert "type=2,manufacturer=,serial=B=1,,2" in line
    assert "type=3,manufacturer=,serial=C,asset=A" in line


@settings(
    max_examples=25,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(machine=machines())
def test_any_machine_becomes_a_valid_domain(host: Host, machine: Machine) -> None:
    try:
        path = host.written(machine.model_copy(update={"memory": Memory(size=128 << 20)}))
    except PlanError:
        assume(False)
    validate(path)


def test_libvirt_defines_machines_with_hostile_names(host: Host) -> None:
    from vmconv.testing.machines import HOSTILE

    for number, text in enumerate(HOSTILE):
        word = text.replace("\n", " ")
        identity = Identity(manufacturer=word, product=word, serial=word, asset_tag=word)
        subject = machine(name=f"{number} {word}", description=text, identity=identity, nics=(Nic(network=word),))
        path = host.written(subject, str(number))
        host.run(f"define --validate {path}")
    names = host.run("list --all --name").split("\n")
    assert sum(1 for name in names if name.strip()) == len(HOSTILE)


def osinfo_ids() -> list[tuple[str, str]]:
    program = oracle_program("osinfo-query")
    done = subprocess.run([program, "os", "--fields=short-id,id"], capture_output=True, text=True, check=True)
    rows = [line.split("|") for line in done.stdout.splitlines()[2:]]
    return [(short.strip(), url.strip()) for short, url in rows]


def test_ids_are_those_of_libosinfo() -> None:
    ids = osinfo_ids()
    known = dict(ids)
    wrong = [(short, osinfo_url(short)) for short, url in ids if osinfo_url(short) not in (None, url)]
    # Names of systems that are not known by their version.
    assert [each for each in wrong if osinfo_short(str(each[1])) == each[0]] == []
    found = [short for short, url in ids if osinfo_short(url) == short]
    assert all(osinfo_short(url) in (None, short) for short, url in ids)
    assert len(found) > 600
    assert {"debian11", "win2k22", "win10", "rhel9.1", "ubuntu22.04", "sles12sp5", "archlinux"} <= set(found)
    assert known["win2k22"] == osinfo_url("win2k22")
