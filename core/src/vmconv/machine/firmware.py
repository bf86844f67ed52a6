"""The firmware's variables of a machine that is converted: read from the source's store, written to a new one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vmconv.errors import AccessError, ImageError, PlanError
from vmconv.interface.machines import ConfigFile
from vmconv.machine.request import Loss

if TYPE_CHECKING:
    from vmconv.machine.nvram import Store
    from vmconv.machine.source import Source
    from vmconv.machine.target import Target


class Variables(NamedTuple):
    """The new variable store, None without one; the loss of the source's store; and a note on each dropped variable."""

    store: ConfigFile | None = None
    losses: tuple[Loss, ...] = ()
    notes: tuple[str, ...] = ()


def variables(source: Source, target: Target) -> Variables:
    """Returns the variables for the new machine.

    A store that cannot be carried over is a loss with its reason, not an error: a machine without it starts with the
    defaults of its firmware.
    """
    firmware = source.machine.firmware
    if firmware.nvram is None:
        return Variables()
    if firmware.kind == "bios":
        return _lost(firmware.nvram.file, "a BIOS has no variables that another firmware could use")
    if target.format.nvram_kind is None:
        return _lost(firmware.nvram.file, f"{target.format.name} takes no store that could be made")
    from vmconv.machine import nvram

    try:
        read = _read(source, firmware.nvram.file)
        data, dropped = nvram.converted(read, target.format.nvram_kind, secure_boot=firmware.secure_boot)
    except (AccessError, ImageError, PlanError) as exc:
        return _lost(firmware.nvram.file, str(exc))
    return Variables(ConfigFile(target.nvram_name(), data), (), tuple(f"firmware variable {line}" for line in dropped))


def with_secure_boot(source: Source) -> Source:
    """Returns the source with Secure Boot on, if only its variables say so, as on Proxmox and VirtualBox.

    Other platforms state it in the configuration too, and start the machine without it otherwise.
    """
    firmware = source.machine.firmware
    if firmware.secure_boot is not None or firmware.kind != "uefi" or firmware.nvram is None:
        return source
    if firmware.nvram.kind not in ("ovmf", "virtualbox"):
        return source
    from vmconv.machine import nvram

    try:
        on = nvram.enforces_secure_boot(_read(source, firmware.nvram.file))
    except (AccessError, ImageError):
        # `variables` reports it.
        return source
    firmware = firmware.model_copy(update={"secure_boot": on or None})
    return source._replace(machine=source.machine.model_copy(update={"firmware": firmware}))


def _read(source: Source, name: str) -> Store:
    from vmconv.machine import nvram

    file = source.disks.related(source.file, name, "store of firmware variables", moved=True)
    return nvram.read(file, file.name)


def _lost(file: str, reason: str) -> Variables:
    return Variables(losses=(Loss("firmware.nvram", file, reason),))
