"""Whether a machine will start on another platform: its disks against its firmware and its controllers.

Reads a few kilobytes of each disk. With the libraries of the extra `vmconv[guest]`, also what starts the guest: see
`vmconv.machine.readiness`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vmconv.errors import AccessError, ImageError
from vmconv.guest.contents import content_of
from vmconv.guest.protocol import Volume
from vmconv.machine.boot import partitions
from vmconv.machine.findings import Finding, first_disk
from vmconv.machine.firmware import tpm_state
from vmconv.machine.formats import machine_format
from vmconv.model.extents import Extents

if TYPE_CHECKING:
    from vmconv.machine.model import Machine
    from vmconv.machine.source import Source

_MBR_LIMIT = 2 << 40
"""Bytes that an MBR of 512-byte sectors reaches."""

_NO_UEFI_DRIVER = ("buslogic", "lsilogic", "lsisas1068", "lsi53c895a", "lsi53c810", "megasas", "pvscsi")
"""Controllers for which OVMF, the firmware of KVM platforms, has no driver.

edk2 has drivers for pvscsi and lsisas1068 that a build may leave out; the OVMF of Debian 12 has neither.
"""

_KVM = ("libvirt", "proxmox", "kubevirt")


def check(source: Source, machine: Machine, target: str | None, *, inside: bool = True) -> tuple[Finding, ...]:
    """Returns the findings for a machine of `source`, adapted to the platform `target` if there is one.

    `inside`: the filesystems are looked at too, if their libraries are installed.
    """
    return tuple(_findings(source, machine, target, inside=inside))


def _findings(source: Source, machine: Machine, target: str | None, *, inside: bool) -> Iterator[Finding]:
    boot = first_disk(machine)
    disks: list[Extents] = []
    volumes: list[Volume] = []
    for number, disk in enumerate(source.machine.disks):
        path = f"disks[{number}]"
        if disk.device is not None:
            yield Finding("warning", path, f"is the physical disk {disk.device}", "it is not converted")
        image = source.image(disk)
        disks.append(image.flat if image else Extents.filled(0))
        if image is not None:
            found = _looked_at(path, image.flat, source)
            if isinstance(found, Finding):
                yield found
                continue
            table, contents = found
            yield from _of_disk(path, image.flat, table, contents)
            volumes += _volumes(number, image.flat, table, contents)
            if number == boot:
                yield from _of_boot_disk(path, machine, table)
    if target in _KVM:
        yield from _of_controllers(machine)
    if source.machine.tpm is not None:
        yield _of_tpm(source, machine, target)
    if inside:
        from vmconv.machine import readiness

        if readiness.HAVE_LIBRARIES:
            needs = readiness.Needs(machine, boot)
            yield from readiness.findings(disks, volumes, needs, moved=target is not None)


def _looked_at(path: str, disk: Extents, source: Source) -> tuple[partitions.Table, list[str | None]] | Finding:
    """Returns the partitions of a disk and their contents, or that a compressed package has to be decoded for them."""
    try:
        table = partitions.read(disk)
        return table, [content_of(disk, start) for start in _starts(table)]
    except ImageError as exc:
        if source.compression is None:
            raise
        return Finding("warning", path, f"was not looked at: {exc}", exc.hint or "")


def _starts(table: partitions.Table) -> list[int]:
    """Returns where the partitions begin; a disk without any is one itself."""
    return [partition.start for partition in table.partitions] or [0]


def _volumes(number: int, disk: Extents, table: partitions.Table, contents: Sequence[str | None]) -> Iterator[Volume]:
    """Yields the partitions of a disk whose content is known."""
    places = [(one.start, one.length) for one in table.partitions] or [(0, disk.size)]
    for position, ((start, length), content) in enumerate(zip(places, contents, strict=True), 1):
        if content is not None:
            yield Volume(number, position if table.partitions else 0, start, min(length, disk.size - start), content)


def _of_disk(path: str, disk: Extents, table: partitions.Table, contents: Sequence[str | None]) -> Iterator[Finding]:
    if table.problem:
        yield Finding("error", path, table.problem)
    if table.scheme == "mbr" and disk.size > _MBR_LIMIT:
        yield Finding("warning", path, "has an MBR, which reaches 2 TiB, and is larger")
    for number, content in enumerate(contents, 1):
        name = f"partition {number}" if table.partitions else "disk"
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


def _of_tpm(source: Source, machine: Machine, target: str | None) -> Finding:
    if target is not None and machine.tpm is not None and machine_format(target).tpm_kind is not None:
        try:
            if tpm_state(source) is not None:
                return Finding("note", "tpm", "its state is moved")
        except (AccessError, ImageError):
            # The plan of a conversion says why.
            pass
    hint = "suspend BitLocker, or have its recovery key at hand"
    return Finding("warning", "tpm", "the secrets in the TPM are not moved", hint)


def _of_controllers(machine: Machine) -> Iterator[Finding]:
    if machine.firmware.kind != "uefi":
        return
    for number, disk in enumerate(machine.disks):
        if (model := machine.controller_model(disk.bus, disk.controller)) in _NO_UEFI_DRIVER:
            text = f"is at a controller {model}, for which the firmware has no driver"
            yield Finding("error", f"disks[{number}]", text, "choose another controller")
