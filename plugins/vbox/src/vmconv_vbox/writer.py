"""Writes VirtualBox's settings files, version 1.19: VirtualBox 7.0 and later."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from vmconv.machine import Disk, Layer, Machine, Nic
from vmconv.plugin import ConfigFile
from vmconv_vbox.places import listed
from vmconv_vbox.settings import EXTRA_DATA
from vmconv_vbox.structs import (
    BOOT,
    CHIPSETS,
    DISPLAYS,
    DMI,
    FORMAT_NAMES,
    MODES,
    NAMESPACE,
    NIC_NAMES,
    PORTS,
    SOUNDS,
    TPMS,
    TYPES,
    UARTS,
    dmi_key,
    registered,
    serial_key,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmconv.machine import Removable

VERSION = "1.19-linux"

_STEP = r"[A-Za-z][A-Za-z0-9]*(?:\[[1-9]\d{0,3}\])?"
_KEY = re.compile(rf"(?P<path>{_STEP}(?:/{_STEP}){{0,8}})?@(?P<name>[A-Za-z][A-Za-z0-9-]*)")
_OWN_MODES = ("NATNetwork", "HostOnlyNetwork", "GenericInterface", "CloudNetwork")
_REPEATED = ("Adapter", "StorageController", "Port")


def write(machine: Machine) -> tuple[ConfigFile, ...]:
    """Returns the settings file of an adapted machine."""
    root = _document(machine)
    indent(root)
    return (ConfigFile("", b'<?xml version="1.0"?>\n' + tostring(root, encoding="utf-8") + b"\n"),)


def _document(machine: Machine) -> Element:
    root = Element("VirtualBox", xmlns=NAMESPACE, version=VERSION)
    identity = machine.identity
    element = SubElement(
        root,
        "Machine",
        uuid=_braced(identity.instance_uuid),
        name=machine.name or "machine",
        OSType=machine.os.source_id or "Other_64",
        snapshotFolder="Snapshots",
    )
    if machine.description:
        SubElement(element, "Description").text = machine.description
    _registry(element, machine)
    _extra_data(element, machine)
    hardware = SubElement(element, "Hardware", uuid=_braced(identity.uuid))
    _hardware(hardware, machine)
    for key, value in machine.extra.get("vbox", {}).items():
        if match := _KEY.fullmatch(key):
            _at(element if match["path"] is None else hardware, match["path"] or "").set(match["name"], value)
    return root


def _braced(identity: object) -> str:
    return f"{{{identity}}}"


def _registered(disk: Disk | Layer) -> str:
    return _braced(disk.image_uuid and registered(disk.image_uuid, disk.format))


def _registry(element: Element, machine: Machine) -> None:
    disks = SubElement(SubElement(element, "MediaRegistry"), "HardDisks")
    names = {mode: name for name, mode in MODES.items()}
    for disk in machine.disks:
        # A disk that was made on another is inside its element. The oldest states the type of all.
        place, values = disks, {"type": names.get(disk.mode or "", "Normal")}
        family: tuple[Disk | Layer, ...] = (*reversed(disk.layers), disk)
        for one in family:
            form = FORMAT_NAMES.get(one.format or "", "VDI")
            place = SubElement(
                place, "HardDisk", {"uuid": _registered(one), "location": one.file or "", "format": form, **values}
            )
            values = {}


def _extra_data(element: Element, machine: Machine) -> None:
    found = {
        dmi_key(machine.firmware.kind, name): f"string:{value}"
        for name, field in DMI.items()
        if (value := getattr(machine.identity, field)) is not None
    }
    for name, drives in listed(machine):
        for drive in drives:
            key = serial_key(TYPES[name].kind, _port(drive))
            if key and isinstance(drive, Disk) and drive.serial is not None:
                found[key] = f"string:{drive.serial}"
    found |= {
        key.removeprefix(EXTRA_DATA): value
        for key, value in machine.extra.get("vbox", {}).items()
        if key.startswith(EXTRA_DATA)
    }
    data = SubElement(element, "ExtraData")
    for key, value in sorted(found.items()):
        SubElement(data, "ExtraDataItem", name=key, value=value)


def _add(parent: Element, name: str, values: Mapping[str, str | None]) -> Element:
    """Adds an element with those attributes that have a value."""
    return SubElement(parent, name, {key: value for key, value in values.items() if value is not None})


def _hardware(hardware: Element, machine: Machine) -> None:
    cpu = SubElement(hardware, "CPU", count=str(machine.cpu.count or 1))
    if machine.cpu.hot_add:
        cpu.set("hotplug", "true")
        tree = SubElement(cpu, "CpuTree")
        for number in range(machine.cpu.count or 1):
            SubElement(tree, "Cpu", id=str(number))
    SubElement(cpu, "PAE", enabled="false")
    if machine.os.architecture != "i686":
        SubElement(cpu, "LongMode", enabled="true")
    SubElement(hardware, "Memory", RAMSize=str((machine.memory.size or 1 << 30) >> 20))
    if machine.usb is not None:
        _usb(hardware, machine.usb)
    _boot(hardware, machine)
    _display(hardware, machine)
    _firmware(hardware, machine)
    network = SubElement(hardware, "Network")
    for number, nic in enumerate(machine.nics):
        _nic(network, number, nic, own_mode(machine, number))
    _serials(hardware, machine)
    sound = machine.sound and _name(SOUNDS, machine.sound, "AC97")
    _add(hardware, "AudioAdapter", {"driver": "Default", "controller": sound, "enabled": sound and "true"})
    SubElement(hardware, "RTC", localOrUTC="local" if machine.board.clock == "localtime" else "UTC")
    SubElement(hardware, "Chipset", type=_name(CHIPSETS, machine.board.chipset, "PIIX3"))
    storage = SubElement(hardware, "StorageControllers")
    for name, drives in listed(machine):
        _controller(storage, name, drives)


def _name(table: Mapping[str, str], value: str | None, default: str) -> str:
    return next((name for name, each in table.items() if each == value), default)


def _usb(hardware: Element, speed: str) -> None:
    controllers = SubElement(SubElement(hardware, "USB"), "Controllers")
    # An EHCI has an OHCI beside it, for slower devices.
    for name in {"uhci": ("OHCI",), "ehci": ("OHCI", "EHCI"), "xhci": ("XHCI",)}[speed]:
        SubElement(controllers, "Controller", name=name, type=name)


def _boot(hardware: Element, machine: Machine) -> None:
    boot = SubElement(hardware, "Boot")
    order = [_name(BOOT, one, "None") for one in machine.firmware.boot_order]
    for position, device in enumerate([*order, "None", "None", "None", "None"][:4], start=1):
        SubElement(boot, "Order", position=str(position), device=device)


def _display(hardware: Element, machine: Machine) -> None:
    if (display := machine.display) is not None:
        SubElement(
            hardware,
            "Display",
            controller=_name(DISPLAYS, display.model, "VMSVGA"),
            VRAMSize=str((display.memory or 0) >> 20),
            monitorCount=str(display.heads or 1),
        )


def _firmware(hardware: Element, machine: Machine) -> None:
    SubElement(hardware, "Firmware", type="EFI" if machine.firmware.kind == "uefi" else "BIOS")
    bios = SubElement(hardware, "BIOS")
    SubElement(bios, "IOAPIC", enabled="true")
    if machine.firmware.kind == "uefi":
        # Without a path, VirtualBox makes a new store with the name of the settings file.
        SubElement(bios, "NVRAM", path=machine.firmware.nvram.file if machine.firmware.nvram else "")
    # The table has the UUID as SMBIOS 2.6 wants it, which is how the model means it.
    SubElement(bios, "SmbiosUuidLittleEndian", enabled="true")
    SubElement(bios, "AutoSerialNumGen", enabled="true")
    if machine.tpm is not None:
        kind = _name(TPMS, machine.tpm.version, "v2_0")
        SubElement(hardware, "TrustedPlatformModule", type=kind, location="")


def _nic(network: Element, number: int, nic: Nic, own: str | None) -> None:
    adapter = SubElement(network, "Adapter", slot=str(number), enabled="true")
    if nic.mac:
        adapter.set("MACAddress", nic.mac.replace(":", "").upper())
    if nic.connected is False:
        adapter.set("cable", "false")
    adapter.set("type", NIC_NAMES[nic.model or "e1000"])
    names = {"bridged": "BridgedInterface", "internal": "InternalNetwork", "nat": "NAT"}
    names["host-only"] = "HostOnlyInterface"
    if own is None and nic.network_kind in names:
        _add(adapter, names[nic.network_kind], {"name": nic.network})


def _serials(hardware: Element, machine: Machine) -> None:
    uart = SubElement(hardware, "UART")
    for port in machine.serials:
        base, line = UARTS[port.index]
        mode = _name(PORTS, port.kind, "Disconnected")
        values = {"slot": str(port.index), "enabled": "true", "IOBase": base, "IRQ": line, "hostMode": mode}
        _add(uart, "Port", {**values, "path": port.target})


def _port(drive: Disk | Removable) -> int:
    return (drive.controller or 0) * 2 + (drive.unit or 0) if drive.bus == "ide" else drive.unit or 0


def _controller(storage: Element, name: str, drives: list[Disk | Removable]) -> None:
    kind = TYPES[name]
    most = max((_port(drive) for drive in drives), default=0) + 1
    # A SCSI controller has all its ports; others as many as are used.
    count = {"IDE": 2, "Floppy": 1, "SCSI": kind.ports, "USB": kind.ports}.get(kind.kind, most)
    element = SubElement(
        storage,
        "StorageController",
        name=kind.kind,
        type=name,
        PortCount=str(count),
        useHostIOCache="true" if kind.kind in ("IDE", "Floppy") else "false",
        Bootable="true",
    )
    for drive in drives:
        _attached(element, kind.bus, drive)


def _attached(element: Element, bus: str, drive: Disk | Removable) -> None:
    places = {"ide": (drive.controller, drive.unit), "floppy": (0, drive.unit)}
    port, unit = places.get(bus, (drive.unit, 0))
    if isinstance(drive, Disk):
        discard = None if drive.discard is None else str(drive.discard).lower()
        values = {"type": "HardDisk", "port": str(port), "device": str(unit), "discard": discard}
        attached = _add(element, "AttachedDevice", values)
        SubElement(attached, "Image", uuid=_registered(drive))
    else:
        kind = "DVD" if drive.kind == "cdrom" else "Floppy"
        SubElement(element, "AttachedDevice", passthrough="false", type=kind, port=str(port), device=str(unit))


def own_mode(machine: Machine, number: int) -> str | None:
    """Returns the connection of a card that only VirtualBox has, from the settings that it came with."""
    path = f"Network/Adapter{f'[{number + 1}]' if number else ''}"
    found = machine.extra.get("vbox", {})
    return next((mode for mode in _OWN_MODES if any(key.startswith(f"{path}/{mode}@") for key in found)), None)


def _at(root: Element, path: str) -> Element:
    """Returns the element at a path, made if it is not there."""
    element = root
    for name, count in _steps(path):
        found = [child for child in element if child.tag == name]
        while len(found) < count:
            found.append(SubElement(element, name))
        element = found[count - 1]
    return element


def _steps(path: str) -> list[tuple[str, int]]:
    steps = (step.partition("[") for step in path.split("/") if step)
    return [(name, int(number.removesuffix("]") or "1")) for name, _, number in steps]


def placeable(machine: Machine, key: str) -> bool:
    """True if a setting of VirtualBox's own still has its element, or can have a new one."""
    if key.startswith(EXTRA_DATA):
        return len(key) > len(EXTRA_DATA)
    match = _KEY.fullmatch(key)
    counts = {
        "Adapter": len(machine.nics),
        "StorageController": len(list(listed(machine))),
        "Port": len(machine.serials),
    }
    return match is not None and all(
        count <= (counts.get(name, 1000) if name in _REPEATED else 1000) for name, count in _steps(match["path"] or "")
    )
