"""The conformance kit of VHDX."""

from __future__ import annotations

from typing import ClassVar

from support.vhdx_images import KIB, sealed
from vmconv.model.facts import DiskFacts
from vmconv.testing import FormatTests
from vmconv_vhdx import Vhdx


class VhdxKit(FormatTests):
    format = Vhdx()
    variants = (
        {},
        {"block_size": "1M"},
        {"block_size": "2M", "log_size": "3M"},
        {"subformat": "fixed", "block_size": "1M", "physical_sector_size": "4096"},
    )
    wrong_options = (
        {"subformat": "differencing"},
        {"block_size": "3M"},
        {"block_size": "512K"},
        {"block_size": "512M"},
        {"log_size": "4G"},
        {"log_size": "1000000"},
        {"logical_sector_size": "1024"},
    )
    facts: ClassVar[DiskFacts] = DiskFacts(
        logical_sector_size=4096, physical_sector_size=4096, creator="Somebody Else 1.0"
    )
    ids = ("identity", "data-write-guid", "file-write-guid")

    def seal(self, data: bytearray) -> None:
        for at, length in ((64, 4), (128, 4), (192, 64), (256, 64)):
            start, end = at * KIB, (at + length) * KIB
            data[start:end] = sealed(bytes(data[start:end]))
