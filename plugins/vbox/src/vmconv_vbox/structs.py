"""The words of VirtualBox's settings, and what it has of each device."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

from vmconv.machine import Controller

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmconv.machine import Disk, Removable

NAMESPACE = "http://www.virtualbox.org/"
NS = f"{{{NAMESPACE}}}"

MAX_CPUS = 64
MAX_MEMORY = 2 << 40


class Type(NamedTuple):
    """A controller: its bus, neutral model, how many ports it can have, and its kind, of which a machine has one."""

    bus: str
    model: str | None
    ports: int
    kind: str


TYPES = {
    "AHCI": Type("sata", "ahci", 30, "SATA"),
    "PIIX3": Type("ide", "piix3", 2, "IDE"),
    "PIIX4": Type("ide", "piix4", 2, "IDE"),
    "ICH6": Type("ide", "ich6", 2, "IDE"),
    "LsiLogic": Type("scsi", "lsilogic", 16, "SCSI"),
    "BusLogic": Type("scsi", "buslogic", 16, "SCSI"),
    "LsiLogicSas": Type("scsi", "lsisas1068", 255, "SAS"),
    "VirtioSCSI": Type("scsi", "virtio-scsi", 256, "VirtIO"),
    "NVMe": Type("nvme", "nvme", 255, "NVMe"),
    "USB": Type("usb", None, 8, "USB"),
    "I82078": Type("floppy", None, 2, "Floppy"),
}
"""VirtualBox 7.2 has more of some kinds with an ICH9 chipset, but one of each with a PIIX3."""

SCSI_ID_OF_CONTROLLER = 7

NICS = {
    "Am79C970A": "pcnet32",
    "Am79C973": "pcnet32",
    "82540EM": "e1000",
    "82543GC": "e1000",
    "82545EM": "e1000",
    "virtio": "virtio",
    "usbnet": "usbnet",
}
NIC_NAMES = {"pcnet32": "Am79C973", "e1000": "82540EM", "virtio": "virtio", "usbnet": "usbnet"}
"""The types that new cards get."""

DISPLAYS = {"VBoxVGA": "vboxvga", "VMSVGA": "vmware", "VBoxSVGA": "vboxsvga", "None": "none"}
SOUNDS = {"AC97": "ac97", "HDA": "hda", "SB16": "sb16"}
PORTS = {"HostPipe": "pipe", "HostDevice": "device", "RawFile": "file", "TCP": "network", "Disconnected": "none"}
UARTS = (("0x3f8", "4"), ("0x2f8", "3"), ("0x3e8", "4"), ("0x2e8", "3"))
BOOT = {"HardDisk": "disk", "DVD": "cdrom", "Floppy": "floppy", "Network": "network"}
CHIPSETS = {"PIIX3": "i440fx", "ICH9": "q35", "ARMv8Virtual": "virt"}
USB = {"OHCI": "uhci", "EHCI": "ehci", "XHCI": "xhci"}
"""VirtualBox's USB 1.1 controller is an OHCI; the model has one word for all of that speed."""
FORMAT_NAMES = {
    "vdi": "VDI",
    "vmdk": "VMDK",
    "vhd": "VHD",
    "raw": "RAW",
    "qcow2": "QCOW",
    "qed": "QED",
    "vhdx": "VHDX",
    "parallels": "Parallels",
}
FORMATS = {own.upper(): name for name, own in FORMAT_NAMES.items()}
TPMS = {"v1_2": "1.2", "v2_0": "2.0"}
MODES = {"Normal": "persistent", "Writethrough": "independent-persistent", "Immutable": "independent-nonpersistent"}

DMI = {
    "DmiSystemSerial": "serial",
    "DmiSystemVendor": "manufacturer",
    "DmiSystemProduct": "product",
    "DmiBoardSerial": "board_serial",
    "DmiChassisSerial": "chassis_serial",
    "DmiChassisAssetTag": "asset_tag",
}
"""Fields of the SMBIOS table, which VirtualBox takes from extra data of the firmware's device."""


def registered(identity: UUID, form: str | None) -> UUID:
    """Returns the id under which VirtualBox registers an image: that of a VHD has its first fields swapped.

    The function is its own inverse.
    """
    return UUID(bytes_le=identity.bytes) if form == "vhd" else identity


def dmi_key(kind: str | None, name: str) -> str:
    return f"VBoxInternal/Devices/{'efi' if kind == 'uefi' else 'pcbios'}/0/Config/{name}"


def serial_key(kind: str, port: int) -> str | None:
    """Returns the key of the extra data with a disk's serial number; None where VirtualBox takes none."""
    if kind == "SATA":
        return f"VBoxInternal/Devices/ahci/0/Config/Port{port}/SerialNumber"
    names = ("PrimaryMaster", "PrimarySlave", "SecondaryMaster", "SecondarySlave")
    return f"VBoxInternal/Devices/piix3ide/0/Config/{names[port]}/SerialNumber" if kind == "IDE" else None


def controllers(types: Iterable[str], drives: Iterable[Disk | Removable]) -> tuple[Controller, ...]:
    """Returns neutral controllers, by the names of their types in order.

    The two channels of the IDE controller are two controllers: those that have drives, or the first.
    """
    channels = sorted({drive.controller or 0 for drive in drives if drive.bus == "ide"}) or [0]
    found: list[Controller] = []
    for name in types:
        kind = TYPES[name]
        places = channels if kind.bus == "ide" else [sum(one.bus == kind.bus for one in found)]
        found += [Controller.model_validate({"bus": kind.bus, "index": at, "model": kind.model}) for at in places]
    return tuple(found)
