"""Readers that we did not write see the whole disk in each subformat that we write, byte for byte."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import vmconv
from conftest import missing
from support.disks import MIB, make_disk
from support.opinions import READERS, Reader
from support.variants import Variant, make, self_contained, title
from vmconv.io.registry import installed

SIZE = 70 * MIB
"""Bytes, and one unit of the reader more: some blocks of each format, and no whole number of them."""

OTHER_OPTIONS: list[Variant] = [
    ("parallels", "cluster_size=4K"),
    ("parallels", "cluster_size=64K"),
    ("parallels", "cluster_size=8M"),
    ("qcow2", "cluster_size=512"),
    ("qcow2", "cluster_size=2M"),
    ("qcow2", "compat=0.10"),
    ("qcow2", "refcount_bits=1"),
    ("vhdx", "block_size=1M"),
    ("vhdx", "logical_sector_size=4096"),
    ("vmdk", "zeroed_grain=on"),
]
"""Options besides subformats that change where things are in an image.

qcow2's extended_l2 is not among them: libqcow refuses it, and dissect 3.21 fails on QEMU's own images with it.
"""

Opinion = tuple[Variant, Reader]


def opinions(wanted: list[Variant]) -> list[Opinion]:
    return [(variant, reader) for variant in wanted for reader in READERS.get(variant[0], ())]


def opinion_title(one: Opinion) -> str:
    return f"{title(one[0])}-{one[1].name}"


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


def sum_of(raw: Path, size: int) -> str:
    """Returns the sha256 of a raw disk with zeros behind it, `size` bytes in all."""
    digest = hashlib.sha256()
    with raw.open("rb") as file:
        while piece := file.read(MIB):
            digest.update(piece)
        digest.update(bytes(size - file.tell()))
    return digest.hexdigest()


@pytest.mark.parametrize("opinion", opinions([*self_contained(), *OTHER_OPTIONS]), ids=opinion_title)
def test_another_reader_sees_the_same_disk(xfs_dir: Path, opinion: Opinion) -> None:
    check(xfs_dir, opinion, SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("opinion", opinions([v for v in self_contained() if "twoGb" in v[1]]), ids=opinion_title)
def test_another_reader_sees_the_same_disk_in_several_extents(xfs_dir: Path, opinion: Opinion) -> None:
    check(xfs_dir, opinion, SIZE + (2 << 30))


def test_every_format_has_a_second_reader_or_a_reason_why_not() -> None:
    # Only QEMU reads QED, and a raw disk needs no reader.
    assert {"qed", "raw"} | set(READERS) == set(installed().formats)
