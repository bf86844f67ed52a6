"""EFI variables, independent of the store that holds them, and what readers of stores share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple
from uuid import UUID

from vmconv.errors import ImageError

Kind = Literal["ovmf", "virtualbox", "vmware", "vmgs"]

MAX_STORE = 64 << 20
"""Bytes of a file with a store. Flash images of ARM machines have 64 MiB; all others have less than 5."""

MAX_VARIABLES = 4096
"""Variables of a store. The largest that we have seen has 90."""

NO_TIME = bytes(16)

AUTHENTICATED = 0x20
"""The attribute of variables that are changed by signed, dated writes (UEFI 2.10, 8.2.2)."""

GLOBAL = UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
IMAGE_SECURITY = UUID("d719b2cb-3d3a-4596-a3bc-dad00e67656f")
SHIM = UUID("605dab50-e046-4300-abb6-3dd810dd8b23")
SECURE_BOOT_ENABLE = UUID("f0a30bc7-af08-4556-99c4-001009c93a44")


class Variable(NamedTuple):
    """A variable of the firmware; `time` is the EFI_TIME of an authenticated one, 16 bytes, else zeros."""

    guid: UUID
    name: str
    attributes: int
    data: bytes
    time: bytes = NO_TIME

    def __str__(self) -> str:
        """Returns the name, with the GUID where that is not the one of the specification's variables."""
        return self.name if self.guid == GLOBAL else f"{self.name}-{self.guid}"


class Store(NamedTuple):
    """The variables of a store, and what else its file holds, in words. `tpm` is the state of a TPM beside them."""

    kind: Kind
    variables: tuple[Variable, ...]
    others: tuple[str, ...] = ()
    tpm: bytes | None = None


def damaged(file: str, what: str, offset: int, problem: str, *, hint: str | None = None) -> ImageError:
    """Returns the error for a part of a store."""
    return ImageError(f"{file}: {what} at {offset:#x}: {problem}", hint=hint)


def part(data: bytes, at: int, length: int, end: int, file: str, what: str) -> bytes:
    """Returns bytes of a store; raises `ImageError` if they reach past `end`."""
    if at + length > end:
        raise damaged(file, what, at, f"{length} bytes reach past the end at {end:#x}")
    return data[at : at + length]


def name_of(raw: bytes, at: int, file: str) -> str:
    """Returns a variable's name from UTF-16 with its NUL; raises `ImageError` if it is invalid."""
    try:
        text = raw.decode("utf-16-le")
    except UnicodeDecodeError as exc:
        raise damaged(file, "variable", at, "its name is not UTF-16") from exc
    if len(text) < 2 or text.find("\0") != len(text) - 1:
        raise damaged(file, "variable", at, f"its name {text[:40]!r} does not end with its only NUL")
    return text[:-1]


def distinct(found: Iterable[Variable], file: str, *, last: bool) -> tuple[Variable, ...]:
    """Returns one variable of each GUID and name: the `last`, or else the first. Those without data do not exist.

    Raises `ImageError` for more than `MAX_VARIABLES`.
    """
    kept: dict[tuple[UUID, str], Variable] = {}
    for variable in found:
        key = variable.guid, variable.name
        if last or key not in kept:
            kept[key] = variable
        if len(kept) > MAX_VARIABLES:
            raise ImageError(f"{file}: has more than {MAX_VARIABLES} variables")
    return tuple(variable for variable in kept.values() if variable.data)
