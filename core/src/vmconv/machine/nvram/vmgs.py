"""Stores of Hyper-V: file 1 of a `.vmgs`, the guest state file. Read, where it is not encrypted.

    0, 512    two headers, the one with the following sequence number counts (4096 on disks with such sectors)
    .         file table: 64 entries of 64 bytes; offsets in blocks of 4096 bytes
    .         files: 1 variables, 3 state of the TPM
    end       footer of a fixed VHD

Published by Microsoft in openvmm: vmgs_format, and hcl_compat_uefi_nvram_storage for the variables.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple
from uuid import UUID

from vmconv.errors import ImageError
from vmconv.machine.nvram.variables import Store, Variable, damaged, distinct, name_of, part

SIGNATURE = b"GUESTRTS"
SECOND_HEADERS = (512, 4096)

_BLOCK = 4096
_HEADER = struct.Struct("<8sIIIIIIHH128sI")
_CHECKSUM_AT = 12
_ENTRY = struct.Struct("<IIQ48x")
_FILES = 64
_VERSION = 0x00030000
_VARIABLES, _TPM = 1, 3
_MAX_VARIABLES = 128 << 10
_RECORD = struct.Struct("<III16s16sHH")


class _Header(NamedTuple):
    signature: bytes
    version: int
    checksum: int
    sequence: int
    size: int
    table_offset: int
    table_size: int
    encryption: int
    markers: int
    keys: bytes
    reserved: int


class _Entry(NamedTuple):
    offset: int
    allocated: int
    valid: int


def read(data: bytes, file: str) -> Store:
    """Returns the variables of a guest state file; raises `ImageError` if it is damaged or encrypted."""
    header = _header(data, file)
    if header.encryption:
        raise ImageError(f"{file}: is encrypted (algorithm {header.encryption}); its variables cannot be read")
    entries = _entries(data, header, file)
    others = ("state of the TPM",) if entries[_TPM].allocated else ()
    entry = entries[_VARIABLES]
    if not entry.allocated:
        return Store("vmgs", (), others)
    if entry.valid > _MAX_VARIABLES:
        raise ImageError(f"{file}: EFI variables have {entry.valid} bytes, Hyper-V's have at most {_MAX_VARIABLES}")
    at = entry.offset * _BLOCK
    return Store("vmgs", distinct(_records(data, at, at + entry.valid, file), file, last=True), others)


def _header(data: bytes, file: str) -> _Header:
    """Returns the current header: the valid one, or of two the one whose number follows the other's."""
    second = next((at for at in SECOND_HEADERS if data[at : at + 8] == SIGNATURE), SECOND_HEADERS[0])
    valid = [found for at in (0, second) if (found := _valid(data, at)) is not None]
    if not valid:
        raise damaged(file, "header", 0, "neither it nor its copy is a valid header of version 3")
    if len(valid) == 1:
        return valid[0]
    for one, other in (valid, valid[::-1]):
        if one.sequence == (other.sequence + 1) & 0xFFFFFFFF:
            return one
    raise damaged(file, "header", 0, f"sequence numbers {valid[0].sequence} and {valid[1].sequence} do not follow")


def _valid(data: bytes, at: int) -> _Header | None:
    raw = data[at : at + _HEADER.size]
    if len(raw) < _HEADER.size:
        return None
    header = _Header._make(_HEADER.unpack(raw))
    unsealed = raw[:_CHECKSUM_AT] + bytes(4) + raw[_CHECKSUM_AT + 4 :]
    right = (header.signature, header.version, header.size, header.table_size) == (SIGNATURE, _VERSION, len(raw), 1)
    return header if right and header.checksum == zlib.crc32(unsealed) else None


def _entries(data: bytes, header: _Header, file: str) -> list[_Entry]:
    """Returns the entries of the file table."""
    at = header.table_offset * _BLOCK
    table = part(data, at, _FILES * _ENTRY.size, len(data), file, "file table")
    entries = [_Entry._make(fields) for fields in _ENTRY.iter_unpack(table)]
    for number, entry in enumerate(entries):
        where = at + number * _ENTRY.size
        if not entry.allocated:
            continue
        if entry.offset < 2 or (entry.offset + entry.allocated) * _BLOCK > len(data):
            raise damaged(file, f"file {number}", where, f"blocks {entry.offset}+{entry.allocated} are not in the file")
        if entry.valid > entry.allocated * _BLOCK:
            raise damaged(file, f"file {number}", where, f"{entry.valid} bytes in {entry.allocated} blocks")
    return entries


def _records(data: bytes, at: int, end: int, file: str) -> Iterator[Variable]:
    while at < end:
        head = part(data, at, _RECORD.size, end, file, "variable")
        kind, length, attributes, time, guid, name_length, data_length = _RECORD.unpack(head)
        if kind or length != _RECORD.size + name_length + data_length:
            raise damaged(file, "variable", at, f"kind {kind}, {length} bytes with {name_length}+{data_length} in them")
        content = part(data, at, length, end, file, "variable")[_RECORD.size :]
        name = name_of(content[:name_length], at, file)
        yield Variable(UUID(bytes_le=guid), name, attributes, content[name_length:], time)
        at += length
