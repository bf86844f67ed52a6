"""Puts a machine into KubeVirt's terms; each change has its reason."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from vmconv.machine import Changes, Nic, name_in
from vmconv.plugin import Adapted, PlanError
from vmconv_kubevirt.words import ARCHITECTURES, BUSES, CPU_MODEL, KEPT, MAX_NAME, NETWORK, NICS, SERIAL, SOUNDS, label

if TYPE_CHECKING:
    from vmconv.machine import Disk, Machine
    from vmconv_kubevirt.options import Options

Part = TypeVar("Part", bound=BaseModel)

_SERIALS = "KubeVirt refuses serials with other characters than letters, digits and _.+-"
_ORDER = "KubeVirt numbers devices, each once, and has no classes"


def adapt(machine: Machine, options: Options) -> Adapted:
    """Returns the machine as a VirtualMachine. Raises `PlanError` without a memory size."""
    if machine.memory.size is None:
        raise PlanError("the machine states no memory size, and a VirtualMachine needs one")
    changes = Changes()
    linux = name_in("proxmox", machine.os) in ("l24", "l26")
    machine = _small(_identity(_firmware(_cpu(_names(machine, changes), changes), changes), changes), changes)
    disks = tuple(_disk(disk, at, machine, linux, options, changes) for at, disk in enumerate(machine.disks))
    nics = tuple(_nic(nic, at, linux, options, changes) for at, nic in enumerate(machine.nics))
    machine = _boot_order(_updated(machine, disks=disks, nics=nics), changes)
    return Adapted(_extra(machine, changes, options), tuple(changes.found))


def _updated(part: Part, **values: Any) -> Part:
    return part.model_copy(update=values)


def _names(machine: Machine, changes: Changes) -> Machine:
    why = "names in Kubernetes are labels of DNS: up to 50 lower case letters, digits and hyphens"
    name = changes.set("name", machine.name, label(machine.name or "", MAX_NAME) or "machine", why)
    architecture = machine.os.architecture
    if architecture not in ARCHITECTURES:
        architecture = changes.set("os.architecture", architecture, "x86_64", "KubeVirt has no 32-bit machines")
    return _updated(machine, name=name, os=_updated(machine.os, architecture=architecture))


def _cpu(machine: Machine, changes: Changes) -> Machine:
    cpu = machine.cpu
    cores, threads = cpu.cores or 1, cpu.threads or 1
    sockets = cpu.sockets or max((cpu.count or 1) // (cores * threads), 1)
    if cpu.count is not None and sockets * cores * threads != cpu.count:
        why = "the topology is not that of all processors"
        sockets = changes.set("cpu.sockets", cpu.sockets, cpu.count, why)
        cores = changes.set("cpu.cores", cpu.cores, 1, why)
        threads = changes.set("cpu.threads", cpu.threads, 1, why)
    count = cpu.count or min(sockets * cores * threads, 4096)
    if sockets * cores * threads > 4096:
        raise PlanError(f"the machine has {sockets * cores * threads} processors")
    model = cpu.model
    if model and not CPU_MODEL.fullmatch(model):
        after = "host-passthrough" if model in ("host", "max", "maximum") else None
        model = changes.set("cpu.model", model, after, "KubeVirt has no processor of this name")
    values = {"count": count, "sockets": sockets, "cores": cores, "threads": threads, "model": model}
    return _updated(machine, cpu=_updated(cpu, **values))


def _firmware(machine: Machine, changes: Changes) -> Machine:
    firmware = machine.firmware
    arm = machine.os.architecture == "aarch64"
    kind = firmware.kind or ("uefi" if firmware.secure_boot or arm else "bios")
    secure = firmware.secure_boot
    if kind == "bios":
        secure = changes.set("firmware.secure_boot", secure, None, "a BIOS has no Secure Boot")
    else:
        # KubeVirt's default is on, and sources without a word have it off.
        secure = bool(secure)
    tpm = machine.tpm
    if tpm is not None:
        tpm = _updated(tpm, version=changes.set("tpm.version", tpm.version, "2.0", "KubeVirt's TPM is of version 2.0"))
    chipset = "virt" if arm else "q35"
    chipset = changes.set("board.chipset", machine.board.chipset, chipset, "KubeVirt has one board per architecture")
    clock = machine.board.clock
    if clock == "localtime":
        clock = changes.set("board.clock", clock, "utc", "KubeVirt's clock is UTC or of a named time zone")
    board = _updated(machine.board, chipset=chipset, clock=clock)
    return _updated(machine, tpm=tpm, board=board, firmware=_updated(firmware, kind=kind, secure_boot=secure))


def _identity(machine: Machine, changes: Changes) -> Machine:
    identity = machine.identity
    serial = identity.serial
    if serial and not SERIAL.fullmatch(serial):
        serial = changes.set("identity.serial", serial, None, _SERIALS)
    return _updated(machine, identity=_updated(identity, serial=serial))


def _small(machine: Machine, changes: Changes) -> Machine:
    sound, watchdog = machine.sound, machine.watchdog
    if sound and sound not in SOUNDS:
        sound = changes.set("sound", sound, "hda", "KubeVirt has no such sound card")
    if watchdog and watchdog != "i6300esb":
        watchdog = changes.set("watchdog", watchdog, "i6300esb", "KubeVirt has no such watchdog")
    rng = changes.set("rng", machine.rng, machine.rng or None, "a VirtualMachine names only devices that it has")
    return _updated(machine, sound=sound, watchdog=watchdog, rng=rng)


def _disk(disk: Disk, at: int, machine: Machine, linux: bool, options: Options, changes: Changes) -> Disk:
    path = f"disks[{at}]"
    bus, reason = _bus(disk, machine, linux, options)
    bus = changes.set(f"{path}.bus", disk.bus, bus, reason)
    shared = changes.set(f"{path}.shared", disk.shared, disk.shared or None, "disks are not shared unless stated")
    serial = disk.serial
    if serial and not SERIAL.fullmatch(serial):
        serial = changes.set(f"{path}.serial", serial, None, _SERIALS)
    return _updated(disk, bus=bus, shared=shared, serial=serial)


def _bus(disk: Disk, machine: Machine, linux: bool, options: Options) -> tuple[str, str]:
    """Returns the bus of a disk and the reason if it changes."""
    if options.bus is not None:
        return options.bus, f"asked for with bus={options.bus}"
    if disk.bus == "scsi":
        model = machine.controller_model("scsi", disk.controller)
        if linux or str(model).startswith("virtio") or (model is None and disk.controller is None):
            return "scsi", ""
        return "sata", f"KubeVirt's only SCSI controller is virtio-scsi, not {model or 'that of the source'}"
    if disk.bus in BUSES:
        return disk.bus, ""
    return "sata", f"KubeVirt has no bus {disk.bus}"


def _nic(nic: Nic, at: int, linux: bool, options: Options, changes: Changes) -> Nic:
    path, mac, model = f"nics[{at}]", nic.mac, nic.model or "e1000e"
    if mac and int(mac[:2], 16) & 1:
        mac = changes.set(f"{path}.mac", mac, None, "it is a multicast address, which no card has")
    if model not in NICS:
        after = "virtio" if linux else "e1000e"
        model = changes.set(f"{path}.model", nic.model, after, f"KubeVirt has no {model}")
    kind, network, reason = _network(nic, at, options)
    connected = nic.connected
    if nic.network_kind == "none":
        connected = changes.set(f"{path}.connected", connected, False, "the card is connected to nothing")
    kind = changes.set(f"{path}.network_kind", nic.network_kind, kind, reason)
    network = changes.set(f"{path}.network", nic.network, network, reason)
    values = {"mac": mac, "model": model, "network": network, "network_kind": kind, "connected": connected}
    return _updated(nic, **values)


def _network(nic: Nic, at: int, options: Options) -> tuple[str, str | None, str]:
    """Returns kind and name of the network, and the reason for a change: the pod's network once, or a definition."""
    if options.network is not None:
        return "bridged", options.network, "asked for with network="
    if nic.network is not None and NETWORK.fullmatch(nic.network):
        return "bridged", nic.network, "a NetworkAttachmentDefinition is joined by a bridge"
    if nic.network is not None:
        return "bridged", label(nic.network) or f"network-{at + 1}", "the name of a NetworkAttachmentDefinition"
    if at == 0:
        return "nat", None, "without a network's name the card joins the pod's network"
    return "bridged", f"network-{at + 1}", "a machine joins the pod's network once"


def _boot_order(machine: Machine, changes: Changes) -> Machine:
    groups: dict[str, tuple[Any, ...]] = {"disks": machine.disks, "nics": machine.nics}
    devices = [(name, at, device) for name, group in groups.items() for at, device in enumerate(group)]
    first = sorted((each for each in devices if each[2].boot_index is not None), key=lambda each: each[2].boot_index)
    order = list(first)
    for kind in machine.firmware.boot_order:
        name = {"disk": "disks", "network": "nics"}.get(kind)
        order += [each for each in devices if each[0] == name and each not in order]
    indexes = [device.boot_index for _, _, device in first]
    keep = len(order) == len(first) and len(set(indexes)) == len(indexes)
    ranks = {(name, at): device.boot_index if keep else rank for rank, (name, at, device) in enumerate(order)}
    changes.set("firmware.boot_order", machine.firmware.boot_order, None, _ORDER)
    for name, at, device in order:
        changes.set(f"{name}[{at}].boot_index", device.boot_index, ranks[name, at], _ORDER)
    values = {
        name: tuple(_updated(device, boot_index=ranks.get((name, at))) for at, device in enumerate(group))
        for name, group in groups.items()
    }
    return _updated(machine, **values, firmware=_updated(machine.firmware, boot_order=()))


def _extra(machine: Machine, changes: Changes, options: Options) -> Machine:
    """Returns the machine with the settings that are taken over, and those of the options."""
    kept = {}
    for key, text in machine.extra.get("kubevirt", {}).items():
        if key in KEPT and _is_json(key, text):
            kept[key] = text
        else:
            changes.set("extra.kubevirt", key, None, "it is not a setting that is taken over")
    chosen = {"metadata.namespace": options.namespace, "spec.runStrategy": "Always" if options.running else None}
    for key, value in chosen.items():
        if value is not None:
            after = json.dumps(value)
            kept[key] = changes.set("extra.kubevirt", kept.get(key), after, "asked for with an option")
    extra = {name: values for name, values in machine.extra.items() if name != "kubevirt"}
    return _updated(machine, extra={**extra, "kubevirt": kept} if kept else extra)


def _is_json(key: str, text: str) -> bool:
    """True if the reader stores the setting so."""
    try:
        value = json.loads(text)
        same = json.dumps(value, sort_keys=True) == text and value not in (None, {})
    except (ValueError, RecursionError):
        return False
    return same and (not key.endswith(".features") or (isinstance(value, dict) and not {"smm", "acpi"} & set(value)))
