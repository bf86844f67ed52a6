"""Puts a machine into the terms of libvirt's QEMU driver; each change has its reason."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from vmconv.machine import Changes, Display
from vmconv.plugin import Adapted, PlanError
from vmconv_libvirt.fragments import why_dropped
from vmconv_libvirt.networks import adapt_nics
from vmconv_libvirt.placing import place_all
from vmconv_libvirt.words import (
    CPU_MODELS,
    CPU_MODES,
    DISPLAYS,
    MACHINES,
    SOUNDS,
    WATCHDOGS,
    chipset,
    osinfo_short,
    osinfo_url,
)

if TYPE_CHECKING:
    from vmconv.machine import Machine
    from vmconv_libvirt.options import Options

Part = TypeVar("Part", bound=BaseModel)

_NAME_BYTES = 200
"""The domain's files are named after it, and file names have 255 bytes."""


def adapt(machine: Machine, options: Options) -> Adapted:
    """Returns the machine as a domain for QEMU. Raises `PlanError` without a memory size, and for too many disks."""
    if machine.memory.size is None:
        raise PlanError("the machine states no memory size, and a domain needs one")
    changes = Changes()
    for step in (_names, _cpu, _firmware, _board, _small_devices):
        machine = step(machine, changes)
    before = machine
    machine = place_all(machine, options, changes)
    machine = machine.model_copy(update={"nics": adapt_nics(machine.nics, options, changes)})
    machine = _boot_order(_disks(machine, changes), changes)
    return Adapted(_extra(machine, before, changes), tuple(changes.found))


def _updated(part: Part, **values: Any) -> Part:
    return part.model_copy(update=values)


def _names(machine: Machine, changes: Changes) -> Machine:
    name = (machine.name or "machine").replace("/", "-")
    name = name.encode()[:_NAME_BYTES].decode(errors="ignore").strip()
    name = changes.set("name", machine.name, name, "libvirt names files after the domain")
    short = machine.os.id
    url = osinfo_url(short) if short else None
    if url is None or osinfo_short(url) != short:
        short = changes.set("os.id", short, None, "its id in libosinfo's database is not known")
    architecture = machine.os.architecture or "x86_64"
    return _updated(machine, name=name, os=_updated(machine.os, id=short, architecture=architecture))


def _cpu(machine: Machine, changes: Changes) -> Machine:
    cpu = machine.cpu
    sockets, cores, threads = cpu.sockets, cpu.cores, cpu.threads
    count = cpu.count
    if (sockets, cores, threads) != (None, None, None):
        cores, threads = cores or 1, threads or 1
        sockets = sockets or max((count or 0) // (cores * threads), 1)
        product = sockets * cores * threads
        count = count or (product if product <= 4096 else None)
        if product != count:
            why = "libvirt refuses a topology that is not of all processors"
            for name in ("sockets", "cores", "threads"):
                changes.set(f"cpu.{name}", getattr(cpu, name), None, why)
            sockets = cores = threads = None
    values = {"count": count or 1, "sockets": sockets, "cores": cores, "threads": threads}
    return _updated(machine, cpu=_updated(cpu, **values, model=_cpu_model(machine, changes)))


def _cpu_model(machine: Machine, changes: Changes) -> str:
    model = machine.cpu.model
    if model in CPU_MODES or (model and CPU_MODELS.fullmatch(model) and model != "max"):
        return str(model)
    after = {"host": "host-passthrough", "max": "maximum"}.get(model or "", "host-model")
    if machine.os.architecture == "aarch64" and model is None:
        after = "host-passthrough"
    return changes.set("cpu.model", model, after, "libvirt has no processor of this name")


def _firmware(machine: Machine, changes: Changes) -> Machine:
    firmware = machine.firmware
    kind = firmware.kind or ("uefi" if firmware.secure_boot or machine.os.architecture == "aarch64" else "bios")
    secure = firmware.secure_boot
    if kind == "bios":
        secure = changes.set("firmware.secure_boot", secure, None, "a BIOS has no Secure Boot")
    elif secure is None:
        # libvirt would choose the firmware, and often one with Secure Boot on.
        secure = False
    tpm = machine.tpm
    if tpm is not None:
        tpm = _updated(tpm, version=tpm.version or "2.0")
    return _updated(machine, tpm=tpm, firmware=_updated(firmware, kind=kind, secure_boot=secure))


def _board(machine: Machine, changes: Changes) -> Machine:
    board, firmware = machine.board, machine.firmware
    chip = board.chipset or ("q35" if firmware.kind == "uefi" else "i440fx")
    if machine.os.architecture == "aarch64":
        chip = changes.set("board.chipset", board.chipset, "virt", "QEMU's ARM machine is virt")
    elif chip == "virt":
        chip = changes.set("board.chipset", chip, "q35", "QEMU has the board virt for ARM")
    elif firmware.secure_boot:
        chip = changes.set("board.chipset", board.chipset, "q35", "Secure Boot needs SMM, and only Q35 has it")
    version = board.hardware_version
    if version and (chipset(version) != chip or version in MACHINES.values()):
        version = changes.set("board.hardware_version", version, None, "libvirt has no such machine type")
    return _updated(machine, board=_updated(board, chipset=chip, hardware_version=version))


def _small_devices(machine: Machine, changes: Changes) -> Machine:
    sound, watchdog = machine.sound, machine.watchdog
    if sound and sound not in SOUNDS:
        sound = changes.set("sound", sound, "hda", "QEMU has no such sound card")
    if watchdog and watchdog not in WATCHDOGS:
        watchdog = changes.set("watchdog", watchdog, "i6300esb", "QEMU has no such watchdog")
    rng = changes.set("rng", machine.rng, machine.rng or None, "a domain names only devices that it has")
    values = {"sound": sound, "watchdog": watchdog, "rng": rng, "display": _display(machine, changes)}
    return _updated(machine, **values, serials=_serials(machine, changes))


def _display(machine: Machine, changes: Changes) -> Display:
    found = machine.display or Display()
    arm = machine.os.architecture == "aarch64"
    model, memory, heads = found.model or "vga", found.memory, found.heads
    if model not in DISPLAYS or (arm and model != "virtio"):
        model = changes.set("display.model", found.model, "virtio" if arm else "vga", "QEMU has no such graphics card")
    if memory is not None and (memory < 1 << 20 or memory % 1024 or memory > 1 << 29 or memory & (memory - 1)):
        memory = changes.set("display.memory", memory, None, "it is not a power of two from 1 to 512 MiB")
    if model in ("virtio", "cirrus", "bochs"):
        memory = changes.set("display.memory", memory, None, "the graphics card has no such setting")
    if heads is not None and (heads < 1 or (heads > 1 and model not in ("qxl", "virtio")) or heads > 16):
        heads = changes.set("display.heads", heads, None, "the graphics card has one head")
    return Display(model=model, memory=memory, heads=heads)


def _serials(machine: Machine, changes: Changes) -> tuple[Any, ...]:
    found = []
    taken: set[int] = set()
    for at, serial in enumerate(machine.serials):
        if serial.index in taken or serial.index > 3:
            # Indexes of the others stay, so all ports are named.
            changes.set("serials", f"port {serial.index}", "", "a PC has four serial ports, each once")
            continue
        taken.add(serial.index)
        kind, target = serial.kind, serial.target
        if kind in ("file", "pipe", "device") or (kind == "network" and endpoint(target) is None):
            why = "files, pipes and devices of the source's host are not taken over"
            kind = changes.set(f"serials[{at}].kind", kind, "pty", why)
        if kind != "network":
            target = changes.set(f"serials[{at}].target", target, None, "the port has none on the new host")
        found.append(_updated(serial, kind=kind or "pty", target=target))
    return tuple(found)


def endpoint(target: str | None) -> tuple[str, str, str, bool] | None:
    """Returns protocol, host, service and whether it listens, of a serial port's URL such as `tcp://host:23?server`."""
    found = re.fullmatch(r"(tcp|telnet|tls)://([\w.-]*):(\w+)(\?server)?", target or "")
    return None if found is None else (found[1], found[2], found[3], bool(found[4]))


def _disks(machine: Machine, changes: Changes) -> Machine:
    disks = []
    for at, disk in enumerate(machine.disks):
        path, mode, serial = f"disks[{at}]", disk.mode or "persistent", disk.serial
        if mode == "independent-persistent":
            mode = changes.set(f"{path}.mode", mode, "persistent", "libvirt's snapshots hold all disks")
        if serial and not re.fullmatch(r"[A-Za-z0-9_.+\- ]{1,36}", serial):
            serial = changes.set(f"{path}.serial", serial, None, "serials are up to 36 letters, digits and _.+-")
        disks.append(_updated(disk, mode=mode, shared=bool(disk.shared), serial=serial))
    return _updated(machine, disks=tuple(disks))


def _boot_order(machine: Machine, changes: Changes) -> Machine:
    """Returns the machine with an order of devices or of classes: libvirt takes one of them."""
    groups = {"disks": machine.disks, "removables": machine.removables, "nics": machine.nics}
    devices: list[tuple[str, int, Any]] = [
        (name, at, each) for name, group in groups.items() for at, each in enumerate(group)
    ]
    first = sorted((each for each in devices if each[2].boot_index is not None), key=lambda each: each[2].boot_index)
    if not first:
        return machine
    order = list(first)
    for kind in machine.firmware.boot_order:
        order += [each for each in devices if _class(each[2]) == kind and each not in order]
    indexes = [device.boot_index for _, _, device in order]
    if len(order) > len(first) or len(set(indexes)) < len(indexes):
        ranks = {(name, at): rank for rank, (name, at, _) in enumerate(order)}
    else:
        ranks = {(name, at): device.boot_index for name, at, device in order}
    why = "libvirt numbers devices, each once, and takes no order of classes beside"
    changes.set("firmware.boot_order", machine.firmware.boot_order, None, why)
    for name, at, device in order:
        changes.set(f"{name}[{at}].boot_index", device.boot_index, ranks[name, at], why)
    values = {
        name: tuple(_updated(device, boot_index=ranks.get((name, at))) for at, device in enumerate(group))
        for name, group in groups.items()
    }
    return _updated(machine, **values, firmware=_updated(machine.firmware, boot_order=()))


def _class(device: Any) -> str:
    return {"Disk": "disk", "Nic": "network"}.get(type(device).__name__) or str(device.kind)


def _extra(machine: Machine, before: Machine, changes: Changes) -> Machine:
    """Returns the machine without the fragments that are not taken over."""
    kept = {}
    for key, text in machine.extra.get("libvirt", {}).items():
        reason = why_dropped(key, text, len(machine.disks), len(machine.nics)) or _contradicts(key, machine, before)
        if reason is None:
            kept[key] = text
        else:
            changes.set("extra.libvirt", key, None, reason)
    extra = {name: values for name, values in machine.extra.items() if name != "libvirt"}
    return _updated(machine, extra={**extra, "libvirt": kept} if kept else extra)


def _contradicts(key: str, machine: Machine, before: Machine) -> str | None:
    parts = key.split(".")
    if parts[0] == "disks" and parts[2] == "driver":
        at = int(parts[1])
        return "the disk is on another bus" if machine.disks[at].bus != before.disks[at].bus else None
    if parts[0] == "nics" and parts[2] == "source":
        return None if machine.nics[int(parts[1])].network_kind == "bridged" else "the card has another network"
    return None
