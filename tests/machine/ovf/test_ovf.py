"""OVF descriptors: the conformance kit, what the reader takes and refuses, what the writer states."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from uuid import UUID

import pytest

from support.ovf_packages import ATTACHED, CONTROLLER, DISK, FILE, descriptor, item, with_disk
from support.requirements import oracle_program
from vmconv.errors import ImageError, PlanError, UsageError
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry
from vmconv.machine import (
    Board,
    Controller,
    Disk,
    Display,
    Firmware,
    GuestOS,
    Identity,
    Machine,
    Memory,
    Nic,
    Nvram,
    Property,
    Removable,
    Tpm,
)
from vmconv.model.options import parse_options
from vmconv.testing import MachineTests, image_file
from vmconv.testing.malformed import memory_limit, time_limit
from vmconv_ovf import Ovf
from vmconv_ovf.options import Options
from vmconv_ovf.units import bytes_of

OVF = Ovf()


class TestOvf(MachineTests):
    format = Ovf()


def read(content: bytes) -> Machine:
    return OVF.read(image_file(content, "web.ovf"), Opener(Registry()))


def written(machine: Machine, **options: str) -> str:
    parsed = parse_options(Options, options, "ovf")
    return OVF.write(OVF.adapt(machine, parsed).machine, parsed)[-1].content.decode()


def substitutions(machine: Machine, **options: str) -> dict[str, tuple[str, str]]:
    found = OVF.adapt(machine, parse_options(Options, options, "ovf")).substitutions
    return {each.path: (each.before, each.after) for each in found}


def setting(key: str, value: str, kind: str = "Config") -> str:
    return f'<vmw:{kind} ovf:required="false" vmw:key="{key}" vmw:value="{value}"/>'


# -- reading


@pytest.mark.parametrize(
    ("unit", "size"),
    [
        ("byte", 1),
        ("byte * 2^20", 1 << 20),
        ("byte * 2 ^ 30", 1 << 30),
        ("byte*1024*1024", 1 << 20),
        ("byte * 10^9", 10**9),
        ("MegaBytes", 1 << 20),
        ("GB", 1 << 30),
        ("hertz * 10^6", None),
        ("byte * 2^99", None),
        ("byte + 1", None),
        ("byte * 0", None),
        ("", None),
    ],
)
def test_units_are_programmatic_or_words(unit: str, size: int | None) -> None:
    assert bytes_of(unit) == size


def test_a_disk_has_its_file_capacity_and_place() -> None:
    found = read(with_disk(files='<File ovf:href="a%20b.vmdk" ovf:id="file1" ovf:size="512"/>'))
    assert found.controllers == (Controller(bus="scsi", index=0, model="lsilogic"),)
    assert found.disks == (Disk(file="a b.vmdk", file_size=512, capacity=8 << 30, bus="scsi", controller=0, unit=0),)


def test_a_disk_without_a_file_is_empty() -> None:
    found = read(with_disk(disks='<Disk ovf:capacity="512" ovf:diskId="d1"/>', files=""))
    assert found.disks == (Disk(capacity=512, bus="scsi", controller=0, unit=0),)
    sized = item(4, 17, Parent=3, AddressOnParent=0, AllocationUnits="byte*1024*1024", VirtualQuantity=10)
    assert read(with_disk(CONTROLLER + sized)).disks[0].capacity == 10 << 20


def test_a_capacity_may_be_a_property() -> None:
    product = '<ProductSection><Info/><Property ovf:key="size" ovf:type="int" ovf:value="16"/></ProductSection>'
    disks = DISK.replace('"8"', '"${size}"')
    assert read(with_disk(disks=disks, system=product)).disks[0].capacity == 16 << 30
    with pytest.raises(ImageError, match=r"Disk 'd1': capacity '\$\{size\}' is a property without a value"):
        read(with_disk(disks=disks))


@pytest.mark.parametrize(
    ("subtype", "kind", "place"),
    [
        ("lsilogic", 6, ("scsi", "lsilogic")),
        ("someother, lsilogic", 6, ("scsi", "lsilogic")),
        ("lsilogicsas", 6, ("scsi", "lsisas1068")),
        ("VirtualSCSI", 6, ("scsi", "pvscsi")),
        ("unheard", 6, ("scsi", "unheard")),
        ("PIIX4", 5, ("ide", "piix4")),
        ("AHCI", 20, ("sata", "ahci")),
        ("vmware.sata.ahci", 20, ("sata", "ahci")),
        ("vmware.nvme.controller", 20, ("nvme", "nvme")),
    ],
)
def test_controllers_have_neutral_models(subtype: str, kind: int, place: tuple[str, str]) -> None:
    found = read(descriptor(item(3, kind, Address=1, ResourceSubType=subtype)))
    assert [(each.bus, each.model, each.index) for each in found.controllers] == [(*place, 1)]


def test_controllers_without_a_free_address_get_the_next_number() -> None:
    items = item(1, 5, Address=0) + item(2, 5, Address=0) + item(3, 5, Address="{1}")
    assert [each.index for each in read(descriptor(items)).controllers] == [0, 1, 2]


def test_a_drive_at_the_place_of_a_disk_loses_its_unit() -> None:
    drive = item(5, 15, Parent=3, AddressOnParent=0, AutomaticAllocation="true")
    found = read(with_disk(CONTROLLER + ATTACHED + drive))
    assert found.removables == (Removable(kind="cdrom", bus="scsi", controller=0, connected=True),)
    with pytest.raises(ImageError, match="two disks are at scsi 0:0"):
        read(with_disk(CONTROLLER + ATTACHED + ATTACHED.replace(">4<", ">9<")))


def test_settings_of_vmware_are_firmware_and_hot_add() -> None:
    items = item(1, 3, VirtualQuantity=8, inside="<vmw:CoresPerSocket>4</vmw:CoresPerSocket>")
    items += item(2, 4, VirtualQuantity=2, AllocationUnits="byte * 2^30")
    settings = setting("firmware", "efi") + setting("bootOptions.efiSecureBootEnabled", "true")
    settings += setting("cpuHotAddEnabled", "true") + setting("memoryHotAddEnabled", "false")
    settings += setting("simultaneousThreads", "2") + setting("vendor.other", "x")
    settings += setting("bios.bootOrder", "cdrom,hdd", "ExtraConfig") + setting("svga.x", "1", "ExtraConfig")
    found = read(descriptor(items, settings=settings))
    assert found.cpu.model_dump(exclude_none=True) == {
        "count": 8,
        "sockets": 2,
        "cores": 2,
        "threads": 2,
        "hot_add": True,
    }
    assert found.memory == Memory(size=2 << 30, hot_add=False)
    assert found.firmware == Firmware(kind="uefi", secure_boot=True, boot_order=("cdrom", "disk"))
    assert found.extra == {"ovf": {"config.vendor.other": "x", "extraConfig.svga.x": "1"}}


def test_the_uuid_is_what_the_guest_of_the_hardware_family_sees() -> None:
    settings = setting("uuid", "421f245c-7fa8-60fa-0001-020304050607")
    new = read(descriptor(settings=settings)).identity
    assert new.uuid == UUID("5c241f42-a87f-fa60-0001-020304050607")
    assert new.uuid_text == UUID("421f245c-7fa8-60fa-0001-020304050607")
    old = read(descriptor(settings=settings).replace(b"vmx-13", b"vmx-10")).identity
    serial = "VMware-42 1f 24 5c 7f a8 60 fa-00 01 02 03 04 05 06 07"
    assert old == Identity(uuid=UUID("421f245c-7fa8-60fa-0001-020304050607"), serial=serial)
    assert new.serial == serial


def test_vmware_names_its_variables_in_a_setting() -> None:
    files = '<File ovf:href="web.nvram" ovf:id="n" ovf:size="8684"/>'
    named = setting("nvram", "ovf:/file/n", "ExtraConfig")
    assert read(descriptor(files=files, settings=named)).firmware.nvram == Nvram(file="web.nvram", kind="vmware")
    elsewhere = setting("nvram", "web.nvram", "ExtraConfig")
    found = read(descriptor(settings=elsewhere))
    assert found.firmware.nvram is None
    assert found.extra == {"ovf": {"extraConfig.nvram": "web.nvram"}}


def test_the_boot_order_of_vmware_numbers_devices() -> None:
    order = '<vmw:BootOrderSection vmw:instanceId="5" vmw:type="net"><Info/></vmw:BootOrderSection>'
    order += '<vmw:BootOrderSection vmw:instanceId="4" vmw:type="disk"><Info/></vmw:BootOrderSection>'
    found = read(with_disk(CONTROLLER + ATTACHED + item(5, 10), system=order))
    assert (found.nics[0].boot_index, found.disks[0].boot_index) == (0, 1)


def test_the_default_configuration_is_deployed() -> None:
    options = (
        '<DeploymentOptionSection><Info/><Configuration ovf:id="small"/>'
        '<Configuration ovf:id="big" ovf:default="true"/></DeploymentOptionSection>'
    )
    small = item(1, 3, VirtualQuantity=1)
    big = item(1, 3, VirtualQuantity=16).replace("<Item>", '<Item ovf:configuration="big huge">')
    least = item(1, 3, VirtualQuantity=2).replace("<Item>", '<Item ovf:bound="min">')
    found = read(descriptor(small + big + least, envelope=options))
    assert found.cpu.count == 16
    assert found.extra == {"ovf": {"configuration": "big"}}
    assert read(descriptor(small + big + least)).cpu.count == 1


def test_properties_have_full_keys_and_messages() -> None:
    product = (
        '<ProductSection ovf:class="net" ovf:instance="1"><Info/><Category>x</Category>'
        '<Property ovf:key="ip" ovf:type="string" ovf:value="10.0.0.1" ovf:password="true">'
        '<Label ovf:msgid="m1"/></Property></ProductSection>'
    )
    strings = '<Strings xml:lang="en-US"><Msg ovf:msgid="m1">Address</Msg></Strings>'
    found = read(descriptor(system=product).replace(b"</Envelope>", f"{strings}</Envelope>".encode()))
    assert found.properties == (Property(key="net.ip.1", value="10.0.0.1", label="Address"),)
    assert found.extra == {"ovf": {"property.net.ip.1.password": "true"}}


def test_devices_without_a_neutral_meaning_are_kept() -> None:
    items = [
        item(1, 1, ResourceSubType="vmware.vmci", ElementName="VMCI device"),
        item(2, 1, ResourceSubType="vmware.vtpm"),
        item(3, 1, ResourceSubType="vmware.pci.passthrough"),
        item(4, 20, ResourceSubType="vmware.nvdimm.controller"),
    ]
    found = read(descriptor("".join(items)))
    assert found.tpm == Tpm(version="2.0")
    assert found.passthrough == ("vmware.pci.passthrough",)
    assert found.extra == {"ovf": {"item.0": "1 vmware.vmci", "item.1": "20 vmware.nvdimm.controller"}}
    again = read(written(found).encode())
    assert again.extra == found.extra


def test_long_licences_come_back_whole() -> None:
    licence = "\n\n".join(f"Clause {number} of the licence." for number in range(5000))
    section = f"<EulaSection><Info/><License>{licence}</License></EulaSection>"
    found = read(descriptor(system=section))
    assert list(found.extra["ovf"]) == ["eula.0", "eula.1", "eula.2"]
    again = read(written(found).encode())
    assert again.extra == found.extra


def test_virtualbox_states_the_rest_in_its_own_element() -> None:
    vbox = (
        '<vbox:Machine ovf:required="false"><ExtraData>'
        '<ExtraDataItem name="VBoxInternal/Devices/efi/0/Config/DmiSystemSerial" value="string:ABC"/></ExtraData>'
        '<Hardware uuid="{564d1234-0000-1111-2222-333344445555}"><Firmware type="EFI"/>'
        '<Chipset type="ICH9"/><TrustedPlatformModule type="v2_0"/><RTC localOrUTC="UTC"/>'
        '<Boot><Order position="2" device="HardDisk"/><Order position="1" device="DVD"/></Boot>'
        '<Network><Adapter slot="1" enabled="false" MACAddress="080027000000"/>'
        '<Adapter slot="0" enabled="true" MACAddress="080027AABBCC" type="virtio"><NAT/></Adapter></Network>'
        "</Hardware></vbox:Machine>"
    )
    found = read(descriptor(item(7, 10, ResourceSubType="E1000", Connection="NAT"), system=vbox))
    assert found.firmware == Firmware(kind="uefi", boot_order=("cdrom", "disk"))
    assert found.nics == (Nic(mac="08:00:27:aa:bb:cc", model="virtio", network="NAT", network_kind="nat"),)
    assert found.tpm == Tpm(version="2.0")
    assert found.board == Board(hardware_version="vmx-13", clock="utc", chipset="q35")
    assert found.identity.serial == "ABC"
    # The table of old machines has the bytes in the order of the text.
    assert found.identity.uuid == UUID("34124d56-0000-1111-2222-333344445555")
    modern = vbox.replace("<Firmware", '<BIOS><SmbiosUuidLittleEndian enabled="true"/></BIOS><Firmware')
    assert read(descriptor(system=modern)).identity.uuid == UUID("564d1234-0000-1111-2222-333344445555")


def test_older_descriptors_type_their_sections() -> None:
    old = (
        '<Envelope xmlns="http://www.vmware.com/schema/ovf/1/envelope" xmlns:r="urn:r" '
        'xmlns:o="http://www.vmware.com/schema/ovf/1/envelope" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">'
        '<References><File o:href="a.vmdk" o:id="f"/></References>'
        '<Section xsi:type="o:DiskSection_Type"><Disk o:capacity="512" o:diskId="d" o:fileRef="f"/></Section>'
        '<Content xsi:type="o:VirtualSystem_Type" o:id="old"><Section xsi:type="o:VirtualHardwareSection_Type">'
        "<Item><r:InstanceId>1</r:InstanceId><r:ResourceType>5</r:ResourceType></Item>"
        "<Item><r:InstanceId>2</r:InstanceId><r:ResourceType>17</r:ResourceType><r:Parent>1</r:Parent>"
        "<r:HostResource>disk/d</r:HostResource></Item></Section></Content></Envelope>"
    )
    with pytest.raises(ImageError, match="HostResource 'disk/d' is no disk or file of the package"):
        read(old.encode())
    found = read(old.replace(">disk/d<", ">/disk/d<").encode())
    assert (found.name, found.disks) == ("old", (Disk(file="a.vmdk", capacity=512, bus="ide", controller=0),))


# -- refusing

_SECOND = '<VirtualSystem ovf:id="db"><Info/></VirtualSystem></VirtualSystemCollection>'
_TWO_SYSTEMS = (
    descriptor()
    .replace(b"<VirtualSystem ", b'<VirtualSystemCollection ovf:id="c"><VirtualSystem ')
    .replace(b"</VirtualSystem>", f"</VirtualSystem>{_SECOND}".encode())
)
_NO_TYPE = item(1, 3).replace("<rasd:ResourceType>3</rasd:ResourceType>", "")
_TWO_QUANTITIES = item(1, 3, VirtualQuantity=4, inside="<rasd:VirtualQuantity>5</rasd:VirtualQuantity>")


def _at(href: str) -> bytes:
    return with_disk(files=f'<File ovf:href="{href}" ovf:id="file1"/>')


def _file(more: str) -> bytes:
    return with_disk(files=FILE.replace("/>", f" {more}/>"))


def _disk(old: str, new: str) -> bytes:
    return with_disk(disks=DISK.replace(old, new))


BAD = {
    "root": (b"<Envelope/>", "root element: 'Envelope' is no envelope of OVF 0.9, 1 or 2"),
    "doctype": (b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "line 1: has a DOCTYPE"),
    "systems": (_TWO_SYSTEMS, "VirtualSystemCollection: has 2 virtual systems: 'web', 'db'"),
    "above": (_at("../../etc/shadow"), "'../../etc/shadow' is outside the package"),
    "encoded-above": (_at("%2e%2e/a"), "'%2e%2e/a' is outside the package"),
    "itself": (_at("."), "'.' is outside the package"),
    "absolute": (_at("/etc/shadow"), "'/etc/shadow' is not a relative path"),
    "drive": (_at("C:a.vmdk"), "'C:a.vmdk' is not a relative path"),
    "url": (_at("https://x/a.vmdk"), "'https://x/a.vmdk' is a URL"),
    "line-break": (_at("a%0ab"), "'a%0ab' is not a file name"),
    "no-href": (with_disk(files='<File ovf:id="file1"/>'), "ovf:href '' is not a relative path"),
    "gzip": (_file('ovf:compression="gzip"'), "has ovf:compression 'gzip'"),
    "chunks": (_file('ovf:chunkSize="1024"'), "is stored in chunks of 1024 bytes"),
    "file-size": (_file('ovf:size="-1"'), "File 'file1' ovf:size: '-1' is not a number"),
    "no-file": (with_disk(files=""), "Disk 'd1': refers to the file 'file1', which References does not list"),
    "two-files": (with_disk(files=FILE + FILE), "File 'file1': two have this ovf:id"),
    "no-disk": (with_disk(disks=""), "Item '4': refers to the disk 'd1', which the DiskSection does not list"),
    "delta": (_disk("/>", ' ovf:parentRef="d0"/>'), "Disk 'd1': is a delta of disk 'd0'"),
    "capacity": (_disk('"8"', '"8G"'), "Disk 'd1' capacity: '8G' is not a number"),
    "huge": (_disk('"8"', '"9999999999999"'), "Disk 'd1' capacity: '9999999999999' is not a number"),
    "unit": (_disk("byte *", "bit *"), "'bit . 2.30' is no unit of bytes"),
    "parent": (with_disk(ATTACHED), "Item '4': Parent '3' is no controller of disks"),
    "same-id": (with_disk(CONTROLLER + CONTROLLER), "Item '3' 'lsilogic': two items have this InstanceID"),
    "place": (with_disk(CONTROLLER + ATTACHED.replace(">0<", ">x<")), "AddressOnParent: 'x' is not a number"),
    "mac": (descriptor(item(1, 10, Address="00:11")), "Item '1' Address: '00:11' is not a MAC address"),
    "no-id": (descriptor(item("", 3)), "Item '': has no InstanceID"),
    "no-type": (descriptor(_NO_TYPE), "Item '1': has no ResourceType"),
    "quantity": (descriptor(item(1, 3, VirtualQuantity="four")), "VirtualQuantity: 'four' is not a number"),
    "two-quantities": (descriptor(_TWO_QUANTITIES), "Item 1: VirtualQuantity is '4' and '5'"),
    "pages": (descriptor(item(1, 4, VirtualQuantity=1, AllocationUnits="pages")), "'pages' is no unit of bytes"),
    "two-memories": (descriptor(item(1, 4) + item(2, 4)), "Item '2': is a second item with ResourceType 4"),
    "flag": (descriptor(item(1, 15, AutomaticAllocation="maybe")), "'maybe' is neither true nor false"),
    "firmware": (descriptor(settings=setting("firmware", "prom")), "Config firmware: 'prom' is neither bios nor efi"),
    "uuid": (descriptor(settings=setting("uuid", "123")), "Config uuid: '123' is not a UUID"),
    "nvram": (descriptor(settings=setting("nvram", "ovf:/file/n")), "refers to the file 'n'"),
    "section": (descriptor(system="<FutureSection><Info/></FutureSection>"), "FutureSection: section is required"),
    "no-key": (descriptor(system="<ProductSection><Property/></ProductSection>"), "Property: has no ovf:key"),
    "items": (descriptor("".join(item(key, 1) for key in range(4097))), "has 4097 items, the limit is 4096"),
    "name": (descriptor(system="<Name>a&#10;b</Name>"), "has a line break"),
    "cores": (
        descriptor(item(1, 3, VirtualQuantity=3, inside="<vmw:CoresPerSocket>2</vmw:CoresPerSocket>")),
        "CoresPerSocket 2 does not divide 3 processors",
    ),
}


@pytest.mark.parametrize(("content", "problem"), BAD.values(), ids=BAD)
def test_bad_descriptors_are_refused(content: bytes, problem: str) -> None:
    with pytest.raises(ImageError, match=problem) as caught:
        read(content)
    assert str(caught.value).startswith("web.ovf: ")
    assert "\n" not in str(caught.value)


_MANY = 90_000


def _many(pattern: str, count: int = _MANY) -> str:
    return "".join(pattern.format(at) for at in range(count))


LARGE: dict[str, Callable[[], bytes]] = {
    "files": lambda: descriptor(files=_many('<File ovf:href="{0}" ovf:id="{0}"/>')),
    "disks": lambda: descriptor(disks=_many('<Disk ovf:diskId="{0}"/>')),
    "product": lambda: descriptor(system=f"<ProductSection>{_many('<Product>x</Product>')}</ProductSection>"),
    "products": lambda: descriptor(system=_many("<ProductSection><Product/></ProductSection>", _MANY // 2)),
    "properties": lambda: descriptor(
        system="<ProductSection>" + _many('<Property ovf:key="{0}"/>') + "</ProductSection>"
    ),
    "boot": lambda: descriptor(
        "".join(item(at, 10) for at in range(1000)),
        system=_many('<vmw:BootOrderSection vmw:instanceId="{0}" vmw:type="disk"/>'),
    ),
    "controllers": lambda: descriptor("".join(item(at, 5) for at in range(4096))),
    "settings": lambda: descriptor(settings=_many('<vmw:Config vmw:key="k{0}" vmw:value="v"/>')),
    "nested": lambda: descriptor(system="<VirtualSystemCollection>" * 80 + "</VirtualSystemCollection>" * 80),
}


@pytest.mark.parametrize("made", LARGE.values(), ids=LARGE)
def test_large_descriptors_take_bounded_time_and_memory(made: Callable[[], bytes]) -> None:
    content = made()
    with time_limit(), memory_limit(), suppress(ImageError):
        read(content)


def test_parts_that_no_device_uses_are_not_judged() -> None:
    files = '<File ovf:href="../x" ovf:id="a"/><File ovf:href="y" ovf:id="b" ovf:compression="gzip"/>'
    assert read(descriptor(files=files, system='<FutureSection ovf:required="false"/>')).name == "web"


# -- writing


def test_a_written_descriptor_has_vmware_settings() -> None:
    machine = Machine(
        name="web",
        os=GuestOS(id="debian12", architecture="x86_64"),
        firmware=Firmware(kind="uefi", secure_boot=True, nvram=Nvram(file="web.nvram", kind="vmware")),
        identity=Identity(uuid=UUID("5c241f42-a87f-fa60-0001-020304050607")),
        disks=(Disk(file="web-disk1.vmdk", format="vmdk", capacity=1 << 30, bus="scsi", controller=0, unit=0),),
        controllers=(Controller(bus="scsi", model="pvscsi", pci_slot="160"),),
    )
    found = written(machine)
    for part in (
        "<vssd:VirtualSystemType>vmx-13</vssd:VirtualSystemType>",
        'vmw:osType="debian12_64Guest"',
        setting("firmware", "efi"),
        setting("bootOptions.efiSecureBootEnabled", "true"),
        setting("uuid", "421f245c-7fa8-60fa-0001-020304050607"),
        setting("slotInfo.pciSlotNumber", "160"),
        '<File ovf:href="web.nvram" ovf:id="file1"/>',
        setting("nvram", "ovf:/file/file1", "ExtraConfig"),
        'ovf:capacity="1" ovf:capacityAllocationUnits="byte * 2^30"',
        "vmdk.html#sparse",
    ):
        assert part in found
    assert "vmdk.html#streamOptimized" in written(machine, disk_format="streamOptimized")


def test_what_vmware_lacks_is_substituted_with_a_reason() -> None:
    machine = Machine(
        name="kvm",
        board=Board(hardware_version="pc-q35-8.2"),
        tpm=Tpm(version="1.2"),
        memory=Memory(size=(1 << 30) + 1),
        disks=(
            Disk(bus="virtio", controller=0, unit=0, format="qcow2"),
            Disk(bus="scsi", controller=0, unit=7),
            Disk(bus="ide", controller=0, unit=5),
        ),
        controllers=(Controller(bus="virtio"), Controller(bus="scsi", model="virtio-scsi")),
        nics=(Nic(model="virtio", boot_index=3, mac="52:54:00:01:02:03", mac_origin="generated"),),
        identity=Identity(serial="ABC"),
        display=Display(memory=1025),
        sound="ac97",
    )
    assert substitutions(machine) == {
        "board.hardware_version": ("pc-q35-8.2", "vmx-14"),
        "tpm.version": ("1.2", "2.0"),
        "memory.size": ("1073741825", "1074790400"),
        "disks[0]": ("virtio 0:0", "sata 0:0"),
        "disks[1]": ("scsi 0:7", "scsi 0:0"),
        "disks[2]": ("ide 0:5", "ide 0:0"),
        "controllers": ("virtio 0", "ide 0, sata 0, scsi 0"),
        "controllers[1].model": ("virtio-scsi", "lsisas1068"),
        "nics[0].model": ("virtio", "e1000"),
        "nics[0].boot_index": ("3", "0"),
        "nics[0].mac_origin": ("generated", "static"),
        "identity.serial": ("ABC", ""),
        "display.memory": ("1025", "2048"),
        "sound": ("ac97", "hda"),
    }


def test_a_full_bus_continues_on_sata() -> None:
    disks = tuple(Disk(bus="ide", controller=0, unit=unit) for unit in range(6))
    found = OVF.adapt(Machine(disks=disks), Options()).machine.disks
    assert Counter(each.bus for each in found) == {"ide": 4, "sata": 2}
    with pytest.raises(PlanError, match=r"removables\[2\] has no place left on floppy"):
        OVF.adapt(Machine(removables=(Removable(kind="floppy"),) * 3), Options())


def test_physical_disks_cannot_be_packed() -> None:
    with pytest.raises(PlanError, match="disk 1 is the physical device '/dev/sdb'"):
        OVF.adapt(Machine(disks=(Disk(device="/dev/sdb"),)), Options())


def test_the_hardware_family_is_the_sources_or_the_users() -> None:
    machine = Machine(board=Board(hardware_version="vmx-19"))
    assert "<vssd:VirtualSystemType>vmx-19<" in written(machine)
    assert substitutions(machine, hardware="vmx-15") == {"board.hardware_version": ("vmx-19", "vmx-15")}
    with pytest.raises(UsageError, match="hardware is a family such as vmx-13"):
        parse_options(Options, {"hardware": "esx7"}, "ovf")


def test_names_of_new_files_need_no_encoding() -> None:
    machine = Machine(name="a b/../\u00fc & <c>")
    assert OVF.disk_name(machine, 0, ".vmdk", Options()) == "a-b-..-c-disk1.vmdk"
    assert OVF.config_name(machine, Options()) == "a-b-..-c.ovf"
    assert OVF.config_name(Machine(name="\u540d\u524d"), Options()) == "machine.ovf"


def test_hostile_texts_stay_texts_for_another_parser() -> None:
    program = oracle_program("xmllint")
    hostile = '"><File ovf:href="/etc/shadow"/>&lt;]]> <!-- \u540d'
    machine = Machine(
        name=hostile,
        description=hostile + "\n" + hostile,
        nics=(Nic(network=hostile, model="e1000"),),
        disks=(Disk(file=hostile, capacity=512),),
        properties=(Property(key=hostile, value=hostile + "\n.", label=hostile),),
        extra={"ovf": {f"config.{hostile}": hostile, "transport": hostile}},
    )
    content = written(machine).encode()
    config = "local-name()='Config' and contains(@*[local-name()='key'], 'etc')"
    for expression, value in (
        (f"count(//*[local-name()='File' or {config}])", "2"),
        ("string(//*[local-name()='Name'])", hostile),
        ("string(//*[local-name()='Property']/@*[local-name()='value'])", hostile + "\n."),
    ):
        command = [program, "--nonet", "--xpath", expression, "-"]
        done = subprocess.run(command, input=content, capture_output=True, check=True)
        assert done.stdout.decode().removesuffix("\n") == value
