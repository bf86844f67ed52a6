"""Proxmox VE: the conformance kit, configurations of qemu-server, and what the platform lacks."""

from __future__ import annotations

import subprocess
from typing import Any
from uuid import UUID

import pytest

from support.requirements import missing, oracle_program
from vmconv.errors import ImageError, PlanError, UsageError
from vmconv.machine import Board, Controller, Cpu, Disk, Firmware, GuestOS, Identity, Machine, Memory, Nic, Removable
from vmconv.model.options import parse_options
from vmconv.plugin import Adapted, Opener, Registry
from vmconv.testing import MachineTests, image_file
from vmconv_proxmox import Proxmox

PROXMOX = Proxmox()


class TestProxmox(MachineTests):
    format = Proxmox()


def read(text: str) -> Machine:
    return TestProxmox().read(text.encode())


def options(**given: Any) -> Any:
    return parse_options(PROXMOX.options(), given, "proxmox")


def adapted(machine: Machine, **given: Any) -> Adapted:
    return PROXMOX.adapt(machine, options(**given))


def written(machine: Machine, **given: Any) -> str:
    chosen = options(**given)
    return PROXMOX.write(PROXMOX.adapt(machine, chosen).machine, chosen)[-1].content.decode()


def lines(machine: Machine, **given: Any) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in written(machine, **given).splitlines() if not line.startswith("#"))


# As Proxmox VE 8 writes it: keys in their order, the pending change and the snapshot behind.
WEB = """\
#web server%3A second
#100%25 of it
agent: 1,fstrim_cloned_disks=1
bios: ovmf
boot: order=scsi0;ide2;net0
cores: 2
cpu: host,flags=+aes
efidisk0: local:100/vm-100-disk-1.qcow2,efitype=4m,pre-enrolled-keys=1,size=528K
ide2: local:iso/debian-12.5.0-amd64-netinst.iso,media=cdrom,size=629M
machine: pc-q35-8.1
memory: 4096
name: web.example.org
net0: virtio=BC:24:11:2C:69:EC,bridge=vmbr1,firewall=1,tag=20
net1: e1000=BC:24:11:2C:69:ED,link_down=1
numa: 0
ostype: l26
parent: before
sata0: local-lvm:vm-100-disk-3,size=8G
scsi0: nas:100/vm-100-disk-0.qcow2,discard=on,iothread=1,serial=A%2FB%2C1,size=32G,ssd=1
scsi1: nas:100/base-100-disk-0.qcow2/101/vm-101-disk-0.qcow2,size=4.5G,snapshot=1
scsihw: virtio-scsi-single
serial0: socket
smbios1: uuid=7b10d7af-b932-4c66-b2c3-3996152ec465,base64=1,serial=QUJDLDE9Mg==,family=Zg==
sockets: 2
tpmstate0: local:100/vm-100-disk-2.raw,size=4M,version=v2.0
usb0: host=046d:c52b
vcpus: 3
vga: qxl2,memory=32
vmgenid: 7079e97c-50e3-4079-afe7-23e67566b946

[PENDING]
memory: 8192

[before]
memory: 1024
snaptime: 1737549549
"""


def test_a_configuration_is_read_with_all_it_says() -> None:
    machine = read(WEB)
    assert machine.name == "web.example.org"
    assert machine.description == "web server: second\n100% of it"
    assert machine.os == GuestOS(architecture="x86_64", source_id="l26")
    assert machine.cpu == Cpu(count=3, sockets=2, cores=2, threads=1, model="host")
    assert machine.memory == Memory(size=4096 << 20)
    assert machine.firmware.kind == "uefi"
    assert machine.firmware.secure_boot is None
    assert machine.firmware.nvram is not None
    assert machine.firmware.nvram.file == "vm-100-disk-1.qcow2"
    assert machine.tpm is not None
    assert (machine.tpm.version, machine.tpm.state) == ("2.0", "vm-100-disk-2.raw")
    assert machine.board == Board(chipset="q35", clock="utc")
    assert machine.snapshots == ("before",)
    assert machine.passthrough == ("usb0: host=046d:c52b",)
    assert machine.controllers == (
        Controller(bus="ide", index=1),
        Controller(bus="sata", index=0, model="ahci"),
        Controller(bus="scsi", index=0, model="virtio-scsi"),
    )


def test_identities_are_decoded() -> None:
    identity = read(WEB).identity
    assert identity.uuid == UUID("7b10d7af-b932-4c66-b2c3-3996152ec465")
    assert identity.generation_id == UUID("7079e97c-50e3-4079-afe7-23e67566b946")
    assert identity.serial == "ABC,1=2"
    assert read("smbios1: serial=plain\n").identity.serial == "plain"


def test_disks_are_files_of_storages_and_devices_are_only_named() -> None:
    lvm, first, clone = read(WEB).disks
    assert (lvm.file, lvm.device, lvm.capacity) == (None, "local-lvm:vm-100-disk-3", 8 << 30)
    assert (first.file, first.format, first.capacity) == ("vm-100-disk-0.qcow2", "qcow2", 32 << 30)
    assert (first.bus, first.controller, first.unit, first.boot_index) == ("scsi", 0, 0, 0)
    assert (first.serial, first.discard, first.mode) == ("A/B,1", True, "persistent")
    assert (clone.file, clone.capacity, clone.mode) == ("vm-101-disk-0.qcow2", 9 << 29, "independent-nonpersistent")
    assert read("scsi0: /mnt/a.img\n").disks[0].file == "/mnt/a.img"
    assert read("scsi0: /dev/sdb\n").disks[0].device == "/dev/sdb"


def test_network_cards_and_drives_are_read() -> None:
    first, second = read(WEB).nics
    assert first == Nic(
        mac="bc:24:11:2c:69:ec",
        model="virtio",
        network="vmbr1",
        network_kind="bridged",
        connected=True,
        boot_index=2,
    )
    assert (second.network_kind, second.connected, second.model) == ("nat", False, "e1000")
    (drive,) = read(WEB).removables
    assert (drive.file, drive.unit, drive.boot_index) == ("debian-12.5.0-amd64-netinst.iso", 0, 1)


def test_settings_of_proxmox_alone_survive_a_round_trip() -> None:
    kept = read(WEB).extra["proxmox"]
    assert kept == {
        "agent": "1,fstrim_cloned_disks=1",
        "numa": "0",
        "cpu.flags": "+aes",
        "efidisk0.pre-enrolled-keys": "1",
        "machine.type": "pc-q35-8.1",
        "net0.firewall": "1",
        "net0.tag": "20",
        "scsi0.iothread": "1",
        "scsi0.ssd": "1",
        "smbios1.family": "f",
    }
    again = lines(read(WEB))
    assert again["agent"] == "1,fstrim_cloned_disks=1"
    assert again["net0"] == "virtio=BC:24:11:2C:69:EC,bridge=vmbr1,firewall=1,tag=20"
    assert again["machine"] == "pc-q35-8.1"
    assert "ssd=1" in again["scsi0"]
    assert again["smbios1"].endswith("base64=1,serial=QUJDLDE9Mg==,family=Zg==")
    assert "parent" not in again


@pytest.mark.parametrize(
    ("boot", "order"),
    [
        ("", {"net0": 0}),
        ("boot: cdn\nbootdisk: scsi0\n", {"scsi0": 0, "ide2": 1, "net0": 2}),
        ("boot: legacy=ndc\nbootdisk: scsi0\n", {"net0": 0, "ide2": 1, "scsi0": 2}),
        ("boot: c\n", {}),
        ("boot: order=ide2\n", {"ide2": 0}),
        ("boot: \n", {}),
    ],
    ids=["silent", "letters", "legacy", "no-bootdisk", "order", "empty"],
)
def test_the_boot_order_is_the_one_of_qemu_server(boot: str, order: dict[str, int]) -> None:
    drives = "scsi0: a:1/x.raw\nnet0: virtio\n" + ("ide2: none,media=cdrom\n" if "boot" in boot else "")
    machine = read(boot + drives)
    found = {"scsi0": machine.disks[0].boot_index, "net0": machine.nics[0].boot_index}
    found["ide2"] = machine.removables[0].boot_index if machine.removables else None
    assert {key: index for key, index in found.items() if index is not None} == order


def test_disks_without_a_letter_of_their_own_are_tried_last() -> None:
    assert read("scsi0: a:1/x.raw\nnet0: virtio\n").firmware.boot_order == ("disk",)
    assert read("boot: n\nscsi0: a:1/x.raw\n").firmware.boot_order == ()
    assert lines(read("scsi0: a:1/x.raw\nnet0: virtio\n"))["boot"] == "order=net0;scsi0"


def test_defaults_are_those_of_the_platform() -> None:
    machine = read("scsi9: a:1/x.raw\nostype: win10\n")
    assert machine.memory.size == 512 << 20
    assert machine.cpu == Cpu(count=1, sockets=1, cores=1, threads=1, model="kvm64")
    assert machine.firmware.kind == "bios"
    assert machine.board == Board(chipset="i440fx", clock="localtime")
    assert machine.controllers == (Controller(bus="scsi", index=1, model="lsi53c895a"),)
    assert (machine.disks[0].controller, machine.disks[0].unit) == (1, 2)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("scsi0\n", "line 1: 'scsi0' is not \"key: value\""),
        ("memory: many\n", "memory: 'many' is not a number"),
        ("memory: 0\n", "memory: '0' is not a number from 1"),
        ("sockets: 2\nvcpus: 3\n", "vcpus: '3' is not a number from 1 to 2"),
        ("sockets: 4096\ncores: 4096\n", "cores count: 16777216"),
        ("scsi31: a:1/x.raw\n", "scsi31: Proxmox has scsi0 to scsi30"),
        ("scsi0: a:1/x.raw,size=big\n", "scsi0 size: 'big' is not a size"),
        ("scsi0: a:1/x.raw,size=99999999999999T\n", "scsi0 size"),
        ("scsi0: a:1/x.raw,a:1/y.raw\n", "scsi0: property 'file' is given twice"),
        ("scsi0: a:1/x.raw,ssd=\n", "scsi0: 'ssd=' is not property=value"),
        ("scsi0: size=3G\n", "scsi0: names no volume"),
        ("scsi0: dir/x.raw\n", "scsi0: 'dir/x.raw' is neither a volume nor a device"),
        ("net0: virtio=12:34\n", "net0: '12:34' is not a MAC address"),
        ("net0: virtio,link_down=maybe\n", "net0 link_down: 'maybe' is neither 1 nor 0"),
        ("bios: efi\n", "bios: 'efi' is neither seabios nor ovmf"),
        ("arch: sparc\n", "arch architecture: 'sparc'"),
        ("smbios1: uuid=1234\n", "smbios1 uuid: '1234' is not a UUID"),
        ("smbios1: base64=1,serial=!!\n", "smbios1 serial: '!!' is not UTF-8 in base64"),
        ("vmgenid: x\n", "vmgenid: 'x' is not a UUID"),
        ("serial7: socket\n", "serial7: '7' is not a number from 0 to 3"),
        ("tpmstate0: a:1/x.raw,version=v3\n", "tpmstate0 version: '3'"),
        ("name: a\x07b\n", "machine name"),
        ("rootfs: local:100/x.raw\nostype: debian\n", "rootfs: this is the configuration of a container"),
        ("".join(f"x{number}: 1\n" for number in range(1001)), "settings: more than 1000 are not known"),
    ],
    ids=lambda value: value[:20].strip() if "\n" in value else "",
)
def test_a_damaged_setting_is_named(text: str, problem: str) -> None:
    with pytest.raises(ImageError) as caught:
        read(text)
    assert f"test.conf: {problem}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_configurations_of_virtual_machines_are_claimed() -> None:
    assert PROXMOX.probe(image_file(WEB.encode(), "100.conf"))
    for text in ("apiVersion: v1\nkind: Pod\n", "memory: 1\nrootfs: a\nnet0: b\n", "[Unit]\nDescription=x\n"):
        assert not PROXMOX.probe(image_file(text.encode(), "x.conf"))


def test_names_are_those_of_a_directory_storage() -> None:
    chosen, machine = options(vmid="321"), Machine(disks=(Disk(file="a"), Disk(file="b")))
    assert PROXMOX.directory(machine, chosen) == "images/321"
    assert PROXMOX.disk_name(machine, 1, ".qcow2", chosen) == "vm-321-disk-1.qcow2"
    assert PROXMOX.nvram_name(machine, chosen) == "vm-321-disk-2.raw"
    assert PROXMOX.config_name(machine, chosen) == "321.conf"


@pytest.mark.parametrize(
    "given",
    [{"vmid": "99"}, {"vmid": "1000000000"}, {"storage": "a,b"}, {"bridge": "vmbr0,tag=1"}, {"cpu": "x,flags=+y"}],
    ids=["low", "high", "storage", "bridge", "cpu"],
)
def test_options_that_would_break_the_configuration_are_refused(given: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        options(**given)


def a_machine(model: str | None, *, firmware: Any = "bios", system: str = "debian12", bus: Any = "scsi") -> Machine:
    return Machine(
        os=GuestOS(id=system),
        firmware=Firmware(kind=firmware),
        controllers=(Controller(bus=bus, index=0, model=model),),
        disks=(Disk(file="a.qcow2", bus=bus, controller=0, unit=0),),
    )


@pytest.mark.parametrize(
    ("machine", "place", "model", "reason"),
    [
        (a_machine("lsilogic"), "scsi0", "virtio-scsi-single", "Proxmox has no lsilogic"),
        (a_machine("pvscsi"), "scsi0", "pvscsi", None),
        (a_machine("pvscsi", firmware="uefi"), "scsi0", "virtio-scsi-single", "OVMF has no driver for it"),
        (a_machine("lsi53c895a"), "scsi0", "lsi", None),
        (a_machine("lsi53c895a", firmware="uefi"), "scsi0", "virtio-scsi-single", "OVMF has no driver for it"),
        (a_machine("lsisas1068", system="win2k16"), "sata0", "virtio-scsi-single", "and Windows has one for SATA"),
        (a_machine("nvme", bus="nvme", system="win11"), "sata0", "virtio-scsi-single", "Proxmox has no nvme disks"),
        (a_machine("nvme", bus="nvme"), "scsi0", "virtio-scsi-single", "Proxmox has no nvme disks"),
    ],
    ids=["lsilogic", "pvscsi", "pvscsi-uefi", "lsi", "lsi-uefi", "sas-windows", "nvme-windows", "nvme"],
)
def test_a_disk_gets_a_controller_that_exists_and_has_a_driver(
    machine: Machine, place: str, model: str, reason: str | None
) -> None:
    found = lines(machine)
    assert place in found
    assert found["scsihw"] == model
    reasons = [each.reason for each in adapted(machine).substitutions if each.path in ("disks[0]", "controllers[0]")]
    assert any(reason in each for each in reasons) if reason else not reasons


def test_a_model_of_the_users_choice_is_the_reason() -> None:
    machine = a_machine("pvscsi")
    assert lines(machine, scsihw="megasas")["scsihw"] == "megasas"
    assert "-o scsihw=megasas" in [each.reason for each in adapted(machine, scsihw="megasas").substitutions]


def test_drives_beyond_the_places_of_their_bus_go_to_another() -> None:
    disks = tuple(Disk(file=f"{at}.raw", bus="ide", controller=at // 2, unit=at % 2) for at in range(6))
    found = lines(Machine(disks=disks, removables=(Removable(kind="cdrom", bus="ide", controller=0, unit=0),)))
    assert [key for key in found if key[:-1] in ("ide", "scsi", "sata")] == [
        *(f"ide{n}" for n in range(4)),
        "scsi0",
        "scsi1",
        "sata0",
    ]
    with pytest.raises(PlanError, match="more drives than Proxmox has places"):
        adapted(Machine(disks=tuple(Disk(file=f"{at}.raw", bus="scsi") for at in range(60))))


def test_a_silent_boot_order_starts_from_disks() -> None:
    machine = a_machine("virtio-scsi").model_copy(update={"nics": (Nic(),)})
    assert lines(machine)["boot"] == "order=scsi0;net0"
    ordered = machine.model_copy(update={"firmware": Firmware(kind="bios", boot_order=("network", "disk"))})
    assert lines(ordered)["boot"] == "order=net0;scsi0"


def test_a_card_without_an_address_gets_one_that_stays() -> None:
    machine = Machine(identity=Identity(uuid=UUID(int=7)), nics=(Nic(model="hyperv"), Nic(mac="01:00:5e:00:00:01")))
    first, second = (lines(machine)[f"net{number}"] for number in (0, 1))
    assert first.startswith("virtio=BC:24:11:")
    assert second.startswith("virtio=BC:24:11:")
    assert first != second
    assert first == lines(machine)["net0"]
    reasons = {each.path: each.reason for each in adapted(machine).substitutions}
    assert reasons["nics[0].model"] == "Proxmox has no such card"
    assert reasons["nics[1].mac"] == "Proxmox refuses multicast addresses"


def test_cards_go_to_the_bridge_that_the_target_has() -> None:
    machine = Machine(nics=tuple(Nic(network=name) for name in ("VM Network", "vmbr7", "DMZ")))
    found = lines(machine, bridge="vmbr2")
    assert [found[f"net{number}"].partition("bridge=")[2] for number in range(3)] == ["vmbr2", "vmbr7", "vmbr2"]


def test_a_machine_with_a_tpm_gets_an_empty_state_beside_its_disks() -> None:
    machine = read(WEB)
    state, config = PROXMOX.write(adapted(machine).machine, options())
    assert (state.name, len(state.content), any(state.content)) == ("vm-100-disk-3.raw", 4 << 20, False)
    assert b"tpmstate0: local:100/vm-100-disk-3.raw,size=4M,version=v2.0\n" in config.content


def test_a_device_that_proxmox_cannot_name_is_refused() -> None:
    with pytest.raises(PlanError, match=r"disk 'vml\.02' is neither a device in /dev nor a volume"):
        adapted(Machine(disks=(Disk(device="vml.02", bus="scsi", controller=0, unit=0),)))


def test_a_file_name_that_a_volume_cannot_have_is_refused() -> None:
    with pytest.raises(PlanError, match="has a comma"):
        written(Machine(disks=(Disk(file="a,b.raw", bus="scsi", controller=0, unit=0),)))


def test_settings_that_reach_the_host_are_dropped() -> None:
    extra = {"proxmox": {"args": "-drive file=/etc/shadow", "hookscript": "local:snippets/x.sh", "virtiofs0": "home"}}
    machine = Machine(extra={"proxmox": {**extra["proxmox"], "tags": "a"}})
    found = adapted(machine)
    assert found.machine.extra == {"proxmox": {"tags": "a"}}
    assert {each.before.partition("=")[0] for each in found.substitutions if not each.after} >= {*extra["proxmox"]}
    assert "shadow" not in written(machine)


def test_settings_that_would_make_lines_of_their_own_are_dropped() -> None:
    extra = {
        "proxmox": {"args": "-a\nname: evil", "a b": "c", "scsi3.ssd": "1", "unused0": "local:1/x.raw", "net0": "x"}
    }
    machine = Machine(nics=(Nic(),), extra=extra)
    found = adapted(machine)
    assert found.machine.extra == {}
    assert len([each for each in found.substitutions if each.path == "extra.proxmox"]) == 5
    assert "evil" not in written(machine)


PERL = """
use URI::Escape; use Encode; binmode(STDOUT, ':utf8');
while (<STDIN>) { chomp; print decode('utf8', uri_unescape($_)), "\\n"; }
"""


def test_perl_decodes_descriptions_and_serial_numbers() -> None:
    """qemu-server decodes both with `URI::Escape`."""
    perl = oracle_program("perl")
    if subprocess.run([perl, "-MURI::Escape", "-e1"], capture_output=True, check=False).returncode:
        missing("oracle", "perl has no URI::Escape")
    text, serial = "50% of: ünïcödé 名前 #[x]\n=a,b; 'c'\\", "a,b=%2C:/é'()"
    machine = Machine(description=text, disks=(Disk(file="a.raw", bus="scsi", controller=0, unit=0, serial=serial),))
    content = written(machine).splitlines()
    described = [line[1:] for line in content if line.startswith("#")]
    (drive,) = (line for line in content if line.startswith("scsi0:"))
    (coded,) = (part.partition("=")[2] for part in drive.split(",") if part.startswith("serial="))
    stdin = "\n".join([*described, coded])
    done = subprocess.run([perl, "-e", PERL], input=stdin, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [*text.split("\n"), serial]


def test_a_controller_with_control_characters_is_refused() -> None:
    with pytest.raises(ImageError, match="is not the name of a controller"):
        Proxmox().read(image_file(b"memory: 64\nscsihw: p\x06vscsi\n", "100.conf"), Opener(Registry()))
