"""Writes a domain for QEMU. libvirt, "Domain XML format"."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element, SubElement, indent, register_namespace, tostring

from vmconv.plugin import ConfigFile
from vmconv_libvirt.device_writer import add_devices
from vmconv_libvirt.fragments import DOMAIN, append_all, kept_element
from vmconv_libvirt.words import BOOT, CPU_MODES, MACHINES, OSINFO, osinfo_url

if TYPE_CHECKING:
    from vmconv.machine import Firmware, Identity, Machine
    from vmconv_libvirt.options import Options

_OSINFO_PREFIX = "libosinfo"


def write(machine: Machine, options: Options) -> tuple[ConfigFile, ...]:
    """Returns the domain. Names of files are relative to `options.directory`."""
    register_namespace(_OSINFO_PREFIX, OSINFO[1:-1])
    kept = machine.extra.get("libvirt", {})
    domain = Element("domain", type=options.type)
    _text(domain, "name", machine.name)
    _text(domain, "uuid", machine.identity.uuid)
    _text(domain, "genid", machine.identity.generation_id)
    _text(domain, "description", machine.description)
    _metadata(domain, machine, kept)
    _memory(domain, machine)
    _vcpus(domain, machine, kept)
    _system(domain, machine, kept, options)
    _sysinfo(domain, machine.identity, kept)
    _features(domain, machine, kept)
    _cpu(domain, machine, kept, options)
    _clock(domain, machine, kept)
    for tag in DOMAIN:
        if tag not in ("clock", "vcpu"):
            append_all(domain, kept, tag)
    add_devices(domain, machine, kept, options)
    indent(domain)
    return (ConfigFile("", tostring(domain, encoding="unicode").encode() + b"\n"),)


def _text(parent: Element, tag: str, value: Any) -> None:
    if value is not None:
        SubElement(parent, tag).text = str(value)


def _metadata(domain: Element, machine: Machine, kept: dict[str, str]) -> None:
    metadata = Element("metadata")
    url = osinfo_url(machine.os.id) if machine.os.id else None
    if url:
        SubElement(SubElement(metadata, f"{OSINFO}libosinfo"), f"{OSINFO}os", id=url)
    append_all(metadata, kept, "metadata.")
    if len(metadata):
        domain.append(metadata)


def _memory(domain: Element, machine: Machine) -> None:
    size = machine.memory.size or 0
    unit, value = ("KiB", size // 1024) if size % 1024 == 0 else ("bytes", size)
    SubElement(domain, "memory", unit=unit).text = str(value)


def _vcpus(domain: Element, machine: Machine, kept: dict[str, str]) -> None:
    """Adds the processors: `current` of them if more can be plugged in."""
    count = machine.cpu.count or 1
    element = kept_element(kept, "vcpu")
    if element is None:
        element = Element("vcpu")
        element.text = str(count)
    elif element.text != str(count):
        element.set("current", str(count))
    domain.append(element)


def _system(domain: Element, machine: Machine, kept: dict[str, str], options: Options) -> None:
    firmware, board = machine.firmware, machine.board
    system = SubElement(domain, "os")
    kind = SubElement(system, "type", machine=board.hardware_version or MACHINES[board.chipset or "i440fx"])
    kind.text = "hvm"
    if machine.os.architecture:
        kind.set("arch", machine.os.architecture)
    if firmware.kind == "uefi":
        _uefi(system, firmware, options)
    for each in firmware.boot_order:
        SubElement(system, "boot", dev=BOOT[each])
    append_all(system, kept, "os.b")
    if _described(machine.identity) or any(key.startswith("sysinfo.") for key in kept):
        SubElement(system, "smbios", mode="sysinfo")


def _uefi(system: Element, firmware: Firmware, options: Options) -> None:
    """Lets libvirt choose the firmware; images and templates of another host may not exist here."""
    system.set("firmware", "efi")
    if firmware.secure_boot is not None:
        features = SubElement(system, "firmware")
        wanted = "yes" if firmware.secure_boot else "no"
        SubElement(features, "feature", enabled=wanted, name="secure-boot")
        SubElement(features, "feature", enabled=wanted, name="enrolled-keys")
    if firmware.secure_boot:
        SubElement(system, "loader", secure="yes")
    if firmware.nvram is not None:
        _text(system, "nvram", os.path.join(options.directory, firmware.nvram.file))


def _described(identity: Identity) -> dict[str, dict[str, str | None]]:
    """Returns the strings of SMBIOS by structure."""
    blocks = {
        "system": {
            "manufacturer": identity.manufacturer,
            "product": identity.product,
            "serial": identity.serial,
        },
        "baseBoard": {"serial": identity.board_serial},
        "chassis": {"serial": identity.chassis_serial, "asset": identity.asset_tag},
    }
    return {name: block for name, block in blocks.items() if any(block.values())}


def _sysinfo(domain: Element, identity: Identity, kept: dict[str, str]) -> None:
    described = _described(identity)
    sysinfo = Element("sysinfo", type="smbios")
    for name in ("bios", "system", "baseBoard", "chassis", "oemStrings"):
        block = Element(name)
        for entry, text in described.get(name, {}).items():
            if text is not None:
                SubElement(block, "entry", name=entry).text = text
        append_all(block, kept, f"sysinfo.{name}.")
        if len(block):
            sysinfo.append(block)
    if len(sysinfo):
        domain.append(sysinfo)


def _features(domain: Element, machine: Machine, kept: dict[str, str]) -> None:
    features = SubElement(domain, "features")
    if "features.acpi" not in kept:
        SubElement(features, "acpi")
    if machine.os.architecture != "aarch64":
        SubElement(features, "apic")
    if machine.firmware.secure_boot:
        SubElement(features, "smm", state="on")
    append_all(features, kept, "features.", "features.acpi")


def _cpu(domain: Element, machine: Machine, kept: dict[str, str], options: Options) -> None:
    cpu = machine.cpu
    mode = cpu.model if cpu.model in CPU_MODES else "custom"
    if options.type == "qemu" and mode == "host-passthrough":
        # Emulation has no processor of the host to pass through.
        mode = "maximum"
    element = SubElement(domain, "cpu", mode=mode or "custom")
    if mode == "custom":
        SubElement(element, "model", fallback="allow").text = cpu.model
    topology = {name: getattr(cpu, name) for name in ("sockets", "cores", "threads")}
    if all(topology.values()):
        SubElement(element, "topology", {name: str(value) for name, value in topology.items()})
    append_all(element, kept, "cpu.")


def _clock(domain: Element, machine: Machine, kept: dict[str, str]) -> None:
    clock = kept_element(kept, "clock")
    if clock is None and machine.board.clock is None:
        return
    clock = Element("clock") if clock is None else clock
    if machine.board.clock is not None:
        clock.set("offset", machine.board.clock)
    domain.append(clock)
