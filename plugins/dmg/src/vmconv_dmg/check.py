"""The structural check of a DMG: chunks, property list and trailer lie apart. Chunks are not decompressed."""

from __future__ import annotations

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
    findings.overlaps(usage, structs.SECTOR)
    if not findings.corruption_count:
        try:
            image.guest  # noqa: B018
        except ImageError as exc:
            findings.corrupt(str(exc))
    allocated = int(chunks.size.sum()) // structs.SECTOR
    return findings.report(allocated=allocated, total=image.size // structs.SECTOR, end=usage.end)
