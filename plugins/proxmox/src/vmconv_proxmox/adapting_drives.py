"""Gives drives their places on Proxmox, and the places their order at boot."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeVar

from vmconv.machine import Controller, Disk, Machine, Nic, Removable
from vmconv.plugin import PlanError
from vmconv_proxmox.places import (
    DRIVE,
    LIMITS,
    SCSI_HW,
    SCSI_MODELS,
    WITHOUT_UEFI,
    controllers,
    drive_number,
    place,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmconv.machine import Changes
    from vmconv_proxmox.options import Options

Drive = TypeVar("Drive", Disk, Removable)

_MAX_SERIAL = 20
_DEVICE = re.compile(r"/dev/[^,\s]+|[A-Za-z][\w.-]*:[^,\s]+")
_FORMATS = ("raw", "qcow2", "vmdk")


class _Places:
    """The places that drives have so far, and the SCSI controller."""

    def __init__(self, machine: Machine, windows: bool, options: Options) -> None:
        self.windows = windows
        self.scsi, self.reason = _scsi(machine, windows, options)
        # Drives that only Proxmox itself can make, such as cloud-init's.
        self.taken = {key for key in machine.extra.get("proxmox", {}) if DRIVE.fullmatch(key)}

    def kept(self, drive: Disk | Removable) -> str | None:
        """Returns the key of a drive that stays in its place; None if it cannot."""
        number = drive_number(drive.bus, drive.controller, drive.unit, self.scsi)
        if number is None or f"{drive.bus}{number}" in self.taken or drive.bus not in self._buses(drive):
            return None
        return f"{drive.bus}{number}"

    def free(self, drive: Disk | Removable) -> str:
        """Returns the key of a free place, on the drive's own bus if possible."""
        buses = self._buses(drive)
        for bus in sorted(buses, key=lambda bus: bus != drive.bus):
            for number in range(LIMITS[bus]):
                if f"{bus}{number}" not in self.taken:
                    return f"{bus}{number}"
        raise PlanError("machine has more drives than Proxmox has places: 4 IDE, 6 SATA, 31 SCSI, 16 virtio")

    def _buses(self, drive: Disk | Removable) -> list[str]:
        """Returns the buses for a drive, those first for which the guest surely has a driver."""
        if isinstance(drive, Removable):
            return ["ide", "sata", *(["scsi"] if self.scsi else [])]
        if self.windows:
            return ["sata", *(["scsi"] if self.scsi else []), "ide", "virtio"]
        return ["scsi", "virtio", "sata", "ide"]

    def why(self, drive: Disk | Removable) -> str:
        if drive.bus == "scsi" and self.reason:
            return self.reason
        if drive.bus not in LIMITS:
            return f"Proxmox has no {drive.bus} disks"
        return "Proxmox has another number of places there"


def _scsi(machine: Machine, windows: bool, options: Options) -> tuple[str | None, str]:
    """Returns the model of the SCSI controller and why it is another; None if Windows has no driver for any."""
    if options.scsihw is not None:
        return SCSI_MODELS[options.scsihw], f"-o scsihw={options.scsihw}"
    used = [drive.controller for drive in (*machine.disks, *machine.removables) if drive.bus == "scsi"]
    models = {one.index: one.model for one in machine.controllers if one.bus == "scsi"}
    if not used:
        return (None if windows else "virtio-scsi"), ""
    model = models.get(used[0] or 0)
    if model in SCSI_HW and not (machine.firmware.kind == "uefi" and model in WITHOUT_UEFI):
        return model, "Proxmox has one model of SCSI controllers"
    lack = "OVMF has no driver for it" if model in SCSI_HW else f"Proxmox has no {model or 'plain SCSI controller'}"
    return (None, f"{lack}, and Windows has one for SATA") if windows else ("virtio-scsi", lack)


def adapt_drives(machine: Machine, windows: bool, options: Options, changes: Changes) -> Machine:
    """Returns the machine with each drive in a place that Proxmox has."""
    for disk in machine.disks:
        if disk.device is not None and not _DEVICE.fullmatch(disk.device):
            hint = "detach it, convert, and attach the device with qm set"
            raise PlanError(f"disk {disk.device!r} is neither a device in /dev nor a volume of Proxmox", hint=hint)
    floppies = tuple(drive for drive in machine.removables if drive.kind == "floppy")
    if floppies:
        changes.add("removables", f"{len(floppies)} floppy drives", None, "Proxmox has no floppy drives")
    disks: tuple[Disk, ...] = machine.disks
    removables = tuple(drive for drive in machine.removables if drive.kind != "floppy")
    places = _Places(machine, windows, options)
    keys = _keys((*disks, *removables), places)
    disks = tuple(
        _disk(_placed(disk, keys[at], places, f"disks[{at}]", changes), f"disks[{at}]", changes)
        for at, disk in enumerate(disks)
    )
    removables = tuple(
        _removable(_placed(drive, keys[len(disks) + at], places, f"removables[{at}]", changes), at, changes)
        for at, drive in enumerate(removables)
    )
    found = controllers((*disks, *removables), places.scsi, machine.board.chipset)
    _compare(machine.controllers, found, places, changes)
    return machine.model_copy(update={"disks": disks, "removables": removables, "controllers": found})


def _keys(drives: tuple[Disk | Removable, ...], places: _Places) -> list[str]:
    """Returns the key of each drive. Drives that can stay come first."""
    keys: dict[int, str] = {}
    for find in (places.kept, places.free):
        for at, drive in enumerate(drives):
            if at not in keys and (key := find(drive)) is not None:
                keys[at] = key
                places.taken.add(key)
    return [keys[at] for at in range(len(drives))]


def _placed(drive: Drive, key: str, places: _Places, path: str, changes: Changes) -> Drive:
    match = DRIVE.fullmatch(key)
    assert match is not None
    if match[1] == "scsi" and places.scsi is None:
        places.scsi = "virtio-scsi"
    controller, unit = place(match[1], int(match[2]), places.scsi)
    before = (drive.bus, drive.controller, drive.unit)
    after = (match[1], controller, unit)
    if any(old is not None and old != new for old, new in zip(before, after, strict=True)):
        changes.add(path, _at(*before), key, places.why(drive))
    return drive.model_copy(update=dict(zip(("bus", "controller", "unit"), after, strict=True)))


def _at(bus: str | None, controller: int | None, unit: int | None) -> str:
    return f"{bus or '?'}{'' if controller is None else controller}{'' if unit is None else f':{unit}'}"


def _disk(disk: Disk, path: str, changes: Changes) -> Disk:
    mode = "independent-nonpersistent" if disk.mode == "independent-nonpersistent" else "persistent"
    changes.set(f"{path}.mode", disk.mode, mode, "a snapshot on Proxmox has all disks")
    serial = disk.serial
    if serial is not None and len(serial.encode()) > _MAX_SERIAL:
        serial = changes.set(f"{path}.serial", serial, None, f"a serial number has at most {_MAX_SERIAL} bytes")
    suffix = (disk.file or "").rpartition(".")[2]
    form = disk.format or (suffix if suffix in _FORMATS else None)
    return disk.model_copy(update={"mode": mode, "serial": serial, "format": form})


def _removable(drive: Removable, at: int, changes: Changes) -> Removable:
    reason = "the drive is empty: media belong on a storage for ISO images"
    connected = changes.set(f"removables[{at}].connected", drive.connected, False, reason)
    return drive.model_copy(update={"connected": connected})


def _compare(before: tuple[Controller, ...], after: tuple[Controller, ...], places: _Places, changes: Changes) -> None:
    for at, old in enumerate(before):
        new = after[at] if at < len(after) else None
        if old != new:
            reason = places.reason if old.bus == "scsi" and places.reason else ""
            why = reason or "Proxmox derives controllers from the places of the drives"
            changes.add(f"controllers[{at}]", _model(old), new and _model(new), why)


def _model(controller: Controller) -> str:
    return f"{controller.bus}{controller.index} {controller.model or ''}".strip()


_CLASSES = {"disks": "disk", "removables": "cdrom", "nics": "network"}


def _bootable(machine: Machine) -> Iterator[tuple[str, int, Disk | Removable | Nic]]:
    for name in _CLASSES:
        yield from ((name, at, device) for at, device in enumerate(getattr(machine, name)))


def adapt_boot(machine: Machine, changes: Changes) -> Machine:
    """Returns the machine with one list of devices to boot from, since a silent configuration means the network."""
    devices = list(_bootable(machine))
    indexed = sorted((one for one in devices if one[2].boot_index is not None), key=lambda one: one[2].boot_index or 0)
    order = [(name, at) for name, at, _ in indexed]
    for wanted in (*machine.firmware.boot_order, *(() if order or machine.firmware.boot_order else _DEFAULT)):
        order += [(name, at) for name, at, _ in devices if _CLASSES[name] == wanted and (name, at) not in order]
    if not order:
        order = [(name, at) for wanted in _DEFAULT for name, at, _ in devices if _CLASSES[name] == wanted]
    places = {one: count for count, one in enumerate(order)}
    lists: dict[str, list[Disk | Removable | Nic]] = {name: [] for name in _CLASSES}
    for name, at, device in devices:
        index = places.get((name, at))
        changes.set(f"{name}[{at}].boot_index", device.boot_index, index, "Proxmox has one list of devices, from 0")
        lists[name].append(device.model_copy(update={"boot_index": index}))
    if machine.firmware.boot_order:
        listed = tuple(f"{name}[{at}]" for name, at in order)
        changes.add("firmware.boot_order", machine.firmware.boot_order, listed, "Proxmox lists devices")
    firmware = machine.firmware.model_copy(update={"boot_order": ()})
    return machine.model_copy(update={"firmware": firmware, **{name: tuple(found) for name, found in lists.items()}})


_DEFAULT = ("disk", "cdrom", "network")
