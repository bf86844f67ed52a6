"""The conformance kit of AVML."""

from __future__ import annotations

from collections.abc import Mapping

from support.memory_images import PAGE, avml
from vmconv.testing import MemoryReaderTests, Sample, random_bytes
from vmconv_memory import Avml

MEMORY = random_bytes(3 * PAGE, 1) + bytes(5 * PAGE)


class AvmlKit(MemoryReaderTests):
    format = Avml()

    def sound(self, variant: Mapping[str, str]) -> Sample:
        data = avml([(0, MEMORY), (0x100000, MEMORY)], chunk=2 * PAGE)
        second = data.index(b"AVML", 4)
        return Sample(data, [(0, 64), (second - 96, second + 64), (len(data) - 96, len(data))])
