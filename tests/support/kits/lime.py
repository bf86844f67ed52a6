"""The conformance kit of LiME."""

from __future__ import annotations

import pytest

from vmconv.model.extents import Kind
from vmconv.testing import MemoryFormatTests, patterned
from vmconv.testing.disks import raw_disk
from vmconv.testing.memory import MemoryFile
from vmconv_memory import Lime


class LimeKit(MemoryFormatTests):
    format = Lime()

    def test_a_disk_of_nothing_but_zeros_has_no_payload(self) -> None:
        """Nothing but the rest of the block that has the header."""
        image = raw_disk(MemoryFile("source.ram", 100 << 20))
        assert self.round_trip(image, {}).flat.total(Kind.DATA) == 512 - 32

    @pytest.mark.parametrize("modulus", [512, 4096, 65536])
    def test_aligned_payload_is_placed_where_it_can_be_referenced(self, modulus: int) -> None:
        """All but the small ranges at the beginning, which take less than the modulus."""
        source = patterned(64 * modulus, [(0, 3 * modulus), (8 * modulus, modulus), (40 * modulus, 24 * modulus)])
        (out,) = self.write(raw_disk(source), {}, modulus).files
        moved = [row.length for row in out.table if row.source is source and (row.start - row.offset) % modulus]
        assert sum(moved) < modulus
        assert len(moved) == modulus // 32 - 1
