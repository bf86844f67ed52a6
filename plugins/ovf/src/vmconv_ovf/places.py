"""Places of disks and drives on the buses that VMware and VirtualBox have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vmconv.machine import Controller
from vmconv.plugin import PlanError
from vmconv_ovf import keys

if TYPE_CHECKING:
    from vmconv_ovf.adapting import Adapting

_SCSI_ITSELF = 7
"""The unit of a SCSI controller."""

_UNITS = {
    "ide": range(2),
    "sata": range(30),
    "scsi": tuple(unit for unit in range(16) if unit != _SCSI_ITSELF),
    "nvme": range(15),
    "floppy": range(2),
}
_CONTROLLERS = {"ide": 2, "sata": 4, "scsi": 4, "nvme": 4, "floppy": 1}
_DEFAULT_MODELS = {"ide": None, "sata": "ahci", "scsi": "lsilogic", "nvme": "nvme"}
_WITHOUT_ITEMS = ("floppy",)

Place = tuple[str, int, int]


def settled(changes: Adapting) -> None:
    """Gives each disk and drive a place that exists, and each place a controller."""
    machine = changes.machine
    groups: dict[str, Sequence[Any]] = {"disks": machine.disks, "removables": machine.removables}
    devices = [(group, number, each) for group, found in groups.items() for number, each in enumerate(found)]
    wanted = [_wanted_bus(group, device) for group, _, device in devices]
    places: dict[int, Place] = {}
    for at, (_, _, device) in enumerate(devices):
        place = (device.bus, device.controller, device.unit)
        if device.bus == wanted[at] and _exists(place) and place not in places.values():
            places[at] = place
    for at, (group, number, device) in enumerate(devices):
        if at not in places:
            places[at] = _free(wanted[at], device.controller, set(places.values()), f"{group}[{number}]")
    new: dict[str, list[Any]] = {"disks": [], "removables": []}
    for at, (group, number, device) in enumerate(devices):
        new[group].append(_moved(changes, f"{group}[{number}]", device, places[at]))
    changes.replace(disks=tuple(new["disks"]), removables=tuple(new["removables"]))
    _controllers(changes, {place[:2] for place in places.values() if place[0] not in _WITHOUT_ITEMS})


def _wanted_bus(group: str, device: Any) -> str:
    if group == "removables" and device.kind == "floppy":
        return "floppy"
    allowed = ("ide", "sata", "scsi", "nvme") if group == "disks" else ("ide", "sata", "scsi")
    # Guests of all kinds have a driver for AHCI.
    return device.bus if device.bus in allowed else "sata"


def _exists(place: tuple[Any, ...]) -> bool:
    bus, controller, unit = place
    return controller is not None and unit is not None and controller < _CONTROLLERS[bus] and unit in _UNITS[bus]


def _free(bus: str, controller: int | None, taken: set[Place], path: str) -> Place:
    """Returns a free place on a bus, at the given controller if possible, else on SATA."""
    buses = (bus,) if bus == "floppy" else (bus, "sata")
    for each in buses:
        order = sorted(range(_CONTROLLERS[each]), key=lambda number: (number != controller, number))
        for place in ((each, number, unit) for number in order for unit in _UNITS[each]):
            if place not in taken:
                return place
    raise PlanError(f"{path} has no place left on {' or '.join(dict.fromkeys(buses))}")


def _moved(changes: Adapting, path: str, device: Any, place: Place) -> Any:
    old = (device.bus, device.controller, device.unit)
    if any(before not in (None, after) for before, after in zip(old, place, strict=True)):
        reason = f"VMware has no {device.bus} disks" if device.bus not in _UNITS else "the place does not exist there"
        changes.add(path, _words(old), _words(place), reason)
    return device.model_copy(update=dict(zip(("bus", "controller", "unit"), place, strict=True)))


def _words(place: tuple[Any, ...]) -> str:
    bus, controller, unit = ("?" if each is None else each for each in place)
    return f"{bus} {controller}:{unit}"


def _controllers(changes: Adapting, used: set[tuple[str, int]]) -> None:
    old = changes.machine.controllers
    kept: dict[tuple[str, int], Controller] = {}
    for number, each in enumerate(old):
        place = (each.bus, each.index)
        if each.bus in _DEFAULT_MODELS and each.index < _CONTROLLERS[each.bus] and place not in kept:
            kept[place] = each.model_copy(update={"model": _model(changes, number, each)})
    if len(kept) < len(old):
        gone = [f"{each.bus} {each.index}" for each in old if (each.bus, each.index) not in kept]
        left = ", ".join(f"{bus} {index}" for bus, index in sorted(kept.keys() | used))
        reason = "VMware has up to two IDE controllers, and four for SATA, SCSI and NVMe each"
        changes.add("controllers", ", ".join(gone), left, reason)
    for bus, index in sorted(used - kept.keys()):
        kept[bus, index] = Controller.model_validate({"bus": bus, "index": index, "model": _DEFAULT_MODELS[bus]})
    changes.replace(controllers=tuple(kept.values()))


def _model(changes: Adapting, number: int, controller: Controller) -> str | None:
    """Returns the model of a controller, the platform's default if the source states none."""
    known = {"ide": keys.WRITTEN_IDE, "scsi": keys.WRITTEN_SCSI}.get(controller.bus)
    default = _DEFAULT_MODELS[controller.bus]
    model = controller.model
    if model is None or model == default or (known and model in known):
        return model or default
    # Windows since Vista and Linux have its driver, unlike lsilogic's.
    new = "lsisas1068" if controller.bus == "scsi" else default
    changes.add(f"controllers[{number}].model", model, new, f"VMware has no {model}")
    return new
