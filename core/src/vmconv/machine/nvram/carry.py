"""Chooses the variables that keep their meaning under another firmware: keys, and starting by partition and file."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from uuid import UUID

from vmconv.machine.nvram.variables import GLOBAL, IMAGE_SECURITY, SECURE_BOOT_ENABLE, SHIM, Store, Variable

_KEYS: frozenset[tuple[UUID, str]] = frozenset(
    {
        (GLOBAL, "PK"),
        (GLOBAL, "KEK"),
        *((IMAGE_SECURITY, name) for name in ("db", "dbx", "dbt")),
        (SECURE_BOOT_ENABLE, "SecureBootEnable"),
        (SHIM, "MokSBState"),
    }
)

_MEDIA = 4
_HD, _FILE = 1, 4
"""Device path nodes of type 4 that mean the same on each machine (UEFI 2.10, 10.3.5)."""


def is_key(variable: Variable) -> bool:
    """True for the variables of Secure Boot and of shim."""
    return (variable.guid, variable.name) in _KEYS or (variable.guid == SHIM and variable.name.startswith("MokList"))


def is_start(variable: Variable) -> bool:
    """True for BootOrder and the entries it may name."""
    return variable.guid == GLOBAL and bool(re.fullmatch("BootOrder|Boot[0-9A-F]{4}", variable.name))


def carried(store: Store) -> tuple[tuple[Variable, ...], tuple[str, ...]]:
    """Returns the variables to carry, and a line with the reason for each of the others."""
    starts = _starts(store)
    kept = [variable for variable in store.variables if is_key(variable)] + starts
    entries = {variable.name for variable in starts}
    dropped = [f"{one}: {_reason(one)}" for one in store.variables if not _kept(one, entries)]
    return tuple(kept), (*dropped, *(f"{other}: is no EFI variable" for other in store.others))


def _kept(variable: Variable, entries: set[str]) -> bool:
    return is_key(variable) or (is_start(variable) and variable.name in entries)


def _reason(variable: Variable) -> str:
    if not is_start(variable):
        return "belongs to the firmware or the hardware of the source"
    if variable.name == "BootOrder":
        return "none of its entries is carried"
    if _begins_with_media(variable.data):
        return "BootOrder does not name it"
    return "begins with a device of the source's hardware, not with a partition or a file"


def _starts(store: Store) -> list[Variable]:
    """Returns BootOrder, without the entries that are not carried, and those that are."""
    by_name = {variable.name: variable for variable in store.variables if is_start(variable)}
    order = by_name.get("BootOrder")
    if order is None:
        return []
    numbers = dict.fromkeys(number for number in _numbers(order.data) if _is_carried(by_name.get(f"Boot{number:04X}")))
    if not numbers:
        return []
    data = struct.pack(f"<{len(numbers)}H", *numbers)
    return [order._replace(data=data), *(by_name[f"Boot{number:04X}"] for number in numbers)]


def _is_carried(entry: Variable | None) -> bool:
    return entry is not None and _begins_with_media(entry.data)


def _numbers(data: bytes) -> Iterator[int]:
    return (number for (number,) in struct.iter_unpack("<H", data[: len(data) & ~1]))


def _begins_with_media(option: bytes) -> bool:
    """True if the device path of an EFI_LOAD_OPTION (UEFI 2.10, 3.1.3) begins with a partition or a file."""
    for at in range(6, len(option) - 3, 2):
        if option[at : at + 2] == b"\0\0":
            return option[at + 2] == _MEDIA and option[at + 3] in (_HD, _FILE)
    return False
