"""VDI: the conformance kit, what QEMU and dissect make of it, and what VirtualBox writes that QEMU does not."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO
from uuid import UUID

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk
from support.kits.storage import OnStorage
from support.kits.vdi import OPTIONS, VdiKit
from support.requirements import oracle_module
from support.vdi_images import IDENTITY, build, chain
from vmconv.errors import ImageError, PlanError
from vmconv.fields import field_offset
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry, installed
from vmconv.model.extents import Extents, Kind
from vmconv.model.facts import Geometry
from vmconv.model.image import Image
from vmconv.model.layout import Placement
from vmconv.testing import disk_of, image_file, patterned, random_bytes
from vmconv.testing.malformed import memory_limit
from vmconv.testing.memory import MemoryFile
from vmconv_vdi import Vdi, reader, structs
from vmconv_vdi.options import Options
from vmconv_vdi.writer import MAX_BLOCKS, write


class TestVdi(VdiKit):
    """The conformance kit."""


class TestVdiOnStorage(OnStorage):
    format = VdiKit.format
    variants = OPTIONS
    sizes = (40 * MIB, 40 * MIB + 4096)
    written_by_qemu = OPTIONS
    made_by_qemu = ({"static": "off"}, {"static": "on"})
    shares_qemu_s = False


def read(data: bytes) -> Image:
    return Vdi().read(image_file(data), Opener(Registry()))


def guest(data: bytes) -> bytes:
    table = read(data).flat
    return table.read(0, table.size)


def by_dissect(image: BinaryIO, parent: BinaryIO | None = None) -> bytes:
    """Returns the disk as dissect reads it: by single blocks, since 3.21 takes what follows for more of the first."""
    vdi = oracle_module("dissect.hypervisor.disk.vdi").VDI
    disk = vdi(image, vdi(parent).open() if parent else None)
    parts = []
    for at in range(0, disk.size, MIB):
        stream = disk.open()
        stream.seek(at)
        parts.append(stream.read(MIB))
    return b"".join(parts)


# -- reading


@pytest.mark.parametrize("static", ["off", "on"])
def test_the_subformat_is_that_of_qemu(tmp_path: Path, qemu_img: QemuImg, static: str) -> None:
    image = tmp_path / "disk.vdi"
    qemu_img("create", "-q", "-f", "vdi", "-o", f"static={static}", image, "2M")
    assert vmconv.info(str(image))["format-specific"]["data"]["subformat"] == (
        "static" if static == "on" else "dynamic"
    )


@pytest.mark.parametrize(("block", "data"), [(512, 0x400), (4096, 0x1200), (65536, 0x10000), (2 * MIB, 0x100200)])
def test_any_block_size_and_data_offset_is_read(block: int, data: int) -> None:
    payload = {number: random_bytes(block, number) for number in range(3)}
    image = build(payload, [2, structs.UNALLOCATED, 0, structs.DISCARDED, 1], block=block, data=data)
    assert guest(image) == payload[2] + bytes(block) + payload[0] + bytes(block) + payload[1]


def test_the_bytes_before_each_block_are_skipped() -> None:
    payload = {number: random_bytes(4096, number) for number in range(2)}
    assert guest(build(payload, [1, 0], block=4096, extra=512)) == payload[1] + payload[0]


def test_a_discarded_block_is_zero_and_an_unallocated_one_says_nothing() -> None:
    table = read(build({}, [structs.UNALLOCATED, structs.DISCARDED])).guest
    assert [(row.start, row.kind) for row in table] == [(0, Kind.HOLE), (MIB, Kind.ZERO)]


def test_a_size_that_is_not_whole_sectors_is_rounded_up() -> None:
    assert read(build({}, [structs.UNALLOCATED], cbDisk=1000)).size == 1024


def test_the_geometry_of_older_images_is_found() -> None:
    geometry = {"cCylinders": 20, "cHeads": 16, "cSectors": 63, "cbSector": 512}
    image = read(build({}, [structs.UNALLOCATED], LegacyGeometry=geometry))
    assert image.facts.geometry == Geometry(cylinders=20, heads=16, sectors=63)
    assert image.facts.identity == IDENTITY


def test_a_geometry_that_no_firmware_knows_is_not_stated() -> None:
    geometry = {"cCylinders": 20, "cHeads": 1 << 20, "cSectors": 63, "cbSector": 512}
    assert read(build({}, [structs.UNALLOCATED], LegacyGeometry=geometry)).disk.geometry is None


def test_a_comment_is_a_loss() -> None:
    assert read(build({}, [structs.UNALLOCATED], szComment=b"golden".ljust(256, b"\0"))).losses == ("comment 'golden'",)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"u32Type": 9}, r"u32Type at 0x4c: 9 is not in 1\.\.4"),
    "header length": ({"cbHeader": 12}, r"cbHeader at 0x48: 12 is not in 384\.\.4096"),
    "block of 0": ({"cbBlock": 0}, r"cbBlock at 0x178: 0 is not in"),
    "huge block": ({"cbBlock": 1 << 31}, "cbBlock at 0x178: 2147483648 is not in"),
    "odd block": ({"cbBlock": MIB + 512}, "cbBlock at 0x178: 1049088 is not a power of two"),
    "huge extra": ({"cbBlockExtra": 1 << 31}, "cbBlockExtra at 0x17c: 2147483648 is not in"),
    "huge disk": ({"cbDisk": 1 << 63}, "cbDisk at 0x170: 9223372036854775808 is not in"),
    "few blocks": ({"cBlocks": 1}, "cBlocks at 0x180: 1 blocks, a disk of 3145728 bytes has 3"),
    "map in header": ({"offBlocks": 8}, "offBlocks at 0x154: 0x8 is not a valid offset of 12 bytes"),
    "map past end": ({"offBlocks": 0xFFFFFF00}, "offBlocks at 0x154: 0xffffff00 is not a valid offset of 12 bytes"),
    "data in map": ({"offData": 0x200}, "offData at 0x158: 0x200 is not a sector after the block map"),
    "data between sectors": ({"offData": 0x1001}, "offData at 0x158: 0x1001 is not a sector"),
    "no parent": ({"u32Type": structs.DIFFERENCING}, "uuidLinkage at 0x1a8: differencing image that names no parent"),
}


@pytest.mark.malformed
@pytest.mark.parametrize("name", WRONG)
def test_a_header_that_cannot_be_is_refused_by_field_and_value(name: str) -> None:
    fields, message = WRONG[name]
    free = structs.UNALLOCATED
    with pytest.raises(ImageError, match=message):
        read(build({}, [free, free, free], **fields))


@pytest.mark.malformed
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([0, 7], r"block map entry 1 at 0x204 \(guest address 0x100000\): payload at 0x701000 lies past the end"),
        ([0xFFFFFFFD, 0], "entry 0 .*: payload at .* lies past the end"),
        ([0, structs.UNALLOCATED, 0], "entry 2 at 0x208 .*: block 0 of the file is used twice"),
        ([1, 0, 1], "entry 2 at 0x208 .*: block 1 of the file is used twice"),
    ],
)
def test_a_block_map_that_cannot_be_is_refused(entries: list[int], message: str) -> None:
    image = read(build({0: b"a", 1: b"b"}, entries))
    with pytest.raises(ImageError, match=message):
        _ = image.guest


@pytest.mark.malformed
def test_versions_that_are_not_known_are_refused() -> None:
    image = bytearray(build({}, [structs.UNALLOCATED]))
    image[68:72] = struct.pack("<I", 1)
    with pytest.raises(ImageError, match=r"u32Version at 0x44: 0\.1 is not 1\.1"):
        read(bytes(image))


@pytest.mark.malformed
def test_a_block_map_in_a_hole_takes_no_memory() -> None:
    """A petabyte of blocks that are all the first: refused at the second, not after 4 GiB."""
    count = 0x3FF00000
    image = MemoryFile("sparse.vdi", 1 << 33)
    image.write(0, build({}, [], cbDisk=count * MIB, cBlocks=count, offData=0xFFFFFE00))
    with pytest.raises(ImageError, match=r"entry 1 .* is used twice"):
        _ = Vdi().read(image, Opener(Registry())).guest


@pytest.mark.malformed
def test_a_block_map_of_several_slices_has_no_block_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "SLICE", 2)
    free = structs.UNALLOCATED
    assert read(build({0: b"a", 1: b"b"}, [0, free, free, 1])).guest.size == 4 * MIB
    image = read(build({0: b"a", 1: b"b"}, [0, 1, free, 0]))
    with pytest.raises(ImageError, match=r"entry 3 at 0x20c .*: block 0 of the file is used twice"):
        _ = image.guest


@pytest.mark.malformed
def test_a_file_of_many_small_blocks_takes_no_memory() -> None:
    """The file could hold four billion blocks; the disk has two."""
    image = MemoryFile("sparse.vdi", 1 << 43)
    image.write(0, build({}, [0, 1], cbBlock=512, cbDisk=1024))
    with memory_limit(64 << 20):
        assert Vdi().read(image, Opener(Registry())).guest.size == 1024


# -- differencing images


def test_a_differencing_image_is_flattened_without_copying(reflink_dir: Path) -> None:
    parent, child, payload = chain(reflink_dir)
    result = vmconv.convert(str(child), str(reflink_dir / "flat.raw"), zero_copy="require")
    assert result.totals.copied == 0
    flat = (reflink_dir / "flat.raw").read_bytes()
    assert flat == payload[0] + bytes(MIB) + payload[2] + bytes(MIB)
    with child.open("rb") as fh, parent.open("rb") as below:
        assert by_dissect(fh, below) == flat


def test_a_differencing_image_of_a_differencing_image_is_flattened(tmp_path: Path) -> None:
    _, child, payload = chain(tmp_path)
    middle = UUID(int=5)
    child.rename(tmp_path / f"{{{middle}}}.vdi")
    top = tmp_path / "top.vdi"
    linkage = structs.uuid_bytes(middle)
    free = structs.UNALLOCATED
    top.write_bytes(build({0: payload[3]}, [free, free, free, 0], u32Type=structs.DIFFERENCING, uuidLinkage=linkage))
    vmconv.convert(str(top), str(tmp_path / "flat.raw"))
    assert (tmp_path / "flat.raw").read_bytes() == payload[0] + bytes(MIB) + payload[2] + payload[3]


@pytest.mark.malformed
def test_a_missing_parent_is_named_by_its_uuid(tmp_path: Path) -> None:
    parent, child, _ = chain(tmp_path)
    parent.unlink()
    (tmp_path / "other.vdi").write_bytes(build({0: bytes(MIB)}, [0], uuidCreate=structs.uuid_bytes(UUID(int=5))))
    (tmp_path / "garbage.vdi").write_bytes(b"x" * 1000)
    with pytest.raises(ImageError, match=f"uuidLinkage at 0x1a8: .* UUID {IDENTITY} only") as caught:
        vmconv.convert(str(child), str(tmp_path / "flat.raw"))
    assert "--allow-external" in str(caught.value.hint)


def test_a_parent_under_another_name_is_found_by_its_uuid(tmp_path: Path) -> None:
    parent, child, payload = chain(tmp_path)
    parent.rename(tmp_path / "any name.vdi")
    for name in ("a.vdi", "z.vdi"):
        (tmp_path / name).write_bytes(build({0: bytes(MIB)}, [0], uuidCreate=structs.uuid_bytes(UUID(int=5))))
    vmconv.convert(str(child), str(tmp_path / "flat.raw"))
    assert (tmp_path / "flat.raw").read_bytes()[:MIB] == payload[0]


def test_a_parent_in_another_directory_is_found_where_the_user_allows_it(tmp_path: Path) -> None:
    """VirtualBox keeps differencing images in a directory below that of the disk."""
    snapshots = tmp_path / "Snapshots"
    snapshots.mkdir()
    parent, child, payload = chain(snapshots)
    parent.rename(tmp_path / "disk.vdi")
    flat = tmp_path / "flat.raw"
    with pytest.raises(ImageError, match="named by its UUID"):
        vmconv.convert(str(child), str(flat))
    vmconv.convert(str(child), str(flat), allow_external=[str(tmp_path)])
    assert flat.read_bytes()[:MIB] == payload[0]


def test_of_two_files_with_the_uuid_of_the_parent_the_unchanged_one_is_meant(tmp_path: Path) -> None:
    parent, child, payload = chain(tmp_path)
    content = bytearray(parent.rename(tmp_path / "one.vdi").read_bytes())
    at = structs.HEADER_OFFSET + field_offset(structs.Header, "uuidModify")
    content[at : at + 16] = structs.uuid_bytes(UUID(int=9))
    (tmp_path / "another.vdi").write_bytes(content)
    vmconv.convert(str(child), str(tmp_path / "flat.raw"))
    assert (tmp_path / "flat.raw").read_bytes()[:MIB] == payload[0]
    (tmp_path / "copy.vdi").write_bytes((tmp_path / "one.vdi").read_bytes())
    with pytest.raises(ImageError, match=r"copy\.vdi and .*one\.vdi both have the UUID"):
        vmconv.convert(str(child), str(tmp_path / "again.raw"))


def test_a_search_follows_no_link_out_of_the_directory(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    parent, child, _ = chain(inside)
    parent.rename(outside / "disk.vdi")
    (inside / "link.vdi").symlink_to(outside / "disk.vdi")
    with pytest.raises(ImageError, match="named by its UUID"):
        vmconv.convert(str(child), str(tmp_path / "flat.raw"))


def test_a_search_looks_at_a_limited_number_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmconv.io.opener.MAX_SEARCHED", 3)
    parent, child, _ = chain(tmp_path)
    parent.rename(tmp_path / "parent.vdi")
    for number in range(3):
        (tmp_path / f"{number}.vdi").write_bytes(b"")
    with pytest.raises(ImageError, match="named by its UUID"):
        vmconv.convert(str(child), str(tmp_path / "flat.raw"))


def test_a_link_to_the_parent_will_do(tmp_path: Path) -> None:
    parent, child, payload = chain(tmp_path)
    base = parent.rename(tmp_path / "base.vdi")
    parent.symlink_to(base.name)
    vmconv.convert(str(child), str(tmp_path / "flat.raw"))
    assert (tmp_path / "flat.raw").read_bytes()[:MIB] == payload[0]


@pytest.mark.malformed
@pytest.mark.parametrize(
    ("field", "reason"), [("uuidParentModify", "was changed"), ("uuidCreate", "is another disk")], ids=str
)
def test_a_parent_with_another_identity_is_refused(tmp_path: Path, field: str, reason: str) -> None:
    parent, child, _ = chain(tmp_path)
    other = structs.uuid_bytes(UUID(int=9))
    changed = "uuidModify" if field == "uuidParentModify" else field
    at = structs.HEADER_OFFSET + field_offset(structs.Header, changed)
    content = bytearray(parent.read_bytes())
    content[at : at + 16] = other
    parent.write_bytes(content)
    with pytest.raises(ImageError, match=str(UUID(int=9))) as caught:
        vmconv.convert(str(child), str(tmp_path / "flat.raw"))
    assert reason in str(caught.value.hint)


@pytest.mark.malformed
def test_an_image_that_is_its_own_parent_is_a_loop(tmp_path: Path) -> None:
    parent, child, _ = chain(tmp_path)
    parent.unlink()
    child.rename(parent)
    with pytest.raises(ImageError, match="loop"):
        vmconv.convert(str(parent), str(tmp_path / "flat.raw"))


# -- writing


def test_payload_at_odd_places_is_shared_by_moving_the_data_area(reflink_dir: Path, qemu_img: QemuImg) -> None:
    """QEMU's images have their payload at 1024 modulo 4096: the target's has the same phase."""
    raw, image, copy = (reflink_dir / name for name in ("disk.raw", "disk.vdi", "copy.vdi"))
    make_disk(raw, 20 * MIB)
    qemu_img("convert", "-O", "vdi", raw, image)
    result = vmconv.convert(str(image), str(copy))
    assert result.totals.shared > 0.9 * (result.totals.shared + result.totals.copied)
    qemu_img("check", copy)
    qemu_img("compare", image, copy)


def test_the_order_of_the_source_is_kept() -> None:
    """A scattered disk is one run in the file, so that it is shared in one piece."""
    source = patterned(8 * MIB, [(0, 8 * MIB)])
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    table = Extents.of([(at * MIB, Kind.DATA, source, place * MIB) for at, place in enumerate(order)], 8 * MIB)
    layout = write(disk_of(table, source), Options(), Placement(4096))
    assert [(row.offset, row.length) for row in layout.files[0].table if row.source is source] == [(0, 8 * MIB)]


def test_the_largest_disk_is_planned_and_a_larger_one_is_refused() -> None:
    def plan(size: int) -> int:
        source = MemoryFile("source.raw", 0)
        return write(disk_of(Extents.filled(size), source), Options(), Placement(4096)).files[0].table.size

    assert plan(MAX_BLOCKS * MIB) < 1 << 32
    with pytest.raises(PlanError, match=f"vdi cannot hold {MAX_BLOCKS * MIB + 512} bytes") as caught:
        plan(MAX_BLOCKS * MIB + 512)
    assert str(MAX_BLOCKS * MIB) in str(caught.value.hint)


def test_the_plugin_is_found() -> None:
    assert installed().owners["format", "vdi"] == "vmconv-vdi"
