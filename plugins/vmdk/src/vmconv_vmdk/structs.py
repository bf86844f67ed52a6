"""The structures of VMDK extents, in the order of VMware's "Virtual Disk Format 5.0", and seSparse after QEMU.

    hosted sparse extent     header | descriptor | redundant directory, tables | directory, tables | grains
    stream-optimized         header | descriptor | grain marker, grain ... | tables | directory | footer | end
    COWD (ESX)               header | directory | tables, grains
    seSparse (ESX)           header | volatile header | journal | directory | tables | ... | grains

All numbers are little-endian, offsets are in sectors of 512 bytes. Tables are handled with numpy.
"""

from __future__ import annotations

import struct

from construct import Bytes, Const, Int8ul, Int16ul, Int32ul, Int64ul, Padding, Struct

SECTOR = 512

# Hosted sparse extents: SparseExtentHeader

SPARSE_MAGIC = b"KDMV"

SparseExtentHeader = Struct(
    "magicNumber" / Const(SPARSE_MAGIC),
    "version" / Int32ul,
    "flags" / Int32ul,
    "capacity" / Int64ul,
    "grainSize" / Int64ul,
    "descriptorOffset" / Int64ul,
    "descriptorSize" / Int64ul,
    "numGTEsPerGT" / Int32ul,
    "rgdOffset" / Int64ul,
    "gdOffset" / Int64ul,
    "overHead" / Int64ul,
    "uncleanShutdown" / Int8ul,
    "newlines" / Bytes(4),
    "compressAlgorithm" / Int16ul,
    Padding(433),
)

NEWLINE_TEST, REDUNDANT, ZEROED_GRAINS = 1, 2, 4
COMPRESSED, MARKERS = 1 << 16, 1 << 17
KNOWN_FLAGS = NEWLINE_TEST | REDUNDANT | ZEROED_GRAINS | COMPRESSED | MARKERS
NEWLINES = b"\n \r\n"
DEFLATE = 1
GD_AT_END = 0xFFFFFFFFFFFFFFFF
ZEROED = 1
"""The grain table entry of a grain that reads as zero."""

ENTRIES = 512
"""Entries of a grain table, in every hosted extent."""

# Stream-optimized extents: markers

Marker = Struct("val" / Int64ul, "size" / Int32ul, "type" / Int32ul, Padding(496))
END_OF_STREAM, GRAIN_TABLE, GRAIN_DIRECTORY, FOOTER = range(4)

# One per grain: lba and size; struct is faster than construct.
GrainMarker = struct.Struct("<QI")
GRAIN_MARKER_LENGTH = 12

# ESX server sparse extents: COWDisk_Header

COWD_MAGIC = b"COWD"

CowdHeader = Struct(
    "magicNumber" / Const(COWD_MAGIC),
    "version" / Int32ul,
    "flags" / Int32ul,
    "numSectors" / Int32ul,
    "grainSize" / Int32ul,
    "gdOffset" / Int32ul,
    "numGDEntries" / Int32ul,
    "freeSector" / Int32ul,
)
COWD_ENTRIES = 4096

# seSparse extents: the constant and the volatile header (as documented in QEMU, block/vmdk.c)

SE_MAGIC = b"\xbe\xba\xfe\xca\0\0\0\0"
SE_VERSION = 0x0000000200000001
SE_GRAIN_SECTORS = 8
SE_TABLE_SECTORS = 64

SeSparseHeader = Struct(
    "magic" / Const(SE_MAGIC),
    "version" / Int64ul,
    "capacity" / Int64ul,
    "grain_size" / Int64ul,
    "grain_table_size" / Int64ul,
    "flags" / Int64ul,
    Padding(32),
    "volatile_header_offset" / Int64ul,
    "volatile_header_size" / Int64ul,
    "journal_header_offset" / Int64ul,
    "journal_header_size" / Int64ul,
    "journal_offset" / Int64ul,
    "journal_size" / Int64ul,
    "grain_dir_offset" / Int64ul,
    "grain_dir_size" / Int64ul,
    "grain_tables_offset" / Int64ul,
    "grain_tables_size" / Int64ul,
    "free_bitmap_offset" / Int64ul,
    "free_bitmap_size" / Int64ul,
    "backmap_offset" / Int64ul,
    "backmap_size" / Int64ul,
    "grains_offset" / Int64ul,
    "grains_size" / Int64ul,
)

SeSparseVolatile = Struct(
    "magic" / Int64ul, "free_gt_number" / Int64ul, "next_txn_seq_number" / Int64ul, "replay_journal" / Int64ul
)
SE_VOLATILE_MAGIC = 0xCAFECAFE

SE_KIND = 0xF000000000000000
SE_UNMAPPED, SE_ZEROED, SE_ALLOCATED = (kind << 60 for kind in (1, 2, 3))
SE_TABLE_KIND = 0xFFFFFFFF00000000
SE_TABLE_ALLOCATED = 0x1000000000000000

# Limits of the memory that the numbers of an image can demand.

MAX_DESCRIPTOR = 1 << 20
MAX_DIRECTORY = 4 << 20
"""Entries of a grain directory: 64 TiB in the smallest tables that are in use, those of seSparse."""
MAX_GRAIN_SECTORS = 1 << 21
"""QEMU's limit."""
MAX_COMPRESSED_GRAIN_SECTORS = 1 << 13
