"""The conformance kit of QEMU's migration streams."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from support.memory_images import PAGE, mapped_ram, migration
from vmconv.testing import MemoryReaderTests, Sample, random_bytes
from vmconv_memory import Qevm

MEMORY = random_bytes(5 * PAGE, 1) + bytes(3 * PAGE)


class QevmKit(MemoryReaderTests):
    format = Qevm()
    variants = ({}, {"mapped": "on"})

    def sound(self, variant: Mapping[str, str]) -> Sample:
        """A stream made by the tests, and one with mapped RAM, whose bitmaps and headers are 1 MiB apart."""
        if not variant:
            data = migration(MEMORY, again=[PAGE])
            return Sample(data, [(0, 160), (160 + 2 * PAGE, 320 + 2 * PAGE), (len(data) - 160, len(data))])
        with tempfile.TemporaryDirectory() as folder:
            data = mapped_ram(Path(folder, "image"), MEMORY).read_bytes()
        second = (1 << 20) + len(MEMORY)
        return Sample(data, [(0, 192), (second, second + 64)])
