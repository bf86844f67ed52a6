"""Machines of Proxmox VE for vmconv: the configurations of qemu-server.

Format: qm.conf(5) and the schema in qemu-server's `PVE/QemuServer.pm`, 9.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vmconv.plugin import MachineFormat, hookimpl

if TYPE_CHECKING:
    from vmconv.machine import Machine
    from vmconv.plugin import Adapted, ConfigFile, File, Opener

_PROBED = 1 << 14
_LINE = re.compile(r"#.*|\[[^]]*\]|[a-z][a-z_-]*\d*:.*|\s*")
_OWN = re.compile(
    r"(?:smbios1|vmgenid|scsihw|bios|ostype|cores|sockets|numa|boot|machine|agent|vga|efidisk0|(?:ide|sata|scsi|virtio|net)\d+):"
)


class Proxmox(MachineFormat):
    name = "proxmox"
    title = "Proxmox VE"
    suffixes = (".conf",)
    disk_format = "qcow2"
    no_chains = "Proxmox has snapshots inside of a disk, or in volumes with names of its own"
    disk_formats = frozenset({"raw", "qcow2", "vmdk"})
    nvram_kind = "ovmf"
    tpm_kind = "swtpm-linear"
    carries = frozenset(
        {
            *("name", "description", "os.source_id", "os.architecture", "cpu.count", "cpu.sockets", "cpu.cores"),
            *("cpu.threads", "cpu.model", "memory.size", "firmware.kind", "firmware.nvram", "tpm.version"),
            *("identity.uuid", "identity.generation_id", "identity.serial", "identity.manufacturer"),
            *("identity.product", "board.chipset", "board.clock", "controllers"),
            *(f"disks.{name}" for name in ("bus", "controller", "unit", "boot_index", "file", "format", "capacity")),
            *(f"disks.{name}" for name in ("device", "mode", "discard", "serial")),
            *(f"removables.{name}" for name in ("bus", "controller", "unit", "boot_index", "kind", "connected")),
            *(f"nics.{name}" for name in ("mac", "model", "network", "network_kind", "connected", "boot_index")),
            *("display", "sound", "serials", "watchdog", "rng", "extra.proxmox"),
        }
    )

    def options(self) -> type[Any]:
        from vmconv_proxmox.options import Options

        return Options

    def probe(self, file: File) -> bool:
        text = file.read(0, min(file.size, _PROBED)).decode("utf-8", errors="replace")
        lines = text.split("\n")[: None if file.size <= _PROBED else -1]
        if not all(map(_LINE.fullmatch, lines)) or any(line.startswith("rootfs:") for line in lines):
            return False
        return any(map(_OWN.match, lines))

    def read(self, file: File, opener: Opener) -> Machine:
        from vmconv_proxmox.reader import read

        return read(file)

    def adapt(self, machine: Machine, options: Any) -> Adapted:
        from vmconv_proxmox.adapting import adapt

        return adapt(machine, options)

    def directory(self, machine: Machine, options: Any) -> str:
        return f"images/{options.vmid}"

    def disk_name(self, machine: Machine, number: int, suffix: str, options: Any) -> str:
        return f"vm-{options.vmid}-disk-{number}{suffix}"

    def nvram_name(self, machine: Machine, options: Any) -> str:
        return self.disk_name(machine, len(machine.disks), ".raw", options)

    def tpm_name(self, machine: Machine, options: Any) -> str:
        from vmconv_proxmox.writer import tpm_file

        return tpm_file(machine, options)

    def config_name(self, machine: Machine, options: Any) -> str:
        return f"{options.vmid}.conf"

    def write(self, machine: Machine, options: Any) -> tuple[ConfigFile, ...]:
        from vmconv_proxmox.writer import write

        return write(machine, options)


@hookimpl
def vmconv_register_machines() -> Iterable[MachineFormat]:
    return [Proxmox()]
