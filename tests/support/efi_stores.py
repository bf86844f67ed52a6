"""EFI variable stores for tests, made from the published layouts: Hyper-V's guest state file, and VirtualBox's tar."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Sequence
from uuid import UUID

BLOCK = 4096

Made = tuple[UUID, str, int, bytes, bytes]
"""GUID, name, attributes, data, time."""


def guest_state(
    variables: Sequence[Made], *, encryption: int = 0, sequences: tuple[int, int] = (6, 7), tpm: bool = False
) -> bytes:
    """Returns a guest state file of 512-byte sectors: two headers, the file table in block 2, variables in block 3."""
    content = b"".join(_record(*each) for each in variables)
    blocks = max(1, -(-len(content) // BLOCK))
    entries = {1: (3, blocks, len(content))}
    if tpm:
        entries[3] = (3 + blocks, 1, 100)
    table = b"".join(struct.pack("<IIQ48x", *entries.get(number, (0, 0, 0))) for number in range(64))
    # The header that does not count names another table, which is full of nonsense.
    headers = {sequence: (2 if sequence == sequences[1] else 3 + blocks) for sequence in sequences}
    start = b"".join(_header(sequence, at, encryption).ljust(512, b"\0") for sequence, at in headers.items())
    body = start.ljust(2 * BLOCK, b"\0") + table + content.ljust(blocks * BLOCK, b"\0") + b"\xee" * BLOCK
    return body.ljust(64 * BLOCK, b"\0") + b"conectix".ljust(512, b"\0")


def _header(sequence: int, table_at: int, encryption: int) -> bytes:
    def packed(checksum: int) -> bytes:
        fields = (0x00030000, checksum, sequence, 168, table_at, 1, encryption, 0)
        return struct.pack("<8sIIIIIIHH132x", b"GUESTRTS", *fields)

    return packed(zlib.crc32(packed(0)))


def _record(guid: UUID, name: str, attributes: int, data: bytes, time: bytes) -> bytes:
    text = f"{name}\0".encode("utf-16-le")
    length = 48 + len(text) + len(data)
    return struct.pack("<III16s16sHH", 0, length, attributes, time, guid.bytes_le, len(text), len(data)) + text + data


def with_tpm(store: bytes, names: Sequence[str] = ("efi/nvram", "TpmEmuTpms/permall")) -> bytes:
    """Returns the tar in which VirtualBox keeps a store and the state of a TPM."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            content = store if name == "efi/nvram" else b"state"
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()
