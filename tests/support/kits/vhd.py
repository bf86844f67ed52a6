"""The conformance kit of VHD."""

from __future__ import annotations

import struct
from typing import ClassVar

from vmconv.model.facts import DiskFacts, Geometry
from vmconv.testing import FormatTests
from vmconv_vhd import Vhd


class VhdKit(FormatTests):
    format = Vhd()
    sizes_differ = False
    variants = ({}, {"subformat": "fixed"}, {"subformat": "dynamic", "force_size": "on"})
    wrong_options = (
        {"subformat": "differencing"},
        {"azure": "on", "subformat": "dynamic"},
        {"azure": "on", "subformat": "fixed", "force_size": "off"},
        {"force_size": "perhaps"},
    )
    facts: ClassVar[DiskFacts] = DiskFacts(geometry=Geometry(cylinders=99, heads=7, sectors=21), creator="qem2")
    ids = ("identity",)

    def seal(self, data: bytearray) -> None:
        for at, length, field in ((0, 512, 64), (512, 1024, 36), (len(data) - 512, 512, 64)):
            if bytes(data[at : at + 8]) in (b"conectix", b"cxsparse"):
                data[at : at + length] = sealed(bytes(data[at : at + length]), field)


def sealed(data: bytes, field: int) -> bytes:
    """Returns a footer (checksum at 64) or dynamic header (at 36) with the checksum its bytes ask for."""
    blank = data[:field] + bytes(4) + data[field + 4 :]
    return blank[:field] + struct.pack(">I", ~sum(blank) & 0xFFFFFFFF) + blank[field + 4 :]
