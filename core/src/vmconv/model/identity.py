"""The ids of new images: UUIDs, GUIDs and content ids.

Hypervisors take two images with one id for the same image, and ids are what reveals an exchanged parent. So each new
image has an identity of its own, random or given by the user, and all its ids are derived from it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmconv.model.extents import Extents
    from vmconv.model.sources import File

SIZE = 16
"""Bytes of an identity: a UUID in big-endian order."""

_RANDOM, _CUSTOM = 4, 8


def fresh() -> bytes:
    """Returns a random identity: a UUID of version 4 (RFC 9562)."""
    return _uuid(os.urandom(SIZE), _RANDOM)


def derived(identity: bytes, label: str) -> bytes:
    """Returns the UUID of version 8 (RFC 9562) derived from an identity and a label."""
    from hashlib import blake2b

    return _uuid(blake2b(label.encode("utf-8", "surrogateescape"), digest_size=SIZE, key=identity).digest(), _CUSTOM)


def of_disk(table: Extents, files: Iterable[File], label: str) -> bytes:
    """Returns an identity for a disk that stays the same until one of its files changes."""
    from hashlib import blake2b

    digest = blake2b(digest_size=SIZE)
    for column in table.columns:
        digest.update(column.tobytes())
    for file in files:
        digest.update(repr(tuple(file.stamp)).encode())
    return derived(digest.digest(), label)


def _uuid(data: bytes, version: int) -> bytes:
    # RFC 9562: 4 bits of version, 2 bits of variant.
    found = bytearray(data)
    found[6] = found[6] & 0x0F | version << 4
    found[8] = found[8] & 0x3F | 0x80
    return bytes(found)
