"""The structures of compressed loop images, version 2.0, as the documentation of cloop has them.

    Header | offsets of the blocks, and of the end of the last | blocks, each a stream of zlib

All numbers are big-endian.
"""

from __future__ import annotations

from construct import Bytes, Const, Int32ub, Struct

SIGNATURE = b"#!/bin/sh\n#V2.0 Format\n"
"""The file is also a script, which loads the kernel's module."""
SECTOR = 512

Header = Struct(
    "signature" / Const(SIGNATURE),
    "script" / Bytes(128 - len(SIGNATURE)),
    "block_size" / Int32ub,
    "num_blocks" / Int32ub,
)

MAX_BLOCK = 64 << 20
"""Bytes of a block; QEMU has the same limit."""
MAX_BLOCKS = 1 << 23
"""Blocks of an image: 512 GiB in blocks of 64 KiB."""
