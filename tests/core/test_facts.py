"""What images state of their disks: one record for readers and writers, and its schema."""

from __future__ import annotations

import subprocess
import sys
from typing import Any
from uuid import UUID

import pytest
from pydantic import ValidationError

from vmconv.model.disk import Disk, GeometrySchema, Parent
from vmconv.model.extents import Extents, Kind
from vmconv.model.facts import DiskFacts, Geometry
from vmconv.model.image import Image
from vmconv.testing import disk_of, patterned
from vmconv.testing.memory import MemoryFile

ALL = DiskFacts(
    logical_sector_size=4096,
    physical_sector_size=512,
    identity=UUID(int=7),
    geometry=Geometry(20, 16, 63),
    adapter_type="ide",
    creator="somebody",
)


def test_the_record_and_its_schema_have_the_same_fields() -> None:
    assert [name for name in Disk.model_fields if name not in ("size", "parent")] == list(DiskFacts._fields)
    assert tuple(GeometrySchema.model_fields) == Geometry._fields


def test_the_schema_takes_each_fact() -> None:
    disk = Disk.of(1024, ALL, Parent(reference="base"))
    assert (disk.size, disk.parent) == (1024, Parent(reference="base"))
    for name, value in ALL.stated():
        found: Any = getattr(disk, name)
        assert (Geometry(**found.model_dump()) if name == "geometry" else found) == value, name


def test_unstated_facts_are_none_except_the_sector() -> None:
    disk = Disk.of(0, DiskFacts())
    assert disk.logical_sector_size == 512
    assert {getattr(disk, name) for name in DiskFacts._fields if name != "logical_sector_size"} == {None}


@pytest.mark.parametrize(
    "facts",
    [
        DiskFacts(logical_sector_size=1024),
        DiskFacts(physical_sector_size=513),
        DiskFacts(geometry=Geometry(1 << 32, 1, 1)),
        DiskFacts(geometry=Geometry(1, 1 << 16, 1)),
        DiskFacts(geometry=Geometry(1, 1, -1)),
        DiskFacts(adapter_type="a" * 65),
        DiskFacts(creator="a" * 65),
    ],
    ids=["sector", "physical", "cylinders", "heads", "sectors", "adapter", "creator"],
)
def test_impossible_facts_are_no_disk(facts: DiskFacts) -> None:
    with pytest.raises(ValidationError):
        Disk.of(0, facts)


def test_only_stated_values_are_listed() -> None:
    assert list(DiskFacts().stated()) == []
    assert list(DiskFacts(creator="", geometry=ALL.geometry).stated()) == [("geometry", (20, 16, 63)), ("creator", "")]


def test_a_geometry_is_named_number_by_number() -> None:
    assert str(ALL.geometry) == "cylinders 20, heads 16, sectors 63"


def test_an_image_states_its_facts_and_nothing_by_itself() -> None:
    source = patterned(1024, [])
    table = Extents.whole(source)
    assert disk_of(table, source).facts == DiskFacts()
    image = disk_of(table, source, facts=ALL)
    assert image.facts == image.onto(image).facts == ALL
    assert image.disk == Disk.of(1024, ALL)


def test_the_record_needs_neither_pydantic_nor_uuid() -> None:
    code = (
        "import sys; from vmconv.plugin import DiskFacts, Geometry; DiskFacts(geometry=Geometry(1, 2, 3));"
        "sys.exit(bool({'pydantic', 'uuid', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_copy_with_other_facts_has_the_warnings_of_later_reading() -> None:
    def load() -> Extents:
        image.warnings += ("overlaps",)
        return Extents.filled(512, Kind.ZERO)

    image = Image("test", MemoryFile("disk", 512), 512, load)
    other = image.stating(logical_sector_size=4096)
    assert other.guest.size == 512
    assert other.warnings == image.warnings == ("overlaps",)
