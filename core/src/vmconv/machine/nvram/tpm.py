"""The state of a TPM 2.0 of libtpms in the files of swtpm and VirtualBox: the same bytes in different frames.

    permall of swtpm    u8 version 2, u8 least version 1, u16 length 10, u16 flags, u32 length of all; then records:
                        u16 tag, u32 length, content; big-endian. Tag 1 is the state.
    linear file         "swtpmlin" as u64, u8 version 1, u8 0, u16 length 192; 15 x {u32 offset, u32 length, u32 space};
                        little-endian. The first entry is a permall with its header, as above. Proxmox VE has this.
    VirtualBox          the state itself, as a member of the tar that is its store of variables

Found by analysis of what swtpm 0.7 and VirtualBox 7.2 write, which were compared byte by byte.
"""

from __future__ import annotations

import io
import struct
import tarfile

from vmconv.errors import ImageError
from vmconv.machine.nvram.variables import damaged, part

IN_TAR = "TpmEmuTpms/permall"

MAX_FILE = 16 << 20
"""Bytes of a file with a state. Proxmox VE gives it 4 MiB."""

LINEAR_SIZE = 4 << 20

_HEADER = struct.Struct(">BBHHI")
_RECORD = struct.Struct(">HI")
_STATE_TAG = 1

_LINEAR = struct.Struct("<QBBH")
_ENTRY = struct.Struct("<III")
_LINEAR_MAGIC = 0x737774706D6C696E
_LINEAR_HEADER, _ENTRIES, _SPACE = 192, 15, 1024

_BLOB_MAGIC = bytes.fromhex("ab364723")
"""PERSISTENT_ALL_MAGIC of libtpms, behind a version of two bytes."""

_MODE = 0o600


def read(data: bytes, file: str) -> bytes | None:
    """Returns the state in a file of swtpm; None if the file is empty, as that of a TPM that never ran.

    Raises `ImageError` if it is damaged, encrypted, or the state of a TPM 1.2.
    """
    if not data.strip(b"\0"):
        return None
    at, end = 0, len(data)
    if data[:8] == _LINEAR_MAGIC.to_bytes(8, "little"):
        at, end = _in_linear(data, file)
        if at == end:
            return None
    return checked(_in_permall(data, at, end, file), file)


def _in_linear(data: bytes, file: str) -> tuple[int, int]:
    _, version, _, length = _LINEAR.unpack(part(data, 0, _LINEAR.size, len(data), file, "header"))
    if (version, length) != (1, _LINEAR_HEADER):
        raise damaged(file, "header", 8, f"version {version} with {length} bytes, not 1 with {_LINEAR_HEADER}")
    offset, used, _ = _ENTRY.unpack(part(data, _LINEAR.size, _ENTRY.size, len(data), file, "entry"))
    if offset == 0:
        return 0, 0
    part(data, offset, used, len(data), file, "state")
    return offset, offset + used


def _in_permall(data: bytes, at: int, end: int, file: str) -> bytes:
    version, least, length, flags, whole = _HEADER.unpack(part(data, at, _HEADER.size, end, file, "header"))
    if version < 2 or least > 2 or length != _HEADER.size or not length <= whole <= end - at:
        raise damaged(file, "header", at, "is not one of swtpm's state of a TPM 2.0")
    if flags:
        raise ImageError(f"{file}: the state of the TPM is encrypted or split (flags {flags:#x})")
    begin, end = at + length, at + whole
    tag, size = _RECORD.unpack(part(data, begin, _RECORD.size, end, file, "record"))
    if tag != _STATE_TAG:
        raise ImageError(f"{file}: the state of the TPM is encrypted (record {tag})")
    return part(data, begin + _RECORD.size, size, end, file, "record")


def checked(state: bytes, file: str) -> bytes:
    """Returns a state; raises `ImageError` if it is not one of a TPM 2.0 of libtpms."""
    if state[2:6] != _BLOB_MAGIC:
        raise ImageError(f"{file}: is no state of a TPM 2.0 of libtpms")
    return state


def swtpm(state: bytes) -> bytes:
    """Returns the content of `tpm2-00.permall`."""
    record = _RECORD.pack(_STATE_TAG, len(state)) + state
    return _HEADER.pack(2, 1, _HEADER.size, 0, _HEADER.size + len(record)) + record


def linear(state: bytes) -> bytes:
    """Returns the content of a linear file of swtpm, of `LINEAR_SIZE` bytes."""
    content = swtpm(state)
    space = -(-len(content) // _SPACE) * _SPACE
    entries = _ENTRY.pack(_LINEAR_HEADER, len(content), space) + bytes(_ENTRY.size * (_ENTRIES - 1))
    return (_LINEAR.pack(_LINEAR_MAGIC, 1, 0, _LINEAR_HEADER) + entries + content).ljust(LINEAR_SIZE, b"\0")


def virtualbox(store: bytes, state: bytes) -> bytes:
    """Returns VirtualBox's tar with a store of variables and the state of a TPM."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in ((IN_TAR, state), ("efi/nvram", store)):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), _MODE
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()
