"""Reads VirtualBox's settings files. Settings that are absent have VirtualBox's defaults."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from uuid import UUID

from vmconv.machine import (
    Board,
    Cpu,
    Display,
    Firmware,
    Identity,
    Machine,
    Memory,
    Nvram,
    Serial,
    Tpm,
    guest,
    parse_xml,
    part,
    quoted,
    refused,
    unknown,
)
from vmconv_vbox.nics import nics
from vmconv_vbox.settings import Settings, all_below, children
from vmconv_vbox.storage import read_storage
from vmconv_vbox.structs import BOOT, CHIPSETS, DISPLAYS, DMI, NS, PORTS, SOUNDS, TPMS, USB, dmi_key

if TYPE_CHECKING:
    from vmconv.plugin import File

MAX_EXTRA = 2000
_OLDEST = (1, 7)
_DEFAULT_BOOT = ("floppy", "cdrom", "disk")


def read(file: File) -> Machine:
    """Returns the machine of a settings file; raises `ImageError` with the element that is damaged."""
    settings = _settings(file)
    machine = settings.machine
    name, own = settings.take(machine, "name"), settings.uuid(machine, "uuid")
    kind = _firmware_kind(settings)
    storage = read_storage(settings)
    values: dict[str, Any] = {
        "name": name,
        "description": settings.description(),
        "os": _system(settings),
        "cpu": _cpu(settings),
        "memory": Memory(size=settings.number("Memory", "RAMSize", 1, 1 << 30, "128") << 20),
        "firmware": _firmware(settings, kind),
        "tpm": _tpm(settings),
        "identity": _identity(settings, kind, own),
        "board": _board(settings),
        "controllers": storage.controllers,
        "disks": storage.disks,
        "removables": storage.removables,
        "nics": nics(settings),
        "display": _display(settings),
        "sound": _sound(settings),
        "serials": tuple(_serials(settings)),
        "usb": _usb(settings),
        "memory_state": settings.take(machine, "stateFile"),
        "snapshots": tuple(_snapshots(settings)),
    }
    extra = settings.rest()
    if len(extra) > MAX_EXTRA:
        raise refused(file, "Machine", f"more than {MAX_EXTRA} settings are not known")
    return part(file, "Machine", Machine, **values, extra={"vbox": extra} if extra else {})


def _settings(file: File) -> Settings:
    root = parse_xml(file)
    if root.tag != f"{NS}VirtualBox":
        raise refused(file, quoted(root.tag), "is not VirtualBox in the namespace of VirtualBox")
    machine = root.find(f"{NS}Machine")
    if machine is None:
        reason = "these are VirtualBox's own settings" if root.find(f"{NS}Global") is not None else "has no Machine"
        raise refused(file, "VirtualBox", reason)
    version = root.get("version", "").partition("-")[0].split(".")
    if len(version) != 2 or not all(each.isdecimal() and len(each) < 6 for each in version):
        raise refused(file, "VirtualBox version", f"{quoted(root.get('version'))} is not a version such as 1.19-linux")
    if tuple(map(int, version)) < _OLDEST:
        hint = "open it with a newer VirtualBox once"
        raise refused(file, "VirtualBox version", f"{root.get('version')} is older than 1.7", hint=hint)
    hardware = machine.find(f"{NS}Hardware")
    if hardware is None:
        raise refused(file, "Machine", "has no Hardware; encrypted settings are not supported")
    settings = Settings(file, machine, hardware)
    for key, value in unknown(root, "VirtualBox", {"VirtualBox": "version", "VirtualBox/Machine": "*"}):
        settings.keep(f"/{key}", value)
    for name, value in hardware.attrib.items():
        if name not in ("uuid", "version"):
            settings.keep(f"/Hardware@{name}", value)
    return settings


def _system(settings: Settings) -> Any:
    kind = settings.take(settings.machine, "OSType")
    settings.text("Machine OSType", kind)
    return guest("vbox", kind or "Other")


def _cpu(settings: Settings) -> Cpu:
    hot = settings.flag("CPU", "hotplug")
    count = settings.number("CPU", "count", 1, 4096, "1")
    plugged = len(settings.all("CPU/CpuTree/Cpu"))
    for element in settings.all("CPU/CpuTree"):
        element.clear()
    if hot and 0 < plugged < count:
        settings.keep("CPU@count", str(count))
        count = plugged
    return Cpu(count=count, hot_add=bool(hot))


def _firmware_kind(settings: Settings) -> str:
    text = settings.value("Firmware", "type") or "BIOS"
    if text not in ("BIOS", "EFI", "EFI32", "EFI64", "EFIDUAL"):
        raise refused(settings.file, "Firmware type", f"{quoted(text)} is not known")
    if text not in ("BIOS", "EFI"):
        settings.keep("Firmware@type", text)
    return "bios" if text == "BIOS" else "uefi"


def _firmware(settings: Settings, kind: str) -> Firmware:
    found = {settings.number("Boot/Order", "position", 1, 4, "1", at=one): one for one in settings.all("Boot/Order")}
    devices = [settings.take(found[position], "device") for position in sorted(found)]
    order = [BOOT[device] for device in devices if device in BOOT] if found else list(_DEFAULT_BOOT)
    nvram = None
    paths = [settings.value(f"{parent}/NVRAM", "path") for parent in ("BIOS", "Firmware")]
    stated = next((path for path in paths if path is not None), None)
    # VirtualBox leaves out the usual name.
    if kind == "uefi" and stated != "":
        stem = os.path.splitext(os.path.basename(settings.file.path))[0]
        nvram = part(settings.file, "NVRAM path", Nvram, file=stated or f"{stem}.nvram", kind="virtualbox")
    return part(settings.file, "Boot", Firmware, kind=kind, boot_order=tuple(dict.fromkeys(order)), nvram=nvram)


def _tpm(settings: Settings) -> Tpm | None:
    kind = settings.value("TrustedPlatformModule", "type") or "None"
    location = settings.value("TrustedPlatformModule", "location")
    if kind == "None":
        return None
    if location:
        settings.keep("TrustedPlatformModule@location", location)
    if kind not in TPMS:
        # The host's own TPM, or a program that emulates one.
        settings.keep("TrustedPlatformModule@type", kind)
    return Tpm(version=TPMS.get(kind, "2.0"))


def _identity(settings: Settings, kind: str, own: UUID | None) -> Identity:
    shown = settings.uuid(settings.hardware, "uuid") or own
    little = settings.flag("BIOS/SmbiosUuidLittleEndian", "enabled") or settings.flag(
        "Firmware/SmbiosUuidLittleEndian", "enabled"
    )
    # Before this setting, and in machines of that time, the table has the bytes in the order of the text.
    seen = shown if little or shown is None else UUID(bytes_le=shown.bytes)
    texts = {field: settings.extra_data(dmi_key(kind, name)) for name, field in DMI.items()}
    values = {"uuid": seen, "uuid_text": None if shown == seen else shown, "instance_uuid": own}
    return part(settings.file, "Hardware", Identity, **values, **texts)


def _board(settings: Settings) -> Board:
    chipset = settings.value("Chipset", "type") or "PIIX3"
    if chipset not in CHIPSETS:
        raise refused(settings.file, "Chipset type", f"{quoted(chipset)} is not known")
    local = (settings.value("RTC", "localOrUTC") or "local").lower() == "local"
    return part(settings.file, "Chipset", Board, chipset=CHIPSETS[chipset], clock="localtime" if local else "utc")


def _display(settings: Settings) -> Display:
    kind = settings.value("Display", "controller") or "VBoxVGA"
    return part(
        settings.file,
        "Display",
        Display,
        model=DISPLAYS.get(kind, kind.lower()),
        memory=settings.number("Display", "VRAMSize", 0, 4096, "8") << 20,
        heads=settings.number("Display", "monitorCount", 1, 64, "1"),
    )


def _sound(settings: Settings) -> str | None:
    kind, enabled = settings.value("AudioAdapter", "controller") or "AC97", settings.flag("AudioAdapter", "enabled")
    return SOUNDS.get(kind, kind.lower()) if enabled else None


def _serials(settings: Settings) -> Iterator[Serial]:
    for port in settings.all("UART/Port"):
        slot = settings.number("UART/Port", "slot", 0, 3, "0", at=port)
        mode = settings.take(port, "hostMode") or "Disconnected"
        enabled = settings.take(port, "enabled") == "true"
        target = settings.take(port, "path") or None
        for name in ("IOBase", "IRQ"):
            settings.take(port, name)
        if not enabled:
            port.attrib.clear()
        elif mode not in PORTS:
            raise refused(settings.file, f"UART/Port[{slot}] hostMode", f"{quoted(mode)} is not known")
        else:
            yield part(settings.file, f"UART/Port[{slot}]", Serial, index=slot, kind=PORTS[mode], target=target)


def _usb(settings: Settings) -> str | None:
    kinds = []
    for one in settings.all("USB/Controllers/Controller"):
        settings.take(one, "name")
        kinds.append(settings.take(one, "type") or "")
    # Before 1.15: one element with two switches.
    if settings.flag("USBController", "enabled"):
        kinds.append("EHCI" if settings.flag("USBController", "enabledEhci") else "OHCI")
    return next((USB[kind] for kind in ("XHCI", "EHCI", "OHCI") if kind in kinds), None)


def _snapshots(settings: Settings) -> Iterator[str]:
    for element in children(settings.machine, "Snapshot"):
        for one in all_below(element, "Snapshot"):
            if name := one.get("name", "").strip():
                yield name
