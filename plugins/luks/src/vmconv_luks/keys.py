"""The key of a container, from a passphrase: derived, checked, and never stored."""

from __future__ import annotations

import hashlib
import hmac

from vmconv.plugin import AccessError, ImageError, Opener, counted, read_part
from vmconv_luks.ciphers import SectorCipher
from vmconv_luks.volume import Derivation, Slot, Volume


def unlock(volume: Volume, opener: Opener) -> bytes:
    """Returns the key of a container. Raises `SecretError` without a passphrase, `AccessError` if none fits."""
    name = volume.file.name
    passphrases = opener.passphrases(volume.file)
    if not volume.slots:
        raise ImageError(f"{name}: has no key slot in use: nobody can decrypt it")
    for passphrase in passphrases:
        for slot in volume.slots:
            key = _from_slot(volume, slot, passphrase)
            if key is not None:
                return key
    what = "the passphrase opens" if len(passphrases) == 1 else f"none of {len(passphrases)} passphrases opens"
    count = counted(len(volume.slots), "key slot")
    which = f"none of its {count}" if len(passphrases) == 1 else f"one of its {count}"
    lines = any(one.endswith(b"\n") for one in passphrases)
    raise AccessError(
        f"{name}: {what} {which}",
        hint="the secret ends with a line break, which is part of it: printf %s writes none" if lines else None,
    )


def _from_slot(volume: Volume, slot: Slot, passphrase: bytes) -> bytes | None:
    """Returns the key in a slot, None if the passphrase is not that of the slot."""
    data = read_part(volume.file, f"key slot {slot.name}", slot.offset, slot.length)
    derived = _derived(volume, slot.derivation, passphrase, slot.cipher_key_bytes, slot.name)
    split = SectorCipher(slot.cipher, derived).decrypt(0, data)
    key = merged(split[: slot.key_bytes * slot.stripes], slot.key_bytes, slot.split_hash)
    for digest in volume.digests:
        if slot.name in digest.slots:
            found = _derived(volume, digest.derivation, key, len(digest.value), slot.name)
            if hmac.compare_digest(found, digest.value):
                return key
    return None


def _derived(volume: Volume, how: Derivation, secret: bytes, length: int, slot: str) -> bytes:
    if how.kind == "pbkdf2":
        return hashlib.pbkdf2_hmac(how.hash, secret, how.salt, how.passes, length)
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2i, Argon2id

    kind = Argon2id if how.kind == "argon2id" else Argon2i
    try:
        return kind(
            salt=how.salt, length=length, iterations=how.passes, lanes=how.lanes, memory_cost=how.memory
        ).derive(secret)
    except MemoryError as exc:
        raise ImageError(
            f"{volume.file.name}: key slot {slot}: {how.kind} needs {how.memory} KiB of memory, which there are not"
        ) from exc


def merged(split: bytes, length: int, digest: str) -> bytes:
    """Returns the key of `length` bytes from its stripes (the anti-forensic splitter of LUKS)."""
    found = bytes(length)
    for at in range(0, len(split) - length, length):
        found = diffused(xor(found, split[at : at + length]), digest)
    return xor(found, split[len(split) - length :])


def diffused(data: bytes, digest: str) -> bytes:
    """Returns the digests of the blocks of `data`, each with its number before it, cut to the length of `data`."""
    # By its attribute, which is faster than by its name: this runs for each of 4000 stripes.
    new = getattr(hashlib, digest)
    size = new().digest_size
    found = b""
    for number, at in enumerate(range(0, len(data), size)):
        found += new(number.to_bytes(4, "big") + data[at : at + size]).digest()
    return found[: len(data)]


def xor(one: bytes, other: bytes) -> bytes:
    """Returns the exclusive or of bytes of one length."""
    return (int.from_bytes(one) ^ int.from_bytes(other)).to_bytes(len(one))
