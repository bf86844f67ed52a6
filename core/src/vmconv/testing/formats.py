"""The conformance tests of formats."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmconv.errors import PlanError, UsageError
from vmconv.interface.format import Format
from vmconv.model.extents import Extents, Kind
from vmconv.model.image import Image
from vmconv.model.layout import Backing, Layout, Placement
from vmconv.model.options import describe, parse_options
from vmconv.model.sources import File, Source
from vmconv.testing.disks import (
    changed_in_place,
    content,
    disk_of,
    make_in_memory,
    patterned,
    raw_disk,
)
from vmconv.testing.malformed import Sample
from vmconv.testing.memory import MemoryFile
from vmconv.testing.reading import ReaderTests
from vmconv.testing.stacking import StackingTests
from vmconv.testing.strategies import disks

_MIB = 1 << 20
_GIB = 1 << 30
_MOST_METADATA = 32 << 20


def _made_by(layout: Layout) -> list[Source]:
    """Returns the sources of a layout that its writer generated."""
    return [source for out in layout.files for source in out.table.sources if not isinstance(source, File)]


def _random_pieces(rng: random.Random, size: int) -> Iterator[tuple[int, int]]:
    """Yields short and long ranges in `size` bytes; half of them begin near a page boundary."""
    for _ in range(48 if size else 0):
        start = rng.randrange(size)
        if rng.random() < 0.5:
            start = max(0, min(size - 1, start // 4096 * 4096 + rng.choice((-8, -1, 0, 1, 8))))
        length = rng.choice((1, 8, 100, 4096, 65536, _MIB))
        yield start, rng.randint(1, min(length, size - start))


class FormatTests(ReaderTests, StackingTests):
    """Subclass it and set `format`; set the other attributes if the format needs them. pytest collects the tests.

    A format without a writer overrides `sound`, as with `ReaderTests`; the tests that need a writer are left out.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        one = getattr(cls, "format", None)
        if one is not None and not one.can_write:
            for name in dir(FormatTests):
                if name.startswith("test_") and not hasattr(ReaderTests, name):
                    # pytest collects functions only.
                    setattr(cls, name, None)

    format: ClassVar[Format]
    variants: ClassVar[Sequence[Mapping[str, str]]] = ({},)
    """Options of the writer, as on the command line; each test that writes runs for each."""
    wrong_options: ClassVar[Sequence[Mapping[str, str]]] = ()
    """Options that must be refused."""
    block: ClassVar[int] = 512
    """Bytes; every variant can share payload that is aligned to this."""
    unit: ClassVar[int] = 512
    """Bytes of which disks have whole ones; larger only if the format refuses others."""

    # -- helpers

    def write(self, image: Image, variant: Mapping[str, str], modulus: int = 512) -> Layout:
        options = parse_options(self.format.options(), variant, self.format.name)
        return self.format.write(image, options, Placement(modulus))

    def read(self, files: Sequence[MemoryFile], layout: Layout) -> Image:
        names: dict[str, File] = {out.name: file for out, file in zip(layout.files, files, strict=True) if out.name}
        names |= {reference.name: reference.file for reference in layout.references}
        return self.format.read(files[-1], self.opener(names))

    def round_trip(self, image: Image, variant: Mapping[str, str], modulus: int = 512) -> Image:
        layout = self.write(image, variant, modulus)
        _, files = make_in_memory(layout, image)
        return self.read(files, layout)

    def sound(self, variant: Mapping[str, str]) -> Sample:
        """Returns the image of `sample` with the ranges of its metadata."""
        source = patterned(3 * _MIB, [(0, 4096), (_MIB, 70000), (3 * _MIB - 8192, 8192)])
        image = raw_disk(source)
        layout = self.write(image, variant)
        _, files = make_in_memory(layout, image)
        rows = [row for row in layout.files[-1].table if row.source is not None and row.source is not source]
        places = [(row.start, row.start + row.length) for row in rows]
        return Sample(files[-1].read(0, files[-1].size), places)

    # -- the plugin

    def test_options_are_a_frozen_dataclass_with_help_for_each_field(self) -> None:
        model = self.format.options()
        assert dataclasses.is_dataclass(model)
        assert model.__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert all(option.help for option in describe(model))

    def test_an_unknown_option_is_refused_by_name(self) -> None:
        with pytest.raises(UsageError, match="no_such_option"):
            parse_options(self.format.options(), {"no_such_option": "1"}, self.format.name)

    def test_wrong_options_are_refused_by_name_and_value(self) -> None:
        for wrong in self.wrong_options:
            with pytest.raises(UsageError) as caught:
                parse_options(self.format.options(), wrong, self.format.name)
            assert "\n" not in str(caught.value)

    # -- writing

    def test_a_disk_is_the_same_after_writing_and_reading(self) -> None:
        source = patterned(5 * _MIB, [(0, 512), (4096, 65536), (_MIB, 3 * _MIB // 2), (5 * _MIB - 512, 512)])
        for variant in self.each_variant():
            image = raw_disk(source)
            result = self.round_trip(image, variant)
            assert content(result.flat) == source.read(0, source.size), variant

    @pytest.mark.parametrize("sectors", [1, 2, 7, 127, 128, 129, 4097])
    def test_a_disk_of_any_number_of_sectors_is_the_same(self, sectors: int) -> None:
        size = sectors * 512
        source = patterned(size, [(0, size)])
        for variant in self.each_variant():
            result = self.round_trip(raw_disk(source), variant)
            assert result.size == size
            assert content(result.flat) == source.read(0, size), variant

    def test_a_disk_of_nothing_but_zeros_has_no_payload(self) -> None:
        source = MemoryFile("source.raw", 100 * _MIB)
        for variant in self.each_variant():
            image = raw_disk(source)
            layout = self.write(image, variant)
            plan, files = make_in_memory(layout, image)
            assert plan.totals.shared == plan.totals.copied == 0
            assert self.read(files, layout).flat.total(Kind.DATA) == 0, variant

    def test_any_table_is_the_same_after_writing_and_reading(self) -> None:
        @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
        @given(image=disks(unit=self.unit), variant=st.sampled_from(list(self.variants)))
        def check(image: Image, variant: Mapping[str, str]) -> None:
            result = self.round_trip(image, variant)
            assert content(result.flat)[: image.size] == content(image.flat)

        check()

    def test_the_writer_is_a_pure_function(self) -> None:
        source = patterned(3 * _MIB, [(4096, _MIB)])
        image = raw_disk(source)
        for variant in self.each_variant():
            first, second = (self.write(image, variant) for _ in range(2))
            assert [(f.name, f.table.size) for f in first.files] == [(f.name, f.table.size) for f in second.files]
            for one, other in zip(first.files, second.files, strict=True):
                assert [row[:3] for row in one.table] == [row[:3] for row in other.table]

    def test_the_names_of_the_files_are_known_without_writing(self) -> None:
        for size in (_MIB, 6 * _GIB):
            image = raw_disk(patterned(size, [(0, 4096)]))
            for variant in self.each_variant():
                if variant.get("subformat") in self.format.not_mountable:
                    continue
                options = parse_options(self.format.options(), variant, self.format.name)
                target = f"image{next(iter(self.format.suffixes), '')}"
                try:
                    layout = self.format.write(image, options, Placement(512, target))
                except PlanError:
                    # Such an image may be too small for the larger disk.
                    assert size > _MIB, variant
                    continue
                names = tuple(out.name or target for out in layout.files)
                assert self.format.file_names(options, target, size) == names, variant

    @pytest.mark.parametrize("modulus", [512, 4096, 65536])
    def test_aligned_payload_is_placed_where_it_can_be_referenced(self, modulus: int) -> None:
        unit = max(modulus, self.block)
        source = patterned(64 * unit, [(0, 3 * unit), (8 * unit, unit), (40 * unit, 24 * unit)])
        for variant in self.each_variant():
            layout = self.write(raw_disk(source), variant, modulus)
            for out in layout.files:
                for row in out.table:
                    if row.source is source:
                        assert (row.start - row.offset) % modulus == 0, (variant, row)

    def test_payload_stays_in_place_or_is_refused(self) -> None:
        if not self.format.in_place:
            pytest.skip("this format does not support a carrier")
        source = patterned(9 * _MIB, [(0, 4096), (_MIB, 3 * _MIB), (6 * _MIB, 70000)])
        done = 0
        for variant in self.each_variant():
            options = parse_options(self.format.options(), variant, self.format.name)
            try:
                layout = self.format.write(raw_disk(source), options, Placement(1, "image", carrier=source))
            except PlanError:
                continue
            files = [changed_in_place(out, source) for out in layout.files]
            result = self.read(files, layout)
            assert content(result.flat)[: source.size] == source.read(0, source.size), variant
            report = self.format.check(result)
            assert report is None or (report.corruption_count, report.leak_count) == (0, 0), (variant, report)
            done += 1
        assert done

    def test_computed_metadata_reads_the_same_in_pieces_and_as_a_whole(self) -> None:
        source = patterned(9 * _MIB, [(0, 4096), (_MIB, 5 * _MIB)])
        for variant in self.each_variant():
            for out in self.write(raw_disk(source), variant).files:
                for blob in out.table.sources:
                    if isinstance(blob, File) or not blob.size:
                        continue
                    whole = blob.read(0, blob.size)
                    assert len(whole) == blob.size
                    for seed in range(5):
                        rng = random.Random(seed)
                        start = rng.randrange(blob.size)
                        length = rng.randrange(blob.size - start) + 1
                        assert blob.read(start, length) == whole[start : start + length], (variant, blob.name)

    def test_metadata_read_in_random_pieces_is_the_metadata_read_at_once(self) -> None:
        """With payload far apart, tables that are neighbours in the file map distant addresses."""
        far = [(0, 4096), (_GIB // 2, 70000), (_GIB, 4096), (20 * _GIB, _MIB), (41 * _GIB + 4096, 512)]
        large = patterned(64 * _GIB, far)
        small = patterned(9 * _MIB, [(0, 4096), (_MIB, 5 * _MIB)])
        for number, variant in enumerate(self.each_variant()):
            try:
                layout = self.write(raw_disk(large), variant)
            except PlanError:
                layout = self.write(raw_disk(small), variant)
            if sum(blob.size for blob in _made_by(layout)) > _MOST_METADATA:
                layout = self.write(raw_disk(small), variant)
            rng = random.Random(number)
            for blob in _made_by(layout):
                whole = blob.read(0, blob.size)
                for start, length in _random_pieces(rng, blob.size):
                    assert blob.read(start, length) == whole[start : start + length], (variant, blob.name, start)

    def test_carried_facts_survive_a_round_trip(self) -> None:
        stated = dict(self.facts.stated())
        assert self.format.carries == frozenset(stated)
        source = patterned(4 * _MIB, [(0, _MIB)])
        for variant in self.each_variant():
            result = self.round_trip(raw_disk(source, self.facts), variant)
            assert {name: value for name, value in result.facts.stated() if name in stated} == stated
            # What the reader says is what the schema allows.
            assert result.disk.size == result.size

    # -- parents

    def each_on_a_parent(self, table: Extents, source: MemoryFile) -> Iterator[tuple[Image, Image]]:
        """Yields a layer with this table and the image read back, for each variant that can have a parent."""
        if not self.format.supports_backing:
            pytest.skip("this format has no parents")
        below = patterned(table.size, [(0, table.size)], seed=99)
        parent = self.round_trip(raw_disk(below), self.variants[0])
        backing = Backing(f"base{self.format.suffixes[0]}", self.format.name)
        made = 0
        for variant in self.each_variant():
            layer = disk_of(table, source, parent=parent)
            options = parse_options(self.format.options(), variant, self.format.name)
            try:
                layout = self.format.write(layer, options, Placement(512), backing=backing)
            except PlanError:
                # Some variants have no parents, such as flat ones. The first one must.
                assert made
                continue
            made += 1
            _, files = make_in_memory(layout, layer)
            yield layer, self.read(files, layout)

    def test_a_layer_on_a_parent_is_the_same_after_writing_and_reading(self) -> None:
        source = patterned(4 * _MIB, [(0, 4 * _MIB)])
        data, zero, hole = Kind.DATA, Kind.ZERO, Kind.HOLE
        rows: list[tuple[int, Kind, File | None, int]] = [
            (0, data, source, _MIB),
            (512, hole, None, 0),
            (_MIB + 4096, zero, None, 0),
            (_MIB + 70000 // 512 * 512, data, source, 8192),
            (2 * _MIB, hole, None, 0),
            (5 * _MIB, zero, None, 0),
            (9 * _MIB, hole, None, 0),
        ]
        for layer, result in self.each_on_a_parent(Extents.of(rows, 12 * _MIB), source):
            assert result.parent_reference
            assert layer.parent
            assert content(result.guest.over(layer.parent.flat)) == content(layer.flat)
            report = self.format.check(result)
            assert report is None or (report.corruption_count, report.leak_count) == (0, 0), report
            # Whole blocks may allocate more than the layer, but never less.
            below = layer.guest.total(Kind.HOLE)
            assert below // 4 <= result.guest.total(Kind.HOLE) <= below

    def test_an_empty_layer_allocates_nothing(self) -> None:
        size = 6 * _MIB + 512
        for _, result in self.each_on_a_parent(Extents.filled(size, Kind.HOLE), MemoryFile("source.raw", 512)):
            assert result.guest == Extents.filled(size, Kind.HOLE)

    def test_zeros_hide_the_parent(self) -> None:
        size = 6 * _MIB + 512
        for _, result in self.each_on_a_parent(Extents.filled(size, Kind.ZERO), MemoryFile("source.raw", 512)):
            assert result.guest.total(Kind.HOLE) == 0
            assert not any(content(result.guest))
