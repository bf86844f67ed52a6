"""Gives controllers and places to disks and drives, as VMware has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmconv.machine import Controller, Disk, Machine, Removable
from vmconv.plugin import PlanError, Substitution
from vmconv_vmx import names

if TYPE_CHECKING:
    from vmconv.machine import Changes

Place = tuple[str, int, int]

_UNITS: dict[str, tuple[int, Sequence[int]]] = {
    "ide": (2, range(2)),
    "sata": (4, range(30)),
    "scsi": (4, [unit for unit in range(16) if unit != 7]),
    "nvme": (4, range(15)),
    "floppy": (1, range(2)),
}
"""Controllers of each bus, and the places at one of them. Place 7 of SCSI is the controller itself."""

_WIDE = range(64)
"""Places at a pvscsi controller since hardware version 14; 7 is the controller itself."""

OWN_SLOTS = "VMware numbers PCI slots in its own way"
_ELSEWHERE = {
    "virtio": "VMware has no virtio",
    "usb": "VMware has no USB disks",
    "floppy": "a disk is not a floppy",
    "nvme": "NVMe has no CD drives",
}
_FULL = "VMware has no such place on this bus"


def storage(machine: Machine, changes: Changes) -> Machine:
    """Returns the machine with each disk and drive at a place that VMware has, and with their controllers.

    Raises `PlanError` if the places do not suffice.
    """
    wide = {one.index for one in machine.controllers if one.bus == "scsi" and one.model == "pvscsi"}
    found: dict[str, Disk | Removable] = {
        f"disks[{at}].": _disk(disk, f"disks[{at}].", changes) for at, disk in enumerate(machine.disks)
    }
    for at, drive in enumerate(machine.removables):
        found[f"removables[{at}]."] = _drive(drive, f"removables[{at}].", changes)
    taken: set[Place] = set()
    # Devices at places of their own come first, so that moved ones do not take them.
    for prefix in sorted(found, key=lambda prefix: not _fits(found[prefix], wide)):
        found[prefix] = _placed(found[prefix], prefix, taken, wide, changes)
    devices = found.values()
    update = {
        "disks": tuple(device for device in devices if isinstance(device, Disk)),
        "removables": tuple(device for device in devices if isinstance(device, Removable)),
        "controllers": _controllers(machine, {(bus, index) for bus, index, _ in taken}, changes),
    }
    return machine.model_copy(update=update)


def _disk(disk: Disk, prefix: str, changes: Changes) -> Disk:
    if disk.format not in (None, "vmdk"):
        disk = changes.update(disk, prefix, "VMware reads VMDK", format="vmdk")
    if disk.shared is False:
        disk = changes.update(disk, prefix, "VMware shares no disk unless a setting says so", shared=None)
    if disk.bus in _ELSEWHERE and disk.bus != "nvme":
        return changes.update(disk, prefix, _ELSEWHERE[disk.bus], bus="scsi", controller=None, unit=None)
    return disk if disk.bus else disk.model_copy(update={"bus": "scsi"})


def _drive(drive: Removable, prefix: str, changes: Changes) -> Removable:
    bus = "floppy" if drive.kind == "floppy" else "sata" if drive.bus in _ELSEWHERE else drive.bus or "sata"
    if drive.bus == bus:
        return drive
    reason = "floppy drives have a controller of their own" if bus == "floppy" else _ELSEWHERE.get(drive.bus or "", "")
    return changes.update(drive, prefix, reason, bus=bus, controller=None, unit=None)


def _places(bus: str, index: int, wide: set[int]) -> list[int]:
    count, units = _UNITS.get(bus, (0, ()))
    if index >= count:
        return []
    return [unit for unit in _WIDE if unit != 7] if bus == "scsi" and index in wide else list(units)


def _fits(device: Disk | Removable, wide: set[int]) -> bool:
    """True if VMware has the place that the device has."""
    return device.unit in _places(device.bus or "", device.controller or 0, wide)


def _placed(
    device: Disk | Removable, prefix: str, taken: set[Place], wide: set[int], changes: Changes
) -> Disk | Removable:
    """Returns the device at its own place, or at the next free one of its bus, or else of SATA."""
    bus, index = str(device.bus), device.controller or 0
    own = (bus, index, -1 if device.unit is None else device.unit)
    free = own if _fits(device, wide) and own not in taken else _free(bus, index, taken, wide)
    place = free or _free("sata", 0, taken, wide)
    if place is None or (bus == "floppy" and free is None):
        raise PlanError(f"{prefix[:-1]}: VMware has no free place for it")
    taken.add(place)
    return changes.update(device, prefix, _FULL, bus=place[0], controller=place[1], unit=place[2])


def _free(bus: str, first: int, taken: set[Place], wide: set[int]) -> Place | None:
    """Returns the next free place of a bus, at the controller `first` if it has one."""
    for index in sorted(range(_UNITS[bus][0]), key=lambda index: (index != first, index)):
        for unit in _places(bus, index, wide):
            if (bus, index, unit) not in taken:
                return bus, index, unit
    return None


def _controllers(machine: Machine, used: set[tuple[str, int]], changes: Changes) -> tuple[Controller, ...]:
    """Returns the controllers that VMware has, by bus and number, in the order of the reader."""
    kept = {(one.bus, one.index): one for one in machine.controllers if _exists(one, used)}
    missing = {key: Controller(bus=key[0], index=key[1]) for key in used if key[0] != "floppy" and key not in kept}
    ordered = [one for _, one in sorted((kept | missing).items()) if one.bus != "floppy"]
    if [(one.bus, one.index) for one in machine.controllers] != [(one.bus, one.index) for one in ordered]:
        reason = "VMware has IDE, SATA, SCSI and NVMe controllers, listed in this order"
        before, after = (", ".join(f"{one.bus}{one.index}" for one in each) for each in (machine.controllers, ordered))
        if machine.controllers:
            changes.found.append(Substitution("controllers", before, after, reason))
    return tuple(_controller(one, machine, at, changes) for at, one in enumerate(ordered))


def _exists(one: Controller, used: set[tuple[str, int]]) -> bool:
    """True for a controller with devices, and for an empty one that VMware can have."""
    own = one.bus in ("nvme", "sata", "scsi") and one.index < _UNITS[one.bus][0]
    return own or (one.bus, one.index) in used


def _controller(one: Controller, machine: Machine, at: int, changes: Changes) -> Controller:
    prefix = f"controllers[{at}]."
    if one.pci_slot and (not one.pci_slot.isdecimal() or one.bus == "ide"):
        one = changes.update(one, prefix, OWN_SLOTS, pci_slot=None)
    if one.bus == "ide":
        return changes.update(one, prefix, "VMware's IDE is a PIIX4", model="piix4")
    new = one not in machine.controllers and one.model is None
    if one.bus == "scsi" and ((one.model and one.model not in names.SCSI_MODELS) or new):
        windows = names.is_windows(machine.os.source_id)
        model = names.WINDOWS_SCSI if windows else names.OTHER_SCSI
        reason = f"VMware has no {one.model}; {'Windows' if windows else 'Linux'} has a driver for {model}"
        return changes.update(one, prefix, reason, model=model)
    if one.bus in ("sata", "nvme") and one.model:
        own = {"sata": "ahci", "nvme": "nvme"}[one.bus]
        reason = f"VMware's {one.bus.upper()} controller is of this kind"
        return changes.update(one, prefix, reason, model=own)
    return one
