"""VMX for vmconv: machines of VMware ESXi, Workstation and Fusion."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vmconv.plugin import MachineFormat, hookimpl

if TYPE_CHECKING:
    from vmconv.machine import Machine
    from vmconv.plugin import Adapted, ConfigFile, File, Opener

_PROBED = 1 << 16
"""Bytes in which a VMX names its version; VMware writes that first."""


class Vmx(MachineFormat):
    name = "vmx"
    title = "VMware ESXi, Workstation and Fusion"
    suffixes = (".vmx",)
    carries = frozenset(
        {
            *("name", "description", "os", "display", "sound", "serials", "usb", "extra.vmx"),
            *(f"cpu.{field}" for field in ("count", "sockets", "cores", "threads", "hot_add")),
            *("memory.size", "memory.hot_add", "board.hardware_version", "board.clock"),
            *(f"firmware.{field}" for field in ("kind", "secure_boot", "boot_order")),
            *(f"identity.{field}" for field in ("uuid", "uuid_text", "instance_uuid", "generation_id")),
            *("identity.serial", "identity.asset_tag", "controllers"),
            *(f"disks.{field}" for field in ("bus", "controller", "unit", "boot_index", "file", "format", "device")),
            *("disks.mode", "disks.shared"),
            *(f"removables.{field}" for field in ("bus", "controller", "unit", "kind", "file", "device", "connected")),
            *(f"nics.{field}" for field in ("mac", "mac_origin", "model", "network", "network_kind", "connected")),
            "nics.pci_slot",
        }
    )
    disk_format = "vmdk"
    no_chains = None
    disk_formats = frozenset({"vmdk"})

    def options(self) -> type[Any]:
        from vmconv_vmx.options import Options

        return Options

    def nvram_template(self, options: Any) -> str | None:
        template: str | None = options.nvram_template
        return template

    def probe(self, file: File) -> bool:
        import re

        head = file.read(0, min(file.size, _PROBED))
        return b"\0" not in head and bool(re.search(rb"(?im)^\s*(config\.version|virtualHW\.version)\s*=", head))

    def read(self, file: File, opener: Opener) -> Machine:
        from vmconv_vmx.reader import read

        return read(file)

    def adapt(self, machine: Machine, options: Any) -> Adapted:
        from vmconv_vmx.adapt import adapt

        return adapt(machine, options)

    def write(self, machine: Machine, options: Any) -> tuple[ConfigFile, ...]:
        from vmconv_vmx.writer import write

        return write(machine)


@hookimpl
def vmconv_register_machines() -> Iterable[MachineFormat]:
    return [Vmx()]
