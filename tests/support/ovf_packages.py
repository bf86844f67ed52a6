"""Packages of the tests: a small descriptor, and OVAs made by the writer."""

from __future__ import annotations

from typing import Any

from vmconv.machine import Machine
from vmconv.model.options import parse_options
from vmconv.plugin import ConfigFile, Extents, Kind, Member
from vmconv_ovf import Ova

_SPACES = (
    'xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" '
    'xmlns:vmw="http://www.vmware.com/schema/ovf" xmlns:vbox="http://www.virtualbox.org/ovf/machine" '
    'xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" '
    'xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData"'
)

FILE = '<File ovf:href="disk1.vmdk" ovf:id="file1"/>'
DISK = '<Disk ovf:capacity="8" ovf:capacityAllocationUnits="byte * 2^30" ovf:diskId="d1" ovf:fileRef="file1"/>'


def item(key: object, kind: int, inside: str = "", **values: object) -> str:
    """Returns an Item with this InstanceID and ResourceType."""
    stated = {"InstanceID": key, "ResourceType": kind, **values}
    texts = "".join(f"<rasd:{name}>{value}</rasd:{name}>" for name, value in stated.items())
    return f"<Item>{texts}{inside}</Item>"


CONTROLLER = item(3, 6, Address=0, ResourceSubType="lsilogic")
ATTACHED = item(4, 17, Parent=3, AddressOnParent=0, HostResource="ovf:/disk/d1")


def descriptor(
    items: str = "", *, files: str = "", disks: str = "", envelope: str = "", system: str = "", settings: str = ""
) -> bytes:
    """Returns a descriptor of one machine with these parts."""
    return (
        f"<Envelope {_SPACES}><References>{files}</References><DiskSection><Info/>{disks}</DiskSection>{envelope}"
        f'<VirtualSystem ovf:id="web"><Info/>{system}<VirtualHardwareSection><Info/>'
        f"<System><vssd:VirtualSystemType>vmx-13</vssd:VirtualSystemType></System>{items}{settings}"
        "</VirtualHardwareSection></VirtualSystem></Envelope>"
    ).encode()


def with_disk(items: str = CONTROLLER + ATTACHED, *, files: str = FILE, disks: str = DISK, **parts: str) -> bytes:
    return descriptor(items, files=files, disks=disks, **parts)


def package(machine: Machine, tables: dict[str, Extents], modulus: int = 1, **options: Any) -> Extents:
    """Returns the OVA of an adapted machine; files without a table have a block of zeros."""
    ova = Ova()
    parsed = parse_options(ova.options(), options, "ova")
    names = [disk.file for disk in machine.disks if disk.file]
    names += [drive.file for drive in machine.removables if drive.file]
    nvram = machine.firmware.nvram
    configs = [ConfigFile(nvram.file, tables[nvram.file].read(0, tables[nvram.file].size))] if nvram else []
    configs += [each._replace(name=each.name or "machine.ova") for each in ova.write(machine, parsed)]
    members = [Member(name, tables.get(name, Extents.filled(512, Kind.ZERO))) for name in dict.fromkeys(names)]
    return ova.pack(configs, members, modulus, parsed)


OVF = with_disk(
    CONTROLLER
    + ATTACHED
    + item(1, 3, VirtualQuantity=2, Reservation=5, Limit=7, Weight=3, ElementName="cpu", Description="d")
    + item(2, 4, AllocationUnits="byte * 2^20", VirtualQuantity=512)
    + item(5, 10, Address="00:50:56:01:02:03", Connection="LAN", ResourceSubType="E1000", AutomaticDeallocation="true")
    + item(6, 15, Parent=3, AddressOnParent=1, AutomaticAllocation="false")
    + item(7, 21, ResourceSubType="vmware.serialport.uri"),
    system="<AnnotationSection><Info/><Annotation>x</Annotation></AnnotationSection>"
    '<InstallSection ovf:initialBootStopDelay="300"><Info/></InstallSection>'
    '<vmw:BootOrderSection vmw:instanceId="4" vmw:type="disk"><Info/></vmw:BootOrderSection>'
    "<ProductSection><Info/><Product>p</Product>"
    '<Property ovf:key="a" ovf:type="string" ovf:value="v"/></ProductSection>',
    settings='<vmw:Config vmw:key="firmware" vmw:value="efi"/><vmw:Config vmw:key="x" vmw:value="y"/>',
    envelope='<NetworkSection><Info/><Network ovf:name="LAN"><Description>d</Description></Network></NetworkSection>'
    '<StartupSection><Info/><Item ovf:id="web" ovf:order="1" ovf:startDelay="3"/></StartupSection>',
).decode()
