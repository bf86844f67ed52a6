"""The structures of UDIF images. Apple has published none; these are the facts that libmodi's documentation lists.

    data fork: bytes of chunks | property list | trailer, the last 512 bytes of the file

The property list is XML. It has a block table for each partition, under "resource-fork" and "blkx": a header and
entries, each of which says what a range of sectors is. All numbers are big-endian.
"""

from __future__ import annotations

from construct import Bytes, Const, Int32ub, Int64ub, Struct

SECTOR = 512
TRAILER_LENGTH = 512

Checksum = Struct(
    "kind" / Int32ub,
    "bits" / Int32ub,
    "data" / Bytes(128),
)
CRC32 = 2
"""The kind of checksum that hdiutil makes: a CRC-32, 32 bits.

That of a block table is over its sectors, without those that are `IGNORED`. The trailer's master checksum is over the
checksums of the tables. The one of the data fork is not compared.
"""

Trailer = Struct(
    "signature" / Const(b"koly"),
    "version" / Int32ub,
    "header_size" / Int32ub,
    "flags" / Int32ub,
    "running_data_fork_offset" / Int64ub,
    "data_fork_offset" / Int64ub,
    "data_fork_length" / Int64ub,
    "resource_fork_offset" / Int64ub,
    "resource_fork_length" / Int64ub,
    "segment_number" / Int32ub,
    "segment_count" / Int32ub,
    "segment_identifier" / Bytes(16),
    "data_checksum" / Bytes(136),
    "plist_offset" / Int64ub,
    "plist_length" / Int64ub,
    "reserved" / Bytes(120),
    "master_checksum" / Checksum,
    "image_variant" / Int32ub,
    "sector_count" / Int64ub,
    "reserved2" / Bytes(12),
)

BlockTable = Struct(
    "signature" / Const(b"mish"),
    "version" / Int32ub,
    "first_sector" / Int64ub,
    "sector_count" / Int64ub,
    "data_offset" / Int64ub,
    "buffers_needed" / Int32ub,
    "descriptor" / Int32ub,
    "reserved" / Bytes(24),
    "checksum" / Checksum,
    "entry_count" / Int32ub,
)

ENTRY = [
    ("kind", ">u4"),
    ("comment", ">u4"),
    ("sector", ">u8"),
    ("count", ">u8"),
    ("offset", ">u8"),
    ("length", ">u8"),
]
"""An entry of a block table: 40 bytes. Sectors count from the table's first, the offset from the data fork's."""

ZERO_FILL, RAW, IGNORED = 0x00000000, 0x00000001, 0x00000002
ADC, ZLIB, BZIP2, LZFSE, LZMA = 0x80000004, 0x80000005, 0x80000006, 0x80000007, 0x80000008
COMMENT, TERMINATOR = 0x7FFFFFFE, 0xFFFFFFFF

# Limits: a stranger's image must not decide how much memory it takes.

MAX_PLIST = 64 << 20
"""Bytes of the property list: a million chunks, which hdiutil makes of 512 KiB or more."""
MAX_TABLES = 1024
"""Block tables; hdiutil makes one for each partition and each gap between them."""
MAX_CHUNK = 64 << 20
"""Bytes of a compressed chunk, and of what it becomes; QEMU has the same limit."""
