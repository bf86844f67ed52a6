"""KubeVirt's VirtualMachine objects for vmconv: virtual machines on Kubernetes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vmconv.plugin import Adapted, ConfigFile, MachineFormat, hookimpl

if TYPE_CHECKING:
    from vmconv.machine import Machine
    from vmconv.plugin import File, Opener


class Kubevirt(MachineFormat):
    name = "kubevirt"
    title = "KubeVirt VirtualMachine, with DataVolumes for the disks"
    suffixes = (".yaml", ".yml")
    carries = frozenset(
        {
            *("name", "description", "os.id", "os.architecture", "memory.size"),
            *("cpu.count", "cpu.sockets", "cpu.cores", "cpu.threads", "cpu.model"),
            *("firmware.kind", "firmware.secure_boot", "firmware.boot_order", "tpm.version"),
            *("identity.uuid", "identity.serial", "identity.chassis_serial", "identity.asset_tag"),
            *("board.chipset", "board.clock", "sound", "watchdog", "rng"),
            *("disks.file", "disks.format", "disks.capacity", "disks.device", "disks.bus", "disks.boot_index"),
            *("disks.shared", "disks.serial", "extra.kubevirt"),
            *("nics.mac", "nics.model", "nics.network", "nics.network_kind", "nics.connected", "nics.boot_index"),
        }
    )
    disk_format = "qcow2"
    no_chains = "a DataVolume takes one image"
    disk_formats = frozenset({"raw", "qcow2"})

    def options(self) -> type[Any]:
        from vmconv_kubevirt.options import Options

        return Options

    def probe(self, file: File) -> bool:
        """True if a VirtualMachine of KubeVirt's API begins in the first 64 KiB."""
        import re

        start = file.read(0, min(file.size, 1 << 16))
        api = re.search(rb"""apiVersion["']?\s*:\s*["']?kubevirt\.io/""", start)
        return api is not None and re.search(rb"""\bkind["']?\s*:\s*["']?VirtualMachine\b""", start) is not None

    def read(self, file: File, opener: Opener) -> Machine:
        from vmconv_kubevirt.reader import read

        return read(file)

    def adapt(self, machine: Machine, options: Any) -> Adapted:
        from vmconv_kubevirt.adapting import adapt

        return adapt(machine, options)

    def write(self, machine: Machine, options: Any) -> tuple[ConfigFile, ...]:
        from vmconv_kubevirt.writer import write

        return write(machine, options)


@hookimpl
def vmconv_register_machines() -> Iterable[MachineFormat]:
    return [Kubevirt()]
