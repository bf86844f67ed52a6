"""Bytes of journals and undo files with any fields."""

from __future__ import annotations

import json
import struct
from hashlib import blake2b
from typing import Any

from vmconv.inplace.journal import MAGIC, Journal


def digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=32).digest()


def journal_of(text: bytes, rest: bytes = b"", *, commit: bool = True) -> bytes:
    """Returns a journal with a right digest around any fields."""
    body = struct.pack("<Q", len(text)) + text + rest
    return (
        MAGIC + struct.pack("<Q32s32s", len(body), digest(body), bytes(32)) + body + (digest(body) if commit else b"")
    )


def fields_of(journal: Journal) -> dict[str, Any]:
    encoded = journal.encode(lambda _: bytes(32))
    (length,) = struct.unpack_from("<Q", encoded, 136)
    found: dict[str, Any] = json.loads(encoded[144 : 144 + length])
    return found


def rows(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *numbers)


UNDO_FIELDS = {
    "source": "old.raw",
    "target": "disk.vmdk",
    "source_format": "raw",
    "size": 65536,
    "mtime": 1,
    "siblings": [],
    "made": [],
    "tables": [0, 0],
}
