"""Writes a machine as an OVF 1.1 descriptor, in the elements that VMware exports and VirtualBox and virt-v2v read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape, quoteattr

from vmconv.plugin import ConfigFile
from vmconv_ovf import keys
from vmconv_ovf.guest import KINDS, written
from vmconv_ovf.hardware import family, uuid_seen
from vmconv_ovf.names import encoded, id_of

if TYPE_CHECKING:
    from vmconv.machine import Disk, Machine, Nic, Property, Removable
    from vmconv_ovf.options import Options


def write(machine: Machine, options: Options, *, sizes: bool = True) -> tuple[ConfigFile, ...]:
    """Returns the descriptor; with `sizes` it states the sizes of the disks' files."""
    return (ConfigFile("", _Writer(machine, options, sizes).descriptor().encode()),)


def tag(name: str, attributes: Mapping[str, object], *content: str) -> str:
    """Returns an element; attributes that are None are left out, content is XML."""
    shown = "".join(f" {key}={quoteattr(str(value))}" for key, value in attributes.items() if value is not None)
    if not content:
        return f"<{name}{shown}/>"
    between = "\n" if content[0].startswith("<") else ""
    return f"<{name}{shown}>{between}{between.join(content)}{between}</{name}>"


def text(name: str, value: object, **attributes: object) -> str:
    """Returns an element with text."""
    return tag(name, {f"ovf:{key}": each for key, each in attributes.items()}, escape(str(value)))


def setting(key: str, value: object, kind: str = "Config") -> str:
    """Returns one of VMware's settings, which other readers may ignore."""
    words = str(value).lower() if isinstance(value, bool) else value
    return tag(f"vmw:{kind}", {"ovf:required": "false", "vmw:key": key, "vmw:value": words})


class _Writer:
    """One descriptor; items are numbered in the order in which they are made."""

    def __init__(self, machine: Machine, options: Options, sizes: bool) -> None:
        self.machine = machine
        self.options = options
        self.sizes = sizes
        self.extra = machine.extra.get("ovf", {})
        self.files = self._files()
        self.count = 0
        self.boot: list[tuple[int, int, str]] = []
        """Place in the boot order, id of the item and VMware's word for its class."""

    # -- the envelope

    def descriptor(self) -> str:
        spaces = {"": keys.OVF, "ovf": keys.OVF, "rasd": keys.RASD, "vssd": keys.VSSD, "vmw": keys.VMW, "xsi": keys.XSI}
        if "os.vbox" in self.extra:
            spaces["vbox"] = keys.VBOX
        names = {f"xmlns:{prefix}" if prefix else "xmlns": uri for prefix, uri in spaces.items()}
        system = self._system()
        parts = [self._references(), *self._disk_section(), *self._networks(), *self._configuration(), system]
        return f'<?xml version="1.0" encoding="UTF-8"?>\n{tag("Envelope", names, *parts)}\n'

    def _files(self) -> dict[str, tuple[str, int | None]]:
        """Returns the id and the size of each file by its name: the variables first, then disks and images."""
        nvram = self.machine.firmware.nvram
        names: dict[str, int | None] = {nvram.file: None} if nvram else {}
        for disk in self.machine.disks:
            if disk.file is not None:
                names.setdefault(disk.file, disk.file_size if self.sizes else None)
        for drive in self.machine.removables:
            if drive.file is not None:
                names.setdefault(drive.file, None)
        return {name: (f"file{number}", size) for number, (name, size) in enumerate(names.items(), start=1)}

    def _references(self) -> str:
        files = [
            tag("File", {"ovf:href": encoded(name), "ovf:id": key, "ovf:size": size})
            for name, (key, size) in self.files.items()
        ]
        return tag("References", {}, *files)

    def _disk_section(self) -> Iterator[str]:
        disks = [self._disk_element(number, disk) for number, disk in enumerate(self.machine.disks, start=1)]
        if disks:
            yield tag("DiskSection", {}, text("Info", "Virtual disks of the package"), *disks)

    def _disk_element(self, number: int, disk: Disk) -> str:
        unit, size = _unit_of(disk.capacity)
        return tag(
            "Disk",
            {
                "ovf:capacity": size,
                "ovf:capacityAllocationUnits": unit,
                "ovf:diskId": f"vmdisk{number}",
                "ovf:fileRef": self.files[disk.file][0] if disk.file else None,
                "ovf:format": keys.WRITTEN_FORMATS[self.options.disk_format] if disk.format == "vmdk" else None,
            },
        )

    def _networks(self) -> Iterator[str]:
        names = dict.fromkeys(nic.network for nic in self.machine.nics if nic.network)
        if names:
            listed = [tag("Network", {"ovf:name": name}, text("Description", f"The {name} network")) for name in names]
            yield tag("NetworkSection", {}, text("Info", "Logical networks"), *listed)

    def _configuration(self) -> Iterator[str]:
        name = self.extra.get("configuration")
        if name:
            only = tag(
                "Configuration", {"ovf:id": name, "ovf:default": "true"}, text("Label", name), text("Description", name)
            )
            yield tag("DeploymentOptionSection", {}, text("Info", "The configuration that was converted"), only)

    # -- the system

    def _system(self) -> str:
        parts = [text("Info", "A virtual machine"), text("Name", self.machine.name), *self._operating_system()]
        hardware = self._hardware()
        parts += [hardware, *self._boot_order(), *self._annotation(), *self._products(), *self._licences()]
        return tag("VirtualSystem", {"ovf:id": id_of(self.machine)}, *parts)

    def _operating_system(self) -> Iterator[str]:
        os = self.machine.os
        names = written(os, self.extra)
        vmware, vbox, cim = (names[kind] for kind in KINDS)
        if not any(names.values()):
            return
        parts = [text("Info", "The guest's operating system"), text("Description", os.id or vmware or cim)]
        if vbox:
            parts.append(text("vbox:OSType", vbox, required="false"))
        yield tag("OperatingSystemSection", {"ovf:id": cim or "1", "vmw:osType": vmware}, *parts)

    def _hardware(self) -> str:
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
            HostResource=f"ovf:/file/{self.files[drive.file][0]}" if drive.file else None,
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
            yield self.item(keys.NVRAM, "NVRAM", HostResource=f"ovf:/file/{self.files[nvram.file][0]}", optional=True)

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
        for _, stated in _numbered(self.extra, "item"):
            kind, _, subtype = stated.partition(" ")
            if re.fullmatch(r"\d{1,5}", kind):
                yield self.item(int(kind), subtype or "Device", ResourceSubType=subtype or None, optional=True)

    # -- settings

    def _kept(self, place: str) -> list[str]:
        """Returns the source's own settings of a device."""
        start = f"{place}."
        return [setting(key.removeprefix(start), value) for key, value in self.extra.items() if key.startswith(start)]

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
            yield setting("nvram", f"ovf:/file/{self.files[nvram.file][0]}", "ExtraConfig")
        for key, value in self.extra.items():
            if key.startswith("extraConfig."):
                yield setting(key.removeprefix("extraConfig."), value, "ExtraConfig")

    # -- sections of the system

    def _boot_order(self) -> Iterator[str]:
        for _, number, kind in sorted(self.boot):
            info = text("Info", "Virtual hardware device boot order")
            names = {"vmw:instanceId": number, "vmw:type": kind, "ovf:required": "false"}
            yield tag("vmw:BootOrderSection", names, info)

    def _annotation(self) -> Iterator[str]:
        if self.machine.description:
            note = text("Annotation", self.machine.description)
            yield tag("AnnotationSection", {}, text("Info", "A human-readable annotation"), note)

    def _products(self) -> Iterator[str]:
        found = [(name, self.extra.get(f"product.{name}")) for name in keys.PRODUCT]
        parts = [text(name, value) for name, value in found if value]
        parts += [self._property(each) for each in self.machine.properties]
        if parts:
            yield tag("ProductSection", {}, text("Info", "Information about the software"), *parts)

    def _property(self, found: Property) -> str:
        extra = {name: self.extra.get(f"property.{found.key}.{name}") for name in (*keys.PROPERTY, "description")}
        description = extra.pop("description")
        stated = {f"ovf:{name}": value for name, value in ({"type": "string"} | _stated(extra)).items()}
        texts = [("Label", found.label), ("Description", description)]
        parts = [text(name, value) for name, value in texts if value]
        return tag("Property", {"ovf:key": found.key, **stated, "ovf:value": found.value}, *parts)

    def _licences(self) -> Iterator[str]:
        found = "".join(value for _, value in _numbered(self.extra, "eula"))
        if found:
            yield tag("EulaSection", {}, text("Info", "The licence of the software"), text("License", found))


_CONTROLLER_TYPES = {"ide": keys.IDE, "scsi": keys.SCSI, "sata": keys.OTHER_STORAGE, "nvme": keys.OTHER_STORAGE}


def _subtype(bus: str, model: str | None) -> str | None:
    if bus in keys.WRITTEN_STORAGE:
        return keys.WRITTEN_STORAGE[bus]
    return (keys.WRITTEN_IDE if bus == "ide" else keys.WRITTEN_SCSI).get(model or "")


def _slot(slot: str | None) -> list[str]:
    return [] if slot is None else [setting("slotInfo.pciSlotNumber", slot)]


def _unit_of(capacity: int | None) -> tuple[str | None, int | None]:
    """Returns the largest unit of VMware's that divides a capacity, and the number of units."""
    if capacity is None:
        return None, None
    for power in (30, 20):
        if capacity and not capacity % (1 << power):
            return f"byte * 2^{power}", capacity >> power
    return "byte", capacity


def _stated(values: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in values.items() if value is not None}


def _numbered(extra: Mapping[str, str], prefix: str) -> list[tuple[int, str]]:
    """Returns the settings `prefix.N` in the order of their numbers."""
    found = [(re.fullmatch(rf"{prefix}\.(\d{{1,6}})", key), value) for key, value in extra.items()]
    return sorted((int(match[1]), value) for match, value in found if match)
