"""The conformance kit of Bochs; `growing` makes the images as Bochs writes them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import cache

from vmconv.testing import ReaderTests, Sample, patterned
from vmconv_bochs import Bochs

SECTOR = 512


def growing(disk: bytes, extent: int, version: int = 2, subtype: bytes = b"Growing") -> bytes:
    """Returns a disk as a growing image: sectors of zeros are not allocated. Later extents come first."""
    count = -(-len(disk) // extent)
    bitmap = max(1, extent // SECTOR // 8)
    catalog = [0xFFFFFFFF] * count
    payload = bytearray()
    for entry in reversed(range(count)):
        piece = disk[entry * extent : (entry + 1) * extent].ljust(extent, b"\0")
        sectors = [piece[at : at + SECTOR] for at in range(0, extent, SECTOR)]
        if not any(map(any, sectors)):
            continue
        catalog[entry] = len(payload) // (extent + -(-bitmap // SECTOR) * SECTOR)
        bits = sum(1 << number for number, one in enumerate(sectors) if any(one))
        payload += bits.to_bytes(bitmap, "little").ljust(-(-bitmap // SECTOR) * SECTOR, b"\0") + piece
    head = struct.pack(
        "<32s16s16s5I", b"Bochs Virtual HD Image", b"Redolog", subtype, version << 16, SECTOR, count, bitmap, extent
    )
    size = struct.pack("<IQ", 0, len(disk)) if version == 2 else struct.pack("<Q", len(disk))
    return (head + size).ljust(SECTOR, b"\0") + struct.pack(f"<{count}I", *catalog) + bytes(payload)


@cache
def _made(version: int, extent: int) -> Sample:
    size = 1 << 20
    disk = patterned(size, [(0, 4096), (300 << 10, 100 << 10), (size - 8192, 8192)])
    data = growing(disk.read(0, size), extent, version)
    return Sample(data, [(0, SECTOR + 4 * (size // extent))])


class BochsKit(ReaderTests):
    format = Bochs()
    variants = ({"version": "2", "extent": "65536"}, {"version": "1", "extent": "4096"})

    def sound(self, variant: Mapping[str, str]) -> Sample:
        return _made(int(variant.get("version", "2")), int(variant.get("extent", "65536")))
