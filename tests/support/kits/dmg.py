"""The conformance kit of DMG; `support.dmg_images` makes the images."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from support.dmg_images import ADC, BZIP2, RAW, XZ, ZLIB, udif
from vmconv.testing import ReaderTests, Sample, patterned
from vmconv_dmg import Dmg

_SIZE = 1 << 20
KINDS = {"raw": [RAW], "zlib": [ZLIB], "all": [RAW, ADC, ZLIB, BZIP2, XZ]}


@cache
def _made(kind: str) -> Sample:
    disk = patterned(_SIZE, [(0, 4096), (300 << 10, 200 << 10), (_SIZE - 8192, 8192)])
    data = udif(disk.read(0, _SIZE), KINDS[kind], tables=2)
    begin = data.rindex(b"<?xml")
    return Sample(data, [(begin, len(data))])


class DmgKit(ReaderTests):
    format = Dmg()
    variants = tuple({"chunks": kind} for kind in KINDS)

    def sound(self, variant: Mapping[str, str]) -> Sample:
        return _made(variant.get("chunks", "raw"))
