"""VHDX: the conformance kit, what other tools make of our images, logs to replay, and images that are not as they
should be.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import vmconv
from support.corpus import rows, unpack
from support.disks import MIB, QemuImg
from support.kits.storage import OnStorage
from support.kits.vhdx import VhdxKit
from support.requirements import oracle_module, oracle_program
from support.vhdx_images import (
    BAT,
    CLEAR_3,
    CLEAR_BOTH,
    KIB,
    LOG,
    METADATA,
    PAYLOAD,
    SMALL,
    SOURCE,
    bat,
    bat_sector,
    differencing,
    dirty,
    entry,
    header,
    metadata,
    opened,
    parent_disk,
    put,
    sample,
    sealed,
    written,
)
from vmconv.errors import ImageError, PlanError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.model.extents import Extents, Kind
from vmconv.model.facts import DiskFacts
from vmconv.model.image import Image
from vmconv.model.layout import Backing, Placement
from vmconv.testing import disk_of, disks, patterned
from vmconv.testing.disks import content, raw_disk
from vmconv.testing.malformed import time_limit
from vmconv.testing.memory import MemoryFile
from vmconv_vhdx import Vhdx
from vmconv_vhdx.options import Options


class TestVhdx(VhdxKit):
    """The conformance kit."""


class TestVhdxOnStorage(OnStorage):
    format = VhdxKit.format
    variants = ({}, {"subformat": "fixed"}, {"block_size": "1M"}, {"log_size": "3M"})
    written_by_qemu = ({}, {"block_size": "1M"})
    in_place = ({},)
    made_by_qemu = (
        {"subformat": "dynamic"},
        {"subformat": "fixed"},
        {"block_size": "1M"},
        {"block_size": "256M"},
        {"block_state_zero": "off"},
        {"log_size": "2M"},
    )


# -- helpers


def region(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    """Returns a change of a field in both region tables, their checksums right."""

    def change(data: bytes) -> bytes:
        for at in (192 * KIB, 256 * KIB):
            data = put(data, at, sealed(put(data[at : at + 64 * KIB], offset, value)))
        return data

    return change


# -- other tools read our images, and we read theirs


@pytest.mark.parametrize(("block_size", "size"), [("256M", 4352 * MIB), ("1M", 4352 * MIB), ("0", 2048 * MIB)])
def test_disks_of_several_chunks(xfs_dir: Path, qemu_img: QemuImg, block_size: str, size: int) -> None:
    """The BAT has an entry for a sector bitmap after 16 blocks of 256 MiB, or 4096 of 1 MiB: payload is behind it."""
    raw, ours, theirs = (xfs_dir / name for name in ("disk.raw", "ours.vhdx", "theirs.vhdx"))
    with raw.open("wb") as file:
        file.truncate(size)
        for place in (0, size - 100 * MIB):
            file.seek(place)
            file.write(os.urandom(4096))
    vmconv.convert(str(raw), str(ours), options={"block_size": block_size}, zero_copy="require")
    qemu_img("check", ours)
    qemu_img("compare", "-f", "raw", "-F", "vhdx", raw, ours)
    qemu_img("convert", "-f", "raw", "-O", "vhdx", "-o", f"block_size={block_size}", raw, theirs)
    assert vmconv.compare(str(raw), str(theirs))


def test_the_default_block_sizes_are_those_of_qemu(tmp_path: Path, qemu_img: QemuImg) -> None:
    for size in (MIB, (1 << 30) + MIB, (100 << 30) + MIB, (32 << 40) + MIB):
        qemu_img("create", "-f", "vhdx", tmp_path / "disk.vhdx", str(size))
        theirs = vmconv.info(str(tmp_path / "disk.vhdx"))["cluster-size"]
        disk = disk_of(Extents.filled(size), MemoryFile("source.raw", 0))
        assert opened(written(disk, Options())).details["cluster-size"] == theirs


def test_libvhdi_reads_what_the_metadata_says(tmp_path: Path) -> None:
    vhdiinfo = oracle_program("vhdiinfo")
    path = tmp_path / "disk.vhdx"
    path.write_bytes(sample(DiskFacts(logical_sector_size=4096)))
    said = subprocess.run([vhdiinfo, str(path)], capture_output=True, text=True, check=True).stdout
    assert re.search(r"Disk type\s*: Dynamic", said)
    assert re.search(r"Bytes per sector\s*: 4096", said)
    assert f"({5 * MIB} bytes)" in said


# -- the corpus


def digest(table: Extents) -> str:
    """Returns the manifest's digest of the chunks that are not zero."""
    found = hashlib.sha256()
    edges = np.concatenate([table.start[table.kind == Kind.DATA], table.end[table.kind == Kind.DATA] - 1])
    touched = [range(low // MIB, high // MIB + 1) for low, high in edges.reshape(2, -1).T.tolist()]
    for chunk in sorted({number for numbers in touched for number in numbers}):
        data = table.read(chunk * MIB, min(MIB, table.size - chunk * MIB))
        if any(data):
            found.update((chunk * MIB).to_bytes(8, "little") + data)
    found.update(table.size.to_bytes(8, "little"))
    return found.hexdigest()


@pytest.mark.parametrize("row", rows("vhdx"), ids=lambda row: row["name"])
def test_images_of_the_corpus_are_converted_right(row: dict[str, str], corpus: Path, xfs_dir: Path) -> None:
    image, target = unpack(corpus, row["name"], xfs_dir), xfs_dir / "target.vhdx"
    before = hashlib.sha256(image.read_bytes()).digest()
    vmconv.convert(str(image), str(target))
    with Opener(installed()) as opener:
        result = opener.image(str(target))
        assert result.size == int(row["virtual_size"])
        assert digest(result.flat) == row["zdigest"]
    assert hashlib.sha256(image.read_bytes()).digest() == before


@pytest.mark.malformed
def test_a_parent_that_was_written_to_is_refused(corpus: Path, xfs_dir: Path) -> None:
    child, parent = unpack(corpus, "dfvfs/fat-differential.vhdx", xfs_dir), xfs_dir / "fat-parent.vhdx"
    parent.write_bytes(header(32, b"x" * 16)(parent.read_bytes()))
    with pytest.raises(ImageError, match="data write GUID") as caught:
        vmconv.convert(str(child), str(xfs_dir / "target.raw"))
    assert caught.value.hint


def test_a_differencing_disk_stays_one_on_its_parent(corpus: Path, xfs_dir: Path) -> None:
    child, target = unpack(corpus, "dfvfs/fat-differential.vhdx", xfs_dir), xfs_dir / "target.vhdx"
    vmconv.convert(str(child), str(target), backing_file="fat-parent.vhdx")
    assert vmconv.info(str(target))["backing-filename"] == "fat-parent.vhdx"
    with Opener(installed()) as opener:
        was, now = opener.image(str(child)), opener.image(str(target))
        assert now.parent is not None
        assert np.array_equal(was.guest.start, now.guest.start)
        assert np.array_equal(was.guest.kind, now.guest.kind)
    assert vmconv.compare(str(child), str(target))


def test_dissect_reads_our_differencing_disk_on_its_parent(corpus: Path, xfs_dir: Path) -> None:
    vhdx = oracle_module("dissect.hypervisor.disk.vhdx")
    child, target = unpack(corpus, "dfvfs/fat-differential.vhdx", xfs_dir), xfs_dir / "target.vhdx"
    vmconv.convert(str(child), str(target), backing_file="fat-parent.vhdx")
    (wanted,) = (row["expect"] for row in rows("vhdx") if row["name"] == "dfvfs/fat-differential.vhdx")
    disk = vhdx.VHDX(target)
    try:
        assert hashlib.sha256(disk.read(disk.size)).hexdigest() == wanted
    finally:
        disk.fh.close()
        disk.parent.fh.close()


# -- writing


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(image=disks(parent=True, unit=64 * KIB))
def test_any_layer_on_a_parent_is_the_same_after_writing_and_reading(image: Image) -> None:
    base = parent_disk()
    layer = disk_of(image.guest, image.file, parent=base)  # type: ignore[arg-type]
    result = opened(written(layer, backing=Backing("base.vhdx", "vhdx")))
    linkage = base.details["format-specific"]["data"]["data-write-guid"]
    assert result.parent_reference == "base.vhdx"
    assert linkage in result.details["format-specific"]["data"]["parent-linkage"]
    assert content(result.guest.over(base.flat))[: image.size] == content(layer.flat)


@pytest.mark.parametrize("sector", [512, 4096])
def test_sectors_left_to_the_parent_stay_holes(sector: int) -> None:
    top = patterned(MIB, [(0, MIB)])
    rows = [
        (0, Kind.HOLE, None, 0),
        (2 * MIB, Kind.ZERO, None, 0),
        (3 * MIB, Kind.HOLE, None, 0),
        (6 * MIB + 8192, Kind.DATA, top, 8192),
        (6 * MIB + 12288, Kind.ZERO, None, 0),
        (6 * MIB + 20480, Kind.HOLE, None, 0),
    ]
    layer = disk_of(Extents.of(rows, 8 * MIB), top, parent=parent_disk(sector), facts=DiskFacts(sector))
    table = opened(written(layer, backing=Backing("base.vhdx", "vhdx"))).guest
    assert [(row.start, row.length) for row in table if row.kind == Kind.DATA] == [(6 * MIB + 8192, 12288)]
    assert [(row.start, row.length) for row in table if row.kind == Kind.ZERO] == [(2 * MIB, MIB)]


@pytest.mark.parametrize(
    ("backing", "options"),
    [(Backing("base.raw", "raw"), SMALL), (Backing("b.vhdx", "vhdx"), Options(subformat="fixed"))],
)
def test_a_parent_that_a_vhdx_cannot_have_is_refused(backing: Backing, options: Options) -> None:
    layer = disk_of(Extents.filled(MIB, Kind.HOLE), MemoryFile("top", 0), parent=parent_disk())
    with pytest.raises(PlanError):
        Vhdx().write(layer, options, Placement(), backing=backing)


def test_a_disk_that_is_not_whole_sectors_is_refused_with_the_nearest_sizes() -> None:
    disk = disk_of(Extents.filled(MIB + 512), MemoryFile("source.raw", 0), facts=DiskFacts(logical_sector_size=4096))
    with pytest.raises(PlanError, match="4096") as caught:
        Vhdx().write(disk, Options(), Placement())
    assert caught.value.hint == f"the nearest sizes are {MIB} and {MIB + 4096}"


def test_a_disk_too_large_is_refused_with_the_largest_size() -> None:
    disk = disk_of(Extents.filled((64 << 40) + 512), MemoryFile("source.raw", 0))
    with pytest.raises(PlanError, match=str(64 << 40)):
        Vhdx().write(disk, Options(), Placement())


def test_the_largest_disk_is_laid_out_at_once() -> None:
    source = MemoryFile("source.raw", 64 << 40)
    source.on_storage = Extents.whole(source)
    with time_limit(2):
        table = Vhdx().write(disk_of(source.on_storage, source), SMALL, Placement(4096)).files[0].table
    entries = next(blob for blob in table.sources if blob.name == "BAT")
    assert entries.size > 64 << 23
    assert entries.read(entries.size - 8, 8)[0] & 7 == 6


# -- headers


def test_the_header_with_the_greater_number_counts() -> None:
    data = header(32, b"a" * 16, [64 * KIB])(sample())
    old = opened(data).details["format-specific"]["data"]["data-write-guid"]
    assert old != str(UUID(bytes_le=b"a" * 16))
    newer = header(8, struct.pack("<Q", 9), [64 * KIB])(data)
    assert opened(newer).details["format-specific"]["data"]["data-write-guid"] == str(UUID(bytes_le=b"a" * 16))


@pytest.mark.parametrize("at", [64 * KIB, 128 * KIB])
def test_one_sound_header_is_enough(at: int) -> None:
    assert content(opened(put(sample(), at + 100, b"x")).flat) == SOURCE.read(0, SOURCE.size)


@pytest.mark.malformed
def test_two_headers_with_one_number_must_be_equal() -> None:
    data = header(8, struct.pack("<Q", 7))(sample())
    same = put(data, 128 * KIB, data[64 * KIB : 68 * KIB])
    assert content(opened(same).flat) == SOURCE.read(0, SOURCE.size)
    with pytest.raises(ImageError, match="both headers have 7"):
        opened(header(32, b"b" * 16, [128 * KIB])(data))


def test_one_sound_region_table_is_enough() -> None:
    assert content(opened(put(sample(), 192 * KIB + 20, b"x")).flat) == SOURCE.read(0, SOURCE.size)


# -- the BAT


@pytest.mark.parametrize("state", [0, 1, 2, 3, 5])
def test_blocks_that_are_not_present_read_as_zero(state: int) -> None:
    table = opened(bat(3, PAYLOAD + state)(sample())).flat
    assert content(table) == SOURCE.read(0, 3 * MIB) + bytes(2 * MIB)


@pytest.mark.parametrize("state", [1, 2, 3, 5])
def test_such_blocks_hide_the_parent(state: int) -> None:
    layer = disk_of(Extents.filled(8 * MIB, Kind.HOLE), MemoryFile("top", 0), parent=parent_disk())
    data = written(layer, backing=Backing("base.vhdx", "vhdx"))
    table = opened(bat(1, state)(data)).guest
    assert [(row.start, row.length) for row in table if row.kind == Kind.ZERO] == [(MIB, MIB)]


def test_unallocated_blocks_of_a_fixed_disk_read_as_zero() -> None:
    data = written(raw_disk(SOURCE), Options(subformat="fixed", block_size=MIB))
    assert content(opened(bat(1, 0)(data)).flat) == SOURCE.read(0, SOURCE.size)


# -- the log


WITHOUT_3 = SOURCE.read(0, 3 * MIB) + bytes(2 * MIB)


def test_an_entry_of_a_dirty_log_is_replayed() -> None:
    image = opened(dirty(sample(), (0, entry(5, 0, [(BAT, CLEAR_3)]))))
    assert content(image.flat) == WITHOUT_3
    assert "replayed in memory" in image.warnings[0]
    assert image.details["dirty-flag"]


def test_without_a_log_guid_nothing_is_replayed() -> None:
    data = header(48, bytes(16))(dirty(sample(), (0, entry(5, 0, [(BAT, CLEAR_3)]))))
    assert content(opened(data).flat) == SOURCE.read(0, SOURCE.size)


def test_entries_are_replayed_from_the_tail_to_the_head_around_the_end_of_the_log() -> None:
    first, second = entry(5, MIB - 8192, [(BAT, CLEAR_BOTH)]), entry(6, MIB - 8192, [(BAT, CLEAR_3)])
    data = dirty(sample(), (MIB - 8192, first), (0, second))
    assert content(opened(data).flat) == WITHOUT_3


def test_an_entry_may_cross_the_end_of_the_log() -> None:
    data = dirty(sample(), (MIB - 4096, entry(5, MIB - 4096, [(BAT, CLEAR_3)])))
    assert content(opened(data).flat) == WITHOUT_3


def test_entries_before_the_tail_are_not_replayed() -> None:
    first, second = entry(5, 0, [(BAT, CLEAR_BOTH)]), entry(6, 8192, [(METADATA + 8192, 4096)])
    assert content(opened(dirty(sample(), (0, first), (8192, second))).flat) == SOURCE.read(0, SOURCE.size)


def test_old_entries_that_are_left_in_the_log_do_not_count() -> None:
    data = dirty(sample(), (0, entry(9, 0, [(BAT, CLEAR_3)])), (16384, entry(4, 16384, [(BAT, CLEAR_BOTH)])))
    assert content(opened(data).flat) == WITHOUT_3


def test_zero_descriptors_are_replayed() -> None:
    data = dirty(sample(), (0, entry(5, 0, [(PAYLOAD, 4096), (PAYLOAD + MIB, 70000 // 4096 * 4096)])))
    expected = put(SOURCE.read(0, SOURCE.size), 3 * MIB, bytes(70000 // 4096 * 4096))
    assert content(opened(data).flat) == bytes(4096) + expected[4096:]


def test_payload_in_the_log_is_replayed() -> None:
    sector = bytes(range(256)) * 16
    image = opened(dirty(sample(), (0, entry(5, 0, [(PAYLOAD + MIB, sector)]))))
    assert image.flat.read(3 * MIB, 8192) == sector + SOURCE.read(3 * MIB + 4096, 4096)


def test_a_log_may_make_the_file_longer() -> None:
    data = sample()
    longer = len(data) + MIB
    one = entry(5, 0, [(BAT, bat_sector(b1=len(data) | 6)), (len(data), b"new!" * 1024)], size=(len(data), longer))
    table = opened(dirty(data, (0, one))).flat
    assert table.read(MIB, 8192) == b"new!" * 1024 + bytes(4096)
    assert table.read(3 * MIB, MIB) == SOURCE.read(3 * MIB, MIB)


ONE, TWO, THREE = (entry(number, 0, [(BAT, CLEAR_3)]) for number in (5, 6, 7))

TORN: tuple[tuple[str, tuple[tuple[int, bytes], ...], str], ...] = (
    ("no entry", (), "its log has no entry"),
    ("flipped bit in the only entry", ((0, put(ONE, 5000, b"x")),), "torn: entry 5 .* checksum"),
    ("newest entry is torn", ((0, ONE), (8192, put(TWO, 5000, b"x"))), "torn: entry 6 .* checksum"),
    ("entry in the middle is torn", ((0, ONE), (8192, put(TWO, 5000, b"x")), (16384, THREE)), "torn: entry 7"),
    ("tail outside of the sequence", ((0, entry(5, 40960, [(BAT, CLEAR_3)])),), "torn: entry 5 .*missing"),
    ("tail is no sector", ((0, entry(5, 512, [(BAT, CLEAR_3)])),), "tail 0x200"),
    ("number of a data sector", ((0, sealed(put(ONE, 4096 + 4092, b"x"))),), "a data sector is torn"),
    ("high number of a data sector", ((0, sealed(put(ONE, 4096 + 4, b"x"))),), "a data sector is not of this entry"),
    ("number of a descriptor", ((0, sealed(put(ONE, 64 + 24, b"x"))),), "a descriptor is not of this entry"),
    ("signature of a descriptor", ((0, sealed(put(ONE, 64, b"x"))),), "a descriptor is not of this entry"),
    ("unaligned place", ((0, entry(5, 0, [(BAT + 512, CLEAR_3)])),), "not of whole sectors"),
    ("unaligned length", ((0, entry(5, 0, [(BAT, 512)])),), "not of whole sectors"),
    (
        "sectors without descriptors",
        ((0, sealed(put(put(ONE, 64, b"zero"), 72, bytes(8)))),),
        "0 data descriptors for 1",
    ),
    ("file was longer", ((0, entry(5, 0, [(BAT, CLEAR_3)], size=(1 << 40, 1 << 40))),), "had 0x10000000000 bytes"),
    ("past the end", ((0, entry(5, 0, [(1 << 40, CLEAR_3)])),), "past the end of the file"),
    ("far past the end", ((0, entry(5, 0, [((1 << 64) - 4096, CLEAR_3)])),), "past the largest possible file"),
    ("enormous file", ((0, entry(5, 0, [(BAT, CLEAR_3)], size=(0, (1 << 64) - 1))),), "the file would have"),
)


@pytest.mark.malformed
@pytest.mark.parametrize(("entries", "message"), [case[1:] for case in TORN], ids=[case[0] for case in TORN])
def test_a_log_that_cannot_be_trusted_is_refused(entries: tuple[tuple[int, bytes], ...], message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        opened(dirty(sample(), *entries))
    assert str(caught.value).startswith("disk.vhdx: log at 0x")
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_qemu_replays_the_same(tmp_path: Path, qemu_img: QemuImg) -> None:
    size = len(sample())
    one = entry(5, 0, [(BAT, CLEAR_BOTH)], size=(size, size))
    two = entry(6, 0, [(BAT, CLEAR_3), (PAYLOAD, 4096)], size=(size, size))
    data = dirty(sample(), (0, one), (len(one), two))
    image = tmp_path / "disk.vhdx"
    image.write_bytes(data)
    vmconv.convert(str(image), str(tmp_path / "ours.raw"))
    assert image.read_bytes() == data
    qemu_img("check", "-r", "all", image)
    qemu_img("convert", "-f", "vhdx", "-O", "raw", image, tmp_path / "theirs.raw")
    assert (tmp_path / "ours.raw").read_bytes() == (tmp_path / "theirs.raw").read_bytes()


# -- bad images

HOSTILE: tuple[tuple[Callable[[bytes], bytes], str], ...] = (
    (lambda data: data[: 256 * KIB], "headers at 0x0"),
    (lambda data: b"x" + data[1:], "file at 0x0: no VHDX signature"),
    (lambda data: put(put(data, 64 * KIB, b"x"), 128 * KIB + 9, b"x"), "headers at 0x10000: none is valid"),
    (header(66, b"\2"), "version at 0x20042: 2"),
    (lambda data: put(put(data, 192 * KIB + 9, b"x"), 256 * KIB, b"x"), "region tables at 0x30000"),
    (region(8, struct.pack("<I", 1 << 30)), "entry_count at 0x30008: 1073741824"),
    (region(16, b"x" * 16), "region 0 at 0x30010: required region"),
    (region(16, b"x" * 16 + bytes(16)), "region table at 0x30000: no BAT region"),
    (region(48, UUID("2dc27766-f623-4200-9d64-115e9bfd4a08").bytes_le), "region 1 at 0x30030: .* listed twice"),
    (region(32, struct.pack("<Q", 1 << 62)), "region 0 at 0x30010: 0x4"),
    (region(32, struct.pack("<Q", METADATA)), "overlap"),
    (region(32, struct.pack("<Q", LOG)), "overlap"),
    (region(32, struct.pack("<Q", BAT + 4096)), "not whole MiB"),
    (region(8, struct.pack("<I", 1)), "no metadata region"),
    (metadata(0, b"x"), "metadata table at 0x200000: no VHDX signature"),
    (metadata(10, b"\xff\xff"), "entry_count at 0x20000a: 65535"),
    (metadata(32, b"x" * 16), "metadata item 0 at 0x200020: required item"),
    (metadata(32 + 16, struct.pack("<I", 1 << 31)), "metadata item 0 at .*not inside the region"),
    (metadata(32 + 20, struct.pack("<I", 1 << 31)), "metadata item 0 at .*not inside the region"),
    (metadata(32 + 20, struct.pack("<I", 4)), "file parameters at 0x210000: 4 bytes"),
    (metadata(64 * KIB, struct.pack("<I", 3 * MIB)), f"block_size at 0x210000: {3 * MIB}"),
    (metadata(64 * KIB, bytes(4)), "block_size at 0x210000: 0"),
    (metadata(64 * KIB, struct.pack("<I", 512 * MIB)), "block_size"),
    (metadata(64 * KIB + 4, b"\2"), "no item parent locator"),
    (metadata(64 * KIB + 8, struct.pack("<Q", 1000)), "virtual disk size at 0x210008: 1000"),
    (metadata(64 * KIB + 8, struct.pack("<Q", (64 << 40) + 512)), "virtual disk size"),
    (metadata(64 * KIB + 8, struct.pack("<Q", 64 << 40)), "BAT at 0x300000: 1048576 bytes"),
    (metadata(64 * KIB + 32, struct.pack("<I", 1024)), "logical sector size at 0x210020: 1024"),
    (metadata(64 * KIB + 36, struct.pack("<I", 1024)), "physical sector size at 0x210024: 1024"),
    (bat(0, PAYLOAD | 4), "BAT entry 0 at 0x300000: state 4"),
    (bat(0, PAYLOAD | 7), "BAT entry 0 at 0x300000: partially present in a disk without a parent"),
    (bat(0, 6), "BAT entry 0 at 0x300000: payload at 0x0 lies where the headers are"),
    (bat(1, 6 * MIB | 6), "BAT entry 1 at 0x300008: payload at 0x600000 lies past the end of the file .0x600000"),
    (bat(1, (1 << 64) - MIB | 6), "BAT entry 1 at 0x300008: .*past the end"),
    (lambda data: data[:-MIB], "BAT entry 3 at 0x300018: .*past the end"),
    (header(64, b"\1"), "read"),
    (lambda data: header(64, b"\1")(dirty(data)), "log_version at 0x20040: 1"),
    (lambda data: header(68, bytes(4))(dirty(data)), "log at 0x100000: 0 bytes"),
    (lambda data: header(68, struct.pack("<I", 65 * MIB))(dirty(data)), "log at 0x100000: 68157440 bytes"),
    (lambda data: header(72, struct.pack("<Q", 1 << 62))(dirty(data)), "log at 0x4000000000000000"),
    (lambda data: header(72, bytes(8))(dirty(data)), "log at 0x0"),
)


@pytest.mark.malformed
@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=[message for _, message in HOSTILE])
def test_bad_images_are_refused_in_one_line(change: Callable[[bytes], bytes], message: str) -> None:
    data = change(sample())
    if message == "read":
        assert opened(data).guest.total(Kind.DATA) == 2 * MIB
        return
    with pytest.raises(ImageError, match=message) as caught:
        opened(data).guest.total(Kind.DATA)
    assert str(caught.value).startswith("disk.vhdx: ")
    assert "\n" not in str(caught.value)


@pytest.mark.malformed
def test_more_blocks_than_the_file_has_room_for_are_refused() -> None:
    data = written(raw_disk(patterned(64 * MIB, [(0, 4096)])))
    for number in range(1, 64):
        data = bat(number, PAYLOAD | 6)(data)
    with pytest.raises(ImageError, match="room for"):
        opened(data).guest.total(Kind.DATA)


@pytest.mark.parametrize(
    ("locator", "wanted"),
    [
        ({"relative_path": ".\\a\\b.vhdx", "absolute_win32_path": "C:\\c.vhdx"}, "a/b.vhdx"),
        ({"absolute_win32_path": "C:\\x\\b.vhdx"}, "b.vhdx"),
        ({"volume_path": "\\\\?\\Volume{26a21bda-a627-11d7-9931-806e6f6e6963}\\x\\b.vhdx"}, "b.vhdx"),
        ({"absolute_win32_path": "/srv/b.vhdx"}, "/srv/b.vhdx"),
    ],
)
def test_names_of_the_parent_are_paths_of_this_system(locator: dict[str, str], wanted: str) -> None:
    assert opened(differencing(**locator)).parent_reference == wanted


@pytest.mark.malformed
def test_a_differencing_disk_must_name_its_parent() -> None:
    with pytest.raises(ImageError, match="names no parent"):
        opened(differencing(parent_linkage="{}"))


@pytest.mark.malformed
def test_a_parent_locator_of_another_kind_is_refused() -> None:
    data = metadata(64 * KIB + 40, b"x" * 16)(differencing(relative_path="b.vhdx"))
    with pytest.raises(ImageError, match="parent locator at 0x210028: type"):
        opened(data)


@pytest.mark.malformed
def test_a_partial_block_without_its_bitmap_is_refused() -> None:
    data = bat(0, 1 * MIB | 7)(differencing(relative_path="b.vhdx"))
    with pytest.raises(ImageError, match="sector bitmap at 0x0 is not"):
        opened(data).guest.total(Kind.DATA)


def test_a_disk_of_no_bytes_is_damaged_as_it_is_to_qemu(tmp_path: Path, qemu_img: QemuImg) -> None:
    """Metadata has no checksum: a size that was lost made an empty disk of a full one."""
    image = tmp_path / "disk.vhdx"
    qemu_img("create", "-q", "-f", "vhdx", image, "1M")
    data = image.read_bytes()
    size = MIB.to_bytes(8, "little")
    places = [at for at in range(0x300000, 0x320000, 8) if data[at : at + 8] == size]
    assert len(places) == 1
    with image.open("r+b") as file:
        file.seek(places[0])
        file.write(bytes(8))
    qemu_img("info", "-f", "vhdx", image, ok=(1,))
    with pytest.raises(ImageError, match="virtual disk size"):
        vmconv.convert(image, tmp_path / "disk.raw")
    assert not (tmp_path / "disk.raw").exists()
