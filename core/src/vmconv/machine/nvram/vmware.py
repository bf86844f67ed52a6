"""Stores of VMware: `.nvram` files. Read; written only into an existing file, because the rest of it is undocumented.

    0         "MRVN", u32 1
    8         sections: 8 bytes of name, u32 length, content; CMOS, ESCD, EFI_NV
    EFI_NV    "VMWNVRAM", u32 0, u32 length with this header, then variables, packed and without checksums, then 0xff

Found by analysis of files of ESXi 7. A variable may be there several times; the last one counts.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from uuid import UUID

from vmconv.errors import ImageError, PlanError
from vmconv.machine.nvram.variables import AUTHENTICATED, NO_TIME, Store, Variable, damaged, distinct, name_of, part

SIGNATURE = b"MRVN"

_SECTION = struct.Struct("<8sI")
_HEADER = struct.Struct("<8sII")
_RECORD = struct.Struct("<16sIII")
_MAX_SECTIONS = 64

# WIN_CERTIFICATE_UEFI_GUID with nothing in it (UEFI 2.10, 32.2.4), as VMware writes it behind the time.
_CERTIFICATE = struct.pack("<IHH", 24, 0x0200, 0x0EF1) + UUID("452e8ced-dfff-4b8c-ae01-5118862e682c").bytes_le
_SIGNED = len(NO_TIME) + len(_CERTIFICATE)


def read(data: bytes, file: str) -> Store:
    """Returns the variables of a store; raises `ImageError` if it is damaged."""
    begin, length, _ = _variables(data, file)
    return Store("vmware", distinct(_records(data, begin, begin + length, file), file, last=True))


def _variables(data: bytes, file: str) -> tuple[int, int, int]:
    """Returns the offset of the variables, their length, and the end of their section."""
    at, end = _section(data, file)
    magic, _, length = _HEADER.unpack(part(data, at, _HEADER.size, end, file, "EFI variables"))
    if magic != b"VMWNVRAM":
        raise damaged(file, "EFI variables", at, f"begin with {magic!r}, not b'VMWNVRAM'")
    if not _HEADER.size <= length <= end - at:
        raise damaged(file, "EFI variables", at + 12, f"length {length:#x} is past the end at {end:#x}")
    return at + _HEADER.size, length - _HEADER.size, end


def _section(data: bytes, file: str) -> tuple[int, int]:
    """Returns where the content of the section with the variables begins and ends."""
    at = 8
    for _ in range(_MAX_SECTIONS):
        if at + _SECTION.size > len(data):
            break
        name, length = _SECTION.unpack_from(data, at)
        at += _SECTION.size
        part(data, at, length, len(data), file, f"section {name!r}")
        if name.rstrip(b"\0") == b"EFI_NV":
            return at, at + length
        at += length
    raise ImageError(f"{file}: has no section of EFI variables; machines with a BIOS have none")


def _records(data: bytes, at: int, end: int, file: str) -> Iterator[Variable]:
    while at < end:
        head = part(data, at, _RECORD.size, end, file, "variable")
        guid, attributes, total, name_length = _RECORD.unpack(head)
        content = part(data, at + _RECORD.size, total, end, file, "variable")
        signed = _SIGNED if attributes & AUTHENTICATED else 0
        if name_length + signed > total:
            raise damaged(file, "variable", at, f"has {total} bytes, less than its name of {name_length}")
        name = name_of(content[:name_length], at, file)
        time = content[name_length : name_length + 16] if signed else NO_TIME
        yield Variable(UUID(bytes_le=guid), name, attributes, content[name_length + signed :], time)
        at += _RECORD.size + total


def write(data: bytes, variables: Iterable[Variable], file: str) -> bytes:
    """Returns an existing file with other variables; raises `PlanError` if they do not fit into it."""
    begin, _, end = _variables(data, file)
    records = b"".join(_record(variable) for variable in variables)
    if len(records) > end - begin:
        raise PlanError(f"{file}: EFI variables have {len(records)} bytes, the file has space for {end - begin}")
    header = _HEADER.pack(b"VMWNVRAM", 0, _HEADER.size + len(records))
    return data[: begin - _HEADER.size] + header + records.ljust(end - begin, b"\xff") + data[end:]


def _record(variable: Variable) -> bytes:
    name = f"{variable.name}\0".encode("utf-16-le")
    signed = variable.time + _CERTIFICATE if variable.attributes & AUTHENTICATED else b""
    content = name + signed + variable.data
    return _RECORD.pack(variable.guid.bytes_le, variable.attributes, len(content), len(name)) + content
