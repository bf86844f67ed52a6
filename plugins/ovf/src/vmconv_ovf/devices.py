"""Devices of the neutral model from the items of a VirtualHardwareSection."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from vmconv.machine import Controller, Disk, Display, Nic, Removable, Serial, mac_address, part, quoted
from vmconv.plugin import MAX_SIZE
from vmconv_ovf import keys
from vmconv_ovf.envelope import Described, Envelope
from vmconv_ovf.items import Item

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_HOST = re.compile(r"(?:ovf:)?/{1,2}(disk|file)/(.+)")
"""References to `DiskSection` and `References`, as all versions and VirtualBox spell them."""

_TRUE = {"true": True, "1": True, "false": False, "0": False}
_PLAIN_SETTINGS = frozenset({"slotInfo.pciSlotNumber", "videoRamSizeInKB", "numDisplays", "ehciEnabled"})
"""Settings of items that have a neutral meaning."""

_MAX_UNIT = (1 << 16) - 1


def flag(envelope: Envelope, where: str, text: str) -> bool:
    """Returns a boolean; raises `ImageError` for any other text."""
    if text.lower() not in _TRUE:
        raise envelope.refused(where, f"{quoted(text)} is neither true nor false")
    return _TRUE[text.lower()]


class Devices:
    """The devices of a machine; `extra` collects settings without a neutral meaning."""

    def __init__(self, envelope: Envelope, items: list[Item], boot: dict[str, int], properties: dict[str, str]) -> None:
        self.envelope = envelope
        self.items = {item.id: item for item in items}
        self.boot = boot
        self.properties = properties
        self.extra: dict[str, str] = {}
        self._controllers: dict[str, Controller] = {}
        self.controllers = tuple(self._add_controllers())
        self.disks = tuple(self._disk(number, item) for number, item in enumerate(self.of(keys.DISK)))
        drives = self.of(keys.CD, keys.DVD, keys.FLOPPY)
        self.removables = tuple(self._removable(number, item) for number, item in enumerate(drives))
        self.nics = tuple(self._nic(number, item) for number, item in enumerate(self.of(keys.ETHERNET)))
        self._settle_places()

    def of(self, *types: int) -> list[Item]:
        return [item for item in self.items.values() if item.type in types]

    def flag(self, item: Item, name: str) -> bool | None:
        text = item.get(name)
        return None if text is None else flag(self.envelope, f"{item.where} {name}", text)

    def slot(self, item: Item) -> str | None:
        return item.settings.get("slotInfo.pciSlotNumber") or None

    def keep(self, place: str, item: Item) -> None:
        """Stores the settings of an item that have no neutral meaning."""
        for key, value in item.settings.items():
            if key not in _PLAIN_SETTINGS and value:
                self.extra[f"{place}.{key}"] = value

    # -- controllers

    def _add_controllers(self) -> Iterator[Controller]:
        taken: dict[str, set[int]] = {}
        for item in self.of(keys.IDE, keys.SCSI, keys.OTHER_STORAGE):
            found = _bus_and_model(item)
            if found is None:
                continue
            bus, model = found
            index = _index(item, taken.setdefault(bus, set()))
            taken[bus].add(index)
            made = part(
                self.envelope.file, item.where, Controller, bus=bus, index=index, model=model, pci_slot=self.slot(item)
            )
            self.keep(f"controllers[{len(self._controllers)}]", item)
            self._controllers[item.id] = made
            yield made

    def _place(self, item: Item) -> dict[str, Any]:
        """Returns the controller and the unit of a device."""
        place: dict[str, Any] = {}
        parent, unit = item.get("Parent"), item.get("AddressOnParent")
        if parent is not None:
            controller = self._controllers.get(parent)
            if controller is None:
                what = f"Parent {quoted(parent)} is no controller of disks"
                raise self.envelope.refused(item.where, what)
            place = {"bus": controller.bus, "controller": controller.index}
        if unit is not None and parent is not None:
            place["unit"] = self.envelope.number(f"{item.where} AddressOnParent", unit, _MAX_UNIT)
        if item.id in self.boot:
            place["boot_index"] = self.boot[item.id]
        return place

    def _settle_places(self) -> None:
        """Raises `ImageError` for two disks at one place; a drive at the place of another device gets no unit.

        VirtualBox 3 exports IDE drives with the address of the disk.
        """
        taken: set[tuple[Any, ...]] = set()
        for disk in self.disks:
            place = (disk.bus, disk.controller, disk.unit)
            if None not in place and place in taken:
                raise self.envelope.refused("Item", f"two disks are at {disk.bus} {disk.controller}:{disk.unit}")
            taken.add(place)
        settled = []
        for drive in self.removables:
            place = (drive.bus, drive.controller, drive.unit)
            settled.append(drive.model_copy(update={"unit": None}) if place in taken else drive)
            taken.add(place)
        self.removables = tuple(settled)

    # -- disks and drives

    def _resource(self, item: Item) -> Described | str | None:
        """Returns the disk or file of an item, or its text if it names a device of the host."""
        text = item.get("HostResource")
        found = _HOST.fullmatch(text) if text else None
        if found is None:
            return text
        kind, key = found.groups()
        if kind == "disk":
            return self.envelope.disk(key, item.where, self.properties)
        name, size = self.envelope.file_of(key, item.where)
        return Described(name, size, None, None)

    def _disk(self, number: int, item: Item) -> Disk:
        found = self._resource(item)
        if isinstance(found, str):
            raise self.envelope.refused(item.where, f"HostResource {quoted(found)} is no disk or file of the package")
        if found is None:
            # An empty disk, which the target creates.
            where, quantity = f"{item.where} VirtualQuantity", item.get("VirtualQuantity")
            size = self.envelope.capacity(where, quantity, item.get("AllocationUnits"), self.properties)
            found = Described(None, None, None, size)
        self.keep(f"disks[{number}]", item)
        return part(self.envelope.file, item.where, Disk, **found._asdict(), **self._place(item))

    def _removable(self, number: int, item: Item) -> Removable:
        found = self._resource(item)
        values: dict[str, Any] = {"connected": self.flag(item, "AutomaticAllocation")}
        if item.type == keys.FLOPPY:
            # PCs have one controller of floppy drives, which has no item.
            unit = self.envelope.number(f"{item.where} AddressOnParent", item.get("AddressOnParent") or "0", _MAX_UNIT)
            values |= {"kind": "floppy", "bus": "floppy", "controller": 0, "unit": unit}
            values["boot_index"] = self.boot.get(item.id)
        else:
            values |= {"kind": "cdrom", **self._place(item)}
        if isinstance(found, Described):
            values["file"] = found.file
        else:
            values["device"] = found
        self.keep(f"removables[{number}]", item)
        return part(self.envelope.file, item.where, Removable, **values)

    # -- other devices

    def _nic(self, number: int, item: Item) -> Nic:
        address, model = item.get("Address"), next(iter(item.subtypes)) or None
        known = [keys.NIC_MODELS[each] for each in item.subtypes if each in keys.NIC_MODELS]
        self.keep(f"nics[{number}]", item)
        return part(
            self.envelope.file,
            item.where,
            Nic,
            mac=address and mac_address(self.envelope.file, f"{item.where} Address", address),
            # Importers generate an address unless the item states one.
            mac_origin="static" if address else None,
            model=known[0] if known else model,
            network=item.get("Connection"),
            connected=self.flag(item, "AutomaticAllocation"),
            pci_slot=self.slot(item),
            boot_index=self.boot.get(item.id),
        )

    def display(self) -> Display | None:
        items = self.of(keys.GRAPHICS)
        if not items:
            return None
        item = items[0]
        memory, heads = (item.settings.get(name) for name in ("videoRamSizeInKB", "numDisplays"))
        self.keep("display", item)
        return part(
            self.envelope.file,
            item.where,
            Display,
            memory=self._setting(item, "videoRamSizeInKB", MAX_SIZE >> 10) * 1024 if memory else None,
            heads=self._setting(item, "numDisplays", 64) if heads else None,
        )

    def _setting(self, item: Item, name: str, high: int) -> int:
        return self.envelope.number(f"{item.where} {name}", item.settings[name], high)

    def usb(self) -> str | None:
        """Returns the fastest USB controller."""
        found = {_usb(item) for item in self.of(keys.USB)}
        return next((speed for speed in ("xhci", "ehci", "uhci") if speed in found), None)

    def sound(self) -> str | None:
        items = [*self.of(keys.SOUND), *self._others(lambda subtype: subtype.startswith("vmware.soundcard."))]
        model = next((subtype for item in items for subtype in item.subtypes if subtype), None)
        return None if model is None else keys.SOUND_MODELS.get(model, model)

    def serials(self) -> tuple[Serial, ...]:
        return tuple(
            part(self.envelope.file, item.where, Serial, index=number, kind=_serial_kind(item))
            for number, item in enumerate(self.of(keys.SERIAL))
        )

    def has_tpm(self) -> bool:
        return any(self._others(lambda subtype: subtype == keys.VTPM))

    def passthrough(self) -> tuple[str, ...]:
        found = self._others(lambda subtype: subtype.startswith(keys.PASSTHROUGH))
        return tuple(" ".join((item.get("ResourceSubType") or "").split()) for item in found)

    def _others(self, wanted: Any) -> list[Item]:
        return [item for item in self.items.values() if wanted(item.subtypes[0])]

    def unknown(self) -> Iterable[Item]:
        """Returns the items for which the model has no place."""
        for item in self.of(*({each.type for each in self.items.values()} - _KNOWN)):
            subtype = item.subtypes[0]
            if not (subtype == keys.VTPM or subtype.startswith(("vmware.soundcard.", *keys.PASSTHROUGH))):
                yield item
        yield from (item for item in self.of(keys.OTHER_STORAGE) if item.id not in self._controllers)


_KNOWN = {
    *(keys.PROCESSOR, keys.MEMORY, keys.IDE, keys.SCSI, keys.ETHERNET, keys.FLOPPY, keys.CD, keys.DVD, keys.DISK),
    *(keys.OTHER_STORAGE, keys.SERIAL, keys.USB, keys.GRAPHICS, keys.SOUND, keys.NVRAM),
}


def _bus_and_model(item: Item) -> tuple[str, str | None] | None:
    """Returns the bus and the model of a controller; None for one of no disks, such as NVDIMM's."""
    first = item.subtypes[0] or None
    if item.type == keys.OTHER_STORAGE:
        return next((keys.STORAGE[each] for each in item.subtypes if each in keys.STORAGE), None)
    bus, known = ("ide", keys.IDE_MODELS) if item.type == keys.IDE else ("scsi", keys.SCSI_MODELS)
    return bus, next((known[each] for each in item.subtypes if each in known), first)


def _index(item: Item, taken: set[int]) -> int:
    """Returns the number of a controller on its bus: `Address` or `BusNumber` if it is a free number, else the next.

    DSP0243 leaves the meaning of a controller's address to the device.
    """
    text = item.get("Address") or item.get("BusNumber") or ""
    if re.fullmatch(r"\d{1,4}", text) and int(text) not in taken:
        return int(text)
    return next(number for number in range(len(taken) + 1) if number not in taken)


def _usb(item: Item) -> str:
    subtype = item.subtypes[0]
    if subtype.endswith("xhci"):
        return "xhci"
    ehci = subtype.endswith("ehci") and item.settings.get("ehciEnabled", "true").lower() != "false"
    # An item without a subtype promises no more than USB 1.
    return "ehci" if ehci else "uhci"


def _serial_kind(item: Item) -> str | None:
    kind = item.subtypes[0].removeprefix("vmware.serialport.")
    return {"device": "device", "file": "file", "pipe": "pipe", "uri": "network"}.get(kind)
