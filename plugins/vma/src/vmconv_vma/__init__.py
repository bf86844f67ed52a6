"""Proxmox VE backups (VMA) for vmconv: a machine's configuration and its disks in one archive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vmconv.plugin import MachineFormat, hookimpl
from vmconv_proxmox import Proxmox

if TYPE_CHECKING:
    from vmconv.machine import Machine
    from vmconv.plugin import Adapted, ConfigFile, Extents, File, Member, NewFile, Opener, Progress

_MAGIC = b"VMA\0\0\0\0\1"


class Vma(MachineFormat):
    name = "vma"
    title = "Proxmox VE backup (VMA)"
    suffixes = (".vma", ".vma.zst", ".vma.gz", ".vma.lzo")
    compressed_suffixes = (".vma.zst", ".vma.gz")
    # Devices of a backup are named by their drives, and raw.
    carries = Proxmox.carries - {"disks.file", "disks.format"} | {"extra.vma"}
    disk_formats = frozenset({"raw"})
    nvram_kind = "ovmf"
    is_package = True

    def options(self) -> type[Any]:
        return Proxmox().options()

    def probe(self, file: File) -> bool:
        from vmconv_vma.compression import begins_with

        return file.read(0, min(file.size, len(_MAGIC))) == _MAGIC or begins_with(file, _MAGIC)

    def compression(self, file: File) -> str | None:
        if file.read(0, min(file.size, len(_MAGIC))) == _MAGIC:
            return None
        from vmconv_vma.compression import compression_of

        return compression_of(file)

    def read(self, file: File, opener: Opener) -> Machine:
        from vmconv_vma import archive, decoding
        from vmconv_vma.reader import machine_of

        header = decoding.header_of(file) if self.compression(file) else archive.header_of(file)
        return machine_of(file, header)

    def members(self, file: File) -> Sequence[Member]:
        from vmconv_vma import archive, decoding

        return decoding.members(file) if self.compression(file) else archive.members(file)

    def decode(self, file: File, create: Callable[[str, int], NewFile], progress: Progress | None) -> Sequence[Member]:
        from vmconv_vma.decoding import decode

        return decode(file, create, progress)

    def adapt(self, machine: Machine, options: Any) -> Adapted:
        from vmconv_vma.writer import adapt

        return adapt(machine, options)

    def disk_name(self, machine: Machine, number: int, suffix: str, options: Any) -> str:
        from vmconv_proxmox.backup import drive_key

        return f"drive-{drive_key(machine.disks[number], machine)}"

    def nvram_name(self, machine: Machine, options: Any) -> str:
        return "drive-efidisk0"

    def config_name(self, machine: Machine, options: Any) -> str:
        # qmrestore finds out the kind of a backup by its name.
        return f"vzdump-qemu-{options.vmid}-{machine.name or 'machine'}.vma"

    def write(self, machine: Machine, options: Any) -> tuple[ConfigFile, ...]:
        from vmconv_vma.writer import write

        return write(machine, options)

    def pack(self, configs: Sequence[ConfigFile], members: Sequence[Member], modulus: int, options: Any) -> Extents:
        from vmconv_vma.writer import pack

        return pack(configs, members, modulus)


@hookimpl
def vmconv_register_machines() -> Iterable[MachineFormat]:
    return [Vma()]
