"""Reads qemu-server's configurations. Settings that are absent have the defaults of qm.conf(5)."""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from vmconv.machine import (
    Board,
    Cpu,
    Disk,
    Firmware,
    GuestOS,
    Identity,
    Machine,
    Memory,
    Nvram,
    Removable,
    Tpm,
    guest,
    number,
    part,
    quoted,
    refused,
)
from vmconv_proxmox import devices
from vmconv_proxmox.keys import Conf, parse
from vmconv_proxmox.places import SCSI_MODELS, controllers, is_windows
from vmconv_proxmox.source import Source, file_of

if TYPE_CHECKING:
    from vmconv.plugin import File

MAX_EXTRA = 1000

# States of snapshots and locks, not settings of the machine.
_PASSING = (
    "digest",
    "lock",
    "parent",
    "snaptime",
    "snapstate",
    "runningmachine",
    "runningcpu",
    "running-nets-host-mtu",
)


def read(file: File) -> Machine:
    """Returns the machine of a configuration; raises `ImageError` with the setting that is damaged."""
    return machine_of(file, parse(file))


def machine_of(file: File, conf: Conf) -> Machine:
    """Returns the machine of parsed settings."""
    if "rootfs" in conf.settings:
        raise refused(file, "rootfs", "this is the configuration of a container, not of a virtual machine")
    source = Source(file, dict(conf.settings))
    for key in _PASSING:
        source.take(key)
    system, chipset = _system(source), _chipset(source)
    scsi = source.take("scsihw")
    if scsi and not re.fullmatch(r"[a-z0-9-]{1,40}", scsi):
        raise refused(source.file, "scsihw", f"{quoted(scsi)} is not the name of a controller")
    model = SCSI_MODELS.get(scsi or "lsi", scsi)
    order, other_disks = devices.boot_order(source)
    disks, removables = devices.drives(source, model, order)
    drives: tuple[Disk | Removable, ...] = (*disks, *removables)
    if scsi and scsi != "virtio-scsi-single" and (model == "virtio-scsi" or all(one.bus != "scsi" for one in drives)):
        source.extra["scsihw"] = scsi
    tried_last = other_disks and any(disk.boot_index is None for disk in disks)
    values: dict[str, Any] = {
        "name": source.take("name"),
        "description": conf.description,
        "os": system,
        "cpu": _cpu(source, system),
        "memory": _memory(source),
        "firmware": _firmware(source, ("disk",) if tried_last else ()),
        "tpm": _tpm(source),
        "identity": _identity(source),
        "board": Board(chipset=chipset, clock=_clock(source, system)),
        "controllers": controllers(drives, model, chipset),
        "disks": disks,
        "removables": removables,
        "nics": tuple(devices.nic(source, key, order) for key in source.numbered("net")),
        "display": devices.display(source),
        "sound": devices.sound(source),
        "serials": tuple(devices.serial(source, key) for key in source.numbered("serial")),
        "watchdog": devices.watchdog(source),
        "rng": devices.rng(source),
        "passthrough": devices.passthrough(source),
        "memory_state": file_of(source.take("vmstate")),
        "snapshots": conf.snapshots,
    }
    extra = {**source.settings, **source.extra}
    if len(extra) > MAX_EXTRA:
        raise refused(file, "settings", f"more than {MAX_EXTRA} are not known")
    return part(file, "machine", Machine, **values, extra={"proxmox": extra} if extra else {})


def _system(source: Source) -> GuestOS:
    kind, architecture = source.take("ostype", "other"), source.take("arch", "x86_64")
    named = part(source.file, "ostype", GuestOS, source_id=kind)
    return part(
        source.file,
        "arch",
        GuestOS,
        id=guest("proxmox", str(named.source_id)).id,
        architecture=architecture,
        source_id=named.source_id,
    )


def _clock(source: Source, system: GuestOS) -> Literal["localtime", "utc"]:
    local = source.boolean("localtime", source.take("localtime"), is_windows(system.source_id))
    return "localtime" if local else "utc"


def _chipset(source: Source) -> str:
    values = source.properties("machine")
    kind = values.get("type", "pc")
    chipset = "q35" if "q35" in kind else "virt" if kind.startswith("virt") else "i440fx"
    if kind in ("pc", "q35", "virt"):
        values.pop("type", None)
    source.keep("machine", values)
    return chipset


def _cpu(source: Source, system: GuestOS) -> Cpu:
    def count(key: str, default: str) -> int:
        return number(source.file, key, source.take(key) or default, 1, 4096)

    sockets, cores = count("sockets", source.take("smp") or "1"), count("cores", "1")
    values = source.properties("cpu")
    model = values.pop("cputype", "cortex-a57" if system.architecture == "aarch64" else "kvm64")
    source.keep("cpu", values)
    online = number(source.file, "vcpus", source.take("vcpus") or str(sockets * cores), 1, sockets * cores)
    return part(source.file, "cores", Cpu, count=online, sockets=sockets, cores=cores, threads=1, model=model)


def _memory(source: Source) -> Memory:
    values = source.properties("memory")
    current = number(source.file, "memory", values.pop("current", "512"), 1, 1 << 30)
    source.keep("memory", values)
    return Memory(size=current << 20)


def _firmware(source: Source, order: tuple[str, ...]) -> Firmware:
    kinds = {"seabios": "bios", "ovmf": "uefi"}
    bios = source.take("bios", "seabios")
    if bios not in kinds:
        raise refused(source.file, "bios", f"{quoted(bios)} is neither seabios nor ovmf")
    values = source.properties("efidisk0")
    volume = values.pop("file", None)
    # A volume of a storage without files is named too, so that its loss is.
    file = file_of(volume) or volume
    # A new store is of 4 MiB firmware, whatever this one is. Whether Secure Boot is on, only the store itself says.
    for name in ("size", "format", "efitype"):
        values.pop(name, None)
    if file is None:
        return part(source.file, "bios", Firmware, kind=kinds[bios], boot_order=order)
    source.keep("efidisk0", values)
    nvram = part(source.file, "efidisk0", Nvram, file=file, kind="ovmf")
    return part(source.file, "bios", Firmware, kind=kinds[bios], boot_order=order, nvram=nvram)


def _tpm(source: Source) -> Tpm | None:
    if "tpmstate0" not in source.settings:
        return None
    values = source.properties("tpmstate0")
    version = values.pop("version", "v1.2").removeprefix("v")
    values.pop("size", None)
    volume = values.pop("file", None)
    source.keep("tpmstate0", values)
    return part(source.file, "tpmstate0", Tpm, version=version, state=file_of(volume) or volume)


def _identity(source: Source) -> Identity:
    values = source.properties("smbios1")
    coded = source.boolean("smbios1 base64", values.pop("base64", None), False)
    found: dict[str, Any] = {"uuid": _uuid(source, "smbios1 uuid", values.pop("uuid", None))}
    texts = {name: _text(source, f"smbios1 {name}", text) if coded else text for name, text in values.items()}
    found.update({name: texts.pop(name, None) for name in ("serial", "manufacturer", "product")})
    source.keep("smbios1", texts)
    generation = source.take("vmgenid")
    if generation not in (None, "0", "1"):
        found["generation_id"] = _uuid(source, "vmgenid", generation)
    return part(source.file, "smbios1", Identity, **found)


def _uuid(source: Source, element: str, text: str | None) -> UUID | None:
    if text is None:
        return None
    if not re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", text):
        raise refused(source.file, element, f"{quoted(text)} is not a UUID")
    return UUID(text)


def _text(source: Source, element: str, text: str) -> str:
    try:
        return base64.b64decode(text, validate=True).decode()
    except ValueError as exc:
        raise refused(source.file, element, f"{quoted(text)} is not UTF-8 in base64") from exc
