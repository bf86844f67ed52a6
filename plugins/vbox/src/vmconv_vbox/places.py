"""Gives drives their places at VirtualBox's controllers."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from vmconv.machine import Controller, Disk, Machine, Removable
from vmconv.plugin import PlanError
from vmconv_vbox.structs import SCSI_ID_OF_CONTROLLER, TYPES, controllers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmconv.machine import Changes

Drive = TypeVar("Drive", Disk, Removable)

_NAMES = {(kind.bus, kind.model): name for name, kind in TYPES.items()}
_IDE = "PIIX4"


class _Places:
    """The types of the machine's controllers in their order, and the ports that are taken."""

    def __init__(self, machine: Machine) -> None:
        self.types: list[str] = []
        self.models: dict[tuple[str, int], str | None] = {
            (one.bus, one.index): one.model for one in machine.controllers
        }
        self.taken: set[tuple[str, int]] = set()
        self.first = min(machine.disks, key=lambda disk: (disk.boot_index is None, disk.boot_index or 0), default=None)
        for one in machine.controllers:
            self.type_of(one.bus, one.index)

    def type_of(self, bus: str | None, index: int | None) -> str:
        """Returns the type of the controller for a bus, which the machine then has."""
        model = self.models.get((bus or "", index or 0))
        wanted = _NAMES.get((bus or "", model)) or {"ide": _IDE, "scsi": "LsiLogic"}.get(bus or "", "AHCI")
        if bus == "scsi" and model is not None and (bus, model) not in _NAMES:
            wanted = "AHCI"
        same = [name for name in self.types if TYPES[name].kind == TYPES[wanted].kind]
        if not same:
            self.types.append(wanted)
        elif same[0] != wanted and bus != "ide":
            return self.type_of("sata", 0)
        return same[0] if same else wanted

    def index(self, name: str) -> int:
        """Returns the index of a type's controller on its bus."""
        before = self.types[: self.types.index(name)]
        return sum(TYPES[each].bus == TYPES[name].bus for each in before)

    def kept(self, drive: Disk | Removable) -> tuple[str, int] | None:
        """Returns the port of a drive that stays in its place; None if it cannot."""
        name = self.type_of(drive.bus, drive.controller)
        if drive.unit is None or drive.controller is None or TYPES[name].bus != drive.bus:
            return None
        if drive.bus != "ide" and self.index(name) != drive.controller:
            return None
        if drive.bus == "ide" and not (drive.unit < 2 and drive.controller < 2):
            return None
        port = drive.controller * 2 + drive.unit if drive.bus == "ide" else drive.unit
        return (name, port) if port in _ports(name) and (name, port) not in self.taken else None

    def free(self, drive: Disk | Removable) -> tuple[str, int]:
        """Returns a free port, at the drive's own controller if possible, else at SATA."""
        found = self._free_at(self.type_of(drive.bus, drive.controller), drive)
        found = found or self._free_at(self.type_of("sata", 0), drive)
        if found is None:
            raise PlanError("machine has more drives than VirtualBox has ports: 30 at a SATA controller")
        return found

    def _free_at(self, name: str, drive: Disk | Removable) -> tuple[str, int] | None:
        # Firmware starts from the lowest port, so a disk that comes to a controller goes behind the others.
        last = max((port for each, port in self.taken if each == name and drive is not self.first), default=-1)
        free = [port for port in _ports(name) if (name, port) not in self.taken]
        behind = [port for port in free if port > last]
        return (name, (behind or free)[0]) if free else None

    def place(self, name: str, port: int) -> tuple[str, int, int]:
        """Returns bus, controller and unit of a port."""
        if TYPES[name].bus == "ide":
            return "ide", port // 2, port % 2
        return TYPES[name].bus, self.index(name), port


def _ports(name: str) -> list[int]:
    kind = TYPES[name]
    count = 4 if kind.bus == "ide" else kind.ports
    return [port for port in range(count) if kind.kind != "SCSI" or port != SCSI_ID_OF_CONTROLLER]


def adapt_storage(machine: Machine, changes: Changes) -> Machine:
    """Returns the machine with each drive at a port that VirtualBox has."""
    places = _Places(machine)
    drives: list[Disk | Removable] = [*machine.disks, *machine.removables]
    ports = _assigned(drives, places)
    count = len(machine.disks)
    disks = tuple(
        _placed(disk, places.place(*ports[at]), f"disks[{at}]", _why(disk, places), changes)
        for at, disk in enumerate(machine.disks)
    )
    removables = tuple(
        _placed(drive, places.place(*ports[count + at]), f"removables[{at}]", _why(drive, places), changes)
        for at, drive in enumerate(machine.removables)
    )
    removables = _in_order(removables, ports[count:], places, changes)
    found = controllers(places.types, [*disks, *removables])
    _compare(machine.controllers, found, changes)
    return machine.model_copy(update={"disks": disks, "removables": removables, "controllers": found})


def _assigned(drives: list[Disk | Removable], places: _Places) -> list[tuple[str, int]]:
    """Returns the port of each drive. Drives that can stay come first."""
    ports: dict[int, tuple[str, int]] = {}
    for find in (places.kept, places.free):
        for at, drive in enumerate(drives):
            if at not in ports and (port := find(drive)) is not None:
                ports[at] = port
                places.taken.add(port)
    return [ports[at] for at in range(len(drives))]


def _placed(drive: Drive, after: tuple[str, int, int], path: str, why: str, changes: Changes) -> Drive:
    before = (drive.bus, drive.controller, drive.unit)
    if any(old is not None and old != new for old, new in zip(before, after, strict=True)):
        changes.add(path, _words(*before), _words(*after), why)
    return drive.model_copy(update=dict(zip(("bus", "controller", "unit"), after, strict=True)))


def _words(bus: str | None, controller: int | None, unit: int | None) -> str:
    return f"{bus or '?'}{'' if controller is None else controller}{'' if unit is None else f':{unit}'}"


def _why(drive: Disk | Removable, places: _Places) -> str:
    model = places.models.get((drive.bus or "", drive.controller or 0))
    if drive.bus == "scsi" and model is not None and ("scsi", model) not in _NAMES:
        return _lack(model)
    if drive.bus == "virtio":
        return "VirtualBox has no virtio disks; most guests have a driver for AHCI"
    return "VirtualBox has one controller of a kind, with its own number of ports"


def _lack(model: str) -> str:
    return f"VirtualBox has no {model}; most guests have a driver for AHCI"


def _in_order(
    drives: tuple[Removable, ...], ports: list[tuple[str, int]], places: _Places, changes: Changes
) -> tuple[Removable, ...]:
    """Returns the drives in the order of controllers and ports, in which settings list them."""
    order = sorted(range(len(drives)), key=lambda at: (places.types.index(ports[at][0]), ports[at][1]))
    if order != list(range(len(drives))):
        changes.add("removables", "order of drives", "order of ports", "VirtualBox lists drives by their ports")
    return tuple(drives[at] for at in order)


def _compare(before: tuple[Controller, ...], after: tuple[Controller, ...], changes: Changes) -> None:
    for at, old in enumerate(before):
        new = after[at] if at < len(after) else None
        if old != new:
            lacks = old.bus == "scsi" and old.model is not None and (old.bus, old.model) not in _NAMES
            why = _lack(str(old.model)) if lacks else "VirtualBox has one controller of a kind"
            changes.add(f"controllers[{at}]", _model(old), new and _model(new), why)


def _model(controller: Controller) -> str:
    return f"{controller.bus}{controller.index} {controller.model or ''}".strip()


def listed(machine: Machine) -> Iterator[tuple[str, list[Disk | Removable]]]:
    """Yields the type of each controller of an adapted machine, with its drives by their ports."""
    seen: set[str] = set()
    for one in machine.controllers:
        name = _NAMES[one.bus, one.model]
        if name in seen:
            continue
        seen.add(name)
        own: list[Disk | Removable] = [*machine.disks, *machine.removables]
        at = [drive for drive in own if drive.bus == one.bus and (one.bus == "ide" or drive.controller == one.index)]
        yield name, sorted(at, key=lambda drive: (drive.controller or 0, drive.unit or 0))
