"""The structures of redolog images of Bochs, of which a growing disk is one (Bochs user manual, disk image modes).

    Header | catalog | extents, each a bitmap of its sectors and the sectors

An entry of the catalog is the number of an extent in the file, or "not allocated". All numbers are little-endian.
"""

from __future__ import annotations

from construct import Bytes, Const, Int32ul, Int64ul, Padded, Struct

SECTOR = 512

Header = Struct(
    "magic" / Padded(32, Const(b"Bochs Virtual HD Image\0")),
    "type" / Bytes(16),
    "subtype" / Bytes(16),
    "version" / Int32ul,
    "header_size" / Int32ul,
    "catalog" / Int32ul,
    "bitmap" / Int32ul,
    "extent" / Int32ul,
)
"""Counts of the catalog's entries, and bytes of a bitmap and of an extent. The size of the disk follows."""

SIZE_1, SIZE_2 = Int64ul, Struct("timestamp" / Int32ul, "disk" / Int64ul)

VERSION_1, VERSION_2 = 0x00010000, 0x00020000
NOT_ALLOCATED = 0xFFFFFFFF

# Limits, which QEMU has too.

MAX_CATALOG = 1 << 20
MAX_EXTENT = 8 << 20
"""Bytes."""
