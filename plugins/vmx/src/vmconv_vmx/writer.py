"""Writes a VMX that VMware, libvirt and virt-v2v read."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vmconv.machine import Controller, Disk, Machine, Nic, Removable
from vmconv.plugin import ConfigFile, PlanError
from vmconv_vmx import names
from vmconv_vmx.adapt import setting, shown_uuid
from vmconv_vmx.devices import by_place, place_of, shared_otherwise
from vmconv_vmx.reader import spaced
from vmconv_vmx.settings import text_of

if TYPE_CHECKING:
    from vmconv.machine import Identity

_PCIE_SINCE = 7
"""The hardware version with PCI Express."""

_BOOT = {"disk": "hdd", "cdrom": "cdrom", "floppy": "floppy", "network": "ethernet0"}
_KEY = re.compile(r'[^\s="|#\x00-\x1f][^\s="|\x00-\x1f]*')
_DISK_TYPES = {"scsi": "scsi-hardDisk", "ide": "ata-hardDisk"}

Pairs = Iterator[tuple[str, object]]


def write(machine: Machine) -> tuple[ConfigFile, ...]:
    """Returns the VMX of an adapted machine; raises `PlanError` for a disk without a file."""
    pairs: dict[str, str] = {}
    for key, value in _all(machine):
        if value is not None:
            pairs[key] = _text(value)
    return (ConfigFile("", text_of(_with_extra(machine, pairs))),)


def _text(value: object) -> str:
    return str(value).upper() if isinstance(value, bool) else str(value)


def _with_extra(machine: Machine, pairs: dict[str, str]) -> dict[str, str]:
    """Adds the settings that the model has no field for; none replaces one of the machine's."""
    known = {key.lower() for key in pairs}
    version = names.version_of(machine.board.hardware_version) or 0
    platform = {k: v for k, v in names.PLATFORM.items() if version >= _PCIE_SINCE or not k.startswith("pciBridge")}
    extra = {key: value for key, value in machine.extra.get("vmx", {}).items() if _KEY.fullmatch(key)}
    stated = {key.lower() for key in extra}
    platform = {key: value for key, value in platform.items() if key.lower() not in stated}
    return pairs | {key: value for key, value in (platform | extra).items() if key.lower() not in known}


def _all(machine: Machine) -> Pairs:
    yield ".encoding", "UTF-8"
    yield "virtualHW.version", names.version_of(machine.board.hardware_version)
    yield "displayName", machine.name
    yield "annotation", machine.description
    yield "guestOS", machine.os.source_id
    yield from _hardware(machine)
    yield from _firmware(machine)
    yield from _identity(machine.identity, machine)
    for controller in machine.controllers:
        yield from _controller(controller)
    for number, disk in enumerate(machine.disks):
        yield from _disk(disk, number, machine)
    if all(place_of(drive) != "floppy0" for drive in machine.removables):
        # VMware has a floppy drive unless the VMX denies it.
        yield "floppy0.present", False
    for drive in machine.removables:
        yield from _floppy(drive) if drive.kind == "floppy" else _cdrom(drive, machine)
    for number, nic in enumerate(machine.nics):
        yield from _nic(nic, f"ethernet{number}")


def _hardware(machine: Machine) -> Pairs:
    yield "numvcpus", machine.cpu.count
    yield "cpuid.coresPerSocket", machine.cpu.cores
    yield "vcpu.hotadd", machine.cpu.hot_add
    yield "memsize", machine.memory.size and machine.memory.size >> 20
    yield "mem.hotadd", machine.memory.hot_add
    yield "rtc.diffFromUTC", 0 if machine.board.clock == "utc" else None
    if machine.display:
        yield "svga.present", True
        yield "svga.vramSize", machine.display.memory
        yield "svga.numDisplays", machine.display.heads
    if machine.sound:
        models = {neutral: own for own, neutral in names.SOUND.items()}
        yield "sound.present", True
        yield "sound.virtualDev", models.get(machine.sound, machine.sound)
    if machine.usb:
        yield "usb_xhci.present" if machine.usb == "xhci" else "usb.present", True
        yield "ehci.present", True if machine.usb == "ehci" else None
    for port in machine.serials:
        yield f"serial{port.index}.present", True
        yield f"serial{port.index}.fileType", port.kind
        yield f"serial{port.index}.fileName", port.target


def _firmware(machine: Machine) -> Pairs:
    firmware = machine.firmware
    yield "firmware", "efi" if firmware.kind == "uefi" else None
    yield "uefi.secureBoot.enabled", firmware.secure_boot
    if firmware.nvram is not None and firmware.nvram.kind == "vmware":
        yield "nvram", firmware.nvram.file
    yield "bios.bootOrder", ",".join(_BOOT[word] for word in firmware.boot_order) or None
    started = sorted(machine.disks, key=lambda disk: disk.boot_index is None)
    if started != by_place(machine.disks):
        yield "bios.hddOrder", ",".join(map(place_of, started))


def _identity(identity: Identity, machine: Machine) -> Pairs:
    shown = shown_uuid(machine)
    yield "uuid.bios", spaced(shown) if shown else None
    yield "vc.uuid", spaced(identity.instance_uuid) if identity.instance_uuid else None
    if identity.generation_id:
        low, high = struct.unpack("<qq", identity.generation_id.bytes_le)
        yield "vm.genid", low
        yield "vm.genidX", high
    yield "SMBIOS.assetTag", identity.asset_tag


def _controller(controller: Controller) -> Pairs:
    if controller.bus != "ide":
        node = f"{controller.bus}{controller.index}"
        yield f"{node}.present", True
        yield f"{node}.virtualDev", controller.model
        yield f"{node}.pciSlotNumber", controller.pci_slot


def _disk(disk: Disk, number: int, machine: Machine) -> Pairs:
    node = place_of(disk)
    if not (disk.file or disk.device):
        raise PlanError(f"disks[{number}] has no file")
    yield f"{node}.present", True
    yield f"{node}.deviceType", "rawDisk" if disk.device else _DISK_TYPES.get(str(disk.bus), "disk")
    yield f"{node}.fileName", disk.device or disk.file
    yield f"{node}.mode", disk.mode
    if disk.shared and not shared_otherwise(node, lambda key: setting(machine, key)):
        yield f"{node}.sharing", "multi-writer"


def _cdrom(drive: Removable, machine: Machine) -> Pairs:
    node = place_of(drive)
    emulated = setting(machine, f"{node}.deviceType") == names.CD_EMULATED
    yield f"{node}.present", True
    yield f"{node}.deviceType", names.CD_IMAGE if drive.file else names.CD_EMULATED if emulated else "cdrom-raw"
    yield f"{node}.fileName", drive.file or drive.device or "emptyBackingString"
    yield f"{node}.autodetect", True if drive.device == names.AUTO else None
    yield f"{node}.clientDevice", None if drive.file or drive.device else True
    yield f"{node}.startConnected", drive.connected


def _floppy(drive: Removable) -> Pairs:
    node = place_of(drive)
    yield f"{node}.present", True
    yield f"{node}.fileType", "file" if drive.file else "device"
    yield f"{node}.fileName", drive.file or drive.device or "vmware-null-remote-floppy"
    yield f"{node}.clientDevice", None if drive.file or drive.device else True
    yield f"{node}.startConnected", drive.connected


def _nic(nic: Nic, node: str) -> Pairs:
    models = {neutral: own for own, neutral in names.NICS.items()} | {"vmxnet2": "vmxnet"}
    kinds = {neutral: own for own, neutral in names.NETWORKS.items()}
    yield f"{node}.present", True
    yield f"{node}.virtualDev", models.get(nic.model or "", nic.model)
    yield f"{node}.features", 15 if nic.model == "vmxnet2" else None
    yield f"{node}.networkName", nic.network
    yield f"{node}.connectionType", kinds.get(nic.network_kind or "")
    yield f"{node}.startConnected", nic.connected
    yield f"{node}.pciSlotNumber", nic.pci_slot
    yield from _address(nic, node)


def _address(nic: Nic, node: str) -> Pairs:
    """Returns the address; VMware refuses a static one outside its range unless its check is off."""
    if nic.mac is None or nic.mac_origin == "generated":
        yield f"{node}.addressType", "vpx" if nic.mac and names.is_vpx(nic.mac) else "generated"
        yield f"{node}.generatedAddress", nic.mac
    else:
        yield f"{node}.addressType", "static"
        yield f"{node}.address", nic.mac
        yield f"{node}.checkMACAddress", False if names.needs_no_check(nic.mac) else None
