"""Reads `.vmcx`: devices of the manifest, each with the node of its settings."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from uuid import UUID

from vmconv.machine import (
    Board,
    Controller,
    Cpu,
    Disk,
    Firmware,
    Identity,
    Machine,
    Memory,
    Nic,
    Nvram,
    Removable,
    Serial,
    Tpm,
    mac_address,
    part,
    quoted,
)
from vmconv_hyperv import keys
from vmconv_hyperv.storage import Node
from vmconv_hyperv.storage import read as read_storage

if TYPE_CHECKING:
    from pydantic import BaseModel

    from vmconv.plugin import File

Part = TypeVar("Part", bound="BaseModel")

_MIB = 1 << 20
_PHYSICAL = re.compile(r"\\\\[.?]\\physicaldrive\d+", re.IGNORECASE)
MAX_EXTRA = 4000
_OF_THE_STORAGE = ("VDEVVersion", "flags", "version", "size")
"""Values that describe the tree itself."""

_NO_MAC = "00:00:00:00:00:00"


class _Device(NamedTuple):
    """A device of the manifest: id of its type, its name, its settings."""

    kind: str
    name: str
    node: Node


def read(file: File) -> Machine:
    """Returns the machine of a configuration; raises `ImageError` if it is damaged or no configuration."""
    root = read_storage(file).child("configuration")
    if not root.child("settings").nodes:
        raise root.refused("settings", "is not there: this is no configuration, but perhaps a saved state (.vmrs)")
    return _Reader(file, root).machine()


class _Reader:
    def __init__(self, file: File, root: Node) -> None:
        self._file, self._root = file, root
        self._devices = tuple(_devices(root))
        # The BIOS has settings under its type, in each generation.
        self._bios = root.child(f"_{keys.BIOS}_")

    def machine(self) -> Machine:
        properties = self._root.child("properties")
        disks, removables, controllers = self._drives()
        found = self._part(
            properties,
            Machine,
            name=properties.text("name"),
            description=properties.text("notes"),
            cpu=self._part(self._root, Cpu, count=self._root.at("settings/processors").integer("count")),
            memory=self._memory(),
            firmware=self._firmware(),
            tpm=Tpm(version="2.0") if any(device.kind == keys.TPM for device in self._devices) else None,
            identity=self._identity(),
            board=Board(hardware_version=_version(properties.integer("version"))),
            controllers=controllers,
            disks=disks,
            removables=removables,
            nics=tuple(self._nics()),
            serials=tuple(self._serials()),
        )
        # Last, when everything else has been read.
        nvram = found.firmware.nvram
        return self._part(properties, Machine, **{**dict(found), "extra": self._extra(nvram.file if nvram else None)})

    def _part(self, node: Node, wanted: type[Part], /, **values: Any) -> Part:
        return part(self._file, node.path.lstrip("/"), wanted, **values)

    def _memory(self) -> Memory:
        bank = self._root.at("settings/memory/bank")
        size = bank.integer("size")
        return self._part(bank, Memory, size=None if size is None else size * _MIB)

    def _extra(self, store: str | None) -> dict[str, dict[str, str]]:
        """Returns the limits of dynamic memory, in MiB, where it is on, and the settings that are not known."""
        bank = self._root.at("settings/memory/bank")
        dynamic = bank.boolean("dynamic_memory_enabled")
        limits = {"memory.minimum": bank.integer("reservation"), "memory.maximum": bank.integer("limit")}
        found = {key: str(value) for key, value in limits.items() if value is not None and dynamic}
        found |= {key: value for key, value in self._unread() if value != store}
        if len(found) > MAX_EXTRA:
            raise self._root.refused("settings", f"more than {MAX_EXTRA} are not known")
        return {"hyperv": found} if found else {}

    def _unread(self) -> Iterator[tuple[str, str]]:
        """Yields the settings that have no place in the model, those of a device below its name."""
        names: dict[str, str] = {}
        for device in self._devices:
            count = sum(name.startswith(device.name) for name in names.values())
            names[device.node.name.lower()] = f"{device.name} {count + 1}" if count else device.name
        for path, value in self._root.unread():
            _, first, *below = path.split("/")
            if first.lower() != "manifest" and below and below[-1] not in _OF_THE_STORAGE:
                yield "/".join([names.get(first.lower()) or first, *below]), value

    def _firmware(self) -> Firmware:
        properties = self._root.child("properties")
        subtype = properties.integer("subtype")
        if subtype not in (0, 1, None):
            raise properties.refused("subtype", f"{subtype} is no generation: 0 is the first, 1 the second")
        # Which setting names the guest state file is not published, but only that one names such a file.
        stores = {text for text in self._root.texts() if text.lower().endswith(".vmgs")}
        store = stores.pop() if subtype and len(stores) == 1 else None
        return self._part(
            self._bios,
            Firmware,
            kind=None if subtype is None else ("bios", "uefi")[subtype],
            # Generation 1 has the setting too, without a meaning.
            secure_boot=self._bios.boolean("secure_boot_enabled") if subtype else None,
            nvram=None if store is None else self._part(self._root, Nvram, file=store, kind="vmgs"),
            boot_order=() if subtype else tuple(self._boot_order()),
        )

    def _boot_order(self) -> Iterator[str]:
        boot = self._bios.child("boot")
        for number in range(len(keys.BOOT_CLASSES)):
            device = boot.text(f"device{number}")
            if device is not None and device not in keys.BOOT_CLASSES:
                raise boot.refused(f"device{number}", f"{quoted(device)} is no device to start from")
            if device is not None:
                yield keys.BOOT_CLASSES[device]

    def _identity(self) -> Identity:
        devices = self._root.at("global_settings/devices")
        chassis = self._bios.child("chassis")
        return self._part(
            self._bios,
            Identity,
            uuid=_uuid(self._bios, "bios_guid"),
            instance_uuid=_uuid(self._root.child("properties"), "global_id"),
            generation_id=_generation_id(devices),
            serial=self._bios.text("bios_serial_number"),
            board_serial=self._bios.child("base_board").text("serial_number"),
            chassis_serial=chassis.text("serial_number"),
            asset_tag=chassis.text("asset_tag"),
        )

    def _drives(self) -> tuple[tuple[Disk, ...], tuple[Removable, ...], tuple[Controller, ...]]:
        disks: list[Disk] = []
        removables: list[Removable] = []
        controllers: list[Controller] = []
        for bus, index, node in self._controllers():
            if bus != "floppy":
                model = "hyperv-scsi" if bus == "scsi" else None
                controllers.append(self._part(node, Controller, bus=bus, index=index, model=model))
            for unit, drive in _numbered(node, "drive"):
                place = {"bus": bus, "controller": index, "unit": unit}
                kind, path = drive.text("type"), drive.text("pathname")
                if kind in ("ISO", "VFD"):
                    medium = "floppy" if kind == "VFD" else "cdrom"
                    removables.append(self._part(drive, Removable, kind=medium, file=path, **place))
                elif kind not in (None, "NONE") and path is not None:
                    # A type other than VHD is a physical disk of the host.
                    what = "file" if kind == "VHD" and not _PHYSICAL.fullmatch(path) else "device"
                    disks.append(self._part(drive, Disk, **{what: path}, **place))
        return tuple(disks), tuple(removables), tuple(controllers)

    def _controllers(self) -> Iterator[tuple[str, int, Node]]:
        """Yields bus, index and node of each controller: IDE and floppy first, SCSI in the manifest's order."""
        for kind, bus in ((keys.IDE, "ide"), (keys.FLOPPY, "floppy")):
            for device in self._devices:
                if device.kind == kind:
                    yield from ((bus, number, node) for number, node in _numbered(device.node, "controller"))
        index = 0
        for device in self._devices:
            if device.kind == keys.SCSI:
                found = [node for _, node in _numbered(device.node, "controller")] or [device.node]
                for node in found:
                    yield "scsi", index, node
                    index += 1

    def _nics(self) -> Iterator[Nic]:
        for device in self._devices:
            text = device.node.text("MacAddress")
            legacy = keys.LEGACY_ETHERNET in device.name.lower()
            if device.kind != keys.ETHERNET and not legacy:
                continue
            mac = None if text is None else mac_address(self._file, f"{device.node.path.lstrip('/')}/MacAddress", text)
            static = device.node.boolean("MacAddressIsStatic")
            # A generated address is assigned when the machine first starts.
            known = mac if mac != _NO_MAC or static else None
            yield self._part(
                device.node,
                Nic,
                mac=known,
                mac_origin=None if static is None or known is None else ("static" if static else "generated"),
                model="hyperv-legacy" if legacy else "hyperv",
                network=device.node.child("Connection").text("AltSwitchName"),
                connected=device.node.boolean("IsConnected"),
            )

    def _serials(self) -> Iterator[Serial]:
        for device in self._devices:
            if device.kind == keys.SERIAL:
                for number, port in _numbered(device.node, "port"):
                    target = port.text("connection")
                    if target is not None:
                        yield self._part(port, Serial, index=number, kind="pipe", target=target)


def _devices(root: Node) -> Iterator[_Device]:
    """Yields the devices of the manifest, in the order of their numbers."""
    for _, entry in _numbered(root.child("manifest"), "vdev"):
        kind, instance = (_plain(entry.text(name)) for name in ("device", "instance"))
        yield _Device(kind, entry.text("name") or "", root.child(f"_{instance}_"))


def _plain(guid: str | None) -> str:
    return (guid or "").strip("{}").lower()


def _numbered(node: Node, word: str) -> list[tuple[int, Node]]:
    """Returns the nodes called `word` and a number, by their number."""
    found = [(re.fullmatch(rf"{word}(\d{{1,5}})", each.name, re.IGNORECASE), each) for each in node.nodes]
    numbered = sorted(((int(match[1]), each) for match, each in found if match), key=lambda pair: pair[0])
    for (number, _), (following, each) in itertools.pairwise(numbered):
        if number == following:
            raise node.refused(each.name, "is there twice")
    return numbered


def _uuid(node: Node, name: str) -> UUID | None:
    text = node.text(name)
    if text is None:
        return None
    try:
        return UUID(_plain(text))
    except ValueError as exc:
        raise node.refused(name, f"{quoted(text)} is not a GUID") from exc


def _generation_id(node: Node) -> UUID | None:
    """Returns the id whose `bytes_le` are in the guest's memory.

    The setting has the high and then the low 64 bits as the guest's driver prints them, measured by the authors of
    virt-v2v; the guest's memory has both little-endian, the low ones first.
    """
    text = node.text("generation_id")
    if text is None:
        return None
    if not re.fullmatch(r"[0-9a-fA-F]{32}", text):
        raise node.refused("generation_id", f"{quoted(text)} is not 32 hexadecimal digits")
    high, low = bytes.fromhex(text[:16]), bytes.fromhex(text[16:])
    return UUID(bytes_le=low[::-1] + high[::-1])


def _version(packed: int | None) -> str | None:
    return None if packed is None else f"{packed >> 8 & 0xFFFF}.{packed & 0xFF}"
