"""VirtualBox: the conformance kit, settings that VirtualBox 7.2 wrote, and what the platform lacks."""

from __future__ import annotations

import io
import lzma
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from support.machine_documents import VBOX as FULL
from support.machine_documents import settings
from support.requirements import CORPUS, missing, oracle_module
from vmconv.errors import ImageError, PlanError, UsageError
from vmconv.machine import (
    Board,
    Controller,
    Cpu,
    Disk,
    Firmware,
    GuestOS,
    Identity,
    Layer,
    Machine,
    Nic,
    Removable,
    Serial,
)
from vmconv.model.options import parse_options
from vmconv.plugin import Adapted
from vmconv.testing import MachineTests, image_file
from vmconv.testing.machines import HOSTILE
from vmconv_vbox import VBox

VBOX = VBox()


class TestVBox(MachineTests):
    format = VBox()


def read(text: str, name: str = "test.vbox") -> Machine:
    return VBOX.read(image_file(text.encode(), name), None)  # type: ignore[arg-type]


def options(**given: Any) -> Any:
    return parse_options(VBOX.options(), given, "vbox")


def adapted(machine: Machine, **given: Any) -> Adapted:
    return VBOX.adapt(machine, options(**given))


def written(machine: Machine, **given: Any) -> str:
    chosen = options(**given)
    return VBOX.write(VBOX.adapt(machine, chosen).machine, chosen)[-1].content.decode()


def test_settings_of_virtualbox_are_read_with_all_they_say() -> None:
    machine = read(FULL, "full.vbox")
    assert machine.description == "a <b>\nsecond"
    assert machine.os == GuestOS(architecture="x86_64", source_id="Debian_64")
    assert machine.cpu == Cpu(count=2, hot_add=True)
    assert machine.memory.size == 4 << 30
    assert machine.firmware.boot_order == ("cdrom", "disk")
    assert machine.board == Board(chipset="q35", clock="utc")
    assert (machine.sound, machine.usb, machine.memory_state) == ("hda", "xhci", "Snapshots/s.sav")
    assert machine.snapshots == ("first snap", "second")
    assert machine.serials == (Serial(index=0, kind="pipe", target="/tmp/pipe"),)
    assert machine.display is not None
    assert (machine.display.model, machine.display.memory, machine.display.heads) == ("vmware", 64 << 20, 2)


def test_the_variable_store_has_its_usual_name_unless_the_settings_name_it() -> None:
    def store(text: str) -> str | None:
        nvram = read(text, "full.vbox").firmware.nvram
        return None if nvram is None else nvram.file

    assert store(FULL) == "full.nvram"
    assert store(settings('<Firmware type="EFI"/><BIOS><NVRAM path="a/b.nvram"/></BIOS>')) == "a/b.nvram"
    assert store(settings('<Firmware type="BIOS"/>')) is None


def test_disks_are_the_leaves_of_their_chains_in_the_order_of_the_registry() -> None:
    first, second = read(FULL).disks
    assert (first.file, first.format, first.mode) == ("Snapshots/{317a6071}.vdi", "vdi", "independent-persistent")
    below = UUID("10eac034-7416-4d35-8dc3-e353bbfcc8c2")
    assert first.layers == (Layer(file="a.vdi", format="vdi", image_uuid=below),)
    assert (first.bus, first.controller, first.unit, first.serial, first.discard) == ("sata", 0, 0, "SER1", True)
    assert first.image_uuid == UUID("317a6071-0b64-42bf-8eb8-1bc1fe24849a")
    assert (second.bus, second.controller, second.unit) == ("scsi", 0, 3)
    # VirtualBox takes the bytes of a VHD's id in another order.
    assert second.image_uuid == UUID("cb2b5fac-8f74-d745-b342-7c57de700de0")


def test_drives_and_cards_are_read() -> None:
    empty, disc = read(FULL).removables
    assert (disc.bus, disc.controller, disc.unit, disc.file, disc.connected) == ("ide", 1, 0, "x.iso", True)
    assert (empty.bus, empty.controller, empty.unit, empty.connected) == ("ide", 0, 1, False)
    bridged, internal, nat = read(FULL).nics
    assert bridged == Nic(
        mac="08:00:27:aa:bb:cc", model="e1000", network="eth0", network_kind="bridged", connected=True
    )
    assert (internal.network, internal.network_kind, internal.connected) == ("lan", "internal", False)
    assert (nat.network, nat.network_kind, nat.model) == ("N1", "nat", "pcnet32")


def test_the_guest_sees_the_uuid_in_the_byte_order_of_the_settings() -> None:
    """VirtualBox without SmbiosUuidLittleEndian writes the bytes as the text has them (DevPcBios.cpp)."""
    shown = UUID("11111111-2222-3333-4444-555555555555")
    old = read(settings("")).identity
    assert (old.uuid, old.uuid_text) == (UUID("11111111-2222-3333-4444-555555555555"), None)
    text = settings("").replace("<Hardware>", '<Hardware uuid="{564d1234-0000-1111-2222-333344445555}">')
    swapped = read(text).identity
    assert swapped.uuid == UUID("34124d56-0000-1111-2222-333344445555")
    assert swapped.uuid_text == UUID("564d1234-0000-1111-2222-333344445555")
    assert swapped.instance_uuid == shown
    right = read(text.replace("></Hardware>", '><BIOS><SmbiosUuidLittleEndian enabled="true"/></BIOS></Hardware>'))
    assert (right.identity.uuid, right.identity.uuid_text) == (UUID("564d1234-0000-1111-2222-333344445555"), None)


def test_settings_of_virtualbox_alone_survive_a_round_trip() -> None:
    machine = read(FULL)
    assert machine.extra["vbox"] == {
        "AttachedDevice sata0:0@nonrotational": "true",
        "CPU@count": "4",
        "CPU/NestedHWVirt@enabled": "true",
        "ExtraData:GUI/LastCloseAction": "PowerOff",
        "Firmware@type": "EFI64",
        "Network/Adapter@type": "82545EM",
        "Network/Adapter[3]/NATNetwork@name": "N1",
        "UART/Port@server": "true",
    }
    again = read(written(machine)).extra["vbox"]
    assert machine.extra["vbox"].items() - again.items() == {("AttachedDevice sata0:0@nonrotational", "true")}


def test_an_encrypted_disk_is_refused() -> None:
    text = FULL.replace(
        'location="c.vhd" format="VHD" type="Normal"/>',
        'location="c.vhd" format="VHD" type="Normal"><Property name="CRYPT/KeyId" value="k"/></HardDisk>',
    )
    assert text != FULL
    with pytest.raises(ImageError, match=r"HardDisk ac5f2bcb-.*: the disk is encrypted"):
        read(text)


def test_settings_that_virtualbox_adds_are_named() -> None:
    text = FULL.replace("<ExtraData>", '<Groups><Group name="/x"/></Groups><ExtraData>')
    found = read(text)
    assert found.extra["vbox"]["/Machine/Groups"].startswith("<")
    assert "Groups" not in written(found)


def test_settings_of_machines_for_arm_are_read() -> None:
    platform = (
        '<Platform architecture="ARM"><RTC localOrUTC="UTC"/><Chipset type="ARMv8Virtual"/><CPU count="3"/></Platform>'
    )
    machine = read(settings("", version="1.20-linux").replace("</Machine>", f"{platform}</Machine>"))
    assert machine.board == Board(chipset="virt", clock="utc")
    assert machine.cpu.count == 3


def _attached(**values: str) -> str:
    given = {"type": "HardDisk", "port": "0", "device": "0", "inner": "", "controller": "AHCI", **values}
    inner, controller = given.pop("inner"), given.pop("controller")
    device = " ".join(f'{name}="{value}"' for name, value in given.items())
    return (
        f'<StorageControllers><StorageController name="x" type="{controller}">'
        f"<AttachedDevice {device}>{inner}</AttachedDevice></StorageController></StorageControllers>"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<a/>", "'a': is not VirtualBox"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><a/>', "has a DOCTYPE"),
        ('<VirtualBox xmlns="http://www.virtualbox.org/" version="1.19-linux"/>', "VirtualBox: has no Machine"),
        (
            '<VirtualBox xmlns="http://www.virtualbox.org/" version="1.12-linux"><Global/></VirtualBox>',
            "these are VirtualBox's own settings",
        ),
        (settings("", version="many"), "VirtualBox version: 'many' is not a version"),
        (settings("", version="1.3-linux"), "1.3-linux is older than 1.7"),
        (settings("").replace("Hardware", "Encrypted"), "Machine: has no Hardware"),
        (settings("").replace("{11111111", "{1"), "Machine uuid: '{1-2222-3333-4444-555555555555}' is not a UUID"),
        (settings('<Memory RAMSize="-1"/>'), "Memory RAMSize: '-1' is not a number"),
        (settings('<Memory RAMSize="1"/><Memory RAMSize="2"/>'), "Memory RAMSize: is given more than once"),
        (settings('<CPU count="0"/>'), "CPU count: '0' is not a number from 1"),
        (settings('<CPU hotplug="maybe"/>'), "CPU hotplug: 'maybe' is neither true nor false"),
        (settings('<Firmware type="U-Boot"/>'), "Firmware type: 'U-Boot' is not known"),
        (settings('<Chipset type="VIA"/>'), "Chipset type: 'VIA' is not known"),
        (settings('<Boot><Order position="9" device="DVD"/></Boot>'), "Boot/Order position: '9' is not a number"),
        (
            settings('<Network><Adapter slot="0" enabled="true" MACAddress="0800"/></Network>'),
            "Network/Adapter[0] MACAddress: '0800' is not a MAC address",
        ),
        (settings('<UART><Port slot="7"/></UART>'), "UART/Port slot: '7' is not a number from 0 to 3"),
        (settings('<UART><Port slot="0" enabled="true" hostMode="x"/></UART>'), "UART/Port[0] hostMode: 'x'"),
        (settings(_attached(controller="Fibre")), "StorageController type: 'Fibre' is not known"),
        (settings(_attached(port="30")), "AttachedDevice port: '30' is not a number from 0 to 29"),
        (settings(_attached()), "AttachedDevice sata0:0: has no Image"),
        (settings(_attached(type="Tape")), "AttachedDevice sata0:0 type: 'Tape' is not known"),
        (settings(_attached(inner='<Image uuid="x"/>')), "Image uuid: 'x' is not a UUID"),
        (
            settings(_attached(inner='<Image uuid="{317a6071-0b64-42bf-8eb8-1bc1fe24849a}"/>')),
            "image 317a6071-0b64-42bf-8eb8-1bc1fe24849a is not in the MediaRegistry",
        ),
        (settings("".join(f'<X{n} a="1"/>' for n in range(2001))), "more than 2000 settings are not known"),
    ],
    ids=[
        *("root", "doctype", "empty", "global", "version", "old", "encrypted", "uuid", "memory", "twice", "cpus"),
        *("flag", "firmware", "chipset", "boot", "mac", "slot", "mode", "controller", "port", "no-image", "device"),
        *("image-id", "unregistered", "many"),
    ],
)
def test_a_damaged_element_is_named(text: str, problem: str) -> None:
    with pytest.raises(ImageError) as caught:
        read(text)
    assert problem in str(caught.value)
    assert "test.vbox" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_settings_of_virtualbox_are_claimed() -> None:
    assert VBOX.probe(image_file(FULL.encode(), "x.vbox"))
    envelope = '<Envelope xmlns:vbox="http://www.virtualbox.org/ovf/machine"><vbox:Machine/></Envelope>'
    for text in (envelope, "<domain/>", "<VirtualBox/>"):
        assert not VBOX.probe(image_file(text.encode(), "x.vbox"))


def at(bus: Any, model: str | None, **values: Any) -> Machine:
    disk = Disk(**{"file": "a.vdi", "bus": bus, "controller": 0, "unit": 0, **values})
    return Machine(name="m", controllers=(Controller(bus=bus, model=model),), disks=(disk,))


@pytest.mark.parametrize(
    ("machine", "place", "model", "reason"),
    [
        (at("scsi", "lsilogic"), ("scsi", 0, 0), "lsilogic", None),
        (at("scsi", "lsisas1068"), ("scsi", 0, 0), "lsisas1068", None),
        (at("scsi", "virtio-scsi"), ("scsi", 0, 0), "virtio-scsi", None),
        (at("nvme", "nvme"), ("nvme", 0, 0), "nvme", None),
        (at("scsi", "lsilogic", unit=7), ("scsi", 0, 0), "lsilogic", "with its own number of ports"),
        (at("scsi", "pvscsi", unit=4), ("sata", 0, 0), "ahci", "VirtualBox has no pvscsi"),
        (at("virtio", "virtio-blk"), ("sata", 0, 0), "ahci", "VirtualBox has no virtio disks"),
    ],
    ids=["lsilogic", "sas", "virtio-scsi", "nvme", "id-7", "pvscsi", "virtio"],
)
def test_a_disk_gets_a_controller_that_exists(
    machine: Machine, place: tuple[str, int, int], model: str, reason: str | None
) -> None:
    found = adapted(machine)
    (disk,), (controller,) = found.machine.disks, found.machine.controllers
    assert (disk.bus, disk.controller, disk.unit) == place
    assert controller.model == model
    reasons = [each.reason for each in found.substitutions if each.path == "disks[0]"]
    assert any(reason in each for each in reasons) if reason else not reasons


def test_the_disk_that_starts_the_machine_comes_first_and_others_behind() -> None:
    kept = Disk(file="kept.vdi", bus="sata", controller=0, unit=1)
    moved = [Disk(file=f"{number}.vdi", bus="virtio", controller=0, unit=number) for number in range(2)]
    machine = Machine(disks=(moved[0].model_copy(update={"boot_index": 0}), kept, moved[1]))
    assert [disk.unit for disk in adapted(machine).machine.disks] == [0, 1, 2]


def test_what_cannot_be_in_virtualbox_is_refused_before_anything_is_written() -> None:
    with pytest.raises(PlanError, match="disk '/dev/sdb' is a device"):
        adapted(Machine(disks=(Disk(device="/dev/sdb", bus="sata", controller=0, unit=0),)))
    with pytest.raises(PlanError, match="is for aarch64"):
        adapted(Machine(os=GuestOS(architecture="aarch64")))
    with pytest.raises(PlanError, match="bytes of memory"):
        adapted(Machine.model_validate({"memory": {"size": 4 << 40}}))
    with pytest.raises(PlanError, match="VirtualBox has no luks disks"):
        adapted(at("sata", "ahci", format="luks"))
    with pytest.raises(PlanError, match="more drives than VirtualBox has ports"):
        adapted(Machine(disks=tuple(Disk(file=f"{n}.vdi", bus="sata") for n in range(31))))
    with pytest.raises(UsageError):
        options(bridge=" ")


def test_a_card_without_an_address_gets_one_that_stays() -> None:
    machine = Machine(identity=Identity(uuid=UUID(int=7)), nics=(Nic(model="vmxnet3"), Nic(mac="01:00:5e:00:00:01")))
    first, second = adapted(machine).machine.nics
    assert first.mac is not None
    assert first.mac.startswith("08:00:27:")
    assert first.mac != second.mac
    assert adapted(machine).machine.nics == (first, second)
    reasons = {each.path: each.reason for each in adapted(machine).substitutions}
    assert "VirtualBox has no such card" in reasons["nics[0].model"]
    assert reasons["nics[1].mac"] == "VirtualBox refuses multicast addresses"


def test_a_silent_boot_order_starts_from_disks_and_devices_become_classes() -> None:
    assert adapted(Machine()).machine.firmware.boot_order == ("disk", "cdrom", "network")
    machine = Machine(
        disks=(Disk(file="a.vdi", boot_index=2),),
        nics=(Nic(boot_index=1),),
        removables=(Removable(kind="cdrom", bus="sata"),),
    )
    assert adapted(machine).machine.firmware.boot_order == ("network", "disk")


def test_the_new_table_has_the_bytes_that_the_guest_knows() -> None:
    seen = UUID("34124d56-0000-1111-2222-333344445555")
    text = written(Machine(identity=Identity(uuid=seen), firmware=Firmware(kind="uefi")))
    assert '<Hardware uuid="{34124d56-0000-1111-2222-333344445555}">' in text
    assert '<SmbiosUuidLittleEndian enabled="true" />' in text
    assert read(text).identity.uuid == seen


def test_dissect_reads_what_we_write() -> None:
    parser = oracle_module("dissect.hypervisor.descriptor.vbox").VBox
    disks = tuple(Disk(file=f"{number} & <{number}>.vdi", bus="sata", controller=0, unit=number) for number in range(2))
    for name in HOSTILE:
        machine = adapted(Machine(name=name.replace("\n", " "), disks=disks)).machine
        found = parser(io.StringIO(VBOX.write(machine, options())[-1].content.decode()))
        assert found.name == machine.name
        assert found.uuid == machine.identity.instance_uuid
        assert [disk.location for disk in found.hardware.disks] == [disk.file for disk in disks]
        assert set(found.media) == {disk.image_uuid for disk in machine.disks}


def test_a_file_that_virtualbox_wrote_is_read_as_it_shows_it() -> None:
    packed = Path(CORPUS / "machines" / "virtualbox7.vbox.xz")
    if not packed.exists():
        missing("corpus", f"{packed} is not there")
    machine = read(lzma.decompress(packed.read_bytes()).decode(), "demo.vbox")
    assert (machine.name, machine.os.source_id) == ("demo", "Debian_64")
    assert (machine.cpu.count, machine.memory.size) == (2, 2 << 30)
    assert machine.firmware.boot_order == ("disk", "cdrom")
    assert machine.firmware.nvram is not None
    assert machine.firmware.nvram.file == "demo.nvram"
    assert machine.tpm is not None
    assert machine.tpm.version == "2.0"
    assert machine.identity == Identity(
        uuid=UUID("564d1234-0000-1111-2222-333344445555"),
        instance_uuid=UUID("a051c195-bc1d-486d-97bb-118e205914a8"),
        serial="ABC",
    )
    (disk,) = machine.disks
    # VirtualBox goes by the format that it states, whatever the file is called.
    assert (disk.file, disk.format, disk.bus, disk.unit) == ("d.vmdk", "vdi", "sata", 0)
    (nic,) = machine.nics
    assert (nic.mac, nic.model, nic.network_kind) == ("08:00:27:aa:bb:cc", "e1000", "nat")
    assert "vbox" not in machine.extra
