"""Payload at odd places: what each target can still share of it, and why the rest is copied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk
from support.parallels_images import build as build_parallels
from vmconv.model.extents import Extents, Kind
from vmconv.model.layout import Placement
from vmconv.model.sources import Blob, Source
from vmconv.testing import disk_of
from vmconv.testing.memory import MemoryFile
from vmconv_parallels.structs import MAGIC_V1
from vmconv_qcow2 import Qcow2
from vmconv_qcow2.clusters import cluster_size

SIZE = 96 * MIB
SECTOR = 512
GIB = 1 << 30


def vhd(raw: Path, image: Path, qemu_img: QemuImg) -> None:
    """QEMU's blocks of 2 MiB and 512 bytes: each has another phase."""
    qemu_img("convert", "-O", "vpc", "-o", "subformat=dynamic,force_size=on", raw, image)


def vdi(raw: Path, image: Path, qemu_img: QemuImg) -> None:
    """QEMU's data begins right behind the block map."""
    qemu_img("convert", "-O", "vdi", raw, image)


def parallels(raw: Path, image: Path, qemu_img: QemuImg) -> None:
    """VirtualBox' blocks of 63 sectors, behind a BAT of whole sectors."""
    block = 63 * SECTOR
    data = raw.read_bytes()
    blocks = [data[at : at + block].ljust(block, b"\0") for at in range(0, len(data), block)]
    first = -(-(64 + 4 * len(blocks)) // SECTOR) * SECTOR
    used = [content for content in blocks if any(content)]
    places = iter(range(first, first + len(used) * block, block))
    bat = [next(places) // SECTOR if any(content) else 0 for content in blocks]
    header = build_parallels({}, bat, tracks=63, magic=MAGIC_V1, nb_sectors=len(data) // SECTOR)
    image.write_bytes(b"".join([header.ljust(first, b"\0"), *used]))


SOURCES: dict[str, Callable[[Path, Path, QemuImg], None]] = {"vhd": vhd, "vdi": vdi, "parallels": parallels}
SHARES = [("vmdk", {}, 0.99), ("vmdk", {"subformat": "twoGbMaxExtentSparse"}, 0.99), ("qcow2", {}, 0.99)]


@pytest.fixture
def raw(reflink_dir: Path) -> Path:
    return make_disk(reflink_dir / "disk.raw", SIZE, pieces=12, unit=MIB // 8)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("target", "options", "least"), SHARES, ids=["vmdk", "split vmdk", "qcow2"])
def test_targets_with_small_units_share_it(
    reflink_dir: Path, qemu_img: QemuImg, raw: Path, source: str, target: str, options: dict[str, str], least: float
) -> None:
    image, path = reflink_dir / f"disk.{source}", reflink_dir / f"new.{target}"
    SOURCES[source](raw, image, qemu_img)
    totals = vmconv.convert(str(image), str(path), source_format=source, options=options).totals
    payload = totals.shared + totals.copied
    assert payload > 16 * MIB
    assert totals.shared >= least * payload
    # The header of a disk as small as this weighs more than its tables.
    assert totals.written <= 0.025 * payload + 65536
    proof = vmconv.prove(str(image), str(path), left_format=source)
    assert proof.shared >= least * (proof.shared + proof.apart)
    qemu_img("compare", "-f", "raw", "-F", target, raw, path)
    qemu_img("check", "-f", target, path)


def test_a_vhd_shares_what_has_one_phase_for_each_block(reflink_dir: Path, qemu_img: QemuImg, raw: Path) -> None:
    for source in ("vhd", "vdi"):
        image, path = reflink_dir / f"disk.{source}", reflink_dir / f"{source}.vhd"
        SOURCES[source](raw, image, qemu_img)
        totals = vmconv.convert(str(image), str(path)).totals
        assert totals.shared >= 0.99 * (totals.shared + totals.copied)
        qemu_img("compare", "-f", "raw", "-F", "vpc", raw, path)


@pytest.mark.parametrize("target", ["raw", "vhdx", "qed", "parallels"])
def test_copies_of_other_targets_have_reasons(reflink_dir: Path, qemu_img: QemuImg, raw: Path, target: str) -> None:
    image, path = reflink_dir / "disk.vdi", reflink_dir / f"new.{target}"
    vdi(raw, image, qemu_img)
    result = vmconv.convert(str(image), str(path), target_format=target)
    assert result.totals.shared == 0
    (copy,) = result.copies
    assert copy.reason == "offsets in source and target differ modulo the 4096-byte block"
    assert copy.bytes == result.totals.copied > 16 * MIB
    qemu_img("compare", "-f", "raw", "-F", target, raw, path)


# -- how large qcow2's clusters are


class Full(MemoryFile):
    """A file that has something everywhere, as far as its map tells."""

    def data_ranges(self, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
        return [(start, self.size if end is None else min(end, self.size))]


def dense(length: int, phase: int) -> Extents:
    """Returns a disk that lies in one piece in a file, at this offset."""
    return Extents.whole(Full("source", length + phase)).window(phase, length)


def mixed(*rows: tuple[Source, int, int]) -> Extents:
    """Returns a disk of pieces: a source, an offset in it and a length."""
    table, at = [], 0
    for source, offset, length in rows:
        table.append((at, Kind.DATA, source, offset))
        at += length
    return Extents.of(table, at)


def scattered(pieces: int, length: int) -> Extents:
    """Returns a disk with small pieces far from each other, at odd places of a file."""
    file = MemoryFile("source", pieces * length + SECTOR)
    rows = [(at * MIB, Kind.DATA, file, SECTOR + at * length) for at in range(pieces)]
    holes = [(at * MIB + length, Kind.ZERO, None, 0) for at in range(pieces)]
    return Extents.of(sorted([*rows, *holes], key=lambda row: row[0]), pieces * MIB)


FILE = MemoryFile("file", 8 * GIB)
CHOICES: dict[str, tuple[Extents, int, int]] = {
    "aligned": (dense(GIB, 0), 4096, 65536),
    "aligned to blocks": (dense(GIB, 4096), 4096, 65536),
    "phase of 2048": (dense(GIB, 2048), 4096, 2048),
    "phase of 1024": (dense(GIB, 3 * 1024), 4096, 1024),
    "phase of 512": (dense(GIB, 7 * 512), 4096, 512),
    "phase of 4096 in blocks of 64K": (dense(GIB, 4096), 65536, 4096),
    "no phase at all": (dense(GIB, 100), 4096, 65536),
    "two phases": (mixed((FILE, 1024, GIB), (FILE, 2 * GIB + 512, GIB)), 4096, 512),
    "less than half is odd": (mixed((FILE, 0, GIB), (FILE, 2 * GIB + 512, GIB // 2)), 4096, 65536),
    "more than half is odd": (mixed((FILE, 0, GIB // 2), (FILE, 2 * GIB + 512, GIB)), 4096, 512),
    "copying": (dense(GIB, 512), 1, 65536),
    "metadata only": (mixed((Blob("made", bytes(4096)), 512, 2048)), 4096, 65536),
    "nothing": (Extents.filled(GIB), 4096, 65536),
    "pieces of a few blocks": (scattered(1000, 16384), 4096, 65536),
    "pieces of a MiB less a bit": (scattered(1000, MIB - 65536), 4096, 512),
    "as much as 512 can count": (dense(120 * GIB, 512), 4096, 512),
    "more than 512 can count": (dense(130 * GIB, 512), 4096, 65536),
    "more than 512 but not 1024 can count": (dense(130 * GIB, 1024), 4096, 1024),
    "a large disk with little on it": (dense(GIB, 512).window(0, 120 * GIB).without_holes(), 4096, 65536),
}


@pytest.mark.parametrize("case", CHOICES)
def test_clusters_are_small_only_where_that_is_worth_it(case: str) -> None:
    table, modulus, wanted = CHOICES[case]
    assert cluster_size(table, modulus, 16) == wanted


@pytest.mark.parametrize("case", ["as much as 512 can count", "more than 512 but not 1024 can count"])
def test_the_chosen_blocks_can_be_written(case: str) -> None:
    table, modulus, _ = CHOICES[case]
    (source,) = table.sources
    assert isinstance(source, MemoryFile)
    layout = Qcow2().write(disk_of(table, source), Qcow2().options()(), Placement(modulus))
    rows: Sequence[tuple[int, int]] = [(row.start, row.offset) for row in layout.files[0].table if row.source is source]
    assert rows
    assert all((start - offset) % modulus == 0 for start, offset in rows)


def test_the_user_s_choice_stands(reflink_dir: Path, qemu_img: QemuImg, raw: Path) -> None:
    vdi(raw, reflink_dir / "disk.vdi", qemu_img)
    path = str(reflink_dir / "new.qcow2")
    vmconv.convert(str(reflink_dir / "disk.vdi"), path, options={"cluster_size": "64K"})
    assert vmconv.info(path)["cluster-size"] == 65536
