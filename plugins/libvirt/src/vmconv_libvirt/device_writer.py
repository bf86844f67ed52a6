"""Writes the devices of a domain."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, SubElement

from vmconv_libvirt.adapting import endpoint
from vmconv_libvirt.fragments import append_all, kept_element
from vmconv_libvirt.words import DISK_FORMATS, DISPLAYS, NICS, PREFIXES, SCSI, SOUNDS, USB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmconv.machine import Controller, Disk, Machine, Nic, Removable, Serial
    from vmconv_libvirt.options import Options

_SERIAL = {"pty": "pty", "network": "tcp", "none": "null"}


def add_devices(domain: Element, machine: Machine, kept: dict[str, str], options: Options) -> None:
    """Appends the devices of an adapted machine."""
    devices = SubElement(domain, "devices")
    names = _names()
    for at, disk in enumerate(machine.disks):
        _disk(devices, disk, machine, names, kept, f"disks.{at}.", options)
    for removable in machine.removables:
        _removable(devices, removable, machine, names, options)
    for controller in machine.controllers:
        _controller(devices, controller)
    if machine.usb:
        SubElement(devices, "controller", type="usb", index="0", model=USB[machine.usb])
    for at, nic in enumerate(machine.nics):
        _nic(devices, nic, kept, f"nics.{at}.")
    for serial in machine.serials:
        _serial(devices, serial)
    _single(devices, machine)
    append_all(devices, kept, "devices.")
    if not any(key.startswith("devices.graphics") for key in kept):
        SubElement(devices, "graphics", type="vnc")


def _names() -> dict[str, Iterator[str]]:
    """Returns the names of disks for each prefix: hda, hdb, ... Addresses say where they are."""
    return {prefix: _names_with(prefix) for prefix in PREFIXES.values()}


def _names_with(prefix: str) -> Iterator[str]:
    return (prefix + _letters(at) for at in range(1 << 16))


def _letters(number: int) -> str:
    number += 1
    found = ""
    while number:
        number, rest = divmod(number - 1, 26)
        found = chr(ord("a") + rest) + found
    return found


def _element(devices: Element, kind: str, device: str) -> Element:
    return SubElement(devices, "disk", type=kind, device=device)


def _disk(
    devices: Element,
    disk: Disk,
    machine: Machine,
    names: dict[str, Iterator[str]],
    kept: dict[str, str],
    prefix: str,
    options: Options,
) -> None:
    element = _element(devices, "block" if disk.file is None else "file", "disk")
    driver = kept_element(kept, f"{prefix}driver")
    driver = Element("driver") if driver is None else driver
    driver.set("name", "qemu")
    if disk.format:
        driver.set("type", DISK_FORMATS.get(disk.format, disk.format))
    if disk.discard is not None:
        driver.set("discard", "unmap" if disk.discard else "ignore")
    element.append(driver)
    _source(element, disk.file, disk.device, options)
    _target(element, disk, machine, names)
    if disk.serial:
        SubElement(element, "serial").text = disk.serial
    if disk.shared:
        SubElement(element, "shareable")
    if disk.mode == "independent-nonpersistent":
        SubElement(element, "transient")
    append_all(element, kept, prefix, f"{prefix}driver")


def _source(element: Element, file: str | None, device: str | None, options: Options) -> None:
    if file is not None:
        SubElement(element, "source", file=os.path.join(options.directory, file))
    elif device is not None:
        SubElement(element, "source", dev=device)


def _target(element: Element, device: Disk | Removable, machine: Machine, names: dict[str, Iterator[str]]) -> Element:
    bus = device.bus or "sata"
    unit, controller = device.unit or 0, device.controller or 0
    prefix = PREFIXES[bus]
    name = prefix + _letters(unit) if bus == "virtio" else next(names[prefix])
    target = SubElement(element, "target", dev=name, bus="fdc" if bus == "floppy" else bus)
    if device.boot_index is not None:
        SubElement(element, "boot", order=str(device.boot_index + 1))
    address = {"controller": controller, "bus": 0, "target": 0, "unit": unit}
    if bus == "ide":
        address |= {"controller": 0, "bus": controller}
    elif bus == "scsi" and machine.controller_model("scsi", controller) != "lsi53c895a":
        # Places are targets with one disk each; on a 53C895A libvirt calls the target a unit.
        address |= {"target": unit, "unit": 0}
    if bus in ("floppy", "ide", "sata", "scsi"):
        SubElement(element, "address", {"type": "drive"} | {key: str(value) for key, value in address.items()})
    return target


def _removable(
    devices: Element, removable: Removable, machine: Machine, names: dict[str, Iterator[str]], options: Options
) -> None:
    kind = "block" if removable.file is None and removable.device is not None else "file"
    element = _element(devices, kind, removable.kind)
    SubElement(element, "driver", name="qemu", type="raw")
    _source(element, removable.file, removable.device, options)
    target = _target(element, removable, machine, names)
    if removable.connected is not None:
        target.set("tray", "closed" if removable.connected else "open")
    if removable.kind == "cdrom":
        SubElement(element, "readonly")


def _controller(devices: Element, controller: Controller) -> None:
    if controller.bus not in ("sata", "scsi"):
        # These follow from their disks.
        return
    element = SubElement(devices, "controller", type=controller.bus, index=str(controller.index))
    if controller.bus == "scsi" and controller.model:
        element.set("model", SCSI[controller.model])
    _pci(element, controller.pci_slot)


def _pci(element: Element, slot: str | None) -> None:
    if slot is None:
        return
    domain, bus, rest = slot.split(":")
    values = zip(("domain", "bus", "slot", "function"), (domain, bus, *rest.split(".")), strict=True)
    SubElement(element, "address", {"type": "pci"} | {name: f"0x{value}" for name, value in values})


def _nic(devices: Element, nic: Nic, kept: dict[str, str], prefix: str) -> None:
    direct = kept_element(kept, f"{prefix}source")
    kind = {"bridged": "bridge", "nat": "user"}.get(nic.network_kind or "", "network")
    element = SubElement(devices, "interface", type="direct" if direct is not None else kind)
    if nic.mac:
        SubElement(element, "mac", address=nic.mac)
    if direct is not None:
        element.append(direct)
    elif kind in ("bridge", "network"):
        SubElement(element, "source", {kind: nic.network or "default"})
    SubElement(element, "model", type=NICS[nic.model or "e1000"])
    if nic.connected is not None:
        SubElement(element, "link", state="up" if nic.connected else "down")
    if nic.boot_index is not None:
        SubElement(element, "boot", order=str(nic.boot_index + 1))
    append_all(element, kept, prefix, f"{prefix}source")
    _pci(element, nic.pci_slot)


def _serial(devices: Element, serial: Serial) -> None:
    element = SubElement(devices, "serial", type=_SERIAL[serial.kind or "pty"])
    found = endpoint(serial.target)
    if serial.kind == "network" and found is not None:
        protocol, host, service, listens = found
        mode = "bind" if listens else "connect"
        SubElement(element, "source", mode=mode, host=host, service=service)
        SubElement(element, "protocol", type="raw" if protocol == "tcp" else protocol)
    SubElement(element, "target", port=str(serial.index))


def _single(devices: Element, machine: Machine) -> None:
    """Appends the devices of which there is one."""
    if machine.display is not None:
        model = SubElement(SubElement(devices, "video"), "model", type=DISPLAYS[machine.display.model or "vga"])
        if machine.display.memory is not None:
            model.set("vram", str(machine.display.memory >> 10))
        if machine.display.heads is not None:
            model.set("heads", str(machine.display.heads))
    if machine.sound:
        SubElement(devices, "sound", model=SOUNDS[machine.sound])
    if machine.watchdog:
        SubElement(devices, "watchdog", model=machine.watchdog)
    if machine.rng:
        backend = SubElement(SubElement(devices, "rng", model="virtio"), "backend", model="random")
        backend.text = "/dev/urandom"
    if machine.tpm is not None:
        version = machine.tpm.version or "2.0"
        tpm = SubElement(devices, "tpm", model="tpm-crb" if version == "2.0" else "tpm-tis")
        SubElement(tpm, "backend", type="emulator", version=version)
