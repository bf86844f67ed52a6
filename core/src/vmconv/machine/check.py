"""Whether a machine will start on another platform: its disks against its firmware and its controllers.

Reads a few kilobytes of each disk. What is inside a filesystem is not looked at: `virt-v2v-in-place` repairs that, on
the new machine's disks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

from vmconv.machine.boot import partitions
from vmconv.machine.boot.contents import content_of

if TYPE_CHECKING:
    from vmconv.machine.model import Machine
    from vmconv.machine.source import Source
    from vmconv.model.extents import Extents

_MBR_LIMIT = 2 << 40
"""Bytes that an MBR of 512-byte sectors reaches."""

_NO_UEFI_DRIVER = ("buslogic", "lsilogic", "lsisas1068")
"""Controllers for which OVMF, the firmware of KVM platforms, has no driver."""

_KVM = ("libvirt", "proxmox", "kubevirt")


class Finding(NamedTuple):
    """One finding: an error keeps the machine from starting, a warning may. `path` is the part of the machine."""

    level: Literal["error", "warning", "note"]
    path: str
    text: str
    hint: str = ""


def check(source: Source, machine: Machine, target: str | None) -> tuple[Finding, ...]:
    """Returns the findings for a machine of `source`, adapted to the platform `target` if there is one."""
    return tuple(_findings(source, machine, target))


def _findings(source: Source, machine: Machine, target: str | None) -> Iterator[Finding]:
    boot = _boot_disk(machine)
    for number, disk in enumerate(source.machine.disks):
        path = f"disks[{number}]"
        if disk.device is not None:
            yield Finding("warning", path, f"is the physical disk {disk.device}", "it is not converted")
        image = source.image(disk)
        if image is not None:
            table = partitions.read(image.flat)
            yield from _of_disk(path, image.flat, table)
            if number == boot:
                yield from _of_boot_disk(path, machine, table)
    if target in _KVM:
        yield from _of_controllers(machine)
    if machine.tpm is not None:
        hint = "suspend BitLocker, or have its recovery key at hand"
        yield Finding("warning", "tpm", "the secrets in the TPM are not moved", hint)


def _boot_disk(machine: Machine) -> int | None:
    """Returns the number of the disk that the firmware tries first; None if the machine has no disks."""
    chosen = [(disk.boot_index, number) for number, disk in enumerate(machine.disks) if disk.boot_index is not None]
    return min(chosen)[1] if chosen else 0 if machine.disks else None


def _of_disk(path: str, disk: Extents, table: partitions.Table) -> Iterator[Finding]:
    if table.problem:
        yield Finding("error", path, table.problem)
    if table.scheme == "mbr" and disk.size > _MBR_LIMIT:
        yield Finding("warning", path, "has an MBR, which reaches 2 TiB, and is larger")
    places = [(partition.start, f"partition {n}") for n, partition in enumerate(table.partitions, 1)] or [(0, "disk")]
    for start, name in places:
        content = content_of(disk, start)
        if content == "bitlocker":
            hint = "suspend BitLocker in the guest first, or have its recovery key at hand"
            yield Finding("warning", path, f"its {name} is encrypted by BitLocker", hint)
        elif content == "luks":
            yield Finding("note", path, f"its {name} is encrypted by LUKS", "a key in a TPM is not moved")


def _of_boot_disk(path: str, machine: Machine, table: partitions.Table) -> Iterator[Finding]:
    uefi = machine.firmware.kind == "uefi"
    if table.scheme == "none":
        yield Finding("warning", path, "the machine starts from it, and it has no partition table")
    elif uefi and not table.has_esp and not table.problem:
        hint = "its firmware was a BIOS" if table.has_boot_code else ""
        yield Finding("error", path, "the firmware is UEFI, and the disk has no EFI system partition", hint)
    elif machine.firmware.kind == "bios" and not table.has_boot_code:
        hint = "its firmware was UEFI" if table.has_esp else ""
        yield Finding("error", path, "the firmware is a BIOS, and the disk has no boot code", hint)
    elif machine.firmware.kind is None:
        needed = "UEFI" if table.has_esp and not table.has_boot_code else "a BIOS" if not table.has_esp else "either"
        yield Finding("note", "firmware", f"the configuration does not state the firmware; the disk needs {needed}")


def _of_controllers(machine: Machine) -> Iterator[Finding]:
    if machine.firmware.kind != "uefi":
        return
    for number, disk in enumerate(machine.disks):
        if (model := machine.controller_model(disk.bus, disk.controller)) in _NO_UEFI_DRIVER:
            text = f"is at a controller {model}, for which the firmware has no driver"
            yield Finding("error", f"disks[{number}]", text, "choose another controller")
