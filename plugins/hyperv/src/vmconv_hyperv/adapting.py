"""Brings a machine into Hyper-V's terms: a generation, IDE and SCSI, its own network adapters.

Generation 1 has a BIOS and starts from one of four IDE drives. Generation 2 has UEFI and SCSI drives only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from vmconv.machine import Controller, Disk, Machine, Nic, Removable
from vmconv.plugin import Adapted, PlanError, Substitution, in_words
from vmconv_hyperv import keys
from vmconv_hyperv.options import Options

_MAX_NAME = 100
_MEMORY_STEP = 2 << 20
_LEAST_MEMORY = 32 << 20
_IDE = tuple((controller, unit) for controller in range(2) for unit in range(2))
_SCSI = tuple((controller, unit) for controller in range(4) for unit in range(64))
_MODELS = {"bios": ("hyperv", "hyperv-legacy"), "uefi": ("hyperv",)}
_DYNAMIC = ("memory.minimum", "memory.maximum")
_DEFAULT_MEMORY = 1 << 30
_CLASSES = "a BIOS starts from classes of devices"

_Device = TypeVar("_Device", Disk, Removable)
_Spot = tuple[str, int, int]


class _Step(NamedTuple):
    """New values of the machine's fields, and the differences."""

    update: dict[str, Any]
    substitutions: tuple[Substitution, ...] = ()


def adapt(machine: Machine, options: Options) -> Adapted:
    """Returns the machine with all that the script states, and a reason for each changed field.

    Raises `PlanError` if Hyper-V cannot have it: 32-bit guests with UEFI, more drives than places.
    """
    kind = machine.firmware.kind or "bios"
    if kind == "uefi" and machine.os.architecture == "i686":
        raise PlanError("Hyper-V's generation 2, which has UEFI, runs 64-bit guests only")
    steps = [
        _name(machine),
        _memory(machine),
        _firmware(machine, kind),
        _tpm(machine, kind),
        _drives(machine, kind),
        _nics(machine, kind, options.switch),
        _extra(machine),
    ]
    update: dict[str, Any] = {}
    for step in steps:
        update |= step.update
    return Adapted(machine.model_copy(update=update), tuple(each for step in steps for each in step.substitutions))


def _name(machine: Machine) -> _Step:
    name = machine.name or "machine"
    if len(name) <= _MAX_NAME:
        return _Step({"name": name})
    cut = name[:_MAX_NAME].strip()
    return _Step({"name": cut}, (Substitution("name", name, cut, f"names have at most {_MAX_NAME} characters"),))


def _memory(machine: Machine) -> _Step:
    size = machine.memory.size or _DEFAULT_MEMORY
    fitting = max(_LEAST_MEMORY, -(-size // _MEMORY_STEP) * _MEMORY_STEP)
    memory = machine.memory.model_copy(update={"size": fitting})
    if fitting == size:
        return _Step({"memory": memory})
    reason = "memory is a multiple of 2 MiB, at least 32 MiB"
    return _Step({"memory": memory}, (Substitution("memory.size", str(size), str(fitting), reason),))


def _firmware(machine: Machine, kind: str) -> _Step:
    before = machine.firmware
    # Without a statement Secure Boot would be on, with the keys for Windows.
    secure = bool(before.secure_boot) if kind == "uefi" else None
    order = _boot_order(machine, kind)
    found = []
    if kind == "bios" and before.secure_boot is not None:
        state = "on" if before.secure_boot else "off"
        found.append(Substitution("firmware.secure_boot", state, "", "a BIOS has no Secure Boot"))
    if order != before.boot_order:
        words = ", ".join(before.boot_order), ", ".join(order)
        reason = "a BIOS orders all classes" if kind == "bios" else "generation 2 orders the devices that it has"
        found.append(Substitution("firmware.boot_order", *words, reason))
    after = before.model_copy(update={"kind": kind, "secure_boot": secure, "boot_order": order})
    return _Step({"firmware": after}, tuple(found))


def _boot_order(machine: Machine, kind: str) -> tuple[str, ...]:
    """Returns the classes once each: on a BIOS those that are not stated follow, with UEFI only those with a device."""
    stated = machine.firmware.boot_order
    if kind == "bios":
        return tuple(dict.fromkeys((*stated, *keys.STARTUP))) if stated else ()
    there = {"disk": any(not disk.device for disk in machine.disks), "network": bool(machine.nics)}
    there["cdrom"] = any(drive.kind == "cdrom" for drive in machine.removables)
    return tuple(each for each in dict.fromkeys(stated) if there.get(each))


def _tpm(machine: Machine, kind: str) -> _Step:
    before = machine.tpm
    if before is None:
        return _Step({})
    if kind == "bios":
        reason = "generation 1 has no TPM; suspend BitLocker before the conversion"
        return _Step({"tpm": None}, (Substitution("tpm", before.version or "TPM", "", reason),))
    after = {"tpm": before.model_copy(update={"version": "2.0"})}
    if before.version in (None, "2.0"):
        return _Step(after)
    return _Step(after, (Substitution("tpm.version", before.version, "2.0", "Hyper-V has TPM 2.0 only"),))


class _Places:
    """Places for drives: each keeps its own if it may be there and no other drive is."""

    def __init__(self, kind: str) -> None:
        self._all: list[_Spot] = [("scsi", *spot) for spot in _SCSI]
        # The BIOS starts from IDE, and has its DVD drives there.
        self._ide: list[_Spot] = [("ide", *spot) for spot in _IDE] if kind == "bios" else self._all
        self._all += self._ide if kind == "bios" else []
        self._taken: set[_Spot] = set()

    @property
    def has_ide(self) -> bool:
        return self._ide is not self._all

    def own(self, drive: Disk | Removable) -> _Spot | None:
        """Returns the drive's own place, if it may be there."""
        spot = (drive.bus or "", drive.controller or 0, -1 if drive.unit is None else drive.unit)
        return spot if spot in (self._all if isinstance(drive, Disk) else self._ide) else None

    def take(self, spot: _Spot | None) -> _Spot | None:
        """Returns the place if it is free, and takes it."""
        if spot is None or spot in self._taken:
            return None
        self._taken.add(spot)
        return spot

    def any_for(self, drive: Disk | Removable) -> _Spot | None:
        """Takes the first free place that the drive may have: with its own numbers on SCSI, on SCSI, then on IDE."""
        spots = self._all if isinstance(drive, Disk) else self._ide
        same = ("scsi", drive.controller or 0, -1 if drive.unit is None else drive.unit)
        free = [spot for spot in spots if spot not in self._taken]
        return self.take(same if same in free else next(iter(free), None))

    def start(self, drives: Sequence[Disk | Removable]) -> tuple[int, _Spot] | None:
        """Returns the number of the disk that a BIOS starts from, and its place; None if there is no disk, or UEFI.

        That is the first IDE disk, unless the machine states another.
        """
        disks = {number: drive for number, drive in enumerate(drives) if isinstance(drive, Disk)}
        if not self.has_ide or not disks:
            return None
        stated = {number: disk.boot_index for number, disk in disks.items() if disk.boot_index is not None}
        if stated:
            return min(stated, key=lambda number: (stated[number], number)), self._ide[0]
        on_ide = {number: spot for number, disk in disks.items() if (spot := self.own(disk)) in self._ide}
        if on_ide:
            return min(on_ide.items(), key=lambda pair: pair[1])
        wanted = {self.own(drive) for drive in drives}
        return 0, next((spot for spot in self._ide if spot not in wanted), self._ide[0])

    @property
    def controllers(self) -> tuple[Controller, ...]:
        """Returns the controllers that are needed; SCSI controllers are numbered from 0 without a gap."""
        last = max((controller for bus, controller, _ in self._taken if bus == "scsi"), default=-1)
        ide = sorted({controller for bus, controller, _ in self._taken if bus == "ide"})
        scsi = (Controller(bus="scsi", index=index, model="hyperv-scsi") for index in range(last + 1))
        return (*(Controller(bus="ide", index=index) for index in ide), *scsi)


def _placed(drives: Sequence[Disk | Removable], places: _Places) -> list[_Spot | None]:
    """Returns a place for each drive: first of the one that starts the machine, then of all that may stay."""
    found: dict[int, _Spot | None] = {}
    start = places.start(drives)
    if start is not None:
        found[start[0]] = places.take(start[1])
    for number, drive in enumerate(drives):
        found[number] = found.get(number) or places.take(places.own(drive))
    # DVD drives choose before disks where they have less places.
    for number in sorted(found, key=lambda number: places.has_ide and isinstance(drives[number], Disk)):
        found[number] = found[number] or places.any_for(drives[number])
    return [found[number] for number in range(len(drives))]


def _drives(machine: Machine, kind: str) -> _Step:
    dvds = [each for each in machine.removables if each.kind == "cdrom"]
    for number, disk in enumerate(machine.disks):
        if not (disk.file or disk.device or disk.capacity):
            raise PlanError(f"disks[{number}]: has no file, no device and no size")
    places = _Places(kind)
    spots = _placed([*machine.disks, *dvds], places)
    found: list[Substitution] = []
    disks = tuple(
        _moved(disk, f"disks[{number}]", spot, kind, found)
        for number, (disk, spot) in enumerate(zip(machine.disks, spots, strict=False))
    )
    kept = [(drive, spot) for drive, spot in zip(dvds, spots[len(disks) :], strict=True) if spot]
    if len(kept) < len(machine.removables):
        names = ", ".join(each.kind for each in machine.removables), ", ".join("cdrom" for _ in kept)
        reason = "floppies are not converted, and generation 1 has four IDE drives"
        found.append(Substitution("removables", *names, reason))
    removables = tuple(
        _moved(drive, f"removables[{number}]", spot, kind, found) for number, (drive, spot) in enumerate(kept)
    )
    found += _controllers(machine.controllers, places.controllers)
    return _Step({"disks": disks, "removables": removables, "controllers": places.controllers}, tuple(found))


def _moved(device: _Device, path: str, spot: _Spot | None, kind: str, found: list[Substitution]) -> _Device:
    """Returns the device at its place, and adds to `found` what changes."""
    if spot is None:
        raise PlanError(f"{path}: a machine of Hyper-V has at most {len(_SCSI)} SCSI drives and {len(_IDE)} IDE drives")
    update: dict[str, Any] = dict(zip(("bus", "controller", "unit"), spot, strict=True))
    if kind == "bios" and device.boot_index is not None:
        update["boot_index"] = None
        found.append(Substitution(f"{path}.boot_index", str(device.boot_index), "", _CLASSES))
    for field in ("bus", "controller", "unit"):
        before = getattr(device, field)
        if before is not None and before != update[field]:
            reason = _reason(device.bus, spot[0], kind)
            found.append(Substitution(f"{path}.{field}", str(before), str(update[field]), reason))
    return device.model_copy(update=update)


def _reason(bus: str | None, after: str, kind: str) -> str:
    if bus == after:
        return "the place is another drive's, or there is none"
    if kind == "uefi":
        return "generation 2 has SCSI drives only"
    return (
        "generation 1 starts from IDE, and has its DVD drives there" if after == "ide" else f"Hyper-V has no such {bus}"
    )


def _controllers(before: Sequence[Controller], after: Sequence[Controller]) -> Iterator[Substitution]:
    def words(controllers: Sequence[Controller]) -> str:
        return ", ".join(f"{each.bus} {each.index} {each.model or ''}".strip() for each in controllers)

    if before and tuple(before) != tuple(after):
        reason = "Hyper-V has its own IDE and SCSI controllers"
        yield Substitution("controllers", words(before), words(after) or "none", reason)


def _nics(machine: Machine, kind: str, switch: str) -> _Step:
    found: list[Substitution] = []
    nics = tuple(_nic(nic, f"nics[{number}]", kind, switch, found) for number, nic in enumerate(machine.nics))
    return _Step({"nics": nics}, tuple(found))


def _nic(nic: Nic, path: str, kind: str, switch: str, found: list[Substitution]) -> Nic:
    network = None if nic.connected is False else switch or nic.network
    after = {
        "model": (nic.model if nic.model in _MODELS[kind] else "hyperv", "Hyper-V has its own network adapters"),
        "mac_origin": ("static" if nic.mac else None, "a known address is kept as a static one, another is generated"),
        "network": (network, "the option switch names it" if network else "an adapter without a link names no switch"),
        "connected": (network is not None, "no virtual switch is known; the option switch names one"),
        "boot_index": (None if kind == "bios" else nic.boot_index, _CLASSES),
    }
    for field, (value, reason) in after.items():
        before = getattr(nic, field)
        if before is not None and before != value:
            found.append(
                Substitution(f"{path}.{field}", in_words(before), "" if value is None else in_words(value), reason)
            )
    return nic.model_copy(update={field: value for field, (value, _) in after.items()})


def _extra(machine: Machine) -> _Step:
    """Keeps the limits of dynamic memory, in MiB, if they are around the machine's memory."""
    before = machine.extra.get("hyperv", {})
    limits = {key: value for key, value in before.items() if key in _DYNAMIC and re.fullmatch("[0-9]{1,8}", value)}
    low, high = (int(limits.get(key, "0")) for key in _DYNAMIC)
    kept = limits if 32 <= low <= (machine.memory.size or _DEFAULT_MEMORY) >> 20 <= high else {}
    if kept == before:
        return _Step({})
    extra = {key: value for key, value in machine.extra.items() if key != "hyperv"} | ({"hyperv": kept} if kept else {})
    reason = "of Hyper-V's own settings only limits of dynamic memory are kept, if they are around the machine's memory"
    dropped = [Substitution("extra.hyperv", key, "", reason) for key in before if key not in kept]
    return _Step({"extra": extra}, tuple(dropped))
