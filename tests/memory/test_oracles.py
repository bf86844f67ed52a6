"""Memory images against programs that are not ours: volatility3, readelf, QEMU."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmconv
from support import memory_images as images
from support.requirements import oracle_program
from support.volatility import volatility
from vmconv.io.registry import installed

PLACES = 1000
LAYERS = {
    "ram": ("physical", "FileLayer"),
    "elfcore": ("elf", "Elf64Layer"),
    "lime": ("lime", "LimeLayer"),
    "vmem": ("vmware", "VmwareLayer"),
}
"""volatility3's reader of each format: module and class."""


def places(wanted: bytes, length: int = 16) -> Iterator[int]:
    """Yields addresses in RAM, at its edges too."""
    rng = random.Random(5)
    edges = [0, images.LOW - length, images.GAP, images.HIGH - length]
    for at in (*edges, *(rng.randrange(len(wanted) - length) for _ in range(PLACES))):
        if at + length <= images.LOW or at >= images.GAP:
            yield at


@pytest.mark.parametrize("target", sorted(LAYERS))
def test_volatility_reads_the_same_bytes_at_random_addresses(xfs_dir: Path, target: str) -> None:
    wanted = images.physical(images.ram())
    path = xfs_dir / f"made{installed().format(target).suffixes[0]}"
    vmconv.convert(str(images.make_vmware(xfs_dir, images.ram())), str(path))
    asked = list(places(wanted))
    last, found = volatility(path, *LAYERS[target], asked)
    assert last == images.HIGH - 1
    assert found == [wanted[at : at + 16].hex() for at in asked]


@pytest.mark.parametrize("target", ["elfcore", "lime", "vmem"])
def test_volatility_has_no_memory_in_the_gap(xfs_dir: Path, target: str) -> None:
    path = xfs_dir / f"made{installed().format(target).suffixes[0]}"
    vmconv.convert(str(images.make_vmware(xfs_dir, images.ram())), str(path))
    _, found = volatility(path, *LAYERS[target], [images.LOW - 16, images.LOW, images.GAP - 16, images.GAP])
    assert [each is None for each in found] == [False, True, True, False]


def test_readelf_shows_ranges_and_notes(xfs_dir: Path) -> None:
    readelf = oracle_program("readelf")
    memory = images.ram()
    note = b"\5\0\0\0\4\0\0\0\1\0\0\0CORE\0\0\0\0abcd"
    source = xfs_dir / "source.elf"
    source.write_bytes(images.elf_core(images.ranges(memory), notes=note))
    target = xfs_dir / "target.elf"
    result = vmconv.convert(str(source), str(target))
    # The payload of this core lies at no multiple of 4096, and keeps its phase: only the edges are copied.
    assert 0 < result.totals.copied <= 4 * 4096
    assert result.losses == ()
    said = subprocess.run([readelf, "-lnW", str(target)], capture_output=True, text=True, check=True)
    assert not said.stderr
    loads = [line.split() for line in said.stdout.splitlines() if line.split()[:1] == ["LOAD"]]
    assert [(int(load[3], 16), int(load[4], 16)) for load in loads] == [
        (0, images.LOW),
        (images.GAP, images.HIGH - images.GAP),
    ]
    assert all(load[4] == load[5] for load in loads)
    assert "CORE" in said.stdout
    assert "NT_PRSTATUS" in said.stdout


def test_readelf_shows_payload_at_whole_pages(xfs_dir: Path) -> None:
    readelf = oracle_program("readelf")
    target = xfs_dir / "target.elf"
    vmconv.convert(str(images.make_vmware(xfs_dir, images.ram())), str(target), zero_copy="require")
    said = subprocess.run([readelf, "-lW", str(target)], capture_output=True, text=True, check=True)
    assert not said.stderr
    loads = [line.split() for line in said.stdout.splitlines() if line.split()[:1] == ["LOAD"]]
    assert [int(load[1], 16) % 4096 for load in loads] == [0, 0]
