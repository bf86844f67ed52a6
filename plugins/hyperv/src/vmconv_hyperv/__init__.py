"""Machines of Hyper-V for vmconv: `.vmcx` is read, a PowerShell script is written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vmconv.plugin import Adapted, ConfigFile, MachineFormat, hookimpl
from vmconv_hyperv.keys import file_name

if TYPE_CHECKING:
    from vmconv.machine import Machine
    from vmconv.plugin import File, Opener


class HyperV(MachineFormat):
    name = "hyperv"
    title = "Hyper-V: .vmcx is read, a PowerShell script is written"
    suffixes = (".ps1", ".vmcx")
    carries = frozenset(
        {
            *("name", "description", "cpu.count", "memory.size", "tpm.version", "controllers", "extra.hyperv"),
            *("firmware.kind", "firmware.secure_boot", "firmware.boot_order"),
            *("disks.file", "disks.format", "disks.capacity", "disks.file_size"),
            *("disks.bus", "disks.controller", "disks.unit", "disks.boot_index"),
            *("removables.kind", "removables.bus", "removables.controller", "removables.unit"),
            "removables.boot_index",
            *("nics.mac", "nics.mac_origin", "nics.model", "nics.network", "nics.connected", "nics.boot_index"),
        }
    )
    disk_format = "vhdx"
    no_chains = None
    disk_formats = frozenset({"vhdx", "vhd"})

    def options(self) -> type[Any]:
        from vmconv_hyperv.options import Options

        return Options

    def probe(self, file: File) -> bool:
        """True if one of the headers of Hyper-V's storage is there. Scripts are not read."""
        signature = (0x01282014).to_bytes(4, "little")
        return any(file.size >= 8192 and file.read(at, 4) == signature for at in (0, 4096))

    def read(self, file: File, opener: Opener) -> Machine:
        from vmconv_hyperv.reader import read

        return read(file)

    def adapt(self, machine: Machine, options: Any) -> Adapted:
        from vmconv_hyperv.adapting import adapt

        return adapt(machine, options)

    def disk_name(self, machine: Machine, number: int, suffix: str, options: Any) -> str:
        return f"{file_name(machine.name)}-disk{number + 1}{suffix}"

    def config_name(self, machine: Machine, options: Any) -> str:
        return f"{file_name(machine.name)}.ps1"

    def write(self, machine: Machine, options: Any) -> tuple[ConfigFile, ...]:
        from vmconv_hyperv.writer import write

        return write(machine)


@hookimpl
def vmconv_register_machines() -> Iterable[MachineFormat]:
    return [HyperV()]
