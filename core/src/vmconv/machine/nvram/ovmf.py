"""Stores of OVMF, and of VirtualBox, which have the same layout.

    0         firmware volume header (UEFI PI 1.7, volume 3, 3.2.1)
    0x48      variable store header, then variables (edk2, AuthenticatedVariableFormat.h)
    .         event log
    .         working block of fault tolerant writes: what is being written (edk2, FaultTolerantWriteDxe)
    .         spare blocks, as many as all above

Erased bytes are 0xff, and a variable's state loses bits as it is written and deleted. With a TPM, VirtualBox keeps a
tar of the store and of the TPM's state.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from uuid import UUID

from vmconv.errors import ImageError, PlanError
from vmconv.machine.nvram import tpm
from vmconv.machine.nvram.variables import Store, Variable, damaged, distinct, name_of, part

SIZES = {"2M": 0x20000, "4M": 0x84000}
"""Bytes of the store that belongs to firmware of 2 and of 4 MiB."""

SIGNATURE = b"_FVH"
SIGNATURE_AT = 0x28

_BLOCK = 0x1000
_VOLUME = struct.Struct("<16s16sQ4sIHHHBB8s8s")
_STORE = struct.Struct("<16sIBBHI")
_RECORD = struct.Struct("<HBBIQ16sIII16s")
_WORKING = struct.Struct("<16sIB3sQ")
_WRITE = struct.Struct("<B3x16s4xQQ")
_WRITE_PART = struct.Struct("<B7xQQQq")

_NV_VOLUME = UUID("fff12b8d-7696-4c8b-a985-2747075b4f50")
_AUTHENTICATED_STORE = UUID("aaf32c78-947b-439a-a180-2e144ec37792")
_WORKING_BLOCK = UUID("9e58292b-7c68-497d-a0ce-6500fd9f1b95")

# EFI_FVB_ATTRIBUTES_2 of OVMF's own stores: all kinds of access, sticky writes, erased bits are 1.
_ATTRIBUTES = 0x0004FEFF
_FORMATTED, _HEALTHY = 0x5A, 0xFE
_START = 0x55AA
_ADDED, _BEING_DELETED = 0x3F, 0x3E
_ERASED = 0xFFFFFFFF

# Bits of a fault tolerant write and of its parts; each is cleared when it becomes true.
_ALLOCATED, _STATED, _COMPLETE = 1, 2, 4
_IN_SPARE, _IN_PLACE = 2, 4

_STORE_AT = _VOLUME.size
_FIRST_RECORD = _STORE_AT + _STORE.size


class _Record(NamedTuple):
    start: int
    state: int
    reserved: int
    attributes: int
    monotonic_count: int
    time: bytes
    key: int
    name_length: int
    data_length: int
    guid: bytes


def read(data: bytes, file: str) -> Store:
    """Returns the variables of a store of any size; raises `ImageError` if it is damaged."""
    begin, end = _store(data, file)
    records = list(_records(data, begin, end, file))
    added = [variable for state, variable in records if state == _ADDED]
    # A variable that was being replaced when the machine stopped counts until its successor is complete. The first
    # of two complete ones counts. Both as edk2's FindVariableEx.
    fallback = [variable for state, variable in records if state == _BEING_DELETED]
    return Store("ovmf", distinct([*added, *fallback], file, last=False))


def _store(data: bytes, file: str) -> tuple[int, int]:
    """Returns where the variables begin and end."""
    header = part(data, 0, _VOLUME.size, len(data), file, "firmware volume header")
    _, guid, length, _, _, header_length, _, _, _, _, _, _ = _VOLUME.unpack(header)
    if UUID(bytes_le=guid) != _NV_VOLUME:
        raise damaged(file, "firmware volume header", 16, f"volume {UUID(bytes_le=guid)} holds no variables")
    if not _VOLUME.size <= header_length <= 0x1000 or header_length % 4:
        raise damaged(file, "firmware volume header", 0x30, f"length {header_length} is not possible")
    if length > len(data):
        raise damaged(file, "firmware volume", 0, f"length {length:#x} is past the end of the file ({len(data):#x})")
    if _sum16(part(data, 0, header_length, length, file, "firmware volume header")):
        raise damaged(file, "firmware volume header", 0x32, "its checksum is wrong")
    begin, end = _bounds(data, header_length, length, file)
    _refuse_half_written(data, end, length, file)
    return begin, end


def _refuse_half_written(data: bytes, at: int, end: int, file: str) -> None:
    """Raises `ImageError` if the firmware stopped while it moved a new store from the spare blocks to its place.

    The next start of the machine would complete that.
    """
    blocks = range(-(-at // _BLOCK) * _BLOCK, end, _BLOCK)
    block = next((block for block in blocks if data[block : block + 16] == _WORKING_BLOCK.bytes_le), None)
    if block is None:
        return
    at, end = block + _WORKING.size, min(block + _BLOCK, end)
    while at + _WRITE.size <= end and not data[at] & _ALLOCATED:
        state, _, count, private = _WRITE.unpack_from(data, at)
        at += _WRITE.size
        step = _WRITE_PART.size + private
        parts = [data[where] for where in range(at, min(at + count * step, end), step)]
        unfinished = not state & _STATED and state & _COMPLETE
        if unfinished and any(not flags & _IN_SPARE and flags & _IN_PLACE for flags in parts):
            hint = "start the machine once, so that its firmware completes the write"
            raise damaged(file, "fault tolerant write", at - _WRITE.size, "was not completed", hint=hint)
        at += count * step


def _bounds(data: bytes, at: int, end: int, file: str) -> tuple[int, int]:
    header = part(data, at, _STORE.size, end, file, "variable store header")
    guid, size, format_, state, _, _ = _STORE.unpack(header)
    if UUID(bytes_le=guid) != _AUTHENTICATED_STORE:
        raise damaged(file, "variable store header", at, f"stores of kind {UUID(bytes_le=guid)} are not supported")
    if (format_, state) != (_FORMATTED, _HEALTHY):
        raise damaged(file, "variable store header", at + 20, f"format {format_:#x}, state {state:#x}: not healthy")
    if not _STORE.size <= size <= end - at:
        raise damaged(file, "variable store header", at + 16, f"size {size:#x} is past the volume's end ({end:#x})")
    return at + _STORE.size, at + size


def _records(data: bytes, at: int, end: int, file: str) -> Iterator[tuple[int, Variable]]:
    """Yields the state of each variable that is complete, and the variable."""
    while at + _RECORD.size <= end:
        record = _Record._make(_RECORD.unpack_from(data, at))
        if record.start == 0xFFFF:
            return
        if record.start != _START:
            raise damaged(file, "variable", at, f"begins with {record.start:#06x}, not {_START:#06x}")
        body = at + _RECORD.size
        # The lengths of a record whose writing stopped may be erased bytes; edk2 takes them for 0.
        torn = record.state == 0xFF or _ERASED in (record.name_length, record.data_length, record.attributes)
        length = 0 if torn else record.name_length + record.data_length
        content = part(data, body, length, end, file, "variable")
        if not torn and record.state in (_ADDED, _BEING_DELETED):
            yield record.state, _variable(record, content, at, file)
        at = (body + length + 3) & ~3


def _variable(record: _Record, content: bytes, at: int, file: str) -> Variable:
    name = name_of(content[: record.name_length], at, file)
    return Variable(UUID(bytes_le=record.guid), name, record.attributes, content[record.name_length :], record.time)


def write(variables: Iterable[Variable], size: str = "4M") -> bytes:
    """Returns a new store; raises `PlanError` if the variables do not fit into it."""
    total = SIZES[size]
    spare_at = total // 2
    # Two blocks before the spare ones are no store: the event log and the working block.
    store_end = spare_at - 2 * _BLOCK
    data = bytearray(b"\xff" * total)
    data[:_STORE_AT] = _volume_header(total)
    store = _STORE.pack(_AUTHENTICATED_STORE.bytes_le, store_end - _STORE_AT, _FORMATTED, _HEALTHY, 0, 0)
    data[_STORE_AT:_FIRST_RECORD] = store
    records = b"".join(_record(variable) for variable in variables)
    if len(records) > store_end - _FIRST_RECORD:
        raise PlanError(
            f"EFI variables have {len(records)} bytes, a store of size {size} holds {store_end - _FIRST_RECORD}"
        )
    data[_FIRST_RECORD : _FIRST_RECORD + len(records)] = records
    data[spare_at - _BLOCK : spare_at - _BLOCK + _WORKING.size] = _working_header()
    return bytes(data)


def _volume_header(total: int) -> bytes:
    blocks = struct.pack("<II", total // _BLOCK, _BLOCK)

    def packed(checksum: int) -> bytes:
        guid = _NV_VOLUME.bytes_le
        return _VOLUME.pack(
            bytes(16), guid, total, SIGNATURE, _ATTRIBUTES, _VOLUME.size, checksum, 0, 0, 2, blocks, bytes(8)
        )

    return packed(-_sum16(packed(0)) & 0xFFFF)


def _working_header() -> bytes:
    """Returns the header of a working block without writes.

    Its CRC is that of the header with the CRC and the state erased, as edk2's InitWorkSpaceHeader computes it.
    """
    guid, queue = _WORKING_BLOCK.bytes_le, _BLOCK - _WORKING.size
    crc = zlib.crc32(_WORKING.pack(guid, _ERASED, 0xFF, b"\xff" * 3, queue))
    return _WORKING.pack(guid, crc, _HEALTHY, b"\xff" * 3, queue)


def _record(variable: Variable) -> bytes:
    name = f"{variable.name}\0".encode("utf-16-le")
    lengths = len(name), len(variable.data)
    header = _RECORD.pack(_START, _ADDED, 0, variable.attributes, 0, variable.time, 0, *lengths, variable.guid.bytes_le)
    record = header + name + variable.data
    return record + b"\xff" * (-len(record) % 4)


def _sum16(data: bytes) -> int:
    return sum(int(word) for (word,) in struct.iter_unpack("<H", data)) & 0xFFFF


_IN_TAR = "efi/nvram"
_SECTOR = 512
_MAX_MEMBERS = 64
_FILE_TYPES, _DIRECTORY = b"0\0", b"5"


def read_tar(data: bytes, file: str) -> Store:
    """Returns the variables in VirtualBox's tar; raises `ImageError` for any other tar."""
    members = dict(_members(data, file))
    if _IN_TAR not in members:
        raise ImageError(f"{file}: tar without a member {_IN_TAR!r} is no EFI variable store of VirtualBox")
    found = read(members[_IN_TAR], f"{file}: {_IN_TAR}")
    others = tuple(name for name in members if name not in (_IN_TAR, tpm.IN_TAR))
    return Store("virtualbox", found.variables, others, members.get(tpm.IN_TAR))


def _members(data: bytes, file: str) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of the files in a tar of short names, as VirtualBox writes it."""
    at = 0
    seen: set[str] = set()
    while (header := data[at : at + _SECTOR]).strip(b"\0"):
        name, size, kind = _member(header, at, file)
        if kind not in _FILE_TYPES + _DIRECTORY or name in seen or len(seen) == _MAX_MEMBERS:
            raise damaged(file, f"member {name[:60]!r}", at, "is no plain file, is there twice, or is one too many")
        seen.add(name)
        content = part(data, at + _SECTOR, size, len(data), file, f"member {name[:60]!r}")
        if kind in _FILE_TYPES:
            yield name, content
        at += _SECTOR + -(-size // _SECTOR) * _SECTOR


def _member(header: bytes, at: int, file: str) -> tuple[str, int, bytes]:
    """Returns name, size and type of a tar header."""
    name = header[:100].partition(b"\0")[0].decode("utf-8", "replace")
    size, checksum = (header[begin:end].strip(b" \0") for begin, end in ((124, 136), (148, 156)))
    if not (re.fullmatch(rb"[0-7]{1,11}", size) and re.fullmatch(rb"[0-7]{1,8}", checksum)):
        raise damaged(file, f"member {name[:60]!r}", at, f"size {size!r} or checksum {checksum!r} is not octal")
    if int(checksum, 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise damaged(file, f"member {name[:60]!r}", at, "its header's checksum is wrong")
    return name, int(size, 8), header[156:157]
