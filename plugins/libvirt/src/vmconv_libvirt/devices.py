"""Reads the devices of a domain."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element

from vmconv.machine import (
    Controller,
    Disk,
    Display,
    Nic,
    Removable,
    Serial,
    Tpm,
    mac_address,
    number,
    part,
    quoted,
    refused,
)
from vmconv_libvirt.words import BUSES, DISK_FORMATS, DISPLAYS, NICS, PREFIXES, SCSI, SOUNDS, opposite

if TYPE_CHECKING:
    from vmconv.plugin import File
    from vmconv_libvirt.fragments import Fragments

_DISK = ("source", "target", "driver", "shareable", "transient", "serial", "boot", "address", "alias", "backingStore")
_NIC = ("mac", "model", "source", "link", "boot", "address", "alias", "target")
_FIRST = ("video", "sound", "watchdog", "rng", "tpm")
"""Devices of which a machine has one here: further ones become fragments."""

_HANDLED = ("disk", "controller", "interface", "video", "sound", "serial", "watchdog", "rng", "tpm", "hostdev")
_CONTROLLERS = ("ide", "sata", "scsi", "fdc", "usb")
_IGNORED = ("emulator", "console", "audio")
"""The emulator is the host's, the console is the serial port again, and sound is played on the host."""

_SPEED = ("uhci", "ehci", "xhci")
_SIZES = {"sata": 6, "scsi": 15, "floppy": 2}
"""Disks of one controller, where libvirt derives the place from the name."""


class Devices:
    """The devices of a domain, in the order of their elements."""

    def __init__(self, file: File, element: Element, kept: Fragments, *, qemu: bool) -> None:
        self.file, self.element, self.kept, self.qemu = file, element, kept, qemu

    def parts(self) -> dict[str, Any]:
        """Returns the fields of the machine. Raises `ImageError` for values that the domain's format does not allow."""
        disks: list[Disk] = []
        removables: list[Removable] = []
        for number_, element in enumerate(self.element.findall("disk")):
            where = f"devices/disk[{number_ + 1}]"
            if element.get("device", "disk") in ("cdrom", "floppy"):
                removables.append(self._removable(element, where, f"removables.{len(removables)}."))
            else:
                disks.append(self._disk(element, where, f"disks.{len(disks)}."))
        self._fragments()
        found = {
            "disks": tuple(disks),
            "removables": tuple(removables),
            "controllers": self._controllers([*disks, *removables]),
            "nics": tuple(self._nic(each, at) for at, each in enumerate(self.element.findall("interface"))),
            "display": self._display(),
            "serials": tuple(self._serial(each, at) for at, each in enumerate(self.element.findall("serial"))),
            "usb": self._usb(),
            "tpm": self._tpm(),
            "rng": self.element.find("rng") is not None or None,
            "sound": self._model("sound", opposite(SOUNDS)),
            "watchdog": self._model("watchdog", {}),
            "passthrough": tuple(_host_device(each) for each in self.element.findall("hostdev")),
        }
        self._unknown()
        return found

    def _fragments(self) -> None:
        for element in self.element:
            if element.tag == "controller" and element.get("type") in _CONTROLLERS:
                continue
            if element.tag == "graphics" and element.attrib == {"type": "vnc"} and not len(element):
                # The writer adds it to domains without any.
                continue
            further = element.tag in _FIRST and element is not self.element.find(element.tag)
            if element.tag == "controller" or further or element.tag not in (*_HANDLED, *_IGNORED):
                self.kept.add(f"devices.{element.tag}", element)

    def _unknown(self) -> None:
        """Stores what the reader does not know of the devices that it understands."""
        count: dict[str, int] = {}
        for element in self.element:
            tag = element.tag
            count[tag] = count.get(tag, 0) + 1
            if tag == "controller" and element.get("type") not in _CONTROLLERS:
                continue
            if tag in _HANDLED and not (tag in _FIRST and count[tag] > 1):
                where = f"devices/{tag}[{count[tag]}]"
                self.kept.add_unknown(element, tag, where, fragments="/[^/@]+" if tag in ("disk", "interface") else "")

    def _model(self, tag: str, words: dict[str, str]) -> str | None:
        element = self.element.find(tag)
        found = None if element is None else element.get("model")
        return words.get(found, found) if found else None

    def _number(self, element: Element, where: str, name: str, high: int = 0xFFFF) -> int | None:
        text = element.get(name)
        return None if text is None else number(self.file, f"{where}@{name}", text, 0, high)

    def _disk(self, element: Element, where: str, prefix: str) -> Disk:
        file, device = self._source(element, where)
        if file is None and device is None:
            raise refused(self.file, f"{where}/source", "the disk has none")
        driver = element.find("driver")
        kind = None if driver is None else driver.get("type")
        if kind is None and self.qemu and file is not None:
            # Without a type, libvirt takes the content as it is.
            kind = "raw"
        discard = None if driver is None else driver.get("discard")
        self._keep_driver(driver, prefix)
        self.kept.add_others(prefix, element, _DISK)
        return part(
            self.file,
            where,
            Disk,
            **self._place(element, where),
            file=file,
            device=device,
            format=opposite(DISK_FORMATS).get(kind, kind) if kind else None,
            mode="independent-nonpersistent" if element.find("transient") is not None else "persistent",
            shared=element.find("shareable") is not None,
            discard={"unmap": True, "ignore": False}.get(discard or ""),
            serial=(element.findtext("serial") or "").strip() or None,
        )

    def _keep_driver(self, driver: Element | None, prefix: str) -> None:
        if driver is None:
            return
        for name in ("name", "type", "discard"):
            driver.attrib.pop(name, None)
        if driver.attrib or len(driver):
            self.kept.add(f"{prefix}driver", driver)

    def _source(self, element: Element, where: str) -> tuple[str | None, str | None]:
        """Returns the file of a disk, or the name of another source."""
        kind, source = element.get("type", "file"), element.find("source")
        if source is None:
            return None, None
        if kind == "file":
            return source.get("file") or None, None
        parts = {
            "block": ("dev",),
            "dir": ("dir",),
            "volume": ("pool", "volume"),
            "network": ("protocol", "name"),
            "nvme": ("type", "namespace"),
            "vhostuser": ("path",),
        }.get(kind)
        if parts is None:
            raise refused(self.file, f"{where}@type", f"{quoted(kind)} is not a type of disk")
        name = ":".join(text for text in (source.get(each) for each in parts) if text)
        return None, name or None

    def _removable(self, element: Element, where: str, prefix: str) -> Removable:
        file, device = self._source(element, where)
        target = element.find("target")
        tray = None if target is None else target.get("tray")
        self._keep_driver(element.find("driver"), prefix)
        self.kept.add_others(prefix, element, (*_DISK, "readonly"))
        return part(
            self.file,
            where,
            Removable,
            **self._place(element, where),
            kind=element.get("device"),
            file=file,
            device=device,
            connected={"open": False, "closed": True}.get(tray or ""),
        )

    def _place(self, element: Element, where: str) -> dict[str, Any]:
        """Returns bus, controller, unit and boot index of a disk."""
        target, boot, address = (element.find(tag) for tag in ("target", "boot", "address"))
        name = "" if target is None else target.get("dev", "")
        bus = BUSES.get("" if target is None else target.get("bus", ""))
        if bus is None:
            bus = {prefix: bus for bus, prefix in PREFIXES.items() if prefix != "sd"}.get(name[:2])
        controller, unit = self._address(address, where, bus) if _is_drive(address) else _derived(bus, name)
        order = None if boot is None else self._number(boot, f"{where}/boot", "order")
        if order == 0:
            raise refused(self.file, f"{where}/boot@order", "0 is not a number from 1")
        return {
            "bus": bus,
            "controller": controller,
            "unit": unit,
            "boot_index": None if order is None else order - 1,
        }

    def _address(self, address: Element | None, where: str, bus: str | None) -> tuple[int | None, int | None]:
        assert address is not None
        controller, channel, target, unit = (
            self._number(address, f"{where}/address", name) or 0 for name in ("controller", "bus", "target", "unit")
        )
        if bus == "ide":
            # One controller of libvirt has both channels, which other platforms count as controllers.
            return controller * 2 + channel, unit
        if bus == "scsi" and target:
            # A target has one disk on other platforms. A further logical unit gets a place of its own.
            return controller, None if unit else target
        return controller, unit

    def _controllers(self, devices: list[Disk | Removable]) -> tuple[Controller, ...]:
        found: dict[tuple[str, int], Controller] = {}
        for at, element in enumerate(self.element.findall("controller")):
            bus = element.get("type", "")
            if bus in ("sata", "scsi"):
                made = self._controller(element, bus, f"devices/controller[{at + 1}]")
                found.setdefault((bus, made.index), made)
        for device in devices:
            if device.bus in ("floppy", "ide", "sata", "scsi") and device.controller is not None:
                key = (device.bus, device.controller)
                found.setdefault(key, Controller(bus=device.bus, index=device.controller, model=self._chip(device.bus)))
        return tuple(found[key] for key in sorted(found))

    def _chip(self, bus: str) -> str | None:
        """Returns the model that QEMU has for a bus."""
        return {"sata": "ahci", "ide": "piix3"}.get(bus) if self.qemu else None

    def _controller(self, element: Element, bus: str, where: str) -> Controller:
        model = element.get("model")
        if bus == "scsi" and model:
            theirs = model.lower()
            model = opposite(SCSI).get(theirs, theirs)
            if not self.qemu and theirs == "lsilogic":
                # VMware's is the chip of the neutral model, QEMU's is another.
                model = "lsilogic"
        index = self._number(element, where, "index") or 0
        address = element.find("address")
        return part(
            self.file,
            where,
            Controller,
            bus=bus,
            index=index,
            model=model or self._chip(bus),
            pci_slot=self._pci(address, where),
        )

    def _pci(self, address: Element | None, where: str) -> str | None:
        if address is None or address.get("type") != "pci":
            return None
        values = []
        for name, high in (("domain", 0xFFFF), ("bus", 0xFF), ("slot", 0x1F), ("function", 7)):
            text = address.get(name, "0").lower().removeprefix("0x")
            if not re.fullmatch("[0-9a-f]{1,4}", text) or int(text, 16) > high:
                raise refused(
                    self.file, f"{where}/address@{name}", f"{quoted(address.get(name))} is not up to {high:#x}"
                )
            values.append(int(text, 16))
        return "{:04x}:{:02x}:{:02x}.{:x}".format(*values)

    def _nic(self, element: Element, at: int) -> Nic:
        where, prefix = f"devices/interface[{at + 1}]", f"nics.{at}."
        mac, model, link, boot = (element.find(tag) for tag in ("mac", "model", "link", "boot"))
        words = opposite(NICS)
        kind = None if model is None else (model.get("type") or "").lower()
        address = None if mac is None else mac.get("address")
        order = None if boot is None else self._number(boot, f"{where}/boot", "order")
        if order == 0:
            raise refused(self.file, f"{where}/boot@order", "0 is not a number from 1")
        self.kept.add_others(prefix, element, _NIC)
        return part(
            self.file,
            where,
            Nic,
            mac=mac_address(self.file, f"{where}/mac", address) if address else None,
            model=words.get(kind, kind) if kind else None,
            **self._network(element, prefix),
            connected=None if link is None else {"up": True, "down": False}.get(link.get("state", "")),
            pci_slot=self._pci(element.find("address"), where),
            boot_index=None if order is None else order - 1,
        )

    def _network(self, element: Element, prefix: str) -> dict[str, str | None]:
        """Returns the network of a card. Whether a libvirt network is bridged stands in the network's definition."""
        kind, source = element.get("type", ""), element.find("source")
        empty = Element("source") if source is None else source
        if kind == "network":
            return {"network": empty.get("network") or None}
        if kind == "bridge":
            return {"network": empty.get("bridge") or None, "network_kind": "bridged"}
        if kind == "direct":
            self.kept.add(f"{prefix}source", empty)
            return {"network": empty.get("dev") or None, "network_kind": "bridged"}
        if kind in ("user", "null"):
            return {"network_kind": "nat" if kind == "user" else "none"}
        self.kept.add(f"{prefix}interface", element)
        return {}

    def _display(self) -> Display | None:
        model = self.element.find("video/model")
        if model is None:
            return None
        where = "devices/video/model"
        kind = (model.get("type") or "").lower()
        memory = self._number(model, where, "vram", 1 << 30)
        heads = self._number(model, where, "heads", 64)
        words = opposite(DISPLAYS)
        return part(
            self.file,
            where,
            Display,
            model=words.get(kind, kind) or None,
            memory=None if memory is None else memory << 10,
            heads=heads,
        )

    def _serial(self, element: Element, at: int) -> Serial:
        where = f"devices/serial[{at + 1}]"
        source, target, protocol = (element.find(tag) for tag in ("source", "target", "protocol"))
        port = None if target is None else self._number(target, f"{where}/target", "port")
        kind = element.get("type", "")
        words = {"dev": "device", "file": "file", "pipe": "pipe", "tcp": "network", "pty": "pty", "null": "none"}
        if kind not in words:
            self.kept.add("devices.serial", element)
        name = None if source is None else source.get("path")
        if kind == "tcp" and source is not None:
            scheme = "tcp" if protocol is None or protocol.get("type") == "raw" else protocol.get("type")
            end = "?server" if source.get("mode") == "bind" else ""
            name = f"{scheme}://{source.get('host', '')}:{source.get('service', '')}{end}"
        if kind == "pty":
            # The path is the one of the last run.
            name = None
        return part(self.file, where, Serial, index=at if port is None else port, kind=words.get(kind), target=name)

    def _usb(self) -> str | None:
        models = [each.get("model", "") for each in self.element.findall("controller") if each.get("type") == "usb"]
        found = [speed for speed in _SPEED if any(speed in model for model in models)]
        return found[-1] if found else None

    def _tpm(self) -> Tpm | None:
        element = self.element.find("tpm")
        if element is None:
            return None
        backend = element.find("backend")
        source = element.find("backend/source")
        return part(
            self.file,
            "devices/tpm",
            Tpm,
            version=None if backend is None else backend.get("version"),
            state=None if source is None else source.get("path"),
        )


def _is_drive(address: Element | None) -> bool:
    return address is not None and address.get("type") == "drive"


def _derived(bus: str | None, name: str) -> tuple[int | None, int | None]:
    """Returns the place that libvirt derives from a disk's name such as `sdb`; (None, None) for other names."""
    found = re.fullmatch(r"[a-z]d([a-z]{1,3})\d*", name)
    if not found or bus not in (*_SIZES, "ide", "virtio"):
        return None, None
    index = 0
    for letter in found[1]:
        index = index * 26 + ord(letter) - ord("a") + 1
    index -= 1
    if bus == "virtio":
        return 0, index
    if bus == "ide":
        return index // 2, index % 2
    controller, unit = divmod(index, _SIZES[bus])
    # The SCSI controller itself is unit 7.
    return controller, unit + (bus == "scsi" and unit >= 7)


def _host_device(element: Element) -> str:
    """Returns the name of a device of the host, such as `pci 0000:01:00.0`."""
    found = [element.find(f"source/{tag}") for tag in ("address", "vendor", "product")]
    parts = [f"{name}={value}" for each in found if each is not None for name, value in sorted(each.attrib.items())]
    return " ".join((element.get("type", "device"), *parts))[:1024]
