"""The structures of a QED image, in the order of the specification (QEMU, docs/interop/qed_spec.txt).

    0               Header, backing file name: header_size clusters
    l1_table_offset L1 table: table_size clusters of offsets of L2 tables
    anywhere        L2 tables: table_size clusters of offsets of data clusters
    anywhere        data clusters

All numbers are little-endian. Reader and writer handle tables with numpy.
"""

from __future__ import annotations

from construct import Const, Int32ul, Int64ul, Struct

MAGIC = b"QED\0"

Header = Struct(
    "magic" / Const(MAGIC),
    "cluster_size" / Int32ul,
    "table_size" / Int32ul,
    "header_size" / Int32ul,
    "features" / Int64ul,
    "compat_features" / Int64ul,
    "autoclear_features" / Int64ul,
    "l1_table_offset" / Int64ul,
    "image_size" / Int64ul,
    "backing_filename_offset" / Int32ul,
    "backing_filename_size" / Int32ul,
)

HEADER_LENGTH = Header.sizeof()

BACKING_FILE, NEED_CHECK, BACKING_FORMAT_NO_PROBE = (1 << bit for bit in range(3))
FEATURES = BACKING_FILE | NEED_CHECK | BACKING_FORMAT_NO_PROBE

SECTOR = 512

# L2 entries: offsets of data clusters, and

UNALLOCATED = 0
"""The cluster was never written: it reads as in the backing file, or as zero. In an L1 table: no L2 table."""
ZERO = 1
"""The cluster reads as zero and hides the backing file."""

# Limits of the specification

MIN_CLUSTER, MAX_CLUSTER = 1 << 12, 1 << 26
MIN_TABLE, MAX_TABLE = 1, 16
MAX_BACKING_NAME = 1023
"""QEMU's limit."""
