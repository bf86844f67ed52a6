"""Reads the devices of a VMX: controllers, disks, drives, network cards, ports."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from vmconv.machine import MAX_DEVICES, Controller, Disk, Nic, Removable, Serial, mac_address, part, quoted, refused
from vmconv_vmx import names
from vmconv_vmx.settings import Settings

_NODE = re.compile(r"(ide|nvme|sata|scsi)(\d{1,4}):(\d{1,4})\..*")


def read(settings: Settings, *, starts_with_disk: bool) -> dict[str, Any]:
    """Returns the fields of a `Machine` for devices, and takes their settings. Absent devices are removed.

    Disks and drives come in the order of the file.
    """
    order = {key.partition(".")[0]: at for at, key in enumerate(reversed(list(settings)))}
    nodes = _nodes(settings)
    found: dict[str, Any] = {"disks": [], "removables": []}
    for bus, index, unit in nodes:
        _attached(settings, found, bus, index, unit)
    found["removables"] += _floppies(settings)
    for devices in (found["disks"], found["removables"]):
        devices.sort(key=lambda device: -order[place_of(device)])
    found["controllers"] = _controllers(settings, {(bus, index) for bus, index, _ in nodes})
    found["disks"] = _started(settings, found["disks"], starts_with_disk)
    found["nics"] = [_nic(settings, index, at) for at, index in enumerate(_numbers(settings, "ethernet"))]
    found["serials"] = [_serial(settings, index) for index in _numbers(settings, "serial")]
    found["sound"] = _sound(settings)
    found["passthrough"] = tuple(_passthrough(settings))
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


def _bounded(settings: Settings, found: list[Any], what: str) -> list[Any]:
    if len(found) > MAX_DEVICES:
        raise refused(settings.file, what, f"there are more than {MAX_DEVICES}")
    return found


def _nodes(settings: Settings) -> list[tuple[str, int, int]]:
    """Returns the places with a device, and removes the settings of the others. A device is absent by default."""
    places = sorted({(m[1], int(m[2]), int(m[3])) for key in settings if (m := _NODE.fullmatch(key))})
    present = [place for place in places if settings.flag(f"{_name(*place)}.present")]
    settings.remove({_name(*place) for place in places} - {_name(*place) for place in present})
    return _bounded(settings, present, "disks and drives")


def _name(bus: str, index: int, unit: int) -> str:
    return f"{bus}{index}:{unit}"


def place_of(device: Disk | Removable) -> str:
    """Returns the name of a device in a VMX, such as `scsi0:1` and `floppy0`."""
    return f"floppy{device.unit}" if device.bus == "floppy" else f"{device.bus}{device.controller}:{device.unit}"


def _attached(settings: Settings, found: dict[str, Any], bus: str, index: int, unit: int) -> None:
    node, place = _name(bus, index, unit), {"bus": bus, "controller": index, "unit": unit}
    kind = settings.look(f"{node}.deviceType") or "disk"
    if kind != names.CD_EMULATED:
        settings.take(f"{node}.deviceType")
    if kind == names.CD_IMAGE or kind in names.CD_DEVICES:
        found["removables"].append(_cdrom(settings, node, kind, place))
    elif kind in names.DISKS or kind in names.RAW_DISKS:
        found["disks"].append(_disk(settings, node, kind, place))
    else:
        raise refused(settings.file, f"{node}.deviceType", f"{quoted(kind)} is not a disk or a CD drive")


def _disk(settings: Settings, node: str, kind: str, place: dict[str, Any]) -> Disk:
    name = settings.take(f"{node}.fileName")
    if name is None:
        raise refused(settings.file, f"{node}.fileName", "is missing: the disk has no file")
    physical = kind in names.RAW_DISKS or name.startswith(("/dev/", "\\\\.\\", "/vmfs/devices/"))
    source = {"device": name} if physical else {"file": name, "format": "vmdk"}
    mode = settings.look(f"{node}.mode")
    if mode in names.MODES:
        settings.take(f"{node}.mode")
    return part(
        settings.file,
        node,
        Disk,
        **place,
        **source,
        mode=mode if mode in names.MODES else None,
        shared=_shared(settings, node),
    )


def _shared(settings: Settings, node: str) -> bool | None:
    """True for a disk that several machines write to: by itself, or by its controller's shared bus."""
    if settings.look(f"{node}.sharing") == "multi-writer":
        settings.take(f"{node}.sharing")
        return True
    return True if shared_otherwise(node, settings.look) else None


def shared_otherwise(node: str, look: Callable[[str], str]) -> bool:
    """True if settings of Workstation or of the controller share a disk; they stay settings."""
    bus = look(f"{node.partition(':')[0]}.sharedBus")
    return bus in ("virtual", "physical") or look(f"{node}.shared") == "true"


def _cdrom(settings: Settings, node: str, kind: str, place: dict[str, Any]) -> Removable:
    name = settings.take(f"{node}.fileName") or ""
    _ignore(settings, node, "clientDevice", "autodetect")
    source = "file" if kind == names.CD_IMAGE else "device"
    values = {**place, source: None if name.lower() in names.EMPTY else name}
    connected = settings.flag(f"{node}.startConnected")
    return part(settings.file, node, Removable, kind="cdrom", connected=connected, **values)


def _floppies(settings: Settings) -> list[Removable]:
    """Returns the floppy drives. VMware's default for floppy0 is present."""
    indexes = _indexes(settings, "floppy")
    flags = {index: settings.flag(f"floppy{index}.present") for index in indexes}
    present = [index for index in indexes if flags[index] or (flags[index] is None and index == 0)]
    settings.remove({f"floppy{index}" for index in set(indexes) - set(present)})
    return [_floppy(settings, index) for index in _bounded(settings, present, "floppy")]


def _ignore(settings: Settings, node: str, *keys: str) -> None:
    for key in keys:
        settings.take(f"{node}.{key}")


def _floppy(settings: Settings, index: int) -> Removable:
    node = f"floppy{index}"
    client, kind = settings.flag(f"{node}.clientDevice"), (settings.take(f"{node}.fileType") or "device").lower()
    _ignore(settings, node, "autodetect")
    name = settings.take(f"{node}.fileName") or ""
    source = {} if client or name.lower() in names.EMPTY else {"file" if kind == "file" else "device": name}
    connected = settings.flag(f"{node}.startConnected")
    return part(
        settings.file,
        node,
        Removable,
        kind="floppy",
        bus="floppy",
        controller=0,
        unit=index,
        connected=connected,
        **source,
    )


def _controllers(settings: Settings, used: set[tuple[str, int]]) -> list[Controller]:
    """Returns the controllers, by bus and number. A device has a controller, also if the VMX does not say so."""
    found = {key for key in used if key[0] == "ide"}
    for bus in ("nvme", "sata", "scsi"):
        indexes = set(_indexes(settings, bus)) | {index for each, index in used if each == bus}
        flags = {index: settings.flag(f"{bus}{index}.present") for index in indexes}
        present = {index for index in indexes if flags[index] or (bus, index) in used}
        settings.remove({f"{bus}{index}" for index in indexes - present})
        found |= {(bus, index) for index in present}
    return [_controller(settings, bus, index) for bus, index in sorted(_bounded(settings, [*found], "controllers"))]


def _controller(settings: Settings, bus: str, index: int) -> Controller:
    """Returns a controller. IDE is that of VMware's chipset, a PIIX4."""
    node = f"{bus}{index}"
    model = "piix4" if bus == "ide" else (settings.take(f"{node}.virtualDev") or "").lower() or None
    if settings.look(f"{node}.sharedBus") == "none":
        settings.take(f"{node}.sharedBus")
    return part(settings.file, node, Controller, bus=bus, index=index, model=model, pci_slot=_slot(settings, node))


def _slot(settings: Settings, node: str) -> str | None:
    """Returns the PCI slot number; -1 means none yet."""
    number = settings.count(f"{node}.pciSlotNumber", -1, 1 << 31)
    return None if number in (None, -1) else str(number)


def by_place(disks: Sequence[Disk]) -> list[Disk]:
    """Orders the disks of each bus by their places, as VMware starts them without `bios.hddOrder`."""
    buses = list(dict.fromkeys(disk.bus for disk in disks))
    return sorted(disks, key=lambda disk: (buses.index(disk.bus), disk.controller or 0, disk.unit or 0))


def _started(settings: Settings, disks: list[Disk], starts_with_disk: bool) -> list[Disk]:
    """Marks the disk that VMware starts, if it is not the first: that of `bios.hddOrder`, or else of the first place.

    Another class may start before the disks. Then the disks come in VMware's order instead, without a mark. A list of
    absent disks stays a setting.
    """
    words = [word.strip() for word in settings.look("bios.hddOrder").split(",") if word.strip()]
    places = {place_of(disk): disk for disk in disks}
    listed = [places[word] for word in dict.fromkeys(words) if word in places]
    if len(listed) == len(words):
        settings.take("bios.hddOrder")
    order = listed + [disk for disk in by_place(disks) if disk not in listed]
    if not disks or order[0] == disks[0]:
        return disks
    if starts_with_disk:
        return [disk.model_copy(update={"boot_index": 0}) if disk == order[0] else disk for disk in disks]
    return order


def _indexes(settings: Settings, name: str) -> list[int]:
    """Returns the numbers of devices of which the VMX says anything."""
    pattern = re.compile(rf"{name}(\d{{1,4}})\..*")
    return sorted({int(match[1]) for key in settings if (match := pattern.fullmatch(key))})


def _numbers(settings: Settings, name: str) -> list[int]:
    """Returns the numbers of present devices, and removes the settings of the others."""
    indexes = _indexes(settings, name)
    present = [index for index in indexes if settings.flag(f"{name}{index}.present")]
    settings.remove({f"{name}{index}" for index in set(indexes) - set(present)})
    return _bounded(settings, present, name)


def _nic(settings: Settings, index: int, at: int) -> Nic:
    """Returns a network card. Its other settings get its place `at` among the cards, as the writer numbers them."""
    node = f"ethernet{index}"
    mac, origin = _mac(settings, node)
    network, kind = _network(settings, node)
    connected, slot, model = settings.flag(f"{node}.startConnected"), _slot(settings, node), _model(settings, node)
    if at != index:
        settings.rename(f"{node}.", f"ethernet{at}.")
    return part(
        settings.file,
        node,
        Nic,
        mac=mac,
        mac_origin=origin,
        model=model,
        network=network,
        network_kind=kind,
        connected=connected,
        pci_slot=slot,
    )


def _mac(settings: Settings, node: str) -> tuple[str | None, str | None]:
    """Returns the address and its origin. `generated` is VMware's default, `vpx` is generated by vCenter."""
    kind = (settings.take(f"{node}.addressType") or "generated").lower()
    if kind not in ("static", "generated", "vpx"):
        raise refused(settings.file, f"{node}.addressType", f"{quoted(kind)} is not static, generated or vpx")
    static, generated = settings.take(f"{node}.address"), settings.take(f"{node}.generatedAddress")
    _ignore(settings, node, "generatedAddressOffset", "checkMACAddress")
    text = static if kind == "static" else generated or static
    key = f"{node}.{'address' if text == static else 'generatedAddress'}"
    mac = mac_address(settings.file, key, text) if text else None
    return mac, mac and ("static" if kind == "static" else "generated")


def _model(settings: Settings, node: str) -> str | None:
    model = (settings.take(f"{node}.virtualDev") or "").lower()
    if model == "vmxnet" and settings.look(f"{node}.features") == "15":
        settings.take(f"{node}.features")
        return "vmxnet2"
    return names.NICS.get(model, model) or None


def _network(settings: Settings, node: str) -> tuple[str | None, str | None]:
    """Returns the network's name and kind. Workstation names a custom network by its virtual switch."""
    kind = settings.look(f"{node}.connectionType")
    if kind in names.NETWORKS:
        settings.take(f"{node}.connectionType")
    name = settings.take(f"{node}.networkName")
    switch = settings.look(f"{node}.vnet") if kind == "custom" else ""
    return name or switch or None, names.NETWORKS.get(kind)


def _serial(settings: Settings, index: int) -> Serial:
    node = f"serial{index}"
    kind = settings.look(f"{node}.fileType")
    if kind in names.SERIAL:
        settings.take(f"{node}.fileType")
    target = settings.take(f"{node}.fileName")
    return part(settings.file, node, Serial, index=index, kind=names.SERIAL.get(kind), target=target)


def _sound(settings: Settings) -> str | None:
    """Returns the sound card. Without a model it is VMware's oldest, an ES1371."""
    if not settings.flag("sound.present"):
        settings.remove({"sound"})
        return None
    model = (settings.take("sound.virtualDev") or "es1371").lower()
    return names.SOUND.get(model, model)


def _passthrough(settings: Settings) -> list[str]:
    """Returns the host's PCI devices in the machine, as VMware names them."""
    indexes = _numbers(settings, "pcipassthru")
    found = [settings.take(f"pcipassthru{index}.id") or f"pciPassthru{index}" for index in indexes]
    settings.remove({f"pcipassthru{index}" for index in indexes})
    return found
