"""The conformance kit of kdump files."""

from __future__ import annotations

from collections.abc import Mapping

from support.memory_images import PAGE, Kdump
from vmconv.testing import MemoryReaderTests, Sample, random_bytes
from vmconv_memory import Kdump as Format

MEMORY = random_bytes(3 * PAGE, 1) + b"packs well" * 2000


class KdumpKit(MemoryReaderTests):
    format = Format()
    variants = ({}, {"flattened": "on"})

    def sound(self, variant: Mapping[str, str]) -> Sample:
        """A dump made by the tests, and a flattened one, whose pieces have 5000 bytes."""
        dump = Kdump(flat=bool(variant))
        data = dump.data([(0, MEMORY[: 7 * PAGE]), (0x100000, MEMORY[:PAGE])])
        if not variant:
            return Sample(data, [(0, 512), (PAGE, PAGE + 112), (2 * PAGE, 5 * PAGE)])
        places = range(4096, len(data), 5016)
        return Sample(data, [(0, 32), *((at, min(at + 64, len(data))) for at in places)])
