"""The conformance kit of cloop; `compressed_loop` makes the images as create_compressed_fs does."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from functools import cache

from vmconv.testing import ReaderTests, Sample, patterned
from vmconv_cloop import Cloop

HEAD = 136


def compressed_loop(disk: bytes, block: int) -> bytes:
    """Returns a disk as a compressed loop image; zeros fill up its last block."""
    blocks = [zlib.compress(disk[at : at + block].ljust(block, b"\0")) for at in range(0, len(disk), block)]
    at = HEAD + 8 * (len(blocks) + 1)
    offsets = []
    for one in (*blocks, b""):
        offsets.append(at)
        at += len(one)
    head = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\nexit $?\n".ljust(
        128, b"\0"
    )
    return head + struct.pack(f">II{len(offsets)}Q", block, len(blocks), *offsets) + b"".join(blocks)


@cache
def _made(block: int) -> Sample:
    size = 1 << 20
    disk = patterned(size, [(0, 4096), (300 << 10, 200 << 10), (size - 8192, 8192)])
    data = compressed_loop(disk.read(0, size), block)
    return Sample(data, [(0, HEAD + 8 * (size // block + 1))])


class CloopKit(ReaderTests):
    format = Cloop()
    variants = ({"block_size": "65536"}, {"block_size": "512"})

    def sound(self, variant: Mapping[str, str]) -> Sample:
        return _made(int(variant.get("block_size", "65536")))
