"""Readers that we did not write see the whole disk in each subformat that we write, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

import vmconv
from support.disks import MIB, make_disk
from support.opinions import OTHER_OPTIONS, READERS, Opinion, opinion_title, opinions, sum_of
from support.requirements import missing
from support.variants import make, self_contained
from vmconv.io.registry import installed

SIZE = 70 * MIB
"""Bytes, and one unit of the reader more: some blocks of each format, and no whole number of them."""


def check(directory: Path, opinion: Opinion, size: int) -> None:
    """Asks one reader about a disk of this size with payload in many places, its beginning and end among them."""
    variant, reader = opinion
    lack = reader.what_is_missing()
    if lack:
        missing("oracle", f"{reader.name}: {lack}")
    unit = 4096 if "4096" in variant[1] else reader.unit
    raw = make_disk(directory / "disk.raw", size + unit, pieces=60)
    image = make(raw, variant, directory)
    # Some formats hold whole blocks only: what is more is zeros.
    virtual_size = vmconv.info(str(image))["virtual-size"]
    assert reader.sum_of(image) == (virtual_size, sum_of(raw, virtual_size))


@pytest.mark.parametrize("opinion", opinions([*self_contained(), *OTHER_OPTIONS]), ids=opinion_title)
def test_another_reader_sees_the_same_disk(xfs_dir: Path, opinion: Opinion) -> None:
    check(xfs_dir, opinion, SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("opinion", opinions([v for v in self_contained() if "twoGb" in v[1]]), ids=opinion_title)
def test_another_reader_sees_the_same_disk_in_several_extents(xfs_dir: Path, opinion: Opinion) -> None:
    check(xfs_dir, opinion, SIZE + (2 << 30))


def test_every_format_has_a_second_reader_or_a_reason_why_not() -> None:
    # Only QEMU reads QED, and a raw disk needs no reader.
    written = {name for name, one in installed().formats.items() if one.can_write}
    assert {"qed", "raw"} | set(READERS) == written
