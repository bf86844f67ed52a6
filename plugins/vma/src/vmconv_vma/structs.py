"""Structures of VMA archives, version 1: Proxmox's `vma_spec.txt` in pve-qemu. Numbers are big endian.

    +--------+-------------+---------------+---------------------+---------------+----------- - -
    | header | blob buffer | extent header | blocks of 59        | extent header | blocks
    |        |             |               | clusters            |               |
    +--------+-------------+---------------+---------------------+---------------+----------- - -
    0        12288         header_size     n * 4096

A disk is a sequence of clusters of 64 KiB, each of 16 blocks. An extent has the blocks that are not zero, in the order
of its entries. Blobs are a length of 2 bytes, little endian, and the bytes; they are named by their offset in the
buffer, and 0 means none.
"""

from __future__ import annotations

import construct as c
import numpy as np

MAGIC = b"VMA\0"
EXTENT_MAGIC = b"VMAE"
VERSION = 1

BLOCK = 4096
CLUSTER = 16 * BLOCK
ENTRIES = 59
"""Entries of an extent: one for each cluster."""

HEADER_SIZE = 12288
"""Bytes of the fixed part of the header."""

MAX_CONFIGS = 256
MAX_DEVICES = 256
MAX_HEADER = HEADER_SIZE + (2 * MAX_CONFIGS + MAX_DEVICES) * (2 + 65535) + 512
"""Bytes of a header whose blobs all have their largest size."""

Header = c.Struct(
    "magic" / c.Const(MAGIC),
    "version" / c.Int32ub,
    "uuid" / c.Bytes(16),
    "ctime" / c.Int64ub,
    "md5sum" / c.Bytes(16),
    "blob_buffer_offset" / c.Int32ub,
    "blob_buffer_size" / c.Int32ub,
    "header_size" / c.Int32ub,
)

CONFIG_NAMES = 2044
CONFIG_DATA = CONFIG_NAMES + 4 * MAX_CONFIGS
DEV_INFO = 4096
"""Offsets of the header's tables."""

DeviceInfo = np.dtype([("devname_ptr", ">u4"), ("reserved0", ">u4"), ("size", ">u8"), ("reserved", ">u8", 2)])

ExtentHeader = np.dtype(
    [
        ("magic", "S4"),
        ("reserved", ">u2"),
        ("block_count", ">u2"),
        ("uuid", "V16"),
        ("md5sum", "V16"),
        ("blockinfo", ">u8", ENTRIES),
    ]
)
"""`blockinfo`: 16 bits mask of the blocks that follow, 8 bits reserved, 8 bits device, 32 bits cluster number."""

EXTENT_HEADER_SIZE = 512
UUID_IN_EXTENT = slice(8, 24)
MD5_IN_EXTENT = slice(24, 40)
BLOCKINFO_IN_EXTENT = 40
