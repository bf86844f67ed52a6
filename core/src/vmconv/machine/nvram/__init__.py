"""EFI variable stores of OVMF, VirtualBox, VMware and Hyper-V: read them, and make new ones with what can be carried.

store = read(file, file.name)
data, dropped = converted(store, "ovmf", secure_boot=machine.firmware.secure_boot)
"""

from __future__ import annotations

from vmconv.errors import ImageError, PlanError
from vmconv.machine.nvram import carry, ovmf, vmgs, vmware
from vmconv.machine.nvram.variables import GLOBAL, MAX_STORE, SECURE_BOOT_ENABLE, Kind, Store, Variable
from vmconv.model.sources import File

__all__ = ["Kind", "Store", "Variable", "converted", "enforces_secure_boot", "read", "written_into"]

_OTHERS = {
    b"vhdxfile": "a VHDX image",
    b"conectix": "a dynamic VHD image",
    b"QFI\xfb": "a qcow2 image: convert it to raw first",
}
"""First bytes of files that may hold a store inside."""

_NON_VOLATILE_BOOT = 0x3
"""Attributes of SecureBootEnable in OVMF: kept, and seen until the operating system runs."""


def read(source: bytes | File, name: str) -> Store:
    """Returns the variables of a store, whichever kind it is; `name` is the file's name in errors.

    Raises `ImageError` if the store is damaged, encrypted, or of no known kind.
    """
    data = _content(source, name)
    if data.startswith(vmware.SIGNATURE):
        return vmware.read(data, name)
    if data[ovmf.SIGNATURE_AT : ovmf.SIGNATURE_AT + 4] == ovmf.SIGNATURE:
        return ovmf.read(data, name)
    if any(data[at : at + 8] == vmgs.SIGNATURE for at in (0, *vmgs.SECOND_HEADERS)):
        return vmgs.read(data, name)
    if data[257:262] == b"ustar":
        return ovmf.read_tar(data, name)
    known = next((what for start, what in _OTHERS.items() if data.startswith(start)), None)
    raise ImageError(f"{name}: is {known or 'no EFI variable store of a known kind'}")


def _content(source: bytes | File, name: str) -> bytes:
    size = source.size if isinstance(source, File) else len(source)
    if size > MAX_STORE:
        raise ImageError(f"{name}: has {size} bytes, an EFI variable store has at most {MAX_STORE}")
    return source.read(0, size) if isinstance(source, File) else source


def converted(
    store: Store, kind: str, *, size: str = "4M", secure_boot: bool | None = None
) -> tuple[bytes, tuple[str, ...]]:
    """Returns a new store with the variables that can be carried, and a line with the reason for each other.

    `size` is that of the firmware that OVMF's store belongs to: 2M or 4M. VirtualBox has 4M only. `secure_boot` is
    what the machine's configuration says of it, if anything: without the variable for it, OVMF switches Secure Boot
    on where keys are enrolled, which VMware does for machines without Secure Boot too. Raises `PlanError` if no store
    of this kind can be made, or the variables do not fit.
    """
    if kind not in ("ovmf", "virtualbox"):
        raise PlanError(f"a new EFI variable store of kind {kind!r} cannot be made")
    kept, dropped = carry.carried(store)
    return ovmf.write(_with_secure_boot(kept, secure_boot), size if kind == "ovmf" else "4M"), dropped


def enforces_secure_boot(store: Store) -> bool:
    """True if OVMF starts with Secure Boot on: a platform key is enrolled, and SecureBootEnable does not say 0."""
    found = {(one.guid, one.name): one.data for one in store.variables}
    enrolled = bool(found.get((GLOBAL, "PK")))
    return enrolled and found.get((SECURE_BOOT_ENABLE, "SecureBootEnable")) != b"\0"


def _with_secure_boot(kept: tuple[Variable, ...], secure_boot: bool | None) -> tuple[Variable, ...]:
    if secure_boot is None:
        return kept
    switch = Variable(SECURE_BOOT_ENABLE, "SecureBootEnable", _NON_VOLATILE_BOOT, bytes([secure_boot]))
    return (*(one for one in kept if one.name != switch.name), switch)


def written_into(store: Store, existing: bytes | File, name: str) -> tuple[bytes, tuple[str, ...]]:
    """Returns an existing store of VMware with the variables that can be carried, and a line for each other.

    Variables of the existing store stay, except keys, and its boot entries if `store` has some to carry. Raises
    `ImageError` if the existing store is damaged, `PlanError` if it is not one of VMware's or has too little space.
    """
    data = _content(existing, name)
    if not data.startswith(vmware.SIGNATURE):
        raise PlanError(f"{name}: is no EFI variable store of VMware")
    kept, dropped = carry.carried(store)
    starts = any(carry.is_start(variable) for variable in kept)
    own = vmware.read(data, name).variables
    stay = [one for one in own if not carry.is_key(one) and not (starts and carry.is_start(one))]
    return vmware.write(data, [*kept, *stay], name), dropped
