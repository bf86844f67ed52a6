"""The structures of LUKS containers (LUKS1 On-Disk Format Specification 1.2.3, LUKS2 1.1.1).

    LUKS 1:  Header1 with eight key slots | key material of each slot | payload
    LUKS 2:  Header2, JSON area | the same again, with another magic | key slots | payload

All numbers are big-endian. Numbers in LUKS 1 are sectors of 512 bytes, in LUKS 2 bytes.
"""

from __future__ import annotations

from construct import Array, Bytes, Const, Int16ub, Int32ub, Int64ub, Struct

MAGIC = b"LUKS\xba\xbe"
MAGIC_SECOND = b"SKUL\xba\xbe"
SECTOR = 512

Slot1 = Struct(
    "active" / Int32ub,
    "iterations" / Int32ub,
    "salt" / Bytes(32),
    "key_material_offset" / Int32ub,
    "stripes" / Int32ub,
)

Begin = Struct("magic" / Const(MAGIC), "version" / Int16ub)

Header1 = Struct(
    "magic" / Const(MAGIC),
    "version" / Const(1, Int16ub),
    "cipher_name" / Bytes(32),
    "cipher_mode" / Bytes(32),
    "hash_spec" / Bytes(32),
    "payload_offset" / Int32ub,
    "key_bytes" / Int32ub,
    "mk_digest" / Bytes(20),
    "mk_digest_salt" / Bytes(32),
    "mk_digest_iterations" / Int32ub,
    "uuid" / Bytes(40),
    "slots" / Array(8, Slot1),
)

Header2 = Struct(
    "magic" / Bytes(6),
    "version" / Const(2, Int16ub),
    "hdr_size" / Int64ub,
    "seqid" / Int64ub,
    "label" / Bytes(48),
    "csum_alg" / Bytes(32),
    "salt" / Bytes(64),
    "uuid" / Bytes(40),
    "subsystem" / Bytes(48),
    "hdr_offset" / Int64ub,
    "padding" / Bytes(184),
    "csum" / Bytes(64),
)

ENABLED, DISABLED = 0x00AC71F3, 0x0000DEAD

JSON_BEGIN = 4096
"""Offset of the JSON area of LUKS 2 in its header."""
HEADER_SIZES = tuple(1 << bits for bits in range(14, 23))
"""Bytes of a header of LUKS 2 with its JSON area."""

# Limits: a stranger's header must not decide how long a passphrase is tried, or in how much memory.

MAX_ITERATIONS = 1 << 26
"""Of PBKDF2, for one key slot. cryptsetup makes as many as it computes in two seconds."""
MAX_ALL_ITERATIONS = 1 << 27
"""Of all key slots together."""
MAX_MEMORY = 4 << 20
"""KiB of Argon2; cryptsetup's own limit."""
MAX_WORK = 64 << 20
"""KiB that Argon2 passes over for one key slot: memory times passes."""
MAX_LANES = 64
MAX_STRIPES = 4000
"""What all programs write."""
MAX_KEY = 128
MAX_SALT = 256
MAX_SLOTS = 32
MAX_ITEMS = 64
"""Segments, digests and tokens of LUKS 2."""
