"""Puts a machine into VirtualBox's terms, with a reason for each change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, UUID, uuid5

from vmconv.machine import (
    Board,
    Changes,
    Cpu,
    Disk,
    Display,
    Firmware,
    GuestOS,
    Identity,
    Machine,
    Memory,
    Nic,
    Serial,
    guest,
    name_in,
)
from vmconv.plugin import Adapted, PlanError
from vmconv_vbox.places import adapt_storage
from vmconv_vbox.structs import (
    DISPLAYS,
    FORMAT_NAMES,
    MAX_CPUS,
    MAX_MEMORY,
    NIC_NAMES,
    SOUNDS,
    serial_key,
)
from vmconv_vbox.writer import own_mode, placeable

if TYPE_CHECKING:
    from vmconv_vbox.options import Options

_MAX_NICS = {"q35": 36, "i440fx": 8}
_MAX_VIDEO = 256 << 20
_DEFAULT_BOOT = ("disk", "cdrom", "network")
_OUI = "08:00:27"
"""VirtualBox's own prefix of MAC addresses."""
_NO_UUID = UUID(int=0)


def adapt(machine: Machine, options: Options) -> Adapted:
    """Returns the machine in VirtualBox's terms; raises `PlanError` if VirtualBox cannot have it."""
    if machine.os.architecture == "aarch64":
        raise PlanError("machine is for aarch64, and vmconv writes VirtualBox's machines for x86 only")
    changes = Changes()
    machine = adapt_storage(machine, changes)
    board = _board(machine.board, changes)
    values: dict[str, Any] = {
        "name": machine.name or "machine",
        "os": _system(machine.os, changes),
        "cpu": _cpu(machine.cpu, changes),
        "memory": _memory(machine.memory, changes),
        "firmware": _firmware(machine, changes),
        "tpm": machine.tpm and machine.tpm.model_copy(update={"version": machine.tpm.version or "2.0"}),
        "identity": _identity(machine, changes),
        "board": board,
        "disks": _disks(machine, changes),
        "removables": _removables(machine, changes),
        "nics": _nics(machine, _MAX_NICS[board.chipset or "i440fx"], options, changes),
        "display": _display(machine.display, changes),
        "sound": _sound(machine.sound, changes),
        "serials": _serials(machine.serials, changes),
    }
    return Adapted(_extra(machine.model_copy(update=values), changes), tuple(changes.found))


def _system(system: GuestOS, changes: Changes) -> GuestOS:
    own = guest("vbox", system.source_id) if system.source_id else None
    if own is not None and own == system and (own.id or own.architecture):
        return system
    found = guest("vbox", name_in("vbox", system) or "Other_64")
    reason = "VirtualBox has its own names of systems"
    for name in ("id", "architecture", "source_id"):
        changes.set(f"os.{name}", getattr(system, name), getattr(found, name) or found.source_id, reason)
    return found


def _cpu(cpu: Cpu, changes: Changes) -> Cpu:
    stated = cpu.count or (cpu.sockets or 1) * (cpu.cores or 1) * (cpu.threads or 1)
    count = changes.set("cpu.count", stated, min(stated, MAX_CPUS), f"VirtualBox has at most {MAX_CPUS} processors")
    return cpu.model_copy(update={"count": count, "hot_add": bool(cpu.hot_add)})


def _memory(memory: Memory, changes: Changes) -> Memory:
    size = max(4, -(-(memory.size or 1 << 30) >> 20)) << 20
    if size > MAX_MEMORY:
        raise PlanError(f"machine has {size} bytes of memory, VirtualBox at most {MAX_MEMORY}")
    changes.set("memory.size", memory.size, size, "VirtualBox counts whole MiB, from 4")
    return memory.model_copy(update={"size": size})


def _firmware(machine: Machine, changes: Changes) -> Firmware:
    firmware = machine.firmware
    kind = firmware.kind or ("uefi" if firmware.nvram else "bios")
    if firmware.secure_boot is not None:
        after = "as its variables say" if kind == "uefi" and firmware.nvram else None
        reason = "the NVRAM holds it: VBoxManage modifynvram NAME secureboot"
        changes.add("firmware.secure_boot", firmware.secure_boot, after, reason)
    order = firmware.boot_order or _by_devices(machine) or _DEFAULT_BOOT
    return firmware.model_copy(update={"kind": kind, "boot_order": order, "secure_boot": None})


def _by_devices(machine: Machine) -> tuple[Any, ...]:
    """Returns the classes of the devices that have a place in the boot order."""
    found = [(disk.boot_index, "disk") for disk in machine.disks]
    found += [(drive.boot_index, drive.kind) for drive in machine.removables]
    found += [(nic.boot_index, "network") for nic in machine.nics]
    ordered = sorted((index, name) for index, name in found if index is not None)
    return tuple(dict.fromkeys(name for _, name in ordered))


def _identity(machine: Machine, changes: Changes) -> Identity:
    identity = machine.identity
    seed = f"vmconv:{machine.name}/{identity.uuid}/{[nic.mac for nic in machine.nics]}"
    own = identity.instance_uuid
    if own in (None, _NO_UUID):
        own = changes.set("identity.instance_uuid", own, uuid5(NAMESPACE_URL, seed), "zeros are no identity")
    seen = identity.uuid
    if seen in (None, _NO_UUID):
        seen = changes.set("identity.uuid", seen, own, "zeros are no identity")
    return identity.model_copy(update={"instance_uuid": own, "uuid": seen})


def _board(board: Board, changes: Changes) -> Board:
    chipset = "q35" if board.chipset in ("q35", "virt") else "i440fx"
    changes.set("board.chipset", board.chipset, chipset, "VirtualBox's PCs have a PIIX3 or an ICH9")
    return board.model_copy(update={"chipset": chipset, "clock": board.clock or "utc"})


def _disks(machine: Machine, changes: Changes) -> tuple[Disk, ...]:
    return tuple(_disk(machine, number, changes) for number in range(len(machine.disks)))


def _disk(machine: Machine, number: int, changes: Changes) -> Disk:
    disk, path = machine.disks[number], f"disks[{number}]"
    if disk.device is not None:
        hint = "detach it, convert, and make a raw disk with VBoxManage createmedium --variant RawDisk"
        raise PlanError(
            f"disk {disk.device!r} is a device, which VirtualBox takes only through a descriptor", hint=hint
        )
    mode = "independent-persistent" if disk.mode == "independent-persistent" else "persistent"
    changes.set(f"{path}.mode", disk.mode, mode, "VirtualBox drops changes only to layers, which a new disk has not")
    serial = disk.serial
    if serial is not None and not _takes_serial(disk, serial):
        reason = "VirtualBox takes serial numbers of SATA and IDE disks, of at most 20 characters"
        serial = changes.set(f"{path}.serial", serial, None, reason)
    seed = f"vmconv:{machine.name}/{machine.identity.uuid}/disk/{number}"
    suffix = (disk.file or "").rpartition(".")[2].lower()
    form = disk.format or (suffix if suffix in FORMAT_NAMES else "vdi")
    if form not in FORMAT_NAMES:
        raise PlanError(f"{disk.file}: VirtualBox has no {form} disks")
    identity = disk.image_uuid or uuid5(NAMESPACE_URL, seed)
    return disk.model_copy(update={"mode": mode, "serial": serial, "image_uuid": identity, "format": form})


def _takes_serial(disk: Disk, serial: str) -> bool:
    kind = {"sata": "SATA", "ide": "IDE"}.get(disk.bus or "", "")
    return serial_key(kind, 0) is not None and len(serial.encode()) <= 20 and not serial.startswith("string:")


def _removables(machine: Machine, changes: Changes) -> tuple[Any, ...]:
    found = []
    for number, drive in enumerate(machine.removables):
        reason = "the drive is empty: insert the medium again"
        connected = changes.set(f"removables[{number}].connected", drive.connected, False, reason)
        found.append(drive.model_copy(update={"connected": connected}))
    return tuple(found)


def _nics(machine: Machine, limit: int, options: Options, changes: Changes) -> tuple[Nic, ...]:
    for number in range(limit, len(machine.nics)):
        changes.add(f"nics[{number}]", "network card", None, f"VirtualBox has {limit} network cards with this chipset")
    return tuple(_nic(machine, number, options, changes) for number in range(len(machine.nics))[:limit])


def _nic(machine: Machine, number: int, options: Options, changes: Changes) -> Nic:
    nic, path = machine.nics[number], f"nics[{number}]"
    model = nic.model if nic.model in NIC_NAMES else "e1000"
    changes.set(f"{path}.model", nic.model, model, "VirtualBox has no such card; nearly every guest drives e1000")
    mac = _mac(machine, number, changes)
    own = own_mode(machine, number)
    kind, network = nic.network_kind, nic.network
    if kind is None and own is None:
        kind = "bridged" if network else "nat"
    if kind == "bridged" and options.bridge:
        network = options.bridge
    if kind in ("nat", "none") and own is None:
        network = None
    changes.set(f"{path}.network", nic.network, network, "is no network of VirtualBox")
    connected = nic.connected is not False
    return nic.model_copy(
        update={"model": model, "mac": mac, "network_kind": kind, "network": network, "connected": connected}
    )


def _mac(machine: Machine, number: int, changes: Changes) -> str:
    """Returns the card's address. VirtualBox makes up none for a card that is configured without."""
    mac = machine.nics[number].mac
    if mac is not None and int(mac[:2], 16) % 2 == 0:
        return mac
    made = uuid5(NAMESPACE_URL, f"vmconv:{machine.name}/{machine.identity.uuid}/nic/{number}").bytes[:3].hex(":")
    return changes.set(f"nics[{number}].mac", mac, f"{_OUI}:{made}", "VirtualBox refuses multicast addresses")


def _display(display: Display | None, changes: Changes) -> Display:
    display = display or Display()
    names = set(DISPLAYS.values())
    model = display.model if display.model in names else "vmware"
    changes.set("display.model", display.model, model, "VirtualBox has no such graphics card")
    size = min(-(-(display.memory or 16 << 20) >> 20) << 20, _MAX_VIDEO)
    changes.set("display.memory", display.memory, size, "VirtualBox takes whole MiB, at most 256")
    return display.model_copy(update={"model": model, "memory": size, "heads": max(display.heads or 1, 1)})


def _sound(sound: str | None, changes: Changes) -> str | None:
    if sound is None or sound in SOUNDS.values():
        return sound
    return changes.set("sound", sound, "hda", "VirtualBox has AC97, HDA and SB16")


def _serials(serials: tuple[Serial, ...], changes: Changes) -> tuple[Serial, ...]:
    kept = tuple(
        Serial(index=port.index, kind=port.kind or "none", target=None if port.kind in (None, "none") else port.target)
        for port in serials
        if port.index < 4
    )
    if any(old != new for old, new in zip(serials, kept, strict=False) if old.kind) or len(kept) != len(serials):
        changes.add("serials", len(serials), len(kept), "VirtualBox has 4 serial ports")
    return kept


def _extra(machine: Machine, changes: Changes) -> Machine:
    """Returns the machine with those settings of its own that still have their element."""
    found = machine.extra.get("vbox", {})
    kept = {key: value for key, value in found.items() if placeable(machine, key)}
    for key in found.keys() - kept.keys():
        changes.add("extra.vbox", f"{key}={found[key]}"[:80].replace("\n", " "), None, "has no place here")
    others = {name: values for name, values in machine.extra.items() if name != "vbox"}
    return machine.model_copy(update={"extra": {**others, **({"vbox": kept} if kept else {})}})
