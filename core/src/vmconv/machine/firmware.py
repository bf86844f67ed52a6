"""The firmware's variables and the TPM's state of a machine: read from the source's files, written to new ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vmconv.errors import AccessError, ImageError, PlanError
from vmconv.interface.machines import ConfigFile
from vmconv.machine.request import Loss

if TYPE_CHECKING:
    from vmconv.machine.nvram import Store
    from vmconv.machine.source import Source
    from vmconv.machine.target import Target


_NO_STORE = (
    "the configuration names no file with the variables of its firmware: the new machine begins with the defaults"
)


class Variables(NamedTuple):
    """The new variable store, None without one; the losses of source's store; and a note on each dropped variable.

    `tpm` is the content of the file with the state of the TPM, for platforms that have one.
    """

    store: ConfigFile | None = None
    losses: tuple[Loss, ...] = ()
    notes: tuple[str, ...] = ()
    tpm: bytes | None = None


def variables(source: Source, target: Target) -> Variables:
    """Returns the variables for the new machine, and the state of its TPM.

    A store that cannot be carried over is a loss with its reason, not an error: a machine without it starts with the
    defaults of its firmware.
    """
    return _with_tpm(_variables(source, target), source, target)


def _variables(source: Source, target: Target) -> Variables:
    firmware, template = source.machine.firmware, target.format.nvram_template(target.options)
    if template is not None:
        return _in_template(source, target, template)
    if firmware.nvram is None:
        return Variables(notes=(_NO_STORE,) if firmware.kind == "uefi" else ())
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
    return Variables(_store(target, data), (), _notes(dropped))


def _in_template(source: Source, target: Target, template: str) -> Variables:
    """Returns a copy of the template with the source's variables, if there are any. Whatever goes wrong is an error."""
    if target.adapted.machine.firmware.kind != "uefi":
        raise PlanError(f"{template}: is for the variables of UEFI, and the firmware of the machine is a BIOS")
    from vmconv.machine import nvram

    own, existing = source.machine.firmware.nvram, source.opener.file(template)
    read = nvram.Store("ovmf", ()) if own is None else _read(source, own.file)
    data, dropped = nvram.written_into(read, existing, template)
    if own is None:
        # Its keys stay too: the source has none to put in their place.
        data = existing.read(0, existing.size)
    return Variables(_store(target, data), (), _notes(dropped))


def _notes(dropped: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"firmware variable {line}" for line in dropped)


def _store(target: Target, data: bytes) -> ConfigFile:
    return ConfigFile(target.nvram_name(), data)


def tpm_state(source: Source) -> tuple[str, bytes] | None:
    """Returns the file with the state of the source's TPM, and the state; None if the source names none.

    Raises `AccessError` or `ImageError` if it cannot be read.
    """
    machine = source.machine
    if machine.tpm is None:
        return None
    from vmconv.machine.nvram import tpm

    store = machine.firmware.nvram
    if machine.tpm.state is not None:
        file = source.disks.related(source.file, machine.tpm.state, "state of the TPM", moved=True)
        if file.size > tpm.MAX_FILE:
            raise ImageError(f"{file.name}: has {file.size} bytes, the state of a TPM has at most {tpm.MAX_FILE}")
        found = tpm.read(file.read(0, file.size), file.name)
        return None if found is None else (machine.tpm.state, found)
    if store is not None and store.kind == "virtualbox" and (state := _read(source, store.file).tpm) is not None:
        return store.file, tpm.checked(state, store.file)
    return None


def _with_tpm(found: Variables, source: Source, target: Target) -> Variables:
    """Adds the state of the TPM, or its loss."""
    try:
        state = tpm_state(source)
    except (AccessError, ImageError) as exc:
        return _without_tpm(found, _tpm_file(source), str(exc))
    if state is None:
        own, nvram_file = source.machine.tpm, source.machine.firmware.nvram
        if own is not None and own.state is None and (nvram_file is None or nvram_file.kind != "virtualbox"):
            return _without_tpm(found, "its secrets", "the configuration names no file with them")
        # It was never started.
        return found
    kind, machine = target.format.tpm_kind, target.adapted.machine
    if machine.tpm is None or kind is None:
        return _without_tpm(found, state[0], f"{target.format.name} takes no state of a TPM")
    from vmconv.machine import nvram
    from vmconv.machine.nvram import tpm

    if kind != "virtualbox":
        return found._replace(tpm=(tpm.linear if kind == "swtpm-linear" else tpm.swtpm)(state[1]))
    if machine.firmware.kind != "uefi":
        return _without_tpm(found, state[0], "VirtualBox keeps it with the variables of UEFI, and this is a BIOS")
    store = found.store or _store(target, nvram.converted(nvram.Store("ovmf", ()), "virtualbox")[0])
    return found._replace(store=store._replace(content=tpm.virtualbox(store.content, state[1])))


def _tpm_file(source: Source) -> str:
    """Returns the name of the file that holds the state of the TPM."""
    tpm, store = source.machine.tpm, source.machine.firmware.nvram
    return (tpm.state if tpm else None) or (store.file if store else "")


def _without_tpm(found: Variables, file: str, reason: str) -> Variables:
    loss = Loss("tpm.state", file, f"{reason}; suspend BitLocker in the guest first")
    return found._replace(losses=(*found.losses, loss))


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
