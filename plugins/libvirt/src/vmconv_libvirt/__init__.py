"""libvirt's domain XML for vmconv: QEMU and KVM virtual machines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vmconv.plugin import Adapted, ConfigFile, MachineFormat, hookimpl

if TYPE_CHECKING:
    from vmconv.machine import Machine
    from vmconv.plugin import File, Opener


class Libvirt(MachineFormat):
    name = "libvirt"
    title = "libvirt domain XML, for QEMU and KVM"
    suffixes = (".xml",)
    carries = frozenset(
        {
            *("name", "description", "os.id", "os.architecture"),
            *("cpu.count", "cpu.sockets", "cpu.cores", "cpu.threads", "cpu.model", "memory.size"),
            *("firmware.kind", "firmware.secure_boot", "firmware.nvram", "firmware.boot_order", "tpm.version"),
            *("identity.uuid", "identity.generation_id", "identity.serial", "identity.board_serial"),
            *("identity.chassis_serial", "identity.manufacturer", "identity.product", "identity.asset_tag"),
            *("board", "controllers", "removables", "display", "sound", "serials", "usb", "watchdog", "rng"),
            *("disks.file", "disks.format", "disks.device", "disks.bus", "disks.controller", "disks.unit"),
            *("disks.boot_index", "disks.mode", "disks.shared", "disks.discard", "disks.serial"),
            *("nics.mac", "nics.model", "nics.network", "nics.network_kind", "nics.connected"),
            *("nics.pci_slot", "nics.boot_index", "extra.libvirt"),
        }
    )
    disk_format = "qcow2"
    no_chains = None
    disk_formats = frozenset({"raw", "qcow2", "qed", "vmdk", "vdi", "vhd"})
    nvram_kind = "ovmf"
    tpm_kind = "swtpm"

    def options(self) -> type[Any]:
        from vmconv_libvirt.options import Options

        return Options

    def probe(self, file: File) -> bool:
        """True if the first element is `domain`; it stands after a declaration and comments."""
        import re

        start = file.read(0, min(file.size, 4096))
        prolog = rb"(?:\xef\xbb\xbf)?(?:\s|<\?[^>]*\?>|<!--(?:[^-]|-[^-])*-->)*"
        return re.match(prolog + rb"<domain[\s>]", start) is not None

    def read(self, file: File, opener: Opener) -> Machine:
        from vmconv_libvirt.reader import read

        return read(file)

    def adapt(self, machine: Machine, options: Any) -> Adapted:
        from vmconv_libvirt.adapting import adapt

        return adapt(machine, options)

    def tpm_note(self, machine: Machine, file: str) -> str:
        # Only libvirt 10.10 and later takes another place, and earlier ones would start with an empty TPM in silence.
        place = f"/var/lib/libvirt/swtpm/{machine.identity.uuid or 'UUID'}/tpm2/tpm2-00.permall"
        return f"{file} is the state of the TPM: install it as {place} before the machine starts"

    def write(self, machine: Machine, options: Any) -> tuple[ConfigFile, ...]:
        from vmconv_libvirt.writer import write

        return write(machine, options)


@hookimpl
def vmconv_register_machines() -> Iterable[MachineFormat]:
    return [Libvirt()]
