"""The structures of a Parallels expandable image, in the order of QEMU's docs/interop/parallels.txt.

    0               Header
    64              BAT: the offset of each cluster in the file, in sectors (version 1) or clusters
    data_off        data area: clusters, and optionally the Format Extension

All numbers are little-endian. Reader and writer handle the BAT with numpy.
"""

from __future__ import annotations

from construct import Bytes, Int32ul, Int64ul, Struct

MAGIC_V1 = b"WithoutFreeSpace"
MAGIC_V2 = b"WithouFreSpacExt"
VERSION = 2

Header = Struct(
    "magic" / Bytes(16),
    "version" / Int32ul,
    "heads" / Int32ul,
    "cylinders" / Int32ul,
    "tracks" / Int32ul,
    "nb_bat_entries" / Int32ul,
    "nb_sectors" / Int64ul,
    "in_use" / Int32ul,
    "data_off" / Int32ul,
    "flags" / Int32ul,
    "ext_off" / Int64ul,
)

HEADER_LENGTH = Header.sizeof()
SECTOR = 512

IN_USE = 0x746F6E59
"""The image is open for writing. Closed images have been seen with all other values."""
CLOSED = 0x312E3276

EMPTY = 1
"""Flag: the disk reads as zero, and the BAT is ignored."""

MAX_TRACKS = 0x7FFFFFFF // 513
MAX_BAT_ENTRIES = 0x7FFFFFFF // 4
"""QEMU's limits."""
