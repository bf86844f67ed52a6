"""Writes a machine as an OVF 1.1 descriptor, in the elements that VMware exports and VirtualBox and virt-v2v read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from vmconv.plugin import ConfigFile
from vmconv_ovf import keys
from vmconv_ovf.guest import KINDS, written
from vmconv_ovf.hardware_section import HardwareSection, numbered
from vmconv_ovf.markup import tag, text
from vmconv_ovf.names import encoded, id_of

if TYPE_CHECKING:
    from vmconv.machine import Disk, Machine, Property
    from vmconv_ovf.options import Options


def write(machine: Machine, options: Options, *, sizes: bool = True) -> tuple[ConfigFile, ...]:
    """Returns the descriptor; with `sizes` it states the sizes of the disks' files."""
    return (ConfigFile("", _Writer(machine, options, sizes).descriptor().encode()),)


class _Writer:
    """One descriptor; items are numbered in the order in which they are made."""

    def __init__(self, machine: Machine, options: Options, sizes: bool) -> None:
        self.machine = machine
        self.options = options
        self.sizes = sizes
        self.extra = machine.extra.get("ovf", {})
        self.files = self._files()

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
        hardware = HardwareSection(self.machine, {name: key for name, (key, _) in self.files.items()})
        parts += [hardware.made(), *_boot_order(hardware)]
        parts += [*self._annotation(), *self._products(), *self._licences()]
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

    # -- sections of the system

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
        found = "".join(value for _, value in numbered(self.extra, "eula"))
        if found:
            yield tag("EulaSection", {}, text("Info", "The licence of the software"), text("License", found))


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


def _boot_order(hardware: HardwareSection) -> Iterator[str]:
    for _, number, kind in sorted(hardware.boot):
        info = text("Info", "Virtual hardware device boot order")
        names = {"vmw:instanceId": number, "vmw:type": kind, "ovf:required": "false"}
        yield tag("vmw:BootOrderSection", names, info)
