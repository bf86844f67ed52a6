"""Places of drives: `scsi3` and the like, and the controllers that QEMU gets for them.

`PVE::QemuServer::DriveDevice` derives controllers from the numbers of the drives: 7 at an LSI controller, 6 SATA ports,
2 at an IDE channel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmconv.machine import Controller

if TYPE_CHECKING:
    from vmconv.machine import Disk, Removable

DRIVE = re.compile(r"(ide|sata|scsi|virtio)(\d{1,5})")
LIMITS = {"ide": 4, "sata": 6, "scsi": 31, "virtio": 16}

SCSI_MODELS = {
    "lsi": "lsi53c895a",
    "lsi53c810": "lsi53c810",
    "megasas": "megasas",
    "pvscsi": "pvscsi",
    "virtio-scsi-pci": "virtio-scsi",
    "virtio-scsi-single": "virtio-scsi",
}
"""Neutral models by the names of `scsihw`. QEMU's `lsi` is a 53C895A, not the 53C1030 that VMware calls lsilogic."""

SCSI_HW = {model: name for name, model in SCSI_MODELS.items()}

WITHOUT_UEFI = frozenset({"lsi53c895a", "lsi53c810", "megasas", "pvscsi"})
"""Controllers for which OVMF has no driver. edk2 has one for pvscsi, which Debian 12's build leaves out."""


def _per_controller(bus: str, scsi: str | None) -> int:
    if bus == "scsi" and scsi in ("lsi53c895a", "lsi53c810"):
        return 7
    return 2 if bus == "ide" else LIMITS[bus]


def place(bus: str, number: int, scsi: str | None) -> tuple[int, int]:
    """Returns controller and unit of a drive; `scsi` is the model of the SCSI controller."""
    return divmod(number, _per_controller(bus, scsi))


def drive_number(bus: str | None, controller: int | None, unit: int | None, scsi: str | None) -> int | None:
    """Returns the number of the drive at a place; None if Proxmox has no such place."""
    if bus not in LIMITS or controller is None or unit is None:
        return None
    width = _per_controller(bus, scsi)
    number = controller * width + unit
    return number if unit < width and number < LIMITS[bus] else None


def controllers(drives: Iterable[Disk | Removable], scsi: str | None, chipset: str | None) -> tuple[Controller, ...]:
    """Returns the controllers of drives, by bus and index."""
    models = {"ide": "piix3" if chipset == "i440fx" else None, "sata": "ahci", "scsi": scsi, "virtio": "virtio-blk"}
    found = sorted({(drive.bus, drive.controller or 0) for drive in drives if drive.bus is not None})
    return tuple(Controller(bus=bus, index=index, model=models[bus]) for bus, index in found)


def is_windows(ostype: str | None) -> bool:
    """True for the OS types of Windows: `w2k3`, `win10` and the like."""
    return ostype is not None and ostype.startswith("w")
