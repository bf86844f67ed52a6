"""The plan of a machine's conversion, from its laid-out files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vmconv.machine import losses
from vmconv.machine.paths import carried
from vmconv.machine.request import DiskPlan, Loss, MachinePlan

if TYPE_CHECKING:
    from vmconv.machine.firmware import Variables
    from vmconv.machine.layout import NewDisk, NewMachine
    from vmconv.machine.source import Source
    from vmconv.machine.target import Target
    from vmconv.model.image import Image


def machine_plan(
    source: Source, target: Target, made: NewMachine, images: Sequence[Image | None], firmware: Variables
) -> MachinePlan:
    """Returns what becomes of each setting and of each disk."""
    fate = losses.fate(source.machine, target.adapted, target.format)
    warnings = [text for image in images if image is not None for text in image.warnings]
    warnings += _on_the_host(target)
    if made.machine.tpm is not None and firmware.tpm is not None:
        warnings.append(target.format.tpm_note(made.machine, made.machine.tpm.state or ""))
    return MachinePlan(
        source.format.name,
        target.format.name,
        target.directory,
        fate.carried,
        fate.substitutions,
        (*_with_physical(fate.losses, source, target), *source.secrets, *firmware.losses, *_signature(source)),
        tuple(_disk_plan(disk, source) for disk in made.disks),
        tuple(file.name for file in made.plan.files),
        made.plan.backend,
        made.plan.totals,
        made.plan.copies,
        tuple(dict.fromkeys(filter(None, warnings))),
        firmware.notes,
        tuple(file.real_path() for file in source.opener.files),
        made.digested,
    )


def _signature(source: Source) -> Iterator[Loss]:
    if source.manifest is not None and source.manifest.certificate is not None:
        reason = "it signs the old package, and only its owner can sign the new machine"
        yield Loss("certificate", source.manifest.certificate, reason)


def _with_physical(losses: tuple[Loss, ...], source: Source, target: Target) -> tuple[Loss, ...]:
    """Returns the losses with the physical disks of the machine: the new one has no copy of their content."""
    named = carried("disks.device", target.format.carries)
    reason = "its content is not converted, and the new machine " + (
        "writes to the device of that name on its host" if named else "does not have it"
    )
    disks = {f"disks[{number}]": disk.device for number, disk in enumerate(source.machine.disks) if disk.device}
    found = tuple(Loss(path, f"physical disk {device}", reason) for path, device in disks.items())
    return found + tuple(loss for loss in losses if loss.path.removesuffix(".device") not in disks)


def _on_the_host(target: Target) -> Iterator[str]:
    """Yields a warning for each file and port outside the machine that the new guest writes to."""
    machine = target.adapted.machine
    if carried("serials.target", target.format.carries):
        for number, port in enumerate(machine.serials):
            if port.target is not None and port.kind in ("file", "device"):
                yield f"serials[{number}] writes to the {port.kind} {port.target} of the new machine's host"


def _disk_plan(disk: NewDisk, source: Source) -> DiskPlan:
    container = disk.container
    return DiskPlan(
        source.machine.disks[disk.number].file or "",
        container.source.format_name,
        container.name,
        container.format.name,
        disk.plan.totals,
        disk.plan.losses,
    )
