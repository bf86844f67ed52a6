"""Proxmox VE backups (VMA) for vmconv: a machine's configuration and its disks in one archive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from vmconv.plugin import MachineFormat, hookimpl
from vmconv_proxmox import Proxmox

if TYPE_CHECKING:
    from vmconv.machine import Machine
    from vmconv.plugin import File, Member, Opener

_MAGIC = b"VMA\0\0\0\0\1"


class Vma(MachineFormat):
    name = "vma"
    title = "Proxmox VE backup (VMA)"
    suffixes = (".vma",)
    carries = Proxmox.carries
    is_package = True
    can_write = False

    def probe(self, file: File) -> bool:
        return file.size >= len(_MAGIC) and file.read(0, len(_MAGIC)) == _MAGIC

    def read(self, file: File, opener: Opener) -> Machine:
        from vmconv_vma.archive import header_of
        from vmconv_vma.reader import machine_of

        return machine_of(file, header_of(file))

    def members(self, file: File) -> Sequence[Member]:
        from vmconv_vma.archive import members

        return members(file)


@hookimpl
def vmconv_register_machines() -> Iterable[MachineFormat]:
    return [Vma()]
