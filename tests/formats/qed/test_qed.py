"""QED: the conformance kit, and what QEMU makes of it."""

from __future__ import annotations

import lzma
import time
from pathlib import Path

import numpy as np
import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk, scribble
from support.kits.qed import OPTIONS, QedKit
from support.kits.storage import OnStorage
from vmconv.errors import ImageError, PlanError
from vmconv.fields import field_offset
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry, installed
from vmconv.model.extents import Extents, Kind
from vmconv.model.image import Image
from vmconv.model.layout import Backing, Placement
from vmconv.testing import disk_of, image_file, make_in_memory, patterned
from vmconv.testing.memory import MemoryFile
from vmconv_qed import Qed, structs
from vmconv_qed.options import Options
from vmconv_qed.writer import write


class TestQed(QedKit):
    """The conformance kit."""


class TestQedOnStorage(OnStorage):
    format = QedKit.format
    variants = OPTIONS
    sizes = (40 * MIB + 4096,)
    written_by_qemu = OPTIONS
    made_by_qemu = (
        {"cluster_size": "64K"},
        {"cluster_size": "4K", "table_size": "16"},
        {"cluster_size": "1M"},
    )


SMALL = Options(cluster_size=4096, table_size=2)


def read(data: bytes) -> Image:
    return Qed().read(image_file(data), Opener(Registry()))


def sample() -> bytearray:
    """Returns an image of a header, L1 at 0x1000, L2 at 0x3000 and 0x5000, payload of guest addresses 0 and 5 MiB."""
    source = patterned(8 * MIB, [(0, 12288)])
    rows = [
        (0, Kind.DATA, source, 0),
        (8192, Kind.ZERO, None, 0),
        (5 * MIB, Kind.DATA, source, 8192),
        (5 * MIB + 4096, Kind.ZERO, None, 0),
    ]
    image = disk_of(Extents.of(rows, 8 * MIB), source)
    layout = write(image, SMALL, Placement(4096))
    _, files = make_in_memory(layout, image)
    return bytearray(files[-1].read(0, files[-1].size))


def patched(name: str, value: int) -> bytes:
    """Returns the sample with another value in one field of its header."""
    image = sample()
    length = next(s.sizeof() for s in structs.Header.subcons if s.name == name)
    at = field_offset(structs.Header, name)
    image[at : at + length] = value.to_bytes(length, "little")
    return bytes(image)


def with_entry(at: int, value: int) -> bytes:
    """Returns the sample with another table entry."""
    image = sample()
    image[at : at + 8] = value.to_bytes(8, "little")
    return bytes(image)


# -- reading


@pytest.mark.parametrize("backing", ["raw", "qcow2", "qed"])
def test_a_chain_is_flattened_without_copying(reflink_dir: Path, qemu_img: QemuImg, backing: str) -> None:
    base, top, flat = reflink_dir / f"base.{backing}", reflink_dir / "top.qed", reflink_dir / "flat.raw"
    qemu_img("create", "-f", backing, base, "8M")
    scribble(base, 8 * MIB, 1, unit=4096) if backing != "raw" else make_disk(base, 8 * MIB)
    qemu_img("create", "-f", "qed", "-b", base.name, "-F", backing, top)
    scribble(top, 8 * MIB, 2, unit=65536)
    assert vmconv.info(str(top)).get("backing-filename-format") == ("raw" if backing == "raw" else None)
    result = vmconv.convert(str(top), str(flat), zero_copy="require")
    assert result.totals.shared > 0
    qemu_img("compare", "-f", "qed", "-F", "raw", top, flat)


def test_an_image_that_needs_a_check_is_read_with_a_warning(reflink_dir: Path) -> None:
    image = read(patched("features", structs.NEED_CHECK))
    assert "not closed cleanly" in image.warnings[0]
    assert image.details["dirty-flag"] is True
    assert image.flat.total(Kind.DATA) == 12288


def test_features_that_may_be_ignored_are_ignored() -> None:
    for name in ("compat_features", "autoclear_features"):
        assert read(patched(name, (1 << 64) - 1)).flat.total(Kind.DATA) == 12288


WRONG: dict[str, tuple[str, int, str]] = {
    "small cluster": ("cluster_size", 2048, r"cluster_size at 0x4: 2048 is not in 4096\.\.67108864"),
    "odd cluster": ("cluster_size", 5000, "cluster_size at 0x4: 5000 is not a power of two"),
    "no tables": ("table_size", 0, r"table_size at 0x8: 0 is not in 1\.\.16"),
    "odd tables": ("table_size", 3, "table_size at 0x8: 3 is not a power of two"),
    "huge tables": ("table_size", 1 << 31, "table_size at 0x8: 2147483648 is not in"),
    "no header": ("header_size", 0, "header_size at 0xc: 0 is not in"),
    "huge header": ("header_size", 0xFFFFFFFF, "header_size at 0xc: 4294967295 is not in"),
    "unknown features": ("features", 0x8000000000000008, "features at 0x10: unknown bit 3, bit 63"),
    "L1 in header": ("l1_table_offset", 0, "l1_table_offset at 0x28: 0x0 is not a valid offset of 8192 bytes"),
    "L1 unaligned": ("l1_table_offset", 0x1008, "l1_table_offset at 0x28: 0x1008 is not a valid offset"),
    "L1 past end": ("l1_table_offset", 1 << 40, "l1_table_offset at 0x28: 0x10000000000 is not a valid offset"),
    "huge disk": ("image_size", (1 << 32) + 512, r"image_size at 0x30: 4294967808 is not in 0\.\.4294967296"),
    "odd disk": ("image_size", 1000, "image_size at 0x30: 1000 is not whole sectors"),
    "backing without name": ("features", 1, "backing_filename_size at 0x3c: 0 is not in"),
}


@pytest.mark.malformed
@pytest.mark.parametrize("name", WRONG)
def test_a_header_that_cannot_be_is_refused_by_field_and_value(name: str) -> None:
    field, value, message = WRONG[name]
    with pytest.raises(ImageError, match=message):
        read(patched(field, value))


@pytest.mark.malformed
@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0x1000, 0x3001, r"L1 entry 0 at 0x1000: L2 table at 0x3001 is not 8192 bytes of clusters"),
        (0x1000, 1 << 63, r"L1 entry 0 at 0x1000: L2 table at 0x8000000000000000 is not"),
        (0x1000, 0x5000, r"L1 entry 1 at 0x1008: L2 table at 0x5000 overlaps another one"),
        (0x1000, 0x4000, r"L1 entry 1 at 0x1008: L2 table at 0x5000 overlaps another one"),
        (0x3000, 2, r"L2 entry at 0x3000 \(guest address 0x0\): payload at 0x2 is no cluster"),
        (0x3008, 0x10000, r"L2 entry at 0x3008 \(guest address 0x1000\): payload at 0x10000 lies past the end"),
        (0x5800, (1 << 64) - 4096, r"L2 entry at 0x5800 \(guest address 0x500000\): payload at 0xf+000 lies past"),
    ],
)
def test_tables_that_cannot_be_are_refused_by_place_and_value(at: int, value: int, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        _ = read(with_entry(at, value)).guest


@pytest.mark.malformed
def test_more_clusters_than_the_file_has_are_refused() -> None:
    image = sample()
    image[0x3000:0x5000] = (0x7000).to_bytes(8, "little") * 1024
    with pytest.raises(ImageError, match="1024 clusters are allocated so far, the file has room for 10"):
        _ = read(bytes(image)).guest


@pytest.mark.malformed
def test_millions_of_tables_in_holes_are_read_at_once(xfs_dir: Path) -> None:
    """An L1 table of 16 MiB whose tables lie in 32 TiB of nothing, but for one entry of the last table."""
    cluster, count = MIB, 1 << 21
    table = 16 * cluster
    fields = {"cluster_size": cluster, "table_size": 16, "header_size": 1, "features": 0, "compat_features": 0}
    fields |= {"autoclear_features": 0, "l1_table_offset": cluster, "image_size": 1 << 62}
    fields |= {"backing_filename_offset": 0, "backing_filename_size": 0}
    with (xfs_dir / "disk.qed").open("wb") as file:
        file.truncate((count + 2) * table)
        file.write(structs.Header.build(fields))
        file.seek(cluster)
        file.write((np.arange(2, count + 2, dtype=np.int64) * table).astype("<u8").tobytes())
        file.seek((count + 2) * table - 8)
        file.write((table + cluster).to_bytes(8, "little"))
    with Opener(installed()) as opener:
        began = time.process_time()
        rows = list(opener.image(str(xfs_dir / "disk.qed")).guest)
        assert time.process_time() - began < 5
    assert [(row.start, row.kind) for row in rows] == [(0, Kind.HOLE), ((1 << 62) - cluster, Kind.DATA)]


# -- writing


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_kept_backing_file_stays_the_parent(reflink_dir: Path, qemu_img: QemuImg, options: dict[str, str]) -> None:
    make_disk(reflink_dir / "base.raw", 8 * MIB)
    middle, top = reflink_dir / "middle.qcow2", reflink_dir / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", middle)
    scribble(middle, 8 * MIB, 1)
    qemu_img("create", "-f", "qcow2", "-o", "cluster_size=4K", "-b", "middle.qcow2", "-F", "qcow2", top)
    scribble(top, 8 * MIB, 2)
    for backing in ("middle.qcow2", "base.raw"):
        target = reflink_dir / "target.qed"
        vmconv.convert(str(top), str(target), backing_file=backing, options=options, force=True)
        info = vmconv.info(str(target))
        assert info["backing-filename"] == backing
        assert info.get("backing-filename-format") == ("raw" if backing == "base.raw" else None)
        qemu_img("check", target)
        qemu_img("compare", top, target)


def test_zeros_hide_the_parent() -> None:
    source = patterned(MIB, [(0, MIB)])
    parent = disk_of(Extents.whole(source), source)
    rows = [(0, Kind.HOLE, None, 0), (65536, Kind.ZERO, None, 0), (131072, Kind.HOLE, None, 0)]
    image = disk_of(Extents.of(rows, MIB), source, parent=parent)
    layout = write(image, Options(), Placement(4096), backing=Backing("base.raw", "raw"))
    _, files = make_in_memory(layout, image)
    table = Qed().read(files[-1], Opener(Registry())).guest
    assert [(row.start, row.kind) for row in table] == [(0, Kind.HOLE), (65536, Kind.ZERO), (131072, Kind.HOLE)]


def test_a_long_backing_name_is_refused() -> None:
    source = patterned(MIB, [])
    image = disk_of(Extents.whole(source), source)
    with pytest.raises(PlanError, match="1024 bytes, 1023 at most"):
        write(image, SMALL, Placement(4096), backing=Backing("b" * 1024, "raw"))


def test_a_disk_too_large_for_its_tables_is_refused_with_a_hint() -> None:
    def plan(size: int) -> None:
        write(disk_of(Extents.filled(size), MemoryFile("source.raw", 0)), SMALL, Placement(4096))

    plan(1 << 32)
    with pytest.raises(PlanError, match=f"cannot hold {(1 << 32) + 512} bytes, {1 << 32} at most") as caught:
        plan((1 << 32) + 512)
    assert "cluster_size=16384" in str(caught.value.hint)


# -- real images


def test_a_real_image_with_a_raw_parent_is_read_right(corpus: Path, tmp_path: Path) -> None:
    for name in ("qed_raw-raw-relative", "raw"):
        packed = corpus / "images" / "libvirt" / f"{name}.xz"
        (tmp_path / name).write_bytes(lzma.decompress(packed.read_bytes()))
    target = tmp_path / "target.raw"
    vmconv.convert(str(tmp_path / "qed_raw-raw-relative"), str(target), source_format="qed")
    assert target.read_bytes() == (tmp_path / "raw").read_bytes()


@pytest.mark.malformed
def test_a_real_header_without_tables_is_refused(corpus: Path, tmp_path: Path) -> None:
    packed = corpus / "images" / "file-tests" / "qed.img.xz"
    (tmp_path / "disk.qed").write_bytes(lzma.decompress(packed.read_bytes()))
    with pytest.raises(ImageError, match="l1_table_offset at 0x28: 0x10000 is not a valid offset of 262144 bytes"):
        vmconv.convert(str(tmp_path / "disk.qed"), str(tmp_path / "target.raw"))
    assert not (tmp_path / "target.raw").exists()


def test_the_plugin_is_found() -> None:
    assert installed().owners["format", "qed"] == "vmconv-qed"
