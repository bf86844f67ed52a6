"""Which drivers of Linux and Windows serve the controllers and network cards of a machine."""

from __future__ import annotations

from typing import NamedTuple

from vmconv.machine.model import Disk, Machine, Nic


class Drivers(NamedTuple):
    """The drivers that a device needs: of `linux`, one of each tuple; of `windows`, any one."""

    linux: tuple[tuple[str, ...], ...]
    windows: tuple[str, ...]


_CONTROLLERS = {
    "virtio-blk": Drivers((("virtio_blk",), ("virtio_pci",)), ("viostor",)),
    "virtio-scsi": Drivers((("virtio_scsi",), ("virtio_pci",), ("sd_mod",)), ("vioscsi",)),
    "ahci": Drivers((("ahci",), ("sd_mod",)), ("storahci", "msahci")),
    "ide": Drivers((("ata_piix", "ata_generic", "pata_acpi", "piix"),), ("intelide",)),
    "nvme": Drivers((("nvme",),), ("stornvme",)),
    "pvscsi": Drivers((("vmw_pvscsi",), ("sd_mod",)), ("pvscsi",)),
    "lsilogic": Drivers((("mptspi", "sym53c8xx"), ("sd_mod",)), ("lsi_scsi", "symmpi", "sym_hi")),
    "lsisas1068": Drivers((("mptsas",), ("sd_mod",)), ("lsi_sas",)),
    "buslogic": Drivers((("BusLogic",), ("sd_mod",)), ("buslogic",)),
    "hyperv-scsi": Drivers((("hv_storvsc",), ("hv_vmbus",), ("sd_mod",)), ("storvsc",)),
    "usb": Drivers((("usb_storage", "uas"), ("sd_mod",)), ("usbstor",)),
}
"""By the model of the controller, or its family."""

_BUS = {"virtio": "virtio-blk", "sata": "ahci", "ide": "ide", "nvme": "nvme", "usb": "usb"}
"""The family of the controllers of a bus, except SCSI: its controllers have nothing in common."""

_NICS = {
    "virtio": Drivers((("virtio_net",), ("virtio_pci",)), ("netkvm",)),
    "vmxnet3": Drivers((("vmxnet3",),), ("vmxnet3ndis6",)),
    "e1000": Drivers((("e1000",),), ("e1g60", "e1000")),
    "e1000e": Drivers((("e1000e",),), ("e1iexpress", "e1i65x64", "e1i68x64", "e1dexpress")),
    "pcnet32": Drivers((("pcnet32",),), ("pcnet",)),
    "rtl8139": Drivers((("8139cp", "8139too"),), ("rtl8139", "rtlnic64", "rtnic64")),
    "ne2k": Drivers((("ne2k_pci",),), ()),
    "hyperv": Drivers((("hv_netvsc",), ("hv_vmbus",)), ("netvsc",)),
    "hyperv-legacy": Drivers((("tulip",),), ()),
}


def of_disk(machine: Machine, disk: Disk) -> Drivers | None:
    """Returns the drivers for the controller of a disk; None if the machine does not state a known one."""
    model = machine.controller_model(disk.bus, disk.controller)
    if disk.bus == "scsi":
        return _CONTROLLERS.get(model or "")
    return _CONTROLLERS.get(_BUS.get(disk.bus or "", ""))


def of_nic(nic: Nic) -> Drivers | None:
    """Returns the drivers for a network card; None if its model is not known."""
    return _NICS.get(nic.model or "")


def device_names(machine: Machine) -> frozenset[str]:
    """Returns what the names of the machine's disks begin with in Linux; empty if a bus is not stated."""
    names = {"virtio": "vd", "nvme": "nvme"}
    buses = {disk.bus for disk in machine.disks}
    return frozenset() if None in buses else frozenset(names.get(bus or "", "sd") for bus in buses)
