"""Makes headers of LUKS 1 for encrypted images of QEMU, with the layout of QEMU's own.

    Header1, to 4096 | key material of slot 0 | ... of slots 1 to 7, unused

A writer puts the header into its image, and encrypts sectors of 512 bytes, which are numbered from the image's begin.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid

from vmconv.plugin import AccessError, Encryptor
from vmconv_luks import structs
from vmconv_luks.ciphers import SectorCipher, key_name
from vmconv_luks.keys import diffused, xor

CIPHER, MODE, HASH = "aes", "xts-plain64", "sha256"
KEY_BYTES = 64
STRIPES = 4000
_SLOTS = 8
_BEGIN = 4096
"""Offset of the first key slot, and the unit of slots, as QEMU lays them out."""
_ROOM = -(-KEY_BYTES * STRIPES // _BEGIN) * _BEGIN
LENGTH = _BEGIN + _SLOTS * _ROOM
"""Bytes of a header with the room of all key slots."""
LEAST_ITERATIONS = 100_000
MOST_ITERATIONS = 1 << 25
"""Half of what the reader takes."""
_SECONDS = 2.0
"""How long deriving a key takes, as for cryptsetup and QEMU."""
_TRIAL = 50_000


def encryptor(passphrase: bytes) -> Encryptor:
    """Returns a new encryption with a random key, which the passphrase opens.

    Raises `AccessError` for one that QEMU would read otherwise: it takes text in UTF-8 that ends at a NUL.
    """
    try:
        passphrase.decode()
    except UnicodeDecodeError:
        # Without its cause, which has the bytes.
        raise AccessError("the passphrase is not UTF-8, and QEMU takes no other") from None
    if b"\0" in passphrase:
        raise AccessError("the passphrase has a NUL byte, at which it ends for QEMU")
    key = os.urandom(KEY_BYTES)
    cipher = SectorCipher(f"{CIPHER}-{MODE}", key)
    return Encryptor(_header(key, passphrase), LENGTH, key_name(f"{CIPHER}-{MODE}", key), cipher.encrypt, passphrase)


def iterations() -> int:
    """Returns the iterations of PBKDF2 that take this machine about two seconds."""
    # Of this thread alone: other work must not make the passphrase easier to guess.
    before = time.thread_time()
    hashlib.pbkdf2_hmac(HASH, b"trial", bytes(32), _TRIAL, KEY_BYTES)
    seconds = max(time.thread_time() - before, 1e-6)
    return min(max(int(_TRIAL * _SECONDS / seconds), LEAST_ITERATIONS), MOST_ITERATIONS)


def _header(key: bytes, passphrase: bytes) -> bytes:
    """Returns the header up to the end of key slot 0, which has the key."""
    count = iterations()
    # A random key cannot be guessed, so its digest may be quick to compute.
    of_digest = max(count // 8, 1000)
    salt, digest_salt = os.urandom(32), os.urandom(32)
    derived = hashlib.pbkdf2_hmac(HASH, passphrase, salt, count, KEY_BYTES)
    material = SectorCipher(f"{CIPHER}-{MODE}", derived).encrypt(0, split(key, STRIPES, HASH))
    head = structs.Header1.build(
        {
            "cipher_name": CIPHER.encode().ljust(32, b"\0"),
            "cipher_mode": MODE.encode().ljust(32, b"\0"),
            "hash_spec": HASH.encode().ljust(32, b"\0"),
            "payload_offset": LENGTH // structs.SECTOR,
            "key_bytes": KEY_BYTES,
            "mk_digest": hashlib.pbkdf2_hmac(HASH, key, digest_salt, of_digest, 20),
            "mk_digest_salt": digest_salt,
            "mk_digest_iterations": of_digest,
            "uuid": str(uuid.uuid4()).encode().ljust(40, b"\0"),
            "slots": [
                {
                    "active": structs.DISABLED if number else structs.ENABLED,
                    "iterations": 0 if number else count,
                    "salt": bytes(32) if number else salt,
                    "key_material_offset": (_BEGIN + number * _ROOM) // structs.SECTOR,
                    "stripes": STRIPES,
                }
                for number in range(_SLOTS)
            ],
        }
    )
    return bytes(head).ljust(_BEGIN, b"\0") + material


def split(key: bytes, stripes: int, digest: str) -> bytes:
    """Returns a key in stripes, all of which are needed to find it (the anti-forensic splitter of LUKS)."""
    size = len(key)
    random = os.urandom((stripes - 1) * size)
    mixed = bytes(size)
    for at in range(0, len(random), size):
        mixed = diffused(xor(mixed, random[at : at + size]), digest)
    return random + xor(mixed, key)
