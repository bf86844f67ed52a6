"""The structures of a VHDX image, in the order of Microsoft's [MS-VHDX], section 2.

    0           FileTypeIdentifier
    64 KiB      Header, 128 KiB a second one: the one with the greater sequence number is valid
    192 KiB     RegionTable, 256 KiB a copy
    1 MiB ...   in any order, each at whole MiB: log, BAT, metadata, payload blocks, sector bitmap blocks

All numbers are little-endian. Log, BAT and metadata table are handled with numpy.
"""

from __future__ import annotations

from uuid import UUID

import google_crc32c
import numpy as np
from construct import Bytes, Const, Int16ul, Int32ul, Int64ul, Padding, Struct

KIB, MIB = 1 << 10, 1 << 20

# 2.2.1 File type identifier

FileTypeIdentifier = Struct("signature" / Const(b"vhdxfile"), "creator" / Bytes(512))

# 2.2.2 Headers

HEADER_OFFSETS = (64 * KIB, 128 * KIB)
HEADER_LENGTH = 4 * KIB

Header = Struct(
    "signature" / Const(b"head"),
    "checksum" / Int32ul,
    "sequence_number" / Int64ul,
    "file_write_guid" / Bytes(16),
    "data_write_guid" / Bytes(16),
    "log_guid" / Bytes(16),
    "log_version" / Int16ul,
    "version" / Int16ul,
    "log_length" / Int32ul,
    "log_offset" / Int64ul,
    Padding(4016),
)

# 2.2.3 Region table

REGION_TABLE_OFFSETS = (192 * KIB, 256 * KIB)
REGION_TABLE_LENGTH = 64 * KIB
HEADER_SECTION = MIB

RegionTableHeader = Struct("signature" / Const(b"regi"), "checksum" / Int32ul, "entry_count" / Int32ul, Padding(4))

RegionTableEntry = Struct("guid" / Bytes(16), "file_offset" / Int64ul, "length" / Int32ul, "required" / Int32ul)

MAX_ENTRIES = 2047
"""Entries of the region table, and of the metadata table."""

BAT = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")

# 2.3 Log

LOG_SECTOR = 4 * KIB

LogEntryHeader = np.dtype(
    [
        ("signature", "S4"),
        ("checksum", "<u4"),
        ("entry_length", "<u4"),
        ("tail", "<u4"),
        ("sequence_number", "<u8"),
        ("descriptor_count", "<u4"),
        ("reserved", "<u4"),
        ("log_guid", "V16"),
        ("flushed_file_offset", "<u8"),
        ("last_file_offset", "<u8"),
    ]
)

# In a zero descriptor `trailing` is reserved, and `leading` is the length.
LogDescriptor = np.dtype(
    [("signature", "S4"), ("trailing", "V4"), ("leading", "<u8"), ("file_offset", "<u8"), ("sequence_number", "<u8")]
)

LogDataSector = np.dtype(
    [("signature", "S4"), ("sequence_high", "<u4"), ("data", "V4084"), ("sequence_low", "<u4")],
)

# 2.5 BAT

STATE_MASK = 7
OFFSET_MASK = 0xFFFFFFFFFFF00000
NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED = 0, 1, 2, 3
UNMAPPED_V095 = 5
"""UNMAPPED before version 1.0 of the format; QEMU reads it too."""
FULLY_PRESENT, PARTIALLY_PRESENT = 6, 7
BITMAP_PRESENT = 6
CHUNK_SECTORS = 1 << 23
BITMAP_BLOCK = MIB

# 2.6 Metadata

METADATA_TABLE_LENGTH = 64 * KIB

MetadataTableHeader = Struct("signature" / Const(b"metadata"), Padding(2), "entry_count" / Int16ul, Padding(20))

MetadataTableEntry = Struct(
    "item_id" / Bytes(16), "offset" / Int32ul, "length" / Int32ul, "flags" / Int32ul, Padding(4)
)

IS_USER, IS_VIRTUAL_DISK, IS_REQUIRED = 1, 2, 4

FILE_PARAMETERS = UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
VIRTUAL_DISK_SIZE = UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
VIRTUAL_DISK_ID = UUID("beca12ab-b2e6-4523-93ef-c309e000c746")
LOGICAL_SECTOR_SIZE = UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
PHYSICAL_SECTOR_SIZE = UUID("cda348c7-445d-4471-9cc9-e9885251c556")
PARENT_LOCATOR = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")

FileParameters = Struct("block_size" / Int32ul, "flags" / Int32ul)
LEAVE_BLOCKS_ALLOCATED, HAS_PARENT = 1, 2

ParentLocatorHeader = Struct("locator_type" / Bytes(16), Padding(2), "key_value_count" / Int16ul)

ParentLocatorEntry = Struct(
    "key_offset" / Int32ul, "value_offset" / Int32ul, "key_length" / Int16ul, "value_length" / Int16ul
)

VHDX_LOCATOR = UUID("b04aefb7-d19e-4a81-b789-25b8e9445913")

# Limits of the format, and of the memory that the numbers of an image can demand.

MAX_SIZE = 64 << 40
MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = MIB, 256 * MIB
MAX_ITEM_LENGTH = MIB
MAX_DIRTY_LOG = 64 * MIB
MAX_DESCRIPTORS = 1 << 15
MAX_LOCATOR_ENTRIES = 64


def checksum(data: bytes, field: int = 4) -> int:
    """Returns the CRC-32C of a structure, with zeros for the checksum at offset `field`."""
    head = google_crc32c.value(data[:field] + bytes(4))
    return int(google_crc32c.extend(head, data[field + 4 :]))


def chunk_ratio(block_size: int, sector_size: int) -> int:
    """Returns the number of payload blocks per sector bitmap block; its BAT entry follows theirs."""
    return CHUNK_SECTORS * sector_size // block_size
