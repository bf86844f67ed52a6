"""Reads the devices of a configuration: drives, network cards and the rest."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from vmconv.machine import Disk, Display, Nic, Removable, Serial, mac_address, number, part, quoted, refused
from vmconv_proxmox.keys import joined, size
from vmconv_proxmox.places import DRIVE, LIMITS, place
from vmconv_proxmox.source import file_of

if TYPE_CHECKING:
    from vmconv_proxmox.source import Source

NIC_NAMES = {"pcnet": "pcnet32", "ne2k_pci": "ne2k"}
"""Models that Proxmox names otherwise."""
NICS = frozenset(
    {
        *("e1000", "e1000-82540em", "e1000-82544gc", "e1000-82545em", "e1000e", "i82551", "i82557b", "i82559er"),
        *("ne2k_isa", "ne2k_pci", "pcnet", "rtl8139", "virtio", "vmxnet3"),
    }
)
SOUND = {"ac97": "ac97", "ich9-intel-hda": "hda", "intel-hda": "hda"}
_CLOUDINIT = re.compile(r".*[:/](?:vm-\d+-)?cloudinit(?:\.\w+)?")


def drives(source: Source, scsi: str | None, order: dict[str, int]) -> tuple[tuple[Disk, ...], tuple[Removable, ...]]:
    if "cdrom" in source.settings:
        source.settings.setdefault("ide2", f"{source.take('cdrom')},media=cdrom")
    disks, removables = [], []
    for key in [key for key in source.settings if DRIVE.fullmatch(key)]:
        match = DRIVE.fullmatch(key)
        assert match is not None
        bus, count = match[1], int(match[2])
        if count >= LIMITS[bus]:
            raise refused(source.file, key, f"Proxmox has {bus}0 to {bus}{LIMITS[bus] - 1}")
        values = source.properties(key)
        volume = values.pop("file", values.pop("volume", ""))
        if not volume:
            raise refused(source.file, key, "names no volume")
        controller, unit = place(bus, count, scsi)
        at = {"bus": bus, "controller": controller, "unit": unit, "boot_index": order.get(key)}
        if _CLOUDINIT.fullmatch(volume):
            source.extra[key] = joined(key, {"file": volume, **values})
        elif values.get("media") == "cdrom":
            removables.append(_cdrom(source, key, volume, values, at))
        else:
            disks.append(_disk(source, key, volume, values, at))
    return tuple(disks), tuple(removables)


def _cdrom(source: Source, key: str, volume: str, values: dict[str, str], at: dict[str, Any]) -> Removable:
    del values["media"]
    values.pop("size", None)
    source.keep(key, values)
    file = None if volume in ("none", "cdrom") or volume.startswith("/") else volume.rpartition("/")[2]
    device = volume if volume == "cdrom" or volume.startswith("/") else None
    return part(source.file, key, Removable, kind="cdrom", file=file, device=device, connected=volume != "none", **at)


def _disk(source: Source, key: str, volume: str, values: dict[str, str], at: dict[str, Any]) -> Disk:
    values.pop("media", None)
    file, suffix = file_of(volume), values.pop("format", None)
    if file is None and not volume.startswith("/dev/") and ":" not in volume:
        raise refused(source.file, key, f"{quoted(volume)} is neither a volume nor a device")
    if file is not None:
        # A file outside of a storage is raw, whatever its suffix says.
        suffix = suffix or ("raw" if file.startswith("/") else _suffix(file))
    discard, size_text, serial = values.pop("discard", None), values.pop("size", None), values.pop("serial", None)
    temporary = source.boolean(f"{key} snapshot", values.pop("snapshot", None), False)
    source.keep(key, values)
    return part(
        source.file,
        key,
        Disk,
        **at,
        file=file,
        device=volume if file is None else None,
        format=suffix,
        capacity=None if size_text is None else size(source.file, f"{key} size", size_text),
        mode="independent-nonpersistent" if temporary else "persistent",
        discard=None if discard is None else discard == "on",
        serial=None if serial is None else unquote(serial, errors="replace"),
    )


def _suffix(file: str) -> str | None:
    suffix = file.rpartition(".")[2]
    return suffix if suffix in ("raw", "qcow2", "vmdk") else None


def boot_order(source: Source) -> tuple[dict[str, int], bool]:
    """Returns the places of devices in the boot order, from 0, and whether other disks may start the machine, too.

    Only devices in a list start the machine. The old letters give places to all of a class, of disks to one; firmware
    tries the others last.
    """
    stated = "boot" in source.settings
    values, first = source.properties("boot"), source.take("bootdisk")
    source.keep("boot", {name: value for name, value in values.items() if name not in ("order", "legacy")})
    listed = re.split(r"[;\s]+", values.get("order", "").strip(";"))
    if stated and "legacy" not in values:
        return {key: place for place, key in enumerate(filter(None, listed))}, False
    cdroms = [key for key, value in source.settings.items() if DRIVE.fullmatch(key) and "media=cdrom" in value]
    letters = values.get("legacy", "cdn")
    classes = {"c": [first] if first in source.settings else [], "d": cdroms, "n": source.numbered("net")}
    found = [key for letter in letters for key in classes.get(letter, [])]
    return {str(key): place for place, key in enumerate(dict.fromkeys(found))}, "c" in letters


def nic(source: Source, key: str, order: dict[str, int]) -> Nic:
    values = source.properties(key)
    named = next((name for name in values if name in NICS), None)
    model = named or values.pop("model", None)
    mac = values.pop(named, None) if named else values.pop("macaddr", None)
    bridge, down = values.pop("bridge", None), values.pop("link_down", None)
    source.keep(key, values)
    return part(
        source.file,
        key,
        Nic,
        mac=None if mac is None else mac_address(source.file, key, mac),
        model=None if model is None else NIC_NAMES.get(model, model),
        network=bridge,
        network_kind="bridged" if bridge else "nat",
        connected=not source.boolean(f"{key} link_down", down, False),
        boot_index=order.get(key),
    )


def display(source: Source) -> Display | None:
    values = source.properties("vga")
    if not values:
        return None
    kind, memory = values.pop("type", "std"), values.pop("memory", None)
    source.keep("vga", values)
    heads = re.fullmatch(r"qxl([234])", kind)
    return part(
        source.file,
        "vga",
        Display,
        model="vga" if kind == "std" else "qxl" if heads else kind,
        memory=None if memory is None else number(source.file, "vga memory", memory, 1, 1 << 20) << 20,
        heads=int(heads[1]) if heads else None,
    )


def sound(source: Source) -> str | None:
    values = source.properties("audio0")
    device = values.pop("device", None)
    if device is None:
        return None
    kept = {} if device != "intel-hda" else {"device": device}
    if values.setdefault("driver", "spice") == "none":
        del values["driver"]
    source.keep("audio0", {**kept, **values})
    return SOUND.get(device.lower(), device.lower())


def serial(source: Source, key: str) -> Serial:
    value = source.take(key) or "socket"
    index = number(source.file, key, key.removeprefix("serial"), 0, 3)
    if value == "socket":
        return Serial(index=index, kind="pipe")
    return part(source.file, key, Serial, index=index, kind="device", target=value)


def watchdog(source: Source) -> str | None:
    values = source.properties("watchdog")
    model = values.pop("model", "i6300esb") if values else None
    source.keep("watchdog", values)
    return model


def rng(source: Source) -> bool | None:
    values = source.properties("rng0")
    found = True if values else None
    if values.get("source") == "/dev/urandom":
        del values["source"]
    source.keep("rng0", values)
    return found


def passthrough(source: Source) -> tuple[str, ...]:
    """Returns the host's devices in the guest. Redirection by SPICE is no device of the host."""
    keys = [key for kind in ("usb", "hostpci", "parallel") for key in source.numbered(kind)]
    return tuple(f"{key}: {source.take(key)}" for key in keys if not source.settings[key].startswith("spice"))
