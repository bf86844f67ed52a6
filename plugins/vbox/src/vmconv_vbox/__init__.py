"""Machines of VirtualBox for vmconv: its settings files, `.vbox`.

Format: `VirtualBox-settings.xsd` and `Main/xml/Settings.cpp`, versions 1.15 (VirtualBox 5.1) to 1.22.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vmconv.plugin import MachineFormat, hookimpl

if TYPE_CHECKING:
    from vmconv.machine import Machine
    from vmconv.plugin import Adapted, ConfigFile, File, Opener


class VBox(MachineFormat):
    name = "vbox"
    title = "VirtualBox"
    suffixes = (".vbox",)
    disk_format = "vdi"
    no_chains = None
    # VirtualBox compares the id in an image with its settings, and of these vmconv knows where it is.
    disk_formats = frozenset({"vdi", "vmdk", "vhd", "raw"})
    nvram_kind = "virtualbox"
    tpm_kind = "virtualbox"
    carries = frozenset(
        {
            *("name", "description", "os", "cpu.count", "cpu.hot_add", "memory.size", "firmware.kind"),
            *("firmware.nvram", "firmware.boot_order", "tpm.version", "identity.uuid", "identity.instance_uuid"),
            *("identity.serial", "identity.board_serial", "identity.chassis_serial", "identity.manufacturer"),
            *("identity.product", "identity.asset_tag", "board.chipset", "board.clock", "controllers"),
            *(f"disks.{name}" for name in ("bus", "controller", "unit", "file", "format", "image_uuid", "mode")),
            *("disks.discard", "disks.serial", "disks.layers"),
            *(f"removables.{name}" for name in ("bus", "controller", "unit", "kind", "connected")),
            *(f"nics.{name}" for name in ("mac", "model", "network", "network_kind", "connected")),
            *("display", "sound", "serials", "usb", "extra.vbox"),
        }
    )

    def options(self) -> type[Any]:
        from vmconv_vbox.options import Options

        return Options

    def probe(self, file: File) -> bool:
        head = file.read(0, min(file.size, 4096))
        return b"<VirtualBox" in head and b"http://www.virtualbox.org/" in head and b"<Envelope" not in head

    def read(self, file: File, opener: Opener) -> Machine:
        from vmconv_vbox.reader import read

        return read(file)

    def adapt(self, machine: Machine, options: Any) -> Adapted:
        from vmconv_vbox.adapting import adapt

        return adapt(machine, options)

    def nvram_name(self, machine: Machine, options: Any) -> str:
        return f"{machine.name or 'machine'}.nvram"

    def write(self, machine: Machine, options: Any) -> tuple[ConfigFile, ...]:
        from vmconv_vbox.writer import write

        return write(machine)


@hookimpl
def vmconv_register_machines() -> Iterable[MachineFormat]:
    return [VBox()]
