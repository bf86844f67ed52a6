"""The structures of a qcow2 image, in the order of the specification (QEMU, docs/interop/qcow2.txt).

    cluster 0       Header, header extensions, backing file name
    anywhere        refcount table -> refcount blocks: the number of references to each cluster of the file
    anywhere        L1 table -> L2 tables: guest cluster -> cluster of the file
    anywhere        snapshot table, bitmap directory, data clusters

All numbers are big-endian. Reader and writer handle tables with numpy.
"""

from __future__ import annotations

from construct import Bytes, Const, Int8ub, Int16ub, Int32ub, Int64ub, Padding, Struct

MAGIC = b"QFI\xfb"

# Header

HeaderV2 = Struct(
    "magic" / Const(MAGIC),
    "version" / Int32ub,
    "backing_file_offset" / Int64ub,
    "backing_file_size" / Int32ub,
    "cluster_bits" / Int32ub,
    "size" / Int64ub,
    "crypt_method" / Int32ub,
    "l1_size" / Int32ub,
    "l1_table_offset" / Int64ub,
    "refcount_table_offset" / Int64ub,
    "refcount_table_clusters" / Int32ub,
    "nb_snapshots" / Int32ub,
    "snapshots_offset" / Int64ub,
)

HeaderV3 = Struct(
    "incompatible_features" / Int64ub,
    "compatible_features" / Int64ub,
    "autoclear_features" / Int64ub,
    "refcount_order" / Int32ub,
    "header_length" / Int32ub,
)

HeaderV3Additional = Struct("compression_type" / Int8ub, Padding(7))

V2_LENGTH = 72
V3_LENGTH = 104
V3_FULL_LENGTH = 112


DIRTY, CORRUPT, EXTERNAL_DATA, COMPRESSION, EXTENDED_L2 = (1 << bit for bit in range(5))
INCOMPATIBLE = {
    DIRTY: "dirty",
    CORRUPT: "corrupt",
    EXTERNAL_DATA: "external data file",
    COMPRESSION: "compression type",
    EXTENDED_L2: "extended L2 entries",
}
LAZY_REFCOUNTS = 1
BITMAPS_CONSISTENT, RAW_EXTERNAL_DATA = 1, 2

CRYPT_METHODS = {1: "AES", 2: "LUKS"}
CRYPT_LUKS = 2
MAX_ENCRYPTION_HEADER = 64 << 20
"""Bytes; QEMU makes 2 MiB."""
COMPRESSION_TYPES = {0: "zlib", 1: "zstd"}

# Header extensions

Extension = Struct("type" / Int32ub, "length" / Int32ub)

END = 0x00000000
BACKING_FORMAT = 0xE2792ACA
FEATURE_NAMES = 0x6803F857
BITMAPS = 0x23852875
ENCRYPTION = 0x0537BE77
DATA_FILE_NAME = 0x44415441
RECORDS = 0x766D6372
"""vmconv's ("vmcr"): records of the files that the image refers to, separated by NUL; QEMU preserves it."""

FeatureName = Struct("type" / Int8ub, "bit" / Int8ub, "name" / Bytes(46))

Encryption = Struct("offset" / Int64ub, "length" / Int64ub)

Bitmaps = Struct("nb_bitmaps" / Int32ub, Padding(4), "directory_size" / Int64ub, "directory_offset" / Int64ub)

# Cluster mapping: L1 and L2 entries

OFFSET_MASK = 0x00FFFFFFFFFFFE00
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
SUBCLUSTERS = 32
L1_RESERVED = 0x7F000000000001FF
L2_RESERVED = 0x3F000000000001FE
REFCOUNT_TABLE_MASK = 0xFFFFFFFFFFFFFE00
REFCOUNT_TABLE_RESERVED = 0x1FF
BITMAP_RESERVED = 0xFF000000000001FE

# Snapshots

SnapshotHeader = Struct(
    "l1_table_offset" / Int64ub,
    "l1_size" / Int32ub,
    "id_size" / Int16ub,
    "name_size" / Int16ub,
    "date_sec" / Int32ub,
    "date_nsec" / Int32ub,
    "vm_clock_nsec" / Int64ub,
    "vm_state_size" / Int32ub,
    "extra_data_size" / Int32ub,
)

SnapshotExtra = Struct("vm_state_size" / Int64ub, "disk_size" / Int64ub)

NO_ICOUNT = 0xFFFFFFFFFFFFFFFF
SNAPSHOT_LENGTH = SnapshotHeader.sizeof()
SNAPSHOT_EXTRA_LENGTH = SnapshotExtra.sizeof()

# Bitmap directory

BitmapEntry = Struct(
    "table_offset" / Int64ub,
    "table_size" / Int32ub,
    "flags" / Int32ub,
    "type" / Int8ub,
    "granularity_bits" / Int8ub,
    "name_size" / Int16ub,
    "extra_data_size" / Int32ub,
)

BITMAP_IN_USE, BITMAP_AUTO = 1, 2
BITMAP_FLAGS = {BITMAP_IN_USE: "in-use", BITMAP_AUTO: "auto"}
DIRTY_BITMAP = 1

# QEMU's limits: they bound the memory that the numbers of an image can demand.

MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_BACKING_NAME = 1023
MAX_EXTENSIONS = 64
MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_EXTRA = 1024
MAX_SNAPSHOT_TABLE = 64 << 20
MAX_BITMAPS = 65535
MAX_GRANULARITY_BITS = 31
MAX_BITMAP_DIRECTORY = MAX_BITMAPS * 1024
MAX_BITMAP_BYTES = 512 << 20
