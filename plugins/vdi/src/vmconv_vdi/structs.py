"""The structures of a VDI image, in the order of VirtualBox's VDICore.h.

    0               PreHeader, Header (version 1.1)
    offBlocks       block map: for each block of the disk its number in the data area, or a code
    offData         data area: blocks of cbBlockExtra + cbBlock bytes, contiguous

All numbers are little-endian, in UUIDs the first three fields too. Reader and writer handle the block map with numpy.
"""

from __future__ import annotations

from typing import Any

from construct import Bytes, Const, Int16ul, Int32ul, Int64ul, Struct

SIGNATURE = 0xBEDA107F
VERSION = 0x00010001

PreHeader = Struct(
    "szFileInfo" / Bytes(64),
    "u32Signature" / Const(SIGNATURE, Int32ul),
    "u32Version" / Int32ul,
)

Geometry = Struct("cCylinders" / Int32ul, "cHeads" / Int32ul, "cSectors" / Int32ul, "cbSector" / Int32ul)

Header = Struct(
    "cbHeader" / Int32ul,
    "u32Type" / Int32ul,
    "fFlags" / Int32ul,
    "szComment" / Bytes(256),
    "offBlocks" / Int32ul,
    "offData" / Int32ul,
    "LegacyGeometry" / Geometry,
    "u32Dummy" / Int32ul,
    "cbDisk" / Int64ul,
    "cbBlock" / Int32ul,
    "cbBlockExtra" / Int32ul,
    "cBlocks" / Int32ul,
    "cBlocksAllocated" / Int32ul,
    "uuidCreate" / Bytes(16),
    "uuidModify" / Bytes(16),
    "uuidLinkage" / Bytes(16),
    "uuidParentModify" / Bytes(16),
)
"""The common part of headers of version 1.1; longer ones continue with `LCHSGeometry`, a `Geometry`."""

HEADER_OFFSET = PreHeader.sizeof()
HEADER_LENGTH = Header.sizeof()
LONG_HEADER_LENGTH = HEADER_LENGTH + Geometry.sizeof()

NORMAL, FIXED, UNDO, DIFFERENCING = 1, 2, 3, 4
TYPES = {NORMAL: "dynamic", FIXED: "static", UNDO: "undo", DIFFERENCING: "differencing"}

SECTOR = 512
NIL_UUID = bytes(16)

# Block map entries: numbers of blocks below DISCARDED, and

UNALLOCATED = 0xFFFFFFFF
"""The block was never written: it reads as in the parent, or as zero."""
DISCARDED = 0xFFFFFFFE
"""The block reads as zero and hides the parent."""


def uuid_text(uuid: bytes) -> str:
    """Returns a UUID as text."""
    first, second, third = Int32ul.parse(uuid[:4]), Int16ul.parse(uuid[4:6]), Int16ul.parse(uuid[6:8])
    return f"{first:08x}-{second:04x}-{third:04x}-{uuid[8:10].hex()}-{uuid[10:].hex()}"


def uuid_bytes(uuid: Any) -> bytes:
    """Returns a UUID (or its text) as the format stores it."""
    plain = bytes.fromhex(str(uuid).replace("-", ""))
    return plain[3::-1] + plain[5:3:-1] + plain[7:5:-1] + plain[8:]


# Limits of the memory that the numbers of an image can demand.

MAX_HEADER = 4096
MIN_BLOCK = 512
MAX_BLOCK = 1 << 30
MAX_BLOCKS = 0x3FFFFFFF
"""QEMU's limit."""
