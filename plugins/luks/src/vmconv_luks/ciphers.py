"""Encryption of sectors: AES in the modes XTS and CBC, computed for many sectors at once.

The library sets up one cipher for each call, which for sectors of 512 bytes takes longer than the cipher. So the modes
are numpy here, and the library encrypts all blocks of many sectors in one call.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from vmconv_luks import structs

_BLOCK = 16
_POLYNOMIAL = 0x87
"""x^128 + x^7 + x^2 + x + 1 of XTS (IEEE 1619)."""

_Words = npt.NDArray[np.uint64]

XTS_KEYS, CBC_KEYS = (32, 64), (16, 24, 32)
"""Bytes of keys."""
HASHES = ("sha1", "sha224", "sha256", "sha384", "sha512")


class UnsupportedCipherError(Exception):
    """The text says what is not supported."""


class SectorCipher:
    """A cipher as dm-crypt names it, such as "aes-xts-plain64", with its key; encrypts whole sectors of `unit` bytes.

    Raises `UnsupportedCipherError` for another one.
    """

    def __init__(self, name: str, key: bytes, unit: int = structs.SECTOR) -> None:
        self._mode, self._iv, digest = parse(name, len(key))
        self._unit = unit
        self._key, self._tweak_key = (key[: len(key) // 2], key[len(key) // 2 :]) if self._mode == "xts" else (key, b"")
        if self._iv == "essiv":
            self._tweak_key = hashlib.new(digest, key).digest()

    def decrypt(self, sector: int, data: bytes) -> bytes:
        """Returns the plain text of sectors; `sector` is the number of the first, in units of 512 bytes."""
        words = self._words(data)
        if self._mode == "xts":
            tweak = self._tweaks(sector, len(words))
            return (self._blocks(words ^ tweak, decrypt=True) ^ tweak).tobytes()
        plain = self._blocks(words, decrypt=True)
        plain[:, 0] ^= self._ivs(sector, len(words))
        plain[:, 1:] ^= words[:, :-1]
        return plain.tobytes()

    def encrypt(self, sector: int, data: bytes) -> bytes:
        """Returns the cipher text of sectors."""
        words = self._words(data)
        if self._mode == "xts":
            tweak = self._tweaks(sector, len(words))
            return (self._blocks(words ^ tweak) ^ tweak).tobytes()
        found = words.copy()
        before = self._ivs(sector, len(words))
        for number in range(words.shape[1]):
            before = found[:, number] = self._blocks(words[:, number] ^ before)
        return found.tobytes()

    def _words(self, data: bytes) -> _Words:
        """Returns bytes as sectors of blocks of two words."""
        return np.frombuffer(data, dtype="<u8").reshape(-1, self._unit // _BLOCK, 2)

    def _blocks(self, words: _Words, *, decrypt: bool = False) -> _Words:
        return _ecb(self._key, words, decrypt=decrypt)

    def _ivs(self, sector: int, count: int) -> _Words:
        """Returns the initialization vectors of sectors, each two words."""
        numbers = sector + np.arange(count, dtype=np.uint64) * np.uint64(self._unit // structs.SECTOR)
        found = np.zeros((count, 2), dtype="<u8")
        found[:, 0] = numbers & np.uint64(0xFFFFFFFF) if self._iv == "plain" else numbers
        return _ecb(self._tweak_key, found) if self._iv == "essiv" else found

    def _tweaks(self, sector: int, count: int) -> _Words:
        """Returns the tweak of each block of sectors: that of the sector, times x for each block."""
        blocks = self._unit // _BLOCK
        found = np.empty((count, blocks, 2), dtype="<u8")
        one, carry = np.uint64(1), np.uint64(63)
        now = _ecb(self._tweak_key, self._ivs(sector, count))
        for number in range(blocks):
            found[:, number] = now
            low, high = now[:, 0], now[:, 1]
            now = np.stack([(low << one) ^ (high >> carry) * np.uint64(_POLYNOMIAL), (high << one) | (low >> carry)], 1)
        return found


def key_name(cipher: str, key: bytes) -> str:
    """Returns a name of a cipher with its key that tells nothing of the key, for `Decoded.cipher`."""
    return f"{cipher} {hashlib.sha256(b'vmconv ' + cipher.encode() + key).hexdigest()}"


def _ecb(key: bytes, words: _Words, *, decrypt: bool = False) -> _Words:
    cipher = Cipher(algorithms.AES(key), modes.ECB())
    context = cipher.decryptor() if decrypt else cipher.encryptor()
    # Writable, unlike the bytes that `update` returns.
    found = np.empty(words.nbytes + _BLOCK, dtype=np.uint8)
    done = context.update_into(np.ascontiguousarray(words).reshape(-1).view(np.uint8).data, found.data)
    return found[:done].view("<u8").reshape(words.shape)


def parse(name: str, key_bytes: int) -> tuple[str, str, str]:
    """Returns mode, generator of initialization vectors and its hash. Raises `UnsupportedCipherError`."""
    cipher, _, rest = name.partition("-")
    mode, _, generator = rest.partition("-")
    iv, _, digest = generator.partition(":")
    if cipher != "aes" or mode not in ("xts", "cbc") or iv not in ("plain", "plain64", "essiv"):
        raise UnsupportedCipherError(f"cipher {name!r} is not supported, only aes in the modes xts and cbc")
    keys = XTS_KEYS if mode == "xts" else CBC_KEYS
    if key_bytes not in keys:
        raise UnsupportedCipherError(f"a key of {key_bytes} bytes, aes-{mode} has {' or '.join(map(str, keys))}")
    if iv == "essiv":
        if mode != "cbc" or digest not in HASHES or hashlib.new(digest).digest_size not in CBC_KEYS:
            raise UnsupportedCipherError(f"cipher {name!r} is not supported: its hash yields no key of aes")
    elif digest:
        raise UnsupportedCipherError(f"cipher {name!r} is not supported")
    return mode, iv, digest
