"""The VirtualHardwareSection of a new descriptor: items and VMware's settings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vmconv_ovf import keys
from vmconv_ovf.hardware import family, uuid_seen
from vmconv_ovf.markup import setting, tag, text

if TYPE_CHECKING:
    from vmconv.machine import Machine, Nic, Removable


class HardwareSection:
    """The items of a machine, numbered in the order in which they are made; `files` are the ids of files by name."""

    def __init__(self, machine: Machine, files: Mapping[str, str]) -> None:
        self.machine = machine
        self.files = files
        self.extra = machine.extra.get("ovf", {})
        self.settings: dict[str, list[tuple[str, str]]] = {}
        """The source's own settings by their place, such as `nics[0]`."""
        for key, value in self.extra.items():
            place, _, name = key.partition(".")
            self.settings.setdefault(place, []).append((name, value))
        self.count = 0
        self.boot: list[tuple[int, int, str]] = []
        """Place in the boot order, id of the item and VMware's word for its class."""

    def made(self) -> str:
        """Returns the section; afterwards `boot` has the boot order."""
        system = tag(
            "System",
            {},
            text("vssd:ElementName", "Virtual Hardware Family"),
            text("vssd:InstanceID", 0),
            text("vssd:VirtualSystemIdentifier", self.machine.name),
            text("vssd:VirtualSystemType", self.machine.board.hardware_version),
        )
        items = [*self._base(), *self._storage(), *self._cards(), *self._unknown()]
        parts = [text("Info", "Virtual hardware"), system, *items, *self._settings()]
        return tag("VirtualHardwareSection", {"ovf:transport": self.extra.get("transport") or None}, *parts)

    def item(self, kind: int, name: str, settings: list[str] | None = None, **values: object) -> str:
        """Returns an item; its CIM properties are in alphabetical order, as the schema requires."""
        self.count += 1
        stated = {"ElementName": name, "InstanceID": self.count, "ResourceType": kind, **values}
        optional = stated.pop("optional", False)
        parts = [
            text(f"rasd:{key}", str(value).lower() if isinstance(value, bool) else value)
            for key, value in sorted(stated.items())
            if value is not None
        ]
        return tag("Item", {"ovf:required": "false" if optional else None}, *parts, *(settings or []))

    def _base(self) -> Iterator[str]:
        cpu, memory = self.machine.cpu, self.machine.memory
        if cpu.count is not None:
            together = cpu.cores * (cpu.threads or 1) if cpu.cores else None
            cores = [text("vmw:CoresPerSocket", together, required="false")] if together else []
            yield self.item(
                keys.PROCESSOR,
                f"{cpu.count} virtual CPU(s)",
                cores,
                AllocationUnits="hertz * 10^6",
                VirtualQuantity=cpu.count,
            )
        if memory.size is not None:
            mib = memory.size >> 20
            yield self.item(keys.MEMORY, f"{mib}MB of memory", AllocationUnits="byte * 2^20", VirtualQuantity=mib)

    # -- controllers, disks and drives

    def _storage(self) -> Iterator[str]:
        ids: dict[tuple[str, int], int] = {}
        for number, each in enumerate(self.machine.controllers):
            kind, subtype = _CONTROLLER_TYPES[each.bus], _subtype(each.bus, each.model)
            settings = [*_slot(each.pci_slot), *self._kept(f"controllers[{number}]")]
            name = f"{each.bus.upper()} Controller {each.index}"
            yield self.item(kind, name, settings, Address=each.index, ResourceSubType=subtype)
            ids[each.bus, each.index] = self.count
        for number, disk in enumerate(self.machine.disks):
            parent = ids.get((disk.bus or "", disk.controller or 0))
            resource = f"ovf:/disk/vmdisk{number + 1}"
            settings = self._kept(f"disks[{number}]")
            yield self.item(
                keys.DISK,
                f"Hard Disk {number + 1}",
                settings,
                AddressOnParent=disk.unit,
                HostResource=resource,
                Parent=parent,
            )
            self._remember(disk, "disk")
        for number, drive in enumerate(self.machine.removables):
            yield self._drive(number, drive, ids.get((drive.bus or "", drive.controller or 0)))
            self._remember(drive, drive.kind)

    def _drive(self, number: int, drive: Removable, parent: int | None) -> str:
        floppy = drive.kind == "floppy"
        image, device = ("image", "remotedevice") if floppy else ("iso", "remotepassthrough")
        kind = "floppy" if floppy else "cdrom"
        return self.item(
            keys.FLOPPY if floppy else keys.CD,
            f"{'Floppy' if floppy else 'CD/DVD'} Drive {number + 1}",
            self._kept(f"removables[{number}]"),
            AddressOnParent=drive.unit,
            AutomaticAllocation=drive.connected,
            HostResource=f"ovf:/file/{self.files[drive.file]}" if drive.file else None,
            Parent=parent,
            ResourceSubType=f"vmware.{kind}.{image if drive.file else device}",
            optional=True,
        )

    def _remember(self, device: Any, kind: str) -> None:
        if device.boot_index is not None:
            self.boot.append((device.boot_index, self.count, kind))

    # -- cards

    def _cards(self) -> Iterator[str]:
        for number, nic in enumerate(self.machine.nics):
            yield self._nic(number, nic)
            self._remember(nic, "net")
        display = self.machine.display
        if display is not None:
            memory = None if display.memory is None else display.memory >> 10
            shown = [("videoRamSizeInKB", memory), ("numDisplays", display.heads)]
            settings = [setting(key, value) for key, value in shown if value is not None]
            yield self.item(keys.GRAPHICS, "Video card", [*settings, *self._kept("display")], optional=True)
        if self.machine.sound:
            subtype = keys.WRITTEN_SOUND[self.machine.sound]
            yield self.item(keys.OTHER, "Sound card", ResourceSubType=subtype, optional=True)
        if self.machine.usb:
            slow = [setting("ehciEnabled", False)] if self.machine.usb == "uhci" else []
            subtype = "vmware.usb.xhci" if self.machine.usb == "xhci" else "vmware.usb.ehci"
            yield self.item(keys.USB, "USB Controller", slow, ResourceSubType=subtype, optional=True)
        if self.machine.tpm is not None:
            yield self.item(keys.OTHER, "Virtual TPM", ResourceSubType=keys.VTPM, optional=True)
        nvram = self.machine.firmware.nvram
        if nvram is not None and nvram.kind == "virtualbox":
            yield self.item(keys.NVRAM, "NVRAM", HostResource=f"ovf:/file/{self.files[nvram.file]}", optional=True)

    def _nic(self, number: int, nic: Nic) -> str:
        return self.item(
            keys.ETHERNET,
            f"Ethernet {number + 1}",
            [*_slot(nic.pci_slot), *self._kept(f"nics[{number}]")],
            Address=nic.mac,
            AddressOnParent=number + 7,
            AutomaticAllocation=nic.connected,
            Connection=nic.network,
            ResourceSubType=keys.WRITTEN_NIC[nic.model] if nic.model else None,
        )

    def _unknown(self) -> Iterator[str]:
        """Yields the items of the source that the model has no place for."""
        for _, stated in numbered(self.extra, "item"):
            kind, _, subtype = stated.partition(" ")
            if re.fullmatch(r"\d{1,5}", kind):
                yield self.item(int(kind), subtype or "Device", ResourceSubType=subtype or None, optional=True)

    # -- settings

    def _kept(self, place: str, kind: str = "Config") -> list[str]:
        """Returns the source's own settings of a device or of the machine."""
        return [setting(name, value, kind) for name, value in self.settings.get(place, ())]

    def _settings(self) -> Iterator[str]:
        machine = self.machine
        stated: dict[str, Any] = {
            "firmware": {"uefi": "efi", "bios": "bios"}.get(machine.firmware.kind or ""),
            "bootOptions.efiSecureBootEnabled": machine.firmware.secure_boot,
            "cpuHotAddEnabled": machine.cpu.hot_add,
            "memoryHotAddEnabled": machine.memory.hot_add,
            "simultaneousThreads": machine.cpu.threads,
        }
        if machine.identity.uuid is not None:
            stated["uuid"] = uuid_seen(machine.identity.uuid, family(machine.board.hardware_version))
        yield from (setting(key, value) for key, value in stated.items() if value is not None)
        yield from self._kept("config")
        order = ",".join(keys.BOOT_CLASSES[each] for each in machine.firmware.boot_order)
        if order:
            yield setting("bios.bootOrder", order, "ExtraConfig")
        nvram = machine.firmware.nvram
        if nvram is not None and nvram.kind == "vmware":
            yield setting("nvram", f"ovf:/file/{self.files[nvram.file]}", "ExtraConfig")
        yield from self._kept("extraConfig", "ExtraConfig")


_CONTROLLER_TYPES = {"ide": keys.IDE, "scsi": keys.SCSI, "sata": keys.OTHER_STORAGE, "nvme": keys.OTHER_STORAGE}


def _subtype(bus: str, model: str | None) -> str | None:
    if bus in keys.WRITTEN_STORAGE:
        return keys.WRITTEN_STORAGE[bus]
    return (keys.WRITTEN_IDE if bus == "ide" else keys.WRITTEN_SCSI).get(model or "")


def _slot(slot: str | None) -> list[str]:
    return [] if slot is None else [setting("slotInfo.pciSlotNumber", slot)]


def numbered(extra: Mapping[str, str], prefix: str) -> list[tuple[int, str]]:
    """Returns the settings `prefix.N` in the order of their numbers."""
    found = [(re.fullmatch(rf"{prefix}\.(\d{{1,6}})", key), value) for key, value in extra.items()]
    return sorted((int(match[1]), value) for match, value in found if match)
