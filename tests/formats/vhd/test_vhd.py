"""VHD: the conformance kit, what other tools make of our images, and images that are not as they should be."""

from __future__ import annotations

import hashlib
import json
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
from hypothesis import strategies as st

import vmconv
from support.corpus import rows, unpack
from support.disks import MIB, QemuImg
from support.kits.storage import OnStorage
from support.kits.vhd import VhdKit, sealed
from support.requirements import oracle_program
from vmconv.errors import ImageError, PlanError, VmconvError
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry, installed
from vmconv.model.extents import Extents, Kind
from vmconv.model.facts import DiskFacts, Geometry
from vmconv.model.image import Image
from vmconv.model.layout import Backing, Placement
from vmconv.testing import disk_of, disks, image_file, make_in_memory, patterned
from vmconv.testing.disks import content, raw_disk
from vmconv.testing.malformed import time_limit
from vmconv.testing.memory import MemoryFile
from vmconv_vhd import Vhd
from vmconv_vhd.options import Options


class TestVhd(VhdKit):
    """The conformance kit."""


class TestVhdOnStorage(OnStorage):
    format = VhdKit.format
    qemu_name = "vpc"
    variants = ({}, {"subformat": "fixed"})
    made_by_qemu = (
        {"subformat": "dynamic"},
        {"subformat": "fixed"},
        {"subformat": "dynamic", "force_size": "on"},
    )
    in_place = ({"subformat": "fixed"},)
    shares_qemu_s = False


ID = UUID("12345678-9abc-4def-8123-456789abcdef")
OWN = UUID("87654321-9abc-4def-8123-456789abcdef")


# -- helpers


def written(image: Image, options: Options | None = None, backing: Backing | None = None, modulus: int = 512) -> bytes:
    """Returns the bytes of an image that holds this disk."""
    layout = Vhd().write(image, options or Options(), Placement(modulus, identity=OWN.bytes), backing=backing)
    _, files = make_in_memory(layout, image)
    return files[-1].read(0, files[-1].size)


def opened(data: bytes) -> Image:
    return Vhd().read(image_file(data, "disk.vhd"), Opener(Registry({"vhd": Vhd()})))


def patched(data: bytes, where: str, offset: int, value: bytes) -> bytes:
    """Returns an image with a field of its `footer` (and its copy) or its dynamic `header` changed, checksums right."""
    if where == "header":
        head = bytearray(data[512:1536])
        head[offset : offset + len(value)] = value
        return data[:512] + sealed(bytes(head), 36) + data[1536:]
    foot = bytearray(data[-512:])
    foot[offset : offset + len(value)] = value
    new = sealed(bytes(foot), 64)
    return (new + data[512:-512] if data[:8] == b"conectix" else data[:-512]) + new


def sample(size: int = 5 * MIB) -> bytes:
    return written(raw_disk(patterned(size, [(0, 4096), (3 * MIB, 70000)])))


# -- other tools read our images, and we read theirs


def test_misaligned_blocks_of_qemu_keep_their_phase_in_a_vhd(xfs_dir: Path, qemu_img: QemuImg) -> None:
    raw, theirs, ours = (xfs_dir / name for name in ("disk.raw", "theirs.vhd", "ours.vhd"))
    raw.write_bytes(os.urandom(32 * MIB))
    qemu_img("convert", "-f", "raw", "-O", "vpc", "-o", "force_size=on", raw, theirs)
    result = vmconv.convert(str(theirs), str(ours))
    assert result.totals.shared > 0.99 * 32 * MIB
    qemu_img("compare", "-f", "raw", "-F", "vpc", raw, ours)


@pytest.mark.parametrize("size", [512, MIB, 5 * MIB + 512, 37 * MIB + 1024, 858993664, 1 << 37, 130 << 30])
def test_sizes_rounded_to_cylinders_are_those_of_qemu(tmp_path: Path, qemu_img: QemuImg, size: int) -> None:
    qemu_img("create", "-f", "vpc", tmp_path / "theirs.vhd", str(size))
    theirs = json.loads(qemu_img("info", "-f", "vpc", "--output=json", tmp_path / "theirs.vhd").stdout)["virtual-size"]
    disk = disk_of(Extents.filled(size), MemoryFile("source.raw", 0))
    assert opened(written(disk, Options(force_size=False))).size == theirs


def test_the_footer_says_what_libvhdi_reads(tmp_path: Path) -> None:
    vhdiinfo = oracle_program("vhdiinfo")
    for options, kind in ((Options(), "Dynamic"), (Options(subformat="fixed"), "Fixed")):
        path = tmp_path / f"{kind}.vhd"
        path.write_bytes(written(raw_disk(patterned(5 * MIB + 512, [(0, 512)])), options))
        said = subprocess.run([vhdiinfo, str(path)], capture_output=True, text=True, check=True).stdout
        assert re.search(rf"Disk type\s*: {kind}", said)
        assert f"({5 * MIB + 512} bytes)" in said
        assert str(OWN) in said


# -- the corpus


def digests(table: Extents) -> tuple[str, str]:
    """Returns the sha256 of what the guest sees, and the manifest's digest of the chunks that are not zero."""
    whole, chunks = hashlib.sha256(), hashlib.sha256()
    for at in range(0, table.size, MIB):
        data = table.read(at, min(MIB, table.size - at))
        if table.size < 1 << 30:
            whole.update(data)
        if any(data):
            chunks.update(at.to_bytes(8, "little") + data)
    chunks.update(table.size.to_bytes(8, "little"))
    return whole.hexdigest(), chunks.hexdigest()


@pytest.mark.parametrize("row", rows("vhd"), ids=lambda row: row["name"])
def test_images_of_the_corpus_are_converted_right(row: dict[str, str], corpus: Path, xfs_dir: Path) -> None:
    image = unpack(corpus, row["name"], xfs_dir)
    target = xfs_dir / "target.vhd"
    vmconv.convert(str(image), str(target))
    with Opener(installed()) as opener:
        result = opener.image(str(target))
        assert result.size == int(row["virtual_size"])
        if row["expect"] == "-":
            assert result.flat.total(Kind.DATA) == 0
        else:
            assert digests(result.flat) == (row["expect"], row["zdigest"])


@pytest.mark.malformed
def test_a_parent_that_is_another_disk_is_refused(corpus: Path, xfs_dir: Path) -> None:
    child = unpack(corpus, "dfvfs/fat-differential.vhd", xfs_dir)
    parent = xfs_dir / "fat-parent.vhd"
    parent.write_bytes(patched(parent.read_bytes(), "footer", 68, bytes(16)))
    with pytest.raises(ImageError, match="unique id") as caught:
        vmconv.convert(str(child), str(xfs_dir / "target.raw"))
    assert caught.value.hint
    parent.unlink()
    with pytest.raises(VmconvError, match=r"fat-parent\.vhd"):
        vmconv.convert(str(child), str(xfs_dir / "target.raw"))


def test_a_differencing_disk_stays_one_on_its_parent(corpus: Path, xfs_dir: Path) -> None:
    child, target = unpack(corpus, "dfvfs/fat-differential.vhd", xfs_dir), xfs_dir / "target.vhd"
    vmconv.convert(str(child), str(target), backing_file="fat-parent.vhd")
    assert vmconv.info(str(target))["backing-filename"] == "fat-parent.vhd"
    command = [oracle_program("vhdiinfo"), str(target)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"Parent identifier\s*: 5fa21a55-f394-aa4d-9958-1951a67d5540", said)
    with Opener(installed()) as opener:
        was, now = opener.image(str(child)), opener.image(str(target))
        assert now.parent is not None
        assert np.array_equal(was.guest.start, now.guest.start)
        assert np.array_equal(was.guest.kind, now.guest.kind)
    assert vmconv.compare(str(child), str(target))


# -- writing


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(image=disks(parent=True))
def test_any_layer_on_a_parent_is_the_same_after_writing_and_reading(image: Image) -> None:
    assert image.parent is not None
    same_size = image.parent.guest.window(0, image.size).without_holes()
    below = disk_of(same_size, image.parent.file, facts=DiskFacts(identity=ID))  # type: ignore[arg-type]
    image = disk_of(image.guest, image.file, parent=below)  # type: ignore[arg-type]
    result = opened(written(image, backing=Backing("base.vhd", "vhd")))
    assert result.parent_reference == "base.vhd"
    assert result.details["format-specific"]["data"]["parent-id"] == str(ID)
    whole = result.guest.over(below.flat).without_holes()
    assert content(whole)[: image.size] == content(image.flat)


def test_a_parent_of_another_size_is_refused() -> None:
    base = raw_disk(patterned(512, []), DiskFacts(identity=ID))
    layer = disk_of(Extents.filled(MIB, Kind.HOLE), MemoryFile("top", 0), parent=base)
    with pytest.raises(PlanError, match=r"as large as its parent: 1048576 bytes, base\.vhd has 512") as caught:
        written(layer, backing=Backing("base.vhd", "vhd"))
    assert "flatten" in str(caught.value.hint)


def test_blocks_left_to_the_parent_are_not_allocated() -> None:
    base = raw_disk(patterned(8 * MIB, [(0, 8 * MIB)]), DiskFacts(identity=ID))
    top = MemoryFile("top.raw", 512)
    rows = [(0, Kind.HOLE, None, 0), (5 * MIB, Kind.DATA, top, 0), (5 * MIB + 512, Kind.HOLE, None, 0)]
    layer = disk_of(Extents.of(rows, 8 * MIB), top, parent=base)
    table = opened(written(layer, backing=Backing("base.vhd", "vhd"))).guest
    assert [(row.start, row.length) for row in table if row.kind == Kind.DATA] == [(5 * MIB, 512)]


@pytest.mark.parametrize(
    ("backing", "identity", "options"),
    [
        (Backing("base.raw", "raw"), ID, Options()),
        (Backing("base.vhd", "vhd"), None, Options()),
        (Backing("base.vhd", "vhd"), ID, Options(subformat="fixed")),
    ],
)
def test_a_parent_that_a_vhd_cannot_have_is_refused(backing: Backing, identity: UUID | None, options: Options) -> None:
    base = raw_disk(patterned(MIB, []), DiskFacts(identity=identity))
    layer = disk_of(Extents.filled(MIB, Kind.HOLE), MemoryFile("top", 0), parent=base)
    with pytest.raises(PlanError):
        Vhd().write(layer, options, Placement(), backing=backing)


def test_azure_takes_whole_mib() -> None:
    image = raw_disk(patterned(MIB + 512, [(0, MIB + 512)]))
    layout = Vhd().write(image, Options(azure=True), Placement())
    assert layout.files[0].table.size == 2 * MIB + 512
    assert layout.losses == (f"size {MIB + 512}: rounded up to whole MiB, {2 * MIB} bytes",)


def test_a_disk_too_large_is_refused_with_the_largest_size() -> None:
    disk = disk_of(Extents.filled((2040 << 30) + 512), MemoryFile("source.raw", 0))
    with pytest.raises(PlanError, match=str(2040 << 30)):
        Vhd().write(disk, Options(), Placement())


def test_the_largest_disk_is_laid_out_at_once() -> None:
    size = 2040 << 30
    source = MemoryFile("source.raw", size)
    source.on_storage = Extents.whole(source)
    disk = disk_of(source.on_storage, source)
    with time_limit(10):
        table = Vhd().write(disk, Options(), Placement(4096)).files[0].table
    mine = table.source == table.sources.index(source)
    assert int(mine.sum()) == size // (2 * MIB)
    assert not ((table.start - table.offset)[mine] % 4096).any()


@pytest.mark.parametrize("modulus", [1, 512, 4096, 65536])
def test_data_is_aligned_as_windows_does_it(modulus: int) -> None:
    image = opened(written(raw_disk(patterned(9 * MIB, [(0, 9 * MIB)])), modulus=modulus))
    rows = [row for row in image.guest if row.kind == Kind.DATA]
    assert len(rows) == 5
    assert all(row.offset % 4096 == 0 for row in rows)


@pytest.mark.parametrize("creator", ["qemu", "vpc ", "somebody"])
def test_a_creator_that_would_change_the_size_is_not_carried(creator: str) -> None:
    image = raw_disk(patterned(5 * MIB, []), DiskFacts(creator=creator))
    layout = Vhd().write(image, Options(), Placement())
    assert [loss for loss in layout.losses if f"creator {creator}" in loss]
    assert opened(written(image)).disk.creator == "win"


def test_a_geometry_that_is_too_large_is_a_loss() -> None:
    image = raw_disk(patterned(MIB, []), DiskFacts(geometry=Geometry(cylinders=70000, heads=1, sectors=1)))
    assert "geometry 70000/1/1" in Vhd().write(image, Options(), Placement()).losses[0]


# -- the size, the footer and its copy


@pytest.mark.parametrize(
    ("creator", "geometry", "size"),
    [
        (b"win ", (10, 4, 17), 5 * MIB),
        (b"vpc ", (10, 4, 17), 5 * MIB),
        (b"vbox", (10, 4, 17), 5 * MIB),
        (b"qem2", (10, 4, 17), 5 * MIB),
        (b"qemu", (150, 4, 17), 150 * 4 * 17 * 512),
        (b"qemu", (65535, 16, 255), 5 * MIB),
        (b"qemu", (0, 0, 0), 5 * MIB),
        (b"qemu", (60000, 16, 63), 5 * MIB),
    ],
)
def test_the_size_is_the_footers_except_for_old_qemu(creator: bytes, geometry: tuple[int, int, int], size: int) -> None:
    data = patched(patched(sample(), "footer", 28, creator), "footer", 56, struct.pack(">HBB", *geometry))
    assert opened(data).size == size


@pytest.mark.malformed
def test_the_copy_stands_in_for_a_damaged_footer() -> None:
    data = sample()
    image = opened(data[:-300] + b"x" + data[-299:])
    assert content(image.flat) == content(opened(data).flat)
    assert "copy" in image.warnings[0]


@pytest.mark.malformed
def test_what_a_guest_wrote_into_a_fixed_disk_is_no_footer() -> None:
    fixed = written(raw_disk(patterned(MIB, [])), Options(subformat="fixed"))
    with pytest.raises(ImageError, match="fixed disk"):
        opened(fixed[-512:] + fixed[512:-512] + b"conectix" + bytes(504))


def test_footers_of_511_bytes_are_read() -> None:
    source = patterned(MIB, [(0, MIB)])
    data = written(raw_disk(source), Options(subformat="fixed"))[:-1]
    assert Vhd().probe(image_file(data))
    assert content(opened(data).flat) == source.read(0, MIB)


def test_a_saved_state_is_a_loss() -> None:
    assert "saved state" in opened(patched(sample(), "footer", 84, b"\1")).losses[0]


def bat(entry: int, value: int) -> Callable[[bytes], bytes]:
    return lambda data: data[: 1536 + entry * 4] + struct.pack(">I", value) + data[1540 + entry * 4 :]


HOSTILE: tuple[tuple[Callable[[bytes], bytes], str], ...] = (
    (lambda data: data[:100], "footer at 0x0"),
    (lambda data: b"x" * len(data), "footer at .*no footer"),
    (lambda data: patched(data, "footer", 12, b"\0\2"), "file_format_version at .*0x20000"),
    (lambda data: patched(data, "footer", 60, b"\0\0\0\5"), "disk_type at .*: 5 "),
    (lambda data: patched(data, "footer", 48, struct.pack(">Q", 1000)), "current_size at .*1000 bytes"),
    (lambda data: patched(data, "footer", 48, b"\x7f"), "max_table_entries at .*3 blocks"),
    (lambda data: patched(data, "footer", 60, b"\0\0\0\2")[2 * MIB :], "current_size at .*room"),
    (lambda data: patched(data, "footer", 16, b"\xff" * 8), "data_offset at .*not a valid offset of a header"),
    (lambda data: patched(data, "footer", 16, struct.pack(">Q", 1536)), "dynamic header at 0x600"),
    (lambda data: data[:520] + b"\7" + data[521:], "checksum at 0x224"),
    (lambda data: patched(data, "header", 24, b"\0\2\0\0"), "header_version"),
    (lambda data: patched(data, "header", 28, b"\xff\xff\xff\xff"), "table_offset at .*past the end"),
    (lambda data: patched(data, "header", 16, b"\x7f" + b"\xff" * 7), "table_offset at .*past the end"),
    (lambda data: patched(data, "header", 32, struct.pack(">I", 3 * MIB)), f"block_size at 0x220: {3 * MIB}"),
    (lambda data: patched(data, "header", 32, struct.pack(">I", 1 << 31)), "block_size at"),
    (lambda data: patched(data, "header", 32, bytes(4)), "block_size at 0x220: 0"),
    (bat(0, 0), "BAT entry 0 at 0x600: block 0x0"),
    (bat(1, 0xFFFFFFFE), "BAT entry 1 at 0x604"),
    (bat(2, 5 * MIB // 512), "BAT entry 2 at 0x608"),
    (lambda data: patched(data, "footer", 60, b"\0\0\0\4"), "names no parent"),
)


@pytest.mark.malformed
@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=[message for _, message in HOSTILE])
def test_bad_images_are_refused_in_one_line(change: Callable[[bytes], bytes], message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        opened(change(sample())).guest.total(Kind.DATA)
    assert str(caught.value).startswith("disk.vhd: ")
    assert "\n" not in str(caught.value)


@pytest.mark.malformed
def test_more_blocks_than_the_file_has_room_for_are_refused() -> None:
    source = patterned(64 * MIB, [(0, 4096)])
    data = written(raw_disk(source))
    for entry in range(1, 32):
        data = bat(entry, struct.unpack(">I", data[1536:1540])[0])(data)
    with pytest.raises(ImageError, match="room for"):
        opened(data).guest.total(Kind.DATA)


@pytest.mark.parametrize(
    ("code", "name", "wanted"),
    [
        (b"W2ru", ".\\a\\b.vhd".encode("utf-16-le"), "a/b.vhd"),
        (b"W2ku", "C:\\x\\b.vhd".encode("utf-16-le"), "b.vhd"),
        (b"W2ku", "\\\\server\\share\\b.vhd".encode("utf-16-le"), "b.vhd"),
        (b"MacX", b"file:///x/b.vhd", "/x/b.vhd"),
    ],
)
def test_names_of_the_parent_are_paths_of_this_system(code: bytes, name: bytes, wanted: str) -> None:
    locator = code + struct.pack(">IIIQ", 512, len(name), 0, 0x8000)
    data = patched(patched(sample(), "footer", 60, b"\0\0\0\4"), "header", 576, locator)
    data = data[:0x8000] + name + data[0x8000 + len(name) :]
    assert opened(data).parent_reference == wanted


@pytest.mark.malformed
def test_a_parent_name_that_is_too_long_is_refused() -> None:
    locator = b"W2ru" + struct.pack(">IIIQ", 512, 1 << 30, 0, 0x8000)
    with pytest.raises(ImageError, match=r"parent locator W2ru at 0x8000: 1073741824 bytes"):
        opened(patched(patched(sample(), "footer", 60, b"\0\0\0\4"), "header", 576, locator))


def test_parent_fields_of_a_disk_without_a_parent_are_ignored() -> None:
    locator = b"W2ru" + struct.pack(">IIIQ", 512, 1 << 30, 0, 0x8000)
    assert opened(patched(sample(), "header", 576, locator)).parent is None


@given(st.integers(1, 1 << 33))
def test_a_geometry_lies_inside_the_disk(sectors: int) -> None:
    from vmconv_vhd.structs import geometry_of

    cylinders, heads, per_track = geometry_of(sectors)
    assert cylinders < 1 << 16
    assert heads <= 16
    assert cylinders * heads * per_track <= sectors
