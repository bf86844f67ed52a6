"""The conformance tests of formats of memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmconv.errors import PlanError
from vmconv.model.extents import Columns, Extents, Kind
from vmconv.model.image import Image
from vmconv.model.sources import File
from vmconv.testing.disks import content, patterned
from vmconv.testing.formats import FormatTests
from vmconv.testing.reading import ReaderTests
from vmconv.testing.strategies import disks

_MIB, _GIB = 1 << 20, 1 << 30


def memory_of(table: Extents, file: File, state: Mapping[str, bytes] | None = None) -> Image:
    """Returns a memory image with this table, as input of writers; a HOLE has no RAM."""
    return Image("test", file, table.size, lambda: table, kind="memory", state=lambda: state or {})


def without_end(table: Extents) -> Extents:
    """Returns the table up to the end of its RAM."""
    ram = table.end[table.kind != Kind.HOLE]
    return table.window(0, int(ram[-1]) if len(ram) else 0)


def holes(table: Extents) -> list[tuple[int, int]]:
    """Returns `(start, length)` of each range without RAM."""
    kind = table.kind.clip(max=Kind.ZERO)
    merged = Extents(table.size, Columns(table.start, kind, table.source, table.offset), table.sources)
    return [(row.start, row.length) for row in merged if row.kind == Kind.HOLE]


class MemoryReaderTests(ReaderTests):
    """`ReaderTests` for a format of kind "memory"."""

    def test_it_is_a_format_of_memory(self) -> None:
        assert self.format.kind == "memory"
        assert not self.format.supports_backing
        for variant in self.each_variant():
            image = self.open_sample(self.sample(variant))
            assert image.kind == "memory"
            assert image.parent is None


class MemoryFormatTests(MemoryReaderTests, FormatTests):
    """`FormatTests` for a format of kind "memory", and the tests of addresses without RAM."""

    state: ClassVar[Mapping[str, bytes]] = {}
    """A value for each part of the machine's state that the format carries."""

    def test_any_memory_is_the_same_after_writing_and_reading_and_has_ram_at_the_same_addresses(self) -> None:
        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
        @given(image=disks(unit=self.unit, holes=True), variant=st.sampled_from(list(self.variants)))
        def check(image: Image, variant: Mapping[str, str]) -> None:
            table = without_end(image.guest)
            if not table.size:
                with pytest.raises(PlanError, match="has no RAM"):
                    self.write(image, variant)
                return
            found = self.round_trip(memory_of(table, image.file), variant)
            assert content(found.guest)[: table.size] == content(table)
            if self.format.keeps_holes:
                assert found.size == table.size
                assert holes(found.guest) == holes(table)

        check()

    @pytest.mark.parametrize("modulus", [1, 4096])
    def test_memory_with_a_gap_below_4_gib_keeps_it(self, modulus: int) -> None:
        """As a PC with 5 GiB: RAM up to 3 GiB and from 4 GiB on."""
        low = [(0, 640 << 10), (_MIB, 70000), (3 * _GIB - 8192, 8192)]
        source = patterned(6 * _GIB, [*low, (4 * _GIB, 4096), (6 * _GIB - 4096, 4096)])
        rows = [(0, Kind.DATA, source, 0), (3 * _GIB, Kind.HOLE, None, 0), (4 * _GIB, Kind.DATA, source, 4 * _GIB)]
        table = Extents.of(rows, 6 * _GIB)
        for variant in self.each_variant():
            found = self.round_trip(memory_of(table, source), variant, modulus)
            assert found.size == table.size
            if self.format.keeps_holes:
                assert holes(found.guest) == [(3 * _GIB, _GIB)]
            for start, length in (*low, (3 * _GIB - 4096, _GIB + 8192), (6 * _GIB - 8192, 8192)):
                assert found.guest.read(start, length) == table.read(start, length), (variant, hex(start))

    def test_the_state_that_the_format_carries_comes_back(self) -> None:
        assert self.format.carries_state == frozenset(self.state)
        source = patterned(4 * _MIB, [(0, _MIB)])
        image = memory_of(Extents.whole(source), source, self.state)
        for variant in self.each_variant() if self.state else ():
            found = self.round_trip(image, variant).state
            assert {name: found[name] for name in self.state} == self.state
