"""VMX: the conformance kit, rules of the text, devices, and bad input."""

from __future__ import annotations

import time
from uuid import UUID

import pytest

from vmconv.errors import ImageError, PlanError, UsageError
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
from vmconv.model.options import parse_options
from vmconv.testing import MachineTests, image_file
from vmconv_vmx import Vmx
from vmconv_vmx.options import Options
from vmconv_vmx.settings import MAX_SETTINGS

HEAD = 'config.version = "8"\nvirtualHW.version = "19"\n'
FORMAT = Vmx()


class TestVmx(MachineTests):
    format = FORMAT


def read(text: str | bytes, head: str = HEAD) -> Machine:
    content = text if isinstance(text, bytes) else (head + text).encode()
    return FORMAT.read(image_file(content, "web.vmx"), None)  # type: ignore[arg-type]


def written(machine: Machine, options: Options | None = None) -> dict[str, str]:
    """The settings of a machine's VMX, split in the simplest way."""
    adapted = FORMAT.adapt(machine, options or Options()).machine
    lines = FORMAT.write(adapted, options)[-1].content.decode().splitlines()
    pairs = [line.split(" = ", 1) for line in lines]
    assert len({key.lower() for key, _ in pairs}) == len(pairs)
    return {key: value[1:-1] for key, value in pairs}


# The text


def test_a_guest_system_with_control_characters_is_refused() -> None:
    with pytest.raises(ImageError, match=r"guestOS source_id: 'debian\\x0012': Value error, has the character"):
        read('config.version = "8"\nguestOS = "debian\x0012"\n')


def test_keys_ignore_case_and_values_need_no_quotes() -> None:
    text = '#!/usr/bin/vmware\n\n  DISPLAYNAME="web"  \r\nMemSize = 512\n# memsize = "4"\nnumvcpus\t=\t"2"\n'
    machine = read(text)
    assert (machine.name, machine.memory.size, machine.cpu.count) == ("web", 512 << 20, 2)


def test_escapes_are_bytes_of_the_encoding() -> None:
    machine = read('.encoding = "UTF-8"\nannotation = "|22|7C|7c22|0D|0Ab|C3|BC|23 a|x|"\n')
    assert machine.description == '"||22\nbü# a|x|'


@pytest.mark.parametrize(
    ("encoding", "name"),
    [("UTF-8", "ü名"), ("windows-1252", "ü€"), ("Shift_JIS", "名前"), ("GBK", "名前"), ("ISO-8859-15", "€")],
)
def test_the_file_names_its_encoding(encoding: str, name: str) -> None:
    text = f'{HEAD}displayName = "{name}"\nscsi0:0.fileName = "{name}.vmdk"\nscsi0:0.present = "TRUE"\n'
    codec = {"Shift_JIS": "cp932"}.get(encoding, encoding)
    machine = read(f'.encoding = "{encoding}"\n'.encode() + text.encode(codec))
    assert (machine.name, machine.disks[0].file) == (name, f"{name}.vmdk")


def test_a_byte_order_mark_is_no_key() -> None:
    assert read(b"\xef\xbb\xbf" + (HEAD + 'displayName = "ü"\n').encode()).name == "ü"


def test_a_repeated_setting_does_no_harm() -> None:
    assert read('memsize = "64"\nMEMSIZE = "64"\n').memory.size == 64 << 20


def test_many_lines_are_refused_in_bounded_time() -> None:
    began = time.process_time()
    with pytest.raises(ImageError, match=rf"has more than {MAX_SETTINGS} settings"):
        read("".join(f'a{number} = "x"\n' for number in range(100_000)))
    assert read("# comment\n" * 100_000 + "\n" * 100_000).name is None
    absent = "".join(f'scsi{number % 4}:{number}.fileName = "x"\nethernet{number}.x = "y"\n' for number in range(9_000))
    assert read(absent).extra == {}
    assert time.process_time() - began < 10


BAD = {
    "no setting": ('displayName "x"\n', r"line 3: 'displayName \"x\"' is not a setting such as"),
    "quote": ('displayName = "a"b"\n', "line 3: .* is not a setting"),
    "contradiction": ('memsize = "4"\nmemsize = "8"\n', "line 4: memsize: '8' contradicts '4' above"),
    "encoding": ('.encoding = "rot13"\n', r"\.encoding: 'rot13' is not an encoding of VMware"),
    "escape": ('displayName = "a|FF"\n', r"line 3: displayName: 'a\|FF' is not utf-8"),
    "control": ('displayName = "a|00b"\n', "displayName name: .*: Value error, has the character"),
    "memory": ('memsize = "1.5"\n', "memsize: '1.5' is not a number from 1 to"),
    "memory size": ('memsize = "99999999999"\n', "memsize: '99999999999' is not a number"),
    "processors": ('numvcpus = "0"\n', "numvcpus: '0' is not a number from 1 to 4096"),
    "cores": ('numvcpus = "4"\ncpuid.coresPerSocket = "3"\n', "cpuid.coresPerSocket: 3 does not divide numvcpus"),
    "firmware": ('firmware = "uefi"\n', "firmware: 'uefi' is not bios or efi"),
    "flag": ('scsi0.present = "maybe"\n', r"scsi0\.present: 'maybe' is not TRUE or FALSE"),
    "uuid": ('uuid.bios = "56 4d"\n', "uuid.bios: '56 4d' is not a UUID of 32 hexadecimal digits"),
    "generation": ('vm.genid = "1"\nvm.genidX = "9223372036854775808"\n', "vm.genidX: '9223372036854775808' is not"),
    "no file": ('scsi0:0.present = "TRUE"\n', "scsi0:0.fileName: is missing"),
    "device": ('ide0:0.present = "TRUE"\nide0:0.deviceType = "tape"\n', "ide0:0.deviceType: 'tape' is not a disk"),
    "mac": (
        'ethernet0.present = "TRUE"\nethernet0.generatedAddress = "00:0c:29:1"\n',
        "ethernet0.generatedAddress: '00:0c:29:1' is not a MAC address",
    ),
    "mac type": (
        'ethernet0.present = "TRUE"\nethernet0.addressType = "odd"\n',
        "ethernet0.addressType: 'odd' is not static, generated or vpx",
    ),
    "encrypted": ('encryption.keySafe = "vmware:key/list/x"\n', "encryption.keySafe: the machine is encrypted"),
}


@pytest.mark.parametrize(("text", "problem"), BAD.values(), ids=BAD)
def test_a_setting_that_cannot_be_is_refused_with_its_key(text: str, problem: str) -> None:
    with pytest.raises(ImageError, match=problem) as caught:
        read(text)
    assert str(caught.value).startswith("web.vmx: ")


def test_text_that_is_not_in_its_encoding_is_refused_with_its_place() -> None:
    with pytest.raises(ImageError, match="text at 0x3d: is not utf-8"):
        read((HEAD + 'displayName = "').encode() + b'\xfc"\n')


# Devices


def test_devices_are_present_only_if_the_file_says_so() -> None:
    machine = read(
        'scsi0:0.fileName = "a.vmdk"\nsched.scsi0:0.shares = "normal"\n'
        'scsi0:1.fileName = "b.vmdk"\nscsi0:1.present = "FALSE"\n'
        'ethernet0.virtualDev = "e1000"\nserial0.fileName = "x"\nsata0.present = "FALSE"\nsound.fileName = "-1"\n'
    )
    assert machine == Machine(cpu=Cpu(count=1), board=Board(hardware_version="vmx-19"), firmware=Firmware(kind="bios"))


def test_the_first_floppy_is_present_unless_denied() -> None:
    assert read('floppy0.fileName = "A:"\nfloppy1.fileName = "B:"\n').removables == (
        Removable(kind="floppy", bus="floppy", controller=0, unit=0, device="A:"),
    )
    assert read('floppy0.fileName = "A:"\nfloppy0.present = "FALSE"\n').removables == ()


@pytest.mark.parametrize(
    ("kind", "name", "place"),
    [
        ("rawDisk", "a.vmdk", "device"),
        ("disk", "/dev/sdb", "device"),
        ("disk", "\\\\.\\PhysicalDrive1", "device"),
        ("scsi-passthru-rdm", "lun.vmdk", "device"),
        ("scsi-hardDisk", "/vmfs/volumes/a/b.vmdk", "file"),
        ("disk", "../other/b.vmdk", "file"),
    ],
)
def test_physical_disks_are_named_as_such(kind: str, name: str, place: str) -> None:
    (disk,) = read(f'scsi0:0.present = "TRUE"\nscsi0:0.deviceType = "{kind}"\nscsi0:0.fileName = "{name}"\n').disks
    assert getattr(disk, place) == name
    assert (disk.device is None) == (place == "file")


def test_emulated_access_to_a_drive_stays_emulated() -> None:
    for kind in ("atapi-cdrom", "cdrom-raw"):
        machine = read(f'ide1:0.present = "TRUE"\nide1:0.deviceType = "{kind}"\nide1:0.fileName = "/dev/sr0"\n')
        assert machine.removables[0].device == "/dev/sr0"
        assert written(machine)["ide1:0.deviceType"] == kind


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        ('scsi0:0.sharing = "multi-writer"\n', True),
        ('scsi0:0.sharing = "none"\n', None),
        ('scsi0:0.shared = "TRUE"\n', True),
        ('scsi0.sharedBus = "physical"\n', True),
        ('scsi0.sharedBus = "none"\n', None),
    ],
)
def test_disks_of_several_machines_are_shared(text: str, shared: bool | None) -> None:
    before = read('scsi0.present = "TRUE"\nscsi0:0.present = "TRUE"\nscsi0:0.fileName = "a.vmdk"\n' + text)
    assert before.disks[0].shared is shared
    again = FORMAT.write(FORMAT.adapt(before, Options()).machine, Options())[-1].content
    assert read(again) == before
    assert again.count(b"shar") == text.count("shar") - ('sharedBus = "none"' in text)


@pytest.mark.parametrize(
    ("text", "nic"),
    [
        ('virtualDev = "vmxnet3"\nnetworkName = "LAN"\n', Nic(model="vmxnet3", network="LAN")),
        ('virtualDev = "vmxnet"\nfeatures = "15"\n', Nic(model="vmxnet2")),
        ('virtualDev = "vlance"\nconnectionType = "hostonly"\n', Nic(model="pcnet32", network_kind="host-only")),
        ('virtualDev = "SRIOV"\nstartConnected = "FALSE"\n', Nic(model="sriov", connected=False)),
        ('connectionType = "custom"\nvnet = "VMnet2"\n', Nic(network="vmnet2")),
        (
            'addressType = "static"\naddress = "00:50:56:2F:D3:46"\ngeneratedAddress = "00:0c:29:01:02:03"\n',
            Nic(mac="00:50:56:2f:d3:46", mac_origin="static"),
        ),
        ('generatedAddress = "00:0C:29:01:02:03"\n', Nic(mac="00:0c:29:01:02:03", mac_origin="generated")),
        (
            'addressType = "vpx"\ngeneratedAddress = "00:50:56:87:65:43"\npciSlotNumber = "192"\n',
            Nic(mac="00:50:56:87:65:43", mac_origin="generated", pci_slot="192"),
        ),
        ('pciSlotNumber = "-1"\n', Nic()),
    ],
    ids=["vmxnet3", "vmxnet2", "vlance", "sriov", "custom", "static", "generated", "vpx", "no slot"],
)
def test_network_cards(text: str, nic: Nic) -> None:
    lines = [f"ethernet0.{line}" for line in text.splitlines()]
    assert read("\n".join(['ethernet0.present = "TRUE"', *lines])).nics == (nic,)


def test_settings_follow_a_card_that_changes_its_number() -> None:
    machine = read('ethernet2.present = "TRUE"\nethernet2.wakeOnPcktRcv = "FALSE"\nethernet1.x = "y"\n')
    assert machine.extra == {"vmx": {"ethernet0.wakeonpcktrcv": "FALSE"}}


@pytest.mark.parametrize(
    ("version", "seen", "text"),
    [
        (19, "af964d56-46e6-86bd-5c4d-654e7736ef31", "564d96af-e646-bd86-5c4d-654e7736ef31"),
        (13, "af964d56-46e6-86bd-5c4d-654e7736ef31", "564d96af-e646-bd86-5c4d-654e7736ef31"),
        (12, "564d96af-e646-bd86-5c4d-654e7736ef31", None),
    ],
)
def test_the_guest_reads_its_uuid_in_the_order_of_its_hardware(version: int, seen: str, text: str | None) -> None:
    head = f'virtualHW.version = "{version}"\n'
    machine = read('uuid.bios = "56 4d 96 af e6 46 bd 86-5c 4d 65 4e 77 36 ef 31"\n', head)
    assert machine.identity.uuid == UUID(seen)
    assert machine.identity.uuid_text == (text and UUID(text))
    assert machine.identity.serial == "VMware-56 4d 96 af e6 46 bd 86-5c 4d 65 4e 77 36 ef 31"
    assert written(machine)["uuid.bios"] == "56 4d 96 af e6 46 bd 86-5c 4d 65 4e 77 36 ef 31"


def test_a_serial_number_of_the_host_is_not_known() -> None:
    machine = read('uuid.bios = "56 4d 96 af e6 46 bd 86-5c 4d 65 4e 77 36 ef 31"\nsmbios.reflectHost = "TRUE"\n')
    assert machine.identity.serial is None
    assert written(machine)["smbios.reflectHost"] == "TRUE"


def test_the_generation_id_is_the_one_that_virt_v2v_measured() -> None:
    machine = read('vm.genid = "-570734802784577186"\nvm.genidX = "-5042519231342505152"\n')
    assert machine.identity.generation_id == UUID("8312995e-57b8-f814-4013-c1ba795f05ba")


@pytest.mark.parametrize(
    ("text", "order", "started"),
    [
        ("", (), [("b.vmdk", None), ("a.vmdk", 0)]),
        ('bios.hddOrder = "scsi0:1"\n', (), [("b.vmdk", None), ("a.vmdk", None)]),
        ('bios.bootOrder = "HDD,cdrom"\n', ("disk", "cdrom"), [("b.vmdk", None), ("a.vmdk", 0)]),
        ('bios.bootOrder = "ethernet1,hdd"\n', ("network", "disk"), [("a.vmdk", None), ("b.vmdk", None)]),
        ('bios.bootOrder = "usb"\n', (), [("b.vmdk", None), ("a.vmdk", 0)]),
    ],
    ids=["by place", "listed", "disk first", "network first", "unknown"],
)
def test_the_first_place_starts_unless_a_list_says_otherwise(
    text: str, order: tuple[str, ...], started: list[tuple[str, int | None]]
) -> None:
    disks = "".join(
        f'scsi0:{unit}.present = "TRUE"\nscsi0:{unit}.fileName = "{name}.vmdk"\n' for unit, name in ((1, "b"), (0, "a"))
    )
    machine = read(disks + text)
    assert machine.firmware.boot_order == order
    assert [(disk.file, disk.boot_index) for disk in machine.disks] == started


def test_nothing_is_known_about_the_order_of_buses() -> None:
    nodes = ("scsi0:0", "sata0:0", "ide0:0")
    machine = read("".join(f'{node}.present = "TRUE"\n{node}.fileName = "{node[:4]}.vmdk"\n' for node in nodes))
    assert [(disk.bus, disk.boot_index) for disk in machine.disks] == [("scsi", None), ("sata", None), ("ide", None)]
    assert "bios.hddOrder" not in written(machine)


def test_other_parts_of_a_machine() -> None:
    machine = read(
        'firmware = "efi"\nuefi.secureBoot.enabled = "TRUE"\nnvram = "web.nvram"\nvtpm.present = "TRUE"\n'
        'numvcpus = "8"\ncpuid.coresPerSocket = "4"\nvcpu.hotadd = "TRUE"\nmem.hotadd = "FALSE"\nmemsize = "4096"\n'
        'usb.present = "TRUE"\nehci.present = "TRUE"\nsound.present = "TRUE"\nsound.virtualDev = "hdaudio"\n'
        'svga.present = "TRUE"\nsvga.vramSize = "8388608"\nrtc.diffFromUTC = "0"\nSMBIOS.assetTag = "7"\n'
        'serial0.present = "TRUE"\nserial0.fileType = "network"\nserial0.fileName = "telnet://:1"\n'
        'serial0.network.endPoint = "server"\ncheckpoint.vmState = "web.vmss"\nhostCPUID.0 = "1"\n'
        'pciPassthru0.present = "TRUE"\npciPassthru0.id = "00000:003:00.0"\nguestOS = "windows2019srvnext-64"\n'
    )
    assert machine == Machine(
        os=GuestOS(id="win2k22", architecture="x86_64", source_id="windows2019srvnext-64"),
        cpu=Cpu(count=8, sockets=2, cores=4, threads=1, hot_add=True),
        memory=Memory(size=4 << 30, hot_add=False),
        firmware=Firmware(kind="uefi", secure_boot=True, nvram={"file": "web.nvram", "kind": "vmware"}),
        tpm=Tpm(version="2.0"),
        identity=Identity(asset_tag="7"),
        board=Board(hardware_version="vmx-19", clock="utc"),
        display=Display(model="vmware", memory=8 << 20),
        sound="hda",
        usb="ehci",
        serials=(Serial(index=0, kind="network", target="telnet://:1"),),
        passthrough=("00000:003:00.0",),
        memory_state="web.vmss",
        extra={"vmx": {"serial0.network.endPoint": "server"}},
    )


def test_other_settings_are_kept_and_replace_nothing() -> None:
    before = read('isolation.tools.copy.disable = "TRUE"\nguestOS = "fusionos-64"\npciBridge4.functions = "4"\n')
    assert before.extra["vmx"] == {
        "isolation.tools.copy.disable": "TRUE",
        "guestOS": "fusionos-64",
        "pciBridge4.functions": "4",
    }
    found = written(before)
    assert found["guestOS"] == "fusionos-64"
    assert (found["pciBridge4.functions"], found["pciBridge5.functions"]) == ("4", "8")
    hostile = {"MemSize": "9", 'x"\ny': "1", "a b": "1", "floppy0.PRESENT": "TRUE", "ok": '"\n#|'}
    found = written(Machine(memory=Memory(size=1 << 30), extra={"vmx": hostile}))
    assert found["memsize"] == "1024"
    assert found["floppy0.present"] == "FALSE"
    assert found["ok"] == "|22|0A|23|7C"
    assert not {"MemSize", "a b"} & set(found)


# What VMware cannot have

CHANGES = {
    "clock": (Machine(board=Board(clock="localtime")), "board.clock", ""),
    "hardware": (Machine(board=Board(hardware_version="pc-q35-8.0")), "board.hardware_version", "vmx-19"),
    "system": (Machine(os=GuestOS(id="ubuntu22.04")), "os.id", ""),
    "threads": (Machine(cpu=Cpu(count=8, sockets=2, cores=2, threads=2)), "cpu.cores", "4"),
    "sum": (Machine(cpu=Cpu(count=3, sockets=2, cores=2)), "cpu.cores", ""),
    "memory": (Machine(memory=Memory(size=(1 << 30) + 1)), "memory.size", str((1 << 30) + (4 << 20))),
    "secure boot": (Machine(firmware=Firmware(kind="bios", secure_boot=True)), "firmware.secure_boot", "false"),
    "boot of a card": (
        Machine(nics=(Nic(mac="00:50:56:00:00:01", boot_index=1),), disks=(Disk(file="a", bus="scsi", boot_index=0),)),
        "nics[0].boot_index",
        "network, class 2 of bios.bootOrder",
    ),
    "serial": (Machine(identity=Identity(uuid=UUID(int=1), serial="7")), "identity.serial", "VMware-00"),
    "boot": (
        Machine(disks=(Disk(file="a", bus="scsi"), Disk(file="b", bus="scsi", boot_index=4))),
        "disks[1].boot_index",
        "0",
    ),
    "virtio": (Machine(disks=(Disk(file="a", bus="virtio"),)), "disks[0].bus", "scsi"),
    "virtio-scsi": (
        Machine(os=GuestOS(id="win10"), controllers=(Controller(bus="scsi", model="virtio-scsi"),)),
        "controllers[0].model",
        "lsisas1068",
    ),
    "unit 7": (Machine(disks=(Disk(file="a", bus="scsi", controller=0, unit=7),)), "disks[0].unit", "0"),
    "ide": (Machine(disks=(Disk(file="a", bus="ide", controller=0, unit=3),)), "disks[0].unit", "0"),
    "format": (Machine(disks=(Disk(file="a", format="qcow2"),)), "disks[0].format", "vmdk"),
    "not shared": (Machine(disks=(Disk(file="a", shared=False),)), "disks[0].shared", ""),
    "nvme drive": (Machine(removables=(Removable(kind="cdrom", bus="nvme"),)), "removables[0].bus", "sata"),
    "nic": (Machine(os=GuestOS(id="debian12"), nics=(Nic(model="virtio"),)), "nics[0].model", "vmxnet3"),
    "nic of Windows": (Machine(os=GuestOS(id="win10"), nics=(Nic(model="virtio"),)), "nics[0].model", "e1000e"),
    "mac": (
        Machine(nics=(Nic(mac="52:54:00:01:02:03", mac_origin="generated"),)),
        "nics[0].mac_origin",
        "static",
    ),
    "network": (Machine(nics=(Nic(network_kind="internal"),)), "nics[0].network_kind", "host-only"),
    "slot": (Machine(nics=(Nic(pci_slot="0000:00:03.0"),)), "nics[0].pci_slot", ""),
    "sound": (Machine(sound="ac97"), "sound", "es1371"),
    "display": (Machine(display=Display(model="qxl")), "display.model", "vmware"),
    "serial port": (Machine(serials=(Serial(kind="pty"),)), "serials[0].kind", ""),
}


@pytest.mark.parametrize(("machine", "path", "after"), CHANGES.values(), ids=CHANGES)
def test_a_value_that_vmware_lacks_is_replaced_with_a_reason(machine: Machine, path: str, after: str) -> None:
    adapted = FORMAT.adapt(machine, Options())
    (found,) = [each for each in adapted.substitutions if each.path == path]
    assert found.after == after or (after and found.after.startswith(after))
    assert found.reason


def test_more_devices_than_places_are_refused() -> None:
    with pytest.raises(PlanError, match="has 11 network cards, VMware has at most 10"):
        FORMAT.adapt(Machine(nics=(Nic(),) * 11), Options())
    with pytest.raises(PlanError, match=r"removables\[2\]: VMware has no free place"):
        FORMAT.adapt(Machine(removables=(Removable(kind="floppy"),) * 3), Options())
    full = Machine(disks=tuple(Disk(file="a", bus="ide") for _ in range(5)))
    assert [disk.bus for disk in FORMAT.adapt(full, Options()).machine.disks] == ["ide"] * 4 + ["sata"]
    with pytest.raises(PlanError, match=r"disks\[0\] has no file"):
        FORMAT.write(FORMAT.adapt(Machine(disks=(Disk(capacity=1),)), Options()).machine, Options())


def test_moved_disks_take_no_place_of_others() -> None:
    disks = (Disk(file="a", bus="virtio"), Disk(file="b", bus="scsi", controller=0, unit=0))
    adapted = FORMAT.adapt(Machine(disks=disks), Options()).machine
    assert [(disk.bus, disk.controller, disk.unit) for disk in adapted.disks] == [("scsi", 0, 1), ("scsi", 0, 0)]
    found = written(Machine(disks=disks))
    assert found["bios.hddOrder"] == "scsi0:1,scsi0:0"


def test_addresses_are_kept() -> None:
    found = written(
        Machine(
            nics=(
                Nic(mac="52:54:00:01:02:03"),
                Nic(mac="00:50:56:3f:02:03", mac_origin="static"),
                Nic(mac="00:0c:29:01:02:03", mac_origin="generated"),
                Nic(mac="00:50:56:87:65:43", mac_origin="generated"),
                Nic(),
            )
        )
    )
    assert [found[f"ethernet{at}.addressType"] for at in range(5)] == [
        *("static", "static", "generated", "vpx", "generated"),
    ]
    assert found["ethernet0.address"] == "52:54:00:01:02:03"
    assert found["ethernet0.checkMACAddress"] == "FALSE"
    assert "ethernet1.checkMACAddress" not in found
    assert found["ethernet3.generatedAddress"] == "00:50:56:87:65:43"
    assert "ethernet4.generatedAddress" not in found


def test_the_hardware_version_is_an_option() -> None:
    machine = Machine(identity=Identity(uuid=UUID("5c241f42-a87f-fa60-0102-030405060708")))
    new, old = (written(machine, Options(hardware_version=version)) for version in (None, 10))
    assert (new["virtualHW.version"], old["virtualHW.version"]) == ("19", "10")
    assert new["uuid.bios"].startswith("42 1f 24 5c 7f a8 60 fa-01")
    assert old["uuid.bios"].startswith("5c 24 1f 42 a8 7f fa 60-01")
    assert "pciBridge4.present" not in written(machine, Options(hardware_version=4))
    with pytest.raises(UsageError, match="hardware_version is a number from 4 to 99"):
        parse_options(Options, {"hardware_version": "3"}, "vmx")
