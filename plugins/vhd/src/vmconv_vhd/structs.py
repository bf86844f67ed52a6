"""The structures of a VHD image, in the order of Microsoft's Virtual Hard Disk Image Format Specification 1.0.

    fixed                   payload | Footer
    dynamic, differencing   copy of Footer | DynamicHeader | parent locators, BAT, blocks in any order | Footer
    block                   sector bitmap, padded to whole sectors | payload of the block

All numbers are big-endian. The BAT holds one 32-bit sector number for each block. Bit 7 of a bitmap's first byte
is the block's first sector; it is 1 where a differencing disk holds the sector itself.
"""

from __future__ import annotations

from construct import Array, Bytes, Const, Int8ub, Int16ub, Int32ub, Int64ub, Padding, Struct

SECTOR = 512
COOKIE = b"conectix"

# Hard disk footer

Footer = Struct(
    "cookie" / Const(COOKIE),
    "features" / Int32ub,
    "file_format_version" / Int32ub,
    "data_offset" / Int64ub,
    "time_stamp" / Int32ub,
    "creator_application" / Bytes(4),
    "creator_version" / Int32ub,
    "creator_host_os" / Bytes(4),
    "original_size" / Int64ub,
    "current_size" / Int64ub,
    "cylinders" / Int16ub,
    "heads" / Int8ub,
    "sectors" / Int8ub,
    "disk_type" / Int32ub,
    "checksum" / Int32ub,
    "unique_id" / Bytes(16),
    "saved_state" / Int8ub,
    # 427 reserved bytes, of which old footers have one less.
    Padding(426),
)

OLD_FOOTER_LENGTH = Footer.sizeof()
FOOTER_LENGTH = 512
FEATURE_RESERVED = 2
VERSION = 0x00010000
NOWHERE = 0xFFFFFFFFFFFFFFFF
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
DISK_TYPES = {FIXED: "fixed", DYNAMIC: "dynamic", DIFFERENCING: "differencing"}
CHECKSUM_OFFSET = 64

# Dynamic disk header

ParentLocator = Struct(
    "platform_code" / Bytes(4),
    "platform_data_space" / Int32ub,
    "platform_data_length" / Int32ub,
    Padding(4),
    "platform_data_offset" / Int64ub,
)

LOCATORS = 8

DynamicHeader = Struct(
    "cookie" / Const(b"cxsparse"),
    "data_offset" / Int64ub,
    "table_offset" / Int64ub,
    "header_version" / Int32ub,
    "max_table_entries" / Int32ub,
    "block_size" / Int32ub,
    "checksum" / Int32ub,
    "parent_unique_id" / Bytes(16),
    "parent_time_stamp" / Int32ub,
    Padding(4),
    "parent_unicode_name" / Bytes(512),
    "parent_locators" / Array(LOCATORS, ParentLocator),
    Padding(256),
)

DYNAMIC_HEADER_LENGTH = DynamicHeader.sizeof()
HEADER_CHECKSUM_OFFSET = 36
RELATIVE, ABSOLUTE, MAC = b"W2ru", b"W2ku", b"MacX"

# Block allocation table

UNUSED = 0xFFFFFFFF
BLOCK_SIZE = 2 << 20

# Limits of the memory that the numbers of an image can demand.

MAX_BLOCK_SIZE = 256 << 20
MAX_LOCATOR_LENGTH = 4096
MAX_SIZE = 2040 << 30
"""Largest disk, bytes: the limit of Hyper-V and QEMU, below that of 32-bit sector numbers."""

# Geometry, appendix "CHS Calculation"

MAX_GEOMETRY = (65535, 16, 255)

SIZED_BY_FOOTER = (b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS")
"""Creators for which every reader takes the size from the footer and not from the geometry: QEMU's list."""


def creator_code(name: str) -> bytes:
    """Returns the field of a creator, padded with spaces."""
    code = name.encode("ascii", "replace")
    return next((known for known in SIZED_BY_FOOTER if known.rstrip(b"\0 ") == code), code.ljust(4))


def checksum(data: bytes, field: int) -> int:
    """Returns the one's complement of the sum of all bytes but those of the checksum at offset `field`."""
    return ~(sum(data) - sum(data[field : field + 4])) & 0xFFFFFFFF


def geometry_of(sectors: int) -> tuple[int, int, int]:
    """Returns the cylinders, heads and sectors per track of the largest geometry inside a disk of this many sectors."""
    most_cylinders, most_heads, most_sectors = MAX_GEOMETRY
    sectors = min(sectors, most_cylinders * most_heads * most_sectors)
    if sectors >= most_cylinders * most_heads * 63:
        per_track, heads = most_sectors, most_heads
    else:
        per_track = 17
        heads = max(4, -(-(sectors // per_track) // 1024))
        for wider in (31, 63):
            if sectors // per_track < heads * 1024 and heads <= 16:
                break
            per_track, heads = wider, 16
    return sectors // per_track // heads, heads, per_track
