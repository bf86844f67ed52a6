"""Chooses the bus, controller and unit of each disk: the source's where QEMU has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from vmconv.machine import Controller, Disk, Removable, name_in
from vmconv.plugin import PlanError
from vmconv_libvirt.words import SCSI, VIRTIO_SCSI

if TYPE_CHECKING:
    from vmconv.machine import Changes, Machine
    from vmconv_libvirt.options import Options

Device = TypeVar("Device", Disk, Removable)

_CONTROLLERS = {"ide": 2, "sata": 16, "scsi": 16, "floppy": 1, "virtio": 1}
_NARROW = {"lsi53c895a": 7, "lsisas1068": 8, "am53c974": 7}
_UNITS = {"ide": 2, "sata": 6, "floppy": 2, "virtio": 1024}

_FULL = "the place is taken, or QEMU's controller has no such place"


class Choice(NamedTuple):
    bus: str
    reason: str


class Scsi:
    """The SCSI controllers of a machine: their new models, or why their disks move to another bus."""

    def __init__(self, machine: Machine, options: Options) -> None:
        self.linux = name_in("proxmox", machine.os) in ("l24", "l26")
        self.uefi = machine.firmware.kind == "uefi"
        self.forced = options.bus == "virtio-scsi"
        self.models = {each.index: each.model for each in machine.controllers if each.bus == "scsi"}

    def choose(self, index: int) -> tuple[str | None, str]:
        """Returns the new model of a controller and the reason for it; None if its disks have to move."""
        model = self.models.get(index)
        if self.forced:
            return "virtio-scsi", "asked for with bus=virtio-scsi"
        if model in SCSI:
            if self.uefi and model not in VIRTIO_SCSI:
                return self._other(f"the OVMF of Debian 12 and RHEL has no driver for {model}")
            return model, ""
        if model not in (None, "lsilogic"):
            return self._other(f"QEMU has no {model}")
        if self.uefi:
            return self._other("QEMU has no LSI 53C1030, and OVMF has no driver for its 53C895A")
        if not self.linux:
            return None, "QEMU has no LSI 53C1030, and Windows has no driver for the 53C895A"
        return "lsi53c895a", "QEMU has no LSI 53C1030. The guest needs the driver sym53c8xx"

    def _other(self, why: str) -> tuple[str | None, str]:
        """Returns virtio-scsi for Linux, whose kernels bring its driver."""
        return ("virtio-scsi" if self.linux else None), why


def choose_bus(device: Disk | Removable, machine: Machine, scsi: Scsi, options: Options) -> Choice:
    """Returns the bus of a disk or drive, with the reason if it is not the source's."""
    bus = device.bus
    if isinstance(device, Removable) and device.kind == "floppy":
        return Choice("floppy", "floppy drives are at the floppy controller")
    if isinstance(device, Disk) and options.bus is not None:
        wanted = "scsi" if options.bus == "virtio-scsi" else options.bus
        return Choice(_possible(wanted, machine), f"asked for with bus={options.bus}")
    if bus is None:
        return Choice("sata", "")
    if bus == "nvme":
        return Choice("sata", "libvirt attaches no files as NVMe disks")
    if bus == "floppy" or (bus == "virtio" and isinstance(device, Removable)):
        return Choice("sata", f"the bus {bus} has no such drives")
    if bus == "scsi":
        model, why = scsi.choose(device.controller or 0)
        return Choice("scsi" if model else "sata", why)
    return Choice(_possible(bus, machine), "the board has no IDE controller")


def _possible(bus: str, machine: Machine) -> str:
    return "sata" if bus == "ide" and machine.board.chipset != "i440fx" else bus


class Places:
    """The places at the controllers; each is given once."""

    def __init__(self, models: dict[int, str | None]) -> None:
        self._taken: set[tuple[str, int, int]] = set()
        self._models = models

    def take(self, bus: str, controller: int | None, unit: int | None) -> bool:
        """True if this place exists and was free."""
        place = (bus, controller or 0, -1 if unit is None else unit)
        if place in self._taken or place[1] >= _CONTROLLERS[bus] or place[2] not in self._units(bus, place[1]):
            return False
        self._taken.add(place)
        return True

    def next(self, bus: str) -> tuple[str, int, int]:
        """Takes the first free place of a bus; disks too many for IDE go to SATA. Raises `PlanError` without any."""
        for place in self._free(bus):
            self._taken.add(place)
            return place
        if bus in ("ide", "virtio"):
            return self.next("sata")
        raise PlanError(f"the machine has too many disks for the bus {bus}", hint="bus=virtio takes 1024 disks")

    def _free(self, bus: str) -> Iterator[tuple[str, int, int]]:
        for controller in range(_CONTROLLERS[bus]):
            for unit in self._units(bus, controller):
                if (bus, controller, unit) not in self._taken:
                    yield bus, controller, unit

    def _units(self, bus: str, controller: int) -> list[int]:
        if bus != "scsi":
            return list(range(_UNITS[bus]))
        count = _NARROW.get(self._models.get(controller) or "", 16)
        # 7 is the controller's own id; QEMU's SAS controllers have none.
        return [unit for unit in range(count) if unit != 7 or count == 8]


def place_all(machine: Machine, options: Options, changes: Changes) -> Machine:
    """Returns the machine with a bus, controller and unit for each disk, and all controllers that they need."""
    scsi = Scsi(machine, options)
    new_models = {index: scsi.choose(index)[0] for index in range(_CONTROLLERS["scsi"])}
    places = Places(new_models)

    def stay(devices: Sequence[Device]) -> list[tuple[Device, Choice, bool]]:
        chosen = [(device, choose_bus(device, machine, scsi, options)) for device in devices]
        return [(device, choice, _stays(device, choice, places)) for device, choice in chosen]

    def move(staying: list[tuple[Device, Choice, bool]], path: str) -> tuple[Device, ...]:
        return tuple(
            _placed(device, choice, places, f"{path}[{at}]", changes, stays=stays)
            for at, (device, choice, stays) in enumerate(staying)
        )

    # Devices that stay are placed first, so that no other takes their place.
    disks, removables = stay(machine.disks), stay(machine.removables)
    placed = {"disks": move(disks, "disks"), "removables": move(removables, "removables")}
    moved = machine.model_copy(update=placed)
    return moved.model_copy(update={"controllers": _controllers(machine, moved, scsi, changes)})


def _stays(device: Disk | Removable, choice: Choice, places: Places) -> bool:
    stated = device.bus == choice.bus and choice.bus != "usb" and device.unit is not None
    return stated and places.take(choice.bus, device.controller, device.unit)


def _placed(device: Device, choice: Choice, places: Places, path: str, changes: Changes, *, stays: bool) -> Device:
    if stays:
        return device.model_copy(update={"controller": device.controller or 0})
    bus: str = choice.bus
    controller: int | None = None
    unit: int | None = None
    reason = choice.reason or _FULL
    if bus == "usb":
        reason = "libvirt chooses the ports of USB disks"
    else:
        bus, controller, unit = places.next(bus)
        if bus == device.bus or bus != choice.bus:
            reason = _FULL
    values = {"bus": bus, "controller": controller, "unit": unit}
    for name, value in values.items():
        changes.set(f"{path}.{name}", getattr(device, name), value, reason)
    return device.model_copy(update=values)


def _controllers(machine: Machine, moved: Machine, scsi: Scsi, changes: Changes) -> tuple[Controller, ...]:
    """Returns the controllers in use, and unused SATA and SCSI controllers that QEMU has."""
    before = {(each.bus, each.index): (at, each) for at, each in reversed(list(enumerate(machine.controllers)))}
    used = {
        (device.bus, device.controller)
        for group in (moved.disks, moved.removables)
        for device in group
        if device.bus in ("floppy", "ide", "sata", "scsi") and device.controller is not None
    }
    unused = {key for key in before if key[0] in ("sata", "scsi") and key[1] < _CONTROLLERS[key[0]]}
    unused = {key for key in unused if key[0] == "sata" or scsi.choose(key[1])[0]}
    found = []
    for bus, index in sorted(used | unused):
        at, old = before.get((bus, index), (0, Controller(bus=bus, index=index)))
        model, reason = _model(bus, index, scsi)
        path = f"controllers[{at}].model"
        found.append(old.model_copy(update={"model": changes.set(path, old.model, model, reason)}))
    old_keys, new_keys = ([(each.bus, each.index) for each in group] for group in (machine.controllers, found))
    if old_keys != new_keys[: len(old_keys)]:
        words = [tuple(f"{bus} {index}" for bus, index in keys) for keys in (old_keys, new_keys)]
        changes.set("controllers", words[0], words[1], "a domain has the controllers that QEMU has for its disks")
    return tuple(found)


def _model(bus: str, index: int, scsi: Scsi) -> tuple[str | None, str]:
    if bus == "scsi":
        return scsi.choose(index)
    model = {"sata": "ahci", "ide": "piix3"}.get(bus)
    return model, f"QEMU's {bus} controller is of one model" if model else "the controller has no models"
