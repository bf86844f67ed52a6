"""Writes qemu-server's configurations, with all settings that matter stated."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from vmconv.machine import Disk, Removable
from vmconv.plugin import ConfigFile, PlanError
from vmconv_proxmox.devices import NIC_NAMES
from vmconv_proxmox.keys import encoded, encoded_serial, joined, size_text
from vmconv_proxmox.places import SCSI_HW, drive_number

if TYPE_CHECKING:
    from vmconv.machine import Identity, Machine, Nic
    from vmconv_proxmox.options import Options

Settings = dict[str, "str | dict[str, str]"]

TPM_SIZE = 4 << 20
"""Bytes of the state of a TPM. swtpm makes a new TPM out of zeros, as for any new machine of Proxmox."""

_NIC_KEYS = {neutral: own for own, neutral in NIC_NAMES.items()}
_CHIPSETS = {"i440fx": "pc", "q35": "q35", "virt": "virt", None: "pc"}
_SOUNDS = {"ac97": "AC97", "hda": "ich9-intel-hda"}


def write(machine: Machine, options: Options) -> tuple[ConfigFile, ...]:
    """Returns the configuration of an adapted machine, behind the empty state of a new TPM.

    Raises `PlanError` for a file name that a volume id cannot hold.
    """
    for file in _files(machine):
        if "," in file or "/" in file:
            raise PlanError(f"{file!r} cannot be the name of a volume: it has a comma or a slash")
    lines = [f"#{encoded(line)}" for line in (machine.description or "").split("\n")] if machine.description else []
    lines += [f"{key}: {value}" for key, value in _with_extra(machine, own_settings(machine, options)).items()]
    config = ConfigFile("", "".join(f"{line}\n" for line in lines).encode())
    if machine.tpm is None or machine.tpm.state is not None:
        return (config,)
    return (ConfigFile(tpm_file(machine, options), bytes(TPM_SIZE)), config)


def _files(machine: Machine) -> list[str]:
    nvram = machine.firmware.nvram
    return [disk.file for disk in machine.disks if disk.file] + ([nvram.file] if nvram else [])


def _with_extra(machine: Machine, own: Settings) -> dict[str, str]:
    extra = dict(machine.extra.get("proxmox", {}))
    found: dict[str, str] = {}
    for key, value in own.items():
        more = {name.partition(".")[2]: extra.pop(name) for name in list(extra) if name.startswith(f"{key}.")}
        if key == "smbios1":
            found |= {key: text} if (text := smbios1(machine.identity, more)) else {}
        else:
            found[key] = joined(key, {**value, **more}) if isinstance(value, dict) else extra.pop(key, value)
    return {**found, **extra}


def own_settings(machine: Machine, options: Options) -> Settings:
    """Returns the settings that the neutral model states: text, or the properties of a device."""
    settings: Settings = {}
    if machine.name is not None:
        settings["name"] = machine.name
    settings["ostype"] = machine.os.source_id or "other"
    if machine.os.architecture == "aarch64":
        settings["arch"] = "aarch64"
    settings |= _processors(machine)
    settings["memory"] = {"current": str((machine.memory.size or 512 << 20) >> 20)}
    settings["bios"] = "ovmf" if machine.firmware.kind == "uefi" else "seabios"
    settings["machine"] = {"type": _CHIPSETS[machine.board.chipset]}
    settings |= _firmware_disks(machine, options)
    settings["smbios1"] = {}
    if machine.identity.generation_id is not None:
        settings["vmgenid"] = str(machine.identity.generation_id)
    settings["localtime"] = "1" if machine.board.clock == "localtime" else "0"
    scsi = next((one.model for one in machine.controllers if one.bus == "scsi"), None) or "virtio-scsi"
    settings["scsihw"] = SCSI_HW.get(scsi, "virtio-scsi-single")
    settings |= _drives(machine, options)
    settings |= {f"net{number}": _nic(nic) for number, nic in enumerate(machine.nics)}
    settings |= _boot(machine)
    settings |= _others(machine)
    return settings


def _processors(machine: Machine) -> Settings:
    cpu = machine.cpu
    sockets, cores = cpu.sockets or 1, cpu.cores or 1
    online = {"vcpus": str(cpu.count)} if cpu.count not in (None, sockets * cores) else {}
    return {"sockets": str(sockets), "cores": str(cores), **online, "cpu": {"cputype": cpu.model or "kvm64"}}


def _firmware_disks(machine: Machine, options: Options) -> Settings:
    settings: Settings = {}
    if machine.firmware.nvram is not None:
        file = _volume(machine.firmware.nvram.file, options)
        settings["efidisk0"] = {"file": file, "efitype": "4m", "size": "528K"}
    if machine.tpm is not None:
        volume = _volume(machine.tpm.state or tpm_file(machine, options), options)
        settings["tpmstate0"] = {"file": volume, "size": "4M", "version": f"v{machine.tpm.version or '2.0'}"}
    return settings


def tpm_file(machine: Machine, options: Options) -> str:
    """Returns the name of the volume with the state of the TPM: the number behind those of the disks."""
    number, taken = len(machine.disks), set(_files(machine))
    while f"vm-{options.vmid}-disk-{number}.raw" in taken:
        number += 1
    return f"vm-{options.vmid}-disk-{number}.raw"


def _volume(file: str, options: Options) -> str:
    return f"{options.storage}:{options.vmid}/{file}"


def smbios1(identity: Identity, more: dict[str, str]) -> str:
    """Returns the fields of the SMBIOS table, with texts in base64."""
    names = ("serial", "manufacturer", "product")
    texts = {name: text for name in names if (text := getattr(identity, name)) is not None} | more
    values = {} if identity.uuid is None else {"uuid": str(identity.uuid)}
    values |= {"base64": "1"} if texts else {}
    values |= {name: base64.b64encode(text.encode()).decode() for name, text in texts.items()}
    return joined("smbios1", values)


def drive_key(drive: Disk | Removable, machine: Machine) -> str:
    """Returns the key of an adapted drive, such as `scsi0`."""
    scsi = next((one.model for one in machine.controllers if one.bus == "scsi"), None)
    return f"{drive.bus}{drive_number(drive.bus, drive.controller, drive.unit, scsi)}"


def _drives(machine: Machine, options: Options) -> Settings:
    settings: Settings = {drive_key(disk, machine): _disk(disk, options) for disk in machine.disks}
    return settings | {drive_key(one, machine): {"file": "none", "media": "cdrom"} for one in machine.removables}


def _disk(disk: Disk, options: Options) -> dict[str, str]:
    values = {"file": disk.device or _volume(disk.file or "", options)}
    if disk.discard is not None:
        values["discard"] = "on" if disk.discard else "ignore"
    if disk.format and not (disk.file or "").endswith(f".{disk.format}"):
        values["format"] = disk.format
    if disk.serial is not None:
        values["serial"] = encoded_serial(disk.serial)
    if disk.capacity is not None:
        values["size"] = size_text(disk.capacity)
    if disk.mode == "independent-nonpersistent":
        values["snapshot"] = "1"
    return values


def _nic(nic: Nic) -> dict[str, str]:
    model = _NIC_KEYS.get(nic.model or "", nic.model or "virtio")
    return {
        **({model: nic.mac.upper()} if nic.mac else {"model": model}),
        **({"bridge": nic.network} if nic.network and nic.network_kind != "nat" else {}),
        **({"link_down": "1"} if nic.connected is False else {}),
    }


def _boot(machine: Machine) -> Settings:
    drives: tuple[Disk | Removable, ...] = (*machine.disks, *machine.removables)
    found = [(one.boot_index, drive_key(one, machine)) for one in drives]
    found += [(nic.boot_index, f"net{number}") for number, nic in enumerate(machine.nics)]
    order = [key for index, key in sorted((index, key) for index, key in found if index is not None)]
    return {"boot": {"order": ";".join(order)}} if order else {}


def _others(machine: Machine) -> Settings:
    settings: Settings = {}
    if (display := machine.display) is not None:
        kind = "std" if display.model in (None, "vga") else f"{display.model}{display.heads or ''}"
        memory = {} if display.memory is None else {"memory": str(display.memory >> 20)}
        settings["vga"] = {"type": kind, **memory}
    if machine.sound is not None:
        settings["audio0"] = {"device": _SOUNDS.get(machine.sound, machine.sound), "driver": "none"}
    settings |= {f"serial{port.index}": port.target or "socket" for port in machine.serials}
    if machine.watchdog is not None:
        settings["watchdog"] = {"model": machine.watchdog}
    return settings | ({"rng0": {"source": "/dev/urandom"}} if machine.rng else {})
