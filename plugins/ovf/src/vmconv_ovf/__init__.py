"""OVF and OVA packages for vmconv: virtual machines in the open virtualization format (DMTF DSP0243)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vmconv.plugin import MachineFormat, hookimpl

if TYPE_CHECKING:
    from vmconv.machine import Machine
    from vmconv.plugin import Adapted, ConfigFile, Extents, File, Image, Manifest, Member, Opener

_HEAD = 16384
"""Bytes in which the root element of a descriptor begins; comments may come before it."""

_BEFORE_XML = b"\xef\xbb\xbf\xff\xfe\t\r\n "
"""Byte order marks and white space."""

_CARRIES = frozenset(
    {
        *("name", "description", "os.id", "os.architecture"),
        *("cpu.count", "cpu.sockets", "cpu.cores", "cpu.threads", "cpu.hot_add", "memory.size", "memory.hot_add"),
        *("firmware.kind", "firmware.secure_boot", "firmware.nvram", "firmware.boot_order"),
        *("tpm.version", "identity.uuid", "identity.serial", "board.hardware_version"),
        *("controllers.bus", "controllers.index", "controllers.model", "controllers.pci_slot"),
        *("disks.file", "disks.capacity", "disks.file_size"),
        *("disks.bus", "disks.controller", "disks.unit", "disks.boot_index"),
        *("removables.kind", "removables.file", "removables.connected"),
        *("removables.bus", "removables.controller", "removables.unit", "removables.boot_index"),
        *("nics.mac", "nics.mac_origin", "nics.model", "nics.network", "nics.connected", "nics.pci_slot"),
        "nics.boot_index",
        *("display.memory", "display.heads", "sound", "usb", "properties", "extra.ovf"),
    }
)


class Ovf(MachineFormat):
    name = "ovf"
    title = "OVF descriptor beside its disks"
    suffixes = (".ovf",)
    carries = _CARRIES
    disk_format = "vmdk"
    no_chains = "VMware and VirtualBox import no delta disks"
    disk_formats = frozenset({"vmdk"})
    nvram_kind = "virtualbox"

    def options(self) -> type[Any]:
        from vmconv_ovf.options import Options

        return Options

    def probe(self, file: File) -> bool:
        head = file.read(0, min(file.size, _HEAD)).replace(b"\0", b"")
        is_xml = head.lstrip(_BEFORE_XML).startswith(b"<")
        return is_xml and b"Envelope" in head and b"/ovf/" in head

    def read(self, file: File, opener: Opener) -> Machine:
        from vmconv_ovf.reader import read

        return read(file)

    def manifest(self, file: File, opener: Opener) -> Manifest | None:
        from vmconv_ovf.manifest import beside

        return beside(file, opener)

    def adapt(self, machine: Machine, options: Any) -> Adapted:
        from vmconv_ovf.adapting import adapt

        return adapt(machine, options)

    def disk_name(self, machine: Machine, number: int, suffix: str, options: Any) -> str:
        from vmconv_ovf.names import plain_name

        return f"{plain_name(machine.name)}-disk{number + 1}{suffix}"

    def nvram_name(self, machine: Machine, options: Any) -> str:
        from vmconv_ovf.names import plain_name

        return f"{plain_name(machine.name)}.nvram"

    def disk_options(self, options: Any) -> dict[str, Any]:
        # The descriptor states the kind, and names one file for each disk.
        return {"subformat": "streamOptimized" if options.disk_format == "streamOptimized" else "monolithicSparse"}

    def config_name(self, machine: Machine, options: Any) -> str:
        from vmconv_ovf.names import plain_name

        return f"{plain_name(machine.name)}{self.suffixes[0]}"

    def write(self, machine: Machine, options: Any) -> tuple[ConfigFile, ...]:
        from vmconv_ovf.writer import write

        return write(machine, options)


class Ova(Ovf):
    name = "ova"
    title = "OVF package in one file"
    suffixes = (".ova",)
    # The sizes of members are in the package itself.
    carries = _CARRIES - {"disks.file_size"}
    is_package = True

    def options(self) -> type[Any]:
        from vmconv_ovf.options import PackageOptions

        return PackageOptions

    def probe(self, file: File) -> bool:
        from vmconv_ovf.tar import first_name

        return first_name(file).lower().endswith(".ovf")

    def read(self, file: File, opener: Opener) -> Machine:
        from vmconv_ovf.package import read

        return read(file)

    def members(self, file: File) -> Sequence[Member]:
        from vmconv_ovf.tar import members

        return members(file)

    def manifest(self, file: File, opener: Opener) -> Manifest | None:
        from vmconv_ovf.package import manifest

        return manifest(file)

    def write(self, machine: Machine, options: Any) -> tuple[ConfigFile, ...]:
        from vmconv_ovf.writer import write

        return write(machine, options, sizes=False)

    def pack(self, configs: Sequence[ConfigFile], members: Sequence[Member], modulus: int, options: Any) -> Extents:
        from vmconv_ovf.package import pack

        return pack(configs, members, modulus, options)

    def keeps(self, image: Image, options: Any) -> bool:
        from vmconv_ovf.package import keeps

        return keeps(image, options)

    def digested(self, members: Sequence[Member], options: Any) -> int:
        from vmconv_ovf.package import digested

        return digested(members, options)


@hookimpl
def vmconv_register_machines() -> Iterable[MachineFormat]:
    return [Ovf(), Ova()]
