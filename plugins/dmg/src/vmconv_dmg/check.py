"""The structural check of a DMG: chunks, property list and trailer lie apart. Chunks are not decompressed.

`vmconv check --payload` compares the checksums of the disk.
"""

from __future__ import annotations

import zlib

import numpy as np

from vmconv.plugin import CheckReport, Findings, Image, ImageError, Usage
from vmconv_dmg import structs
from vmconv_dmg.reader import DmgImage


def check(image: Image) -> CheckReport:
    """Returns the report; the reader has checked all numbers."""
    assert isinstance(image, DmgImage)
    findings, usage = Findings(), Usage()
    chunks, trailer = image.chunks, image.trailer
    usage.add("property list", [trailer.plist_offset], trailer.plist_length)
    usage.add("trailer", [image.file.size - structs.TRAILER_LENGTH], structs.TRAILER_LENGTH)
    stored = chunks.length > 0
    usage.add_each("chunk", chunks.offset[stored], chunks.length[stored], np.flatnonzero(stored))
    if trailer.master and all(one.checksum for one in image.sums):
        found = zlib.crc32(b"".join(one.checksum for one in image.sums))
        if found != int.from_bytes(trailer.master):
            stated = int.from_bytes(trailer.master)
            findings.corrupt(f"CRC-32 of the checksums of tables is {found:08x}, the trailer says {stated:08x}")
    findings.overlaps(usage, structs.SECTOR)
    if not findings.corruption_count:
        try:
            image.guest  # noqa: B018
        except ImageError as exc:
            findings.corrupt(str(exc))
    allocated = int(chunks.size.sum()) // structs.SECTOR
    return findings.report(allocated=allocated, total=image.size // structs.SECTOR, end=usage.end)
