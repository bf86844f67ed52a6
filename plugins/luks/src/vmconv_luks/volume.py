"""What a header says, of either version: how payload is encrypted, and the key slots that hold its key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from vmconv.plugin import File


class Derivation(NamedTuple):
    """How a key is derived from a passphrase: `kind` is "pbkdf2", "argon2i" or "argon2id".

    `passes` are iterations of PBKDF2. `memory` is KiB.
    """

    kind: str
    hash: str
    passes: int
    salt: bytes
    memory: int = 0
    lanes: int = 1


class Slot(NamedTuple):
    """A key slot: the volume's key, split into `stripes`, encrypted by a key that is derived from a passphrase.

    `offset` and `length` are bytes of the file.
    """

    name: str
    derivation: Derivation
    key_bytes: int
    offset: int
    length: int
    cipher: str
    cipher_key_bytes: int
    stripes: int
    split_hash: str


class Digest(NamedTuple):
    """What tells the volume's key, for the slots named."""

    derivation: Derivation
    value: bytes
    slots: frozenset[str]


class Volume(NamedTuple):
    """A container. `payload` is the offset of its first sector in the file, `size` its bytes.

    The first sector has the number `first_sector` for the cipher, in units of 512 bytes.
    """

    file: File
    version: int
    cipher: str
    key_bytes: int
    sector: int
    payload: int
    size: int
    first_sector: int
    slots: tuple[Slot, ...]
    digests: tuple[Digest, ...]
    areas: tuple[tuple[str, int, int], ...]
    """Names, offsets and lengths of all parts of the file."""
    facts: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
