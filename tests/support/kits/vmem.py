"""The conformance kit of VMware's memory."""

from __future__ import annotations

from collections.abc import Mapping

from support.memory_images import saved_state
from vmconv.testing import MemoryFormatTests, Sample, random_bytes
from vmconv_memory import Vmem

PAGE = 4096
REGIONS = ((0, 0, 2), (0x100, 2, 3))
"""First page of RAM, first page of the .vmem, pages."""


class VmemKit(MemoryFormatTests):
    format = Vmem()
    block = PAGE
    unit = PAGE

    def sound(self, variant: Mapping[str, str]) -> Sample:
        """A state with its memory inside, made by the tests: the writer makes two files."""
        state, payload = saved_state(REGIONS, random_bytes(5 * PAGE, 1))
        return Sample(state, [(0, payload)])
