"""DMG: the conformance kit, other readers' view of our images, damage that must not become zeros."""

from __future__ import annotations

import random
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

import vmconv
from support.corpus import compare_with_qemu, rows
from support.disks import MIB, QemuImg, make_disk
from support.dmg_images import (
    ADC,
    BZIP2,
    LZFSE,
    PACKERS,
    RAW,
    XZ,
    ZLIB,
    Entry,
    adc,
    closed,
    property_list,
    table,
    trailer,
    udif,
)
from support.kits.dmg import DmgKit
from support.requirements import oracle_program
from vmconv.cli.main import main
from vmconv.errors import ImageError, UsageError
from vmconv_dmg import adc as own_adc
from vmconv_dmg import structs

SIZE = MIB
KIB256 = 256 << 10


class TestDmg(DmgKit):
    """The conformance kit."""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw", SIZE, pieces=20)


def image_of(disk: Path, kinds: list[int], **how: int) -> Path:
    path = disk.parent / "disk.dmg"
    path.write_bytes(udif(disk.read_bytes(), kinds, **how))
    return path


@pytest.mark.parametrize("kinds", [[RAW], [ZLIB], [BZIP2], [XZ], [ADC], [RAW, ADC, ZLIB, BZIP2, XZ]])
@pytest.mark.parametrize("tables", [1, 3])
def test_chunks_of_each_kind_are_the_disk(disk: Path, kinds: list[int], tables: int) -> None:
    image = image_of(disk, kinds, tables=tables)
    result = vmconv.convert(image, disk.parent / "new.raw")
    assert (disk.parent / "new.raw").read_bytes() == disk.read_bytes()
    assert (result.totals.copied > 0) or kinds == [RAW]
    report = vmconv.check(image)
    assert report is not None
    assert report.corruption_count == 0


@pytest.mark.parametrize("kinds", [[RAW], [ZLIB], [RAW, ZLIB]])
def test_qemu_reads_the_same_disk(disk: Path, qemu_img: QemuImg, kinds: list[int]) -> None:
    image = image_of(disk, kinds, tables=2)
    vmconv.convert(image, disk.parent / "new.qcow2")
    qemu_img("compare", "-f", "dmg", "-F", "qcow2", image, disk.parent / "new.qcow2")


@pytest.mark.parametrize("kinds", [[BZIP2], [ADC], [RAW, ADC, ZLIB, BZIP2]])
def test_dmg2img_reads_the_same_disk(disk: Path, kinds: list[int]) -> None:
    image = image_of(disk, kinds)
    theirs = disk.parent / "theirs.raw"
    command = [oracle_program("dmg2img"), "-s", "-i", str(image), "-o", str(theirs)]
    subprocess.run(command, check=True, capture_output=True)
    assert theirs.read_bytes() == disk.read_bytes()


def test_stored_chunks_are_shared(disk: Path, reflink_dir: Path) -> None:
    image = reflink_dir / "disk.dmg"
    image.write_bytes(udif(disk.read_bytes(), [RAW]))
    result = vmconv.convert(image, reflink_dir / "new.raw")
    assert result.totals.shared > 0
    assert (reflink_dir / "new.raw").read_bytes() == disk.read_bytes()


def test_the_last_chunk_and_the_disk_may_end_anywhere(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(512 * 333)
    (tmp_path / "disk.dmg").write_bytes(udif(data, [ZLIB], chunk=512 * 100))
    vmconv.convert(tmp_path / "disk.dmg", tmp_path / "new.raw")
    assert (tmp_path / "new.raw").read_bytes() == data


def test_a_part_of_a_chunk_is_read(disk: Path) -> None:
    image = image_of(disk, [ZLIB], chunk=KIB256)
    vmconv.convert(image, disk.parent / "new.raw", offset=KIB256 - 512, length=1024)
    assert (disk.parent / "new.raw").read_bytes() == disk.read_bytes()[KIB256 - 512 : KIB256 + 512]


def test_what_no_table_names_is_zero(tmp_path: Path) -> None:
    one, packed = b"\1" * 1024, zlib.compress(b"\1" * 1024)
    tables = [table(4, 2, [Entry(ZLIB, 0, 2, 0, len(packed))])]
    (tmp_path / "disk.dmg").write_bytes(closed(packed, tables, 8))
    vmconv.convert(tmp_path / "disk.dmg", tmp_path / "new.raw")
    assert (tmp_path / "new.raw").read_bytes() == bytes(2048) + one + bytes(1024)


def test_it_is_described(disk: Path) -> None:
    data = vmconv.info(image_of(disk, [ZLIB, BZIP2]))["format-specific"]["data"]
    assert data["compression"] == ["zlib", "bzip2"]
    assert data["chunks"] > 0


# -- damage


def damaged(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "disk.dmg"
    path.write_bytes(data)
    return path


@pytest.mark.malformed
@pytest.mark.parametrize("kind", [ADC, ZLIB, BZIP2, XZ])
@pytest.mark.parametrize("change", ["short", "long", "bits", "cut"])
def test_a_damaged_chunk_is_never_read_as_anything(tmp_path: Path, kind: int, change: str) -> None:
    content = random.Random(2).randbytes(4096)
    given = {"short": content[:-512], "long": content + content[:1]}.get(change, content)
    chunk = bytearray(PACKERS[kind](given))
    if change == "bits":
        if kind == ADC:
            pytest.skip("ADC has no checksum")
        chunk[len(chunk) // 2] ^= 0xFF
    if change == "cut":
        del chunk[-5:]
    tables = [table(0, 8, [Entry(kind, 0, 8, 0, len(chunk))])]
    with pytest.raises(ImageError, match="chunk at 0x0"):
        vmconv.convert(damaged(tmp_path, closed(bytes(chunk), tables, 8)), tmp_path / "new.raw")
    assert not (tmp_path / "new.raw").exists()


@pytest.mark.malformed
def test_a_chunk_that_decompresses_without_end_is_refused(tmp_path: Path) -> None:
    chunk = zlib.compress(bytes(64 * MIB))
    tables = [table(0, 8, [Entry(ZLIB, 0, 8, 0, len(chunk))])]
    with pytest.raises(ImageError, match="does not decompress to 4096 bytes by zlib"):
        vmconv.convert(damaged(tmp_path, closed(chunk, tables, 8)), tmp_path / "new.raw")


@pytest.mark.malformed
@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([Entry(0x80000001, 0, 8)], "entry 0: kind 0x80000001 is unknown"),
        ([Entry(RAW, 0, 8, 0, 4096), Entry(RAW, 7, 1, 0, 512)], "two chunks for sector 7"),
        ([Entry(RAW, 0, 9, 0, 4608)], "a chunk up to sector 9, the disk has 8"),
        ([Entry(RAW, 0, 8, 0, 4095)], "8 sectors that are stored in 4095 bytes"),
        ([Entry(RAW, 0, 8, 1 << 40, 4096)], "lie past the end of the file"),
        ([Entry(ZLIB, 0, 8, 1 << 63, 4096)], "offset 0x8000000000000000 is no number of a disk"),
        ([Entry(ZLIB, 1 << 60, 8, 0, 16)], "are past any disk"),
        ([Entry(ZLIB, 0, 1 << 40, 0, 16)], "bytes at most"),
        ([Entry(ZLIB, 0, (64 << 11) + 1, 0, 16)], "67108864 bytes at most"),
    ],
)
def test_an_impossible_entry_is_refused(tmp_path: Path, entries: list[Entry], said: str) -> None:
    with pytest.raises(ImageError, match=said):
        vmconv.info(damaged(tmp_path, closed(b"\1" * 8192, [table(0, 8, entries)], 8)))


@pytest.mark.malformed
def test_stored_chunks_that_share_bytes_are_refused(tmp_path: Path) -> None:
    entries = [Entry(RAW, 0, 4, 0, 2048), Entry(RAW, 4, 4, 1024, 2048)]
    image = damaged(tmp_path, closed(b"\1" * 4096, [table(0, 8, entries)], 8))
    with pytest.raises(ImageError, match="both lie at 0x400"):
        vmconv.convert(image, tmp_path / "new.raw")
    report = vmconv.check(image)
    assert report is not None
    assert report.corruption_count


@pytest.mark.malformed
@pytest.mark.parametrize(
    ("plist", "said"),
    [
        (b"<plist><dict><key>resource-fork</key></dict></plist>", "is not valid"),
        (b"<plist><array/></plist>", "has no block tables"),
        (b"<plist><date>x</date></plist>", r"is not valid \(AttributeError\)"),
        (b"no xml", "is not valid"),
        (b'<!DOCTYPE x [<!ENTITY a "b">]><plist><string>&a;</string></plist>', "is not valid"),
        (property_list([b"mish"]), "block table 0: no signature, or too short"),
        (property_list([]), "no block tables"),
        (property_list([table(0, 1, [])] * 1025), "1025 block tables, 1024 at most"),
        (property_list([table(0, 1, [])[:-4] + b"\0\0\0\1"]), "entry_count 1 is not in 0..0"),
    ],
)
def test_a_damaged_property_list_is_refused(tmp_path: Path, plist: bytes, said: str) -> None:
    with pytest.raises(ImageError, match=f"property list at 0x0: .*{said}"):
        vmconv.info(damaged(tmp_path, plist + trailer(0, len(plist), 8, 0)))


@pytest.mark.malformed
@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (60, struct.pack(">I", 2), "segment 1 of 2, and only images in one file are read"),
        (224, bytes(8), "the block tables are in a resource fork"),
        (224, b"\xff" * 8, "plist_length"),
        (216, b"\xff" * 8, "plist_offset"),
        (24, b"\xff" * 8, "data_fork_offset"),
        (492, b"\xff" * 8, "sector_count"),
        (4, b"\0\0\0\5", "version"),
    ],
)
def test_a_damaged_trailer_is_refused_by_field(tmp_path: Path, at: int, value: bytes, said: str) -> None:
    data = bytearray(udif(bytes(range(256)) * 16, [ZLIB]))
    begin = len(data) - 512 + at
    data[begin : begin + len(value)] = value
    with pytest.raises(ImageError, match=said):
        vmconv.info(damaged(tmp_path, bytes(data)))


def test_lzfse_is_refused_by_name(tmp_path: Path) -> None:
    image = damaged(tmp_path, udif(b"\1" * 8192, [LZFSE]))
    assert vmconv.info(image)["format-specific"]["data"]["compression"] == ["LZFSE"]
    with pytest.raises(ImageError, match="compressed by LZFSE, which is not supported"):
        vmconv.convert(image, tmp_path / "new.raw")


@pytest.mark.parametrize("row", rows("dmg"), ids=lambda row: row["name"])
def test_a_real_image_is_the_disk_that_qemu_reads(
    row: dict[str, str], corpus: Path, tmp_path: Path, qemu_img: QemuImg
) -> None:
    compare_with_qemu(row, corpus, tmp_path, qemu_img)


def test_a_snapshot_is_refused(disk: Path) -> None:
    with pytest.raises(UsageError, match="has no snapshots"):
        vmconv.convert(image_of(disk, [RAW]), disk.parent / "new.raw", snapshot="1")


# -- Apple Data Compression


@pytest.mark.parametrize("seed", range(8))
def test_adc_is_decompressed(seed: int) -> None:
    chosen = random.Random(seed)
    data = b"".join(bytes([chosen.randrange(256)]) * chosen.randrange(1, 70) for _ in range(200))
    assert own_adc.decompress(adc(data), len(data)) == data


@pytest.mark.parametrize(
    ("stream", "found"),
    [
        (b"", b""),
        (b"\x82abc", b"abc"),
        (b"\x82abc\x00\x02", b"abcabc"),
        (b"\x82abc\x10\x01", b"abcbcbcbcb"),
        (b"\x82abc\x41\x00\x02", b"abcabcab"),
        (b"\x81ab\x04\x00", b"abbbbb"),
    ],
)
def test_adc_copies_may_overlap(stream: bytes, found: bytes) -> None:
    assert own_adc.decompress(stream, 100) == found


@pytest.mark.malformed
@pytest.mark.parametrize(
    "stream", [b"\x82ab", b"\x80", b"\x80a\x00", b"\x80a\x40\x00", b"\x80a\x00\x01", b"\x40\x00\x00"]
)
def test_damaged_adc_is_refused(stream: bytes) -> None:
    with pytest.raises(own_adc.AdcError):
        own_adc.decompress(stream, 100)


@pytest.mark.malformed
def test_adc_does_not_grow_past_its_limit() -> None:
    with pytest.raises(own_adc.AdcError, match="more than 100 bytes"):
        own_adc.decompress(b"\x80a" + b"\x7f\x00\x00" * 1000, 100)


def test_the_structures_have_their_lengths() -> None:
    assert (structs.Trailer.sizeof(), structs.BlockTable.sizeof()) == (512, 204)


@pytest.mark.parametrize("kinds", [[RAW], [ZLIB, RAW, BZIP2]])
@pytest.mark.parametrize("tables", [1, 3])
def test_checksums_of_a_sound_disk_agree(disk: Path, kinds: list[int], tables: int) -> None:
    image = image_of(disk, kinds, tables=tables)
    found = vmconv.check(image, payload=True)
    assert found is not None and found == vmconv.check(image) and not found.corruption_count


def test_a_stored_chunk_that_was_changed_is_found_by_its_checksum(
    disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = image_of(disk, [RAW])
    data = bytearray(image.read_bytes())
    data[5] ^= 1
    image.write_bytes(data)
    found = vmconv.check(image)
    assert found is not None and not found.corruption_count
    assert main(["check", "--payload", str(image)]) == 2
    assert "CRC-32 of block table 0 is" in capsys.readouterr().out


def test_the_checksum_of_the_checksums_is_compared_without_payload(disk: Path) -> None:
    image = image_of(disk, [ZLIB], tables=2)
    data = bytearray(image.read_bytes())
    data[structs.Trailer.sizeof() * -1 + 352 + 8] ^= 1
    image.write_bytes(data)
    found = vmconv.check(image)
    assert found is not None
    assert [text for text in found.corruptions if "CRC-32 of the checksums of tables" in text]


def test_an_image_without_checksums_has_nothing_to_compare_with(disk: Path) -> None:
    image = disk.parent / "disk.dmg"
    payload = disk.read_bytes()
    sectors = len(payload) // 512
    image.write_bytes(closed(payload, [table(0, sectors, [Entry(RAW, 0, sectors, 0, len(payload))])], sectors))
    with pytest.raises(UsageError, match="stores no hash"):
        vmconv.check(image, payload=True)
