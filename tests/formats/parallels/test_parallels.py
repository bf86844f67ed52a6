"""Parallels: the conformance kit, what QEMU and dissect make of it, and disks that are described by a descriptor."""

from __future__ import annotations

import csv
import hashlib
import lzma
import struct
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk
from support.kits.parallels import OPTIONS, ParallelsKit
from support.kits.storage import OnStorage
from support.parallels_images import BASE, MIDDLE, NONE, TOP, build, bundle, descriptor
from support.requirements import oracle_module
from vmconv.errors import AccessError, ImageError, PlanError, UsageError
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry, installed
from vmconv.model.disk import GeometrySchema
from vmconv.model.extents import Extents, Kind
from vmconv.model.image import Image
from vmconv.model.layout import Placement
from vmconv.testing import disk_of, image_file, random_bytes
from vmconv.testing.memory import MemoryFile
from vmconv_parallels import Parallels, structs
from vmconv_parallels.options import Options
from vmconv_parallels.writer import write


class TestParallels(ParallelsKit):
    """The conformance kit."""


class TestParallelsOnStorage(OnStorage):
    format = ParallelsKit.format
    variants = OPTIONS
    sizes = (40 * MIB, 40 * MIB + 4096)
    written_by_qemu = OPTIONS
    in_place = ({},)
    made_by_qemu = ({"cluster_size": "1M"}, {"cluster_size": "64K"}, {"cluster_size": "4K"})


def read(data: bytes) -> Image:
    return Parallels().read(image_file(data), Opener(Registry()))


def guest(data: bytes) -> bytes:
    table = read(data).flat
    return table.read(0, table.size)


# -- reading


def test_a_version_1_image_of_63_sectors_is_read() -> None:
    cluster = 63 * 512
    payload = {512: random_bytes(cluster, 1), 512 + cluster: random_bytes(cluster, 2)}
    image = build(payload, [64, 0, 1], tracks=63, magic=structs.MAGIC_V1)
    assert guest(image) == payload[512 + cluster] + bytes(cluster) + payload[512]


def test_a_version_2_image_counts_clusters() -> None:
    payload = {4096: random_bytes(4096, 1), 8192: random_bytes(4096, 2)}
    assert guest(build(payload, [2, 0, 1])) == payload[8192] + bytes(4096) + payload[4096]


def test_remains_above_the_size_of_a_version_1_image_are_ignored() -> None:
    assert read(build({}, [0], magic=structs.MAGIC_V1, nb_sectors=8 | 0xDEAD << 32)).size == 4096


def test_the_last_cluster_may_reach_past_the_disk_and_the_file() -> None:
    assert guest(build({4096: b"a" * 1000}, [1], nb_sectors=3)) == b"a" * 1000 + bytes(536)


@pytest.mark.parametrize("value", [0, 0x312E3276, struct.unpack("<I", b"pd17")[0], 0xFFFFFFFF])
def test_only_one_value_marks_an_image_as_open(value: int) -> None:
    assert read(build({}, [0], in_use=value)).warnings == ()


def test_an_image_that_is_open_is_read_with_a_warning() -> None:
    image = read(build({}, [0], in_use=0x746F6E59))
    assert "not closed cleanly" in image.warnings[0]
    assert image.details["dirty-flag"] is True


def test_a_format_extension_is_a_loss() -> None:
    assert "dirty bitmaps" in read(build({}, [0], ext_off=8)).losses[0]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"version": 3}, "version at 0x10: 3 is not 2"),
    "no cluster": ({"tracks": 0}, r"tracks at 0x1c: 0 is not in 1\.\."),
    "huge cluster": ({"tracks": 0xFFFFFFFF}, "tracks at 0x1c: 4294967295 is not in"),
    "huge disk": ({"nb_sectors": 1 << 63}, "nb_sectors at 0x24: 9223372036854775808 is not in"),
    "few entries": ({"nb_sectors": 25}, "nb_bat_entries at 0x20: 3 entries, the disk needs 4"),
    "BAT past end": (
        {"nb_bat_entries": 0xFFFFFFFF, "nb_sectors": 1 << 34},
        "nb_bat_entries at 0x20: the BAT reaches to 0x200000040, past the end of the file",
    ),
}


@pytest.mark.malformed
@pytest.mark.parametrize("name", WRONG)
def test_a_header_that_cannot_be_is_refused_by_field_and_value(name: str) -> None:
    fields, message = WRONG[name]
    with pytest.raises(ImageError, match=message):
        read(build({}, [0, 0, 0], **({"tracks": 8} | fields)))


@pytest.mark.malformed
@pytest.mark.parametrize(
    ("magic", "bat", "message"),
    [
        (
            structs.MAGIC_V2,
            [1, 9],
            r"BAT entry 1 at 0x44 \(guest address 0x1000\): payload at 0x9000 lies past the end",
        ),
        (structs.MAGIC_V2, [0xFFFFFFFF], r"BAT entry 0 at 0x40 .*: payload at 0xffff{5}000 lies past the end"),
        (structs.MAGIC_V1, [8, 1] + [0] * 300, r"BAT entry 1 .*: payload at 0x200 lies before the end of the BAT"),
        (structs.MAGIC_V2, [1] * 5, "BAT at 0x40: 5 clusters are allocated so far, the file has room for 2"),
    ],
)
def test_a_bat_that_cannot_be_is_refused(magic: bytes, bat: list[int], message: str) -> None:
    image = read(build({4096: bytes(4096)}, bat, magic=magic))
    with pytest.raises(ImageError, match=message):
        _ = image.guest


@pytest.mark.malformed
def test_an_image_that_says_it_is_empty_and_is_not_is_refused() -> None:
    assert read(build({}, [0], flags=1)).flat.total(Kind.DATA) == 0
    with pytest.raises(ImageError, match="with the flag `empty`"):
        _ = read(build({4096: bytes(4096)}, [1], flags=1)).guest


# -- writing


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_file_holds_whole_clusters(tmp_path: Path, options: dict[str, str]) -> None:
    raw, image = make_disk(tmp_path / "disk.raw", 20 * MIB + 512), tmp_path / "disk.hds"
    vmconv.convert(str(raw), str(image), options=options)
    assert image.stat().st_size % vmconv.info(str(image))["cluster-size"] == 0


def test_a_disk_too_large_for_its_clusters_is_refused_with_a_hint() -> None:
    def plan(size: int) -> None:
        image = disk_of(Extents.filled(size), MemoryFile("source.raw", 0))
        write(image, Options(cluster_size=4096), Placement(4096))

    most = structs.MAX_BAT_ENTRIES * 4096
    plan(most)
    with pytest.raises(PlanError, match=f"cannot hold {most + 512} bytes, {most} at most") as caught:
        plan(most + 512)
    assert "cluster_size=8192" in str(caught.value.hint)


# -- disks with a descriptor


def convert(path: Path, target: Path, **arguments: Any) -> bytes:
    vmconv.convert(str(path), str(target), source_format="parallels", force=True, **arguments)
    return target.read_bytes()


@pytest.mark.parametrize("base", ["Plain", "Compressed"])
def test_a_disk_with_snapshots_is_flattened_without_copying(reflink_dir: Path, base: str) -> None:
    path, states = bundle(reflink_dir / "disk.hdd", base)
    assert convert(path, reflink_dir / "flat.raw", zero_copy="require") == states[2]


def test_dissect_sees_the_same_disk(tmp_path: Path) -> None:
    hdd = oracle_module("dissect.hypervisor.disk.hdd").HDD
    path, _ = bundle(tmp_path / "disk.hdd", "Compressed")
    disk = hdd(path.parent)
    for shot in (BASE, MIDDLE, TOP):
        stream = disk.open(shot.strip("{}"))
        parts = []
        # By pieces: 3.21 takes what follows a range of the parent for more of it.
        for at in range(0, 4 * 4096, 4096):
            stream.seek(at)
            parts.append(stream.read(4096))
        for _, layer in stream.streams:
            while layer is not None:
                layer.fh.close()
                layer = layer.parent  # noqa: PLW2901
        assert convert(path, tmp_path / "flat.raw", snapshot=shot) == b"".join(parts)


@pytest.mark.parametrize(("shot", "number"), [(BASE, 0), (MIDDLE.upper(), 1), (TOP.strip("{}"), 2)])
def test_a_snapshot_is_converted_by_its_guid(tmp_path: Path, shot: str, number: int) -> None:
    path, states = bundle(tmp_path)
    assert convert(path, tmp_path / "flat.raw", snapshot=shot) == states[number]


def test_an_unknown_snapshot_is_refused_with_those_there_are(tmp_path: Path) -> None:
    path, _ = bundle(tmp_path)
    with pytest.raises(UsageError, match="no snapshot 'daily'") as caught:
        convert(path, tmp_path / "flat.raw", snapshot="daily")
    assert BASE.strip("{}") in str(caught.value.hint)


def test_other_snapshots_are_a_loss(tmp_path: Path) -> None:
    path, _ = bundle(tmp_path)
    assert vmconv.info(str(path), format_name="parallels")["losses"] == [
        "2 other snapshots (convert --snapshot converts one)"
    ]


def test_a_split_disk_is_read_in_the_order_of_its_sectors(tmp_path: Path) -> None:
    first, second = random_bytes(8192, 1), random_bytes(4096, 2)
    (tmp_path / "1.hds").write_bytes(build({4096: second}, [1]))
    (tmp_path / "0.hds").write_bytes(first)
    storages = [(16, 24, [(TOP, "Compressed", "1.hds")]), (0, 16, [(TOP, "Plain", "0.hds")])]
    path = tmp_path / "DiskDescriptor.xml"
    path.write_text(descriptor(storages, [(TOP, NONE)], size=24))
    assert convert(path, tmp_path / "flat.raw") == first + second


@pytest.mark.malformed
def test_two_storages_in_one_file_are_refused(tmp_path: Path) -> None:
    path, _ = bundle(tmp_path)
    images = [(TOP, "Compressed", "top.hds")]
    path.write_text(descriptor([(0, 32, images), (32, 64, images)], [(TOP, NONE)]))
    with pytest.raises(ImageError, match="two of its 2 storages have one image"):
        convert(path, tmp_path / "copy.raw")


def test_facts_of_the_descriptor_are_carried(tmp_path: Path) -> None:
    path, _ = bundle(tmp_path)
    more = "<LogicSectorSize>512</LogicSectorSize><PhysicalSectorSize>4096</PhysicalSectorSize>"
    more += "<UID>{18162a18-c23a-4f90-8a9d-b7c93a4ef2a6}</UID>"
    path.write_text(path.read_text().replace("<Padding>", f"{more}<Padding>"))
    with Opener(installed()) as opener:
        disk = opener.image(str(path), "parallels").disk
    assert disk.geometry == GeometrySchema(cylinders=1, heads=2, sectors=16)
    assert disk.identity == UUID("18162a18-c23a-4f90-8a9d-b7c93a4ef2a6")
    assert (disk.logical_sector_size, disk.physical_sector_size) == (512, 4096)


def test_only_a_root_can_be_kept_as_a_backing_file(tmp_path: Path, qemu_img: QemuImg) -> None:
    """An overlay by itself has zeros where it leaves things to its parent."""
    path, _ = bundle(tmp_path, "Compressed")
    target = tmp_path / "top.qcow2"
    with pytest.raises(PlanError, match="not a backing file"):
        convert(path, target, backing_file="middle.hds")
    convert(path, target, backing_file="base.hds")
    convert(path, tmp_path / "flat.raw")
    qemu_img("compare", "-f", "qcow2", "-F", "raw", target, tmp_path / "flat.raw")


ONE = [(0, 32, [(TOP, "Plain", "disk.hds")])]
BROKEN: dict[str, tuple[str, str]] = {
    "document type": (
        '<!DOCTYPE a [<!ENTITY b "c">]>' + descriptor(ONE, [(TOP, NONE)]).split("\n", 1)[1],
        "line 1: a document type, which is refused",
    ),
    "cut off": (descriptor(ONE, [(TOP, NONE)])[:300], "line 4: no element found"),
    "deep": ("<Parallels_disk_image>" + "<a>" * 40, "line 1: elements nested over 32 deep"),
    "many": ("<Parallels_disk_image>" + "<a/>" * 50_001, "line 1: more than 50000 elements"),
    "no size": (
        descriptor(ONE, [(TOP, NONE)]).replace("Disk_size", "Size"),
        "Disk_Parameters at line 3: has no Disk_s",
    ),
    "size": (descriptor(ONE, [(TOP, NONE)], size=-1), "Disk_size at line 3: '-1' is not a number"),
    "huge size": (descriptor(ONE, [(TOP, NONE)], size=10**18), "Disk_size at line 3: '1000000000000000000' is not a"),
    "other size": (descriptor(ONE, [(TOP, NONE)], size=33), "storages end at sector 32, Disk_size is 33"),
    "padding": (descriptor(ONE, [(TOP, NONE)], parameters="<Padding>1</Padding>"), "Padding at line 3: 1 is not 0"),
    "encryption": (
        descriptor(ONE, [(TOP, NONE)], parameters=f"<Encryption><Engine>{BASE}</Engine></Encryption>"),
        "Engine at line 3: encryption by",
    ),
    "gap": (
        descriptor([(0, 16, ONE[0][2]), (24, 32, ONE[0][2])], [(TOP, NONE)]),
        r"StorageData at line 4: a storage of sectors 24\.\.32 after sector 16",
    ),
    "no storage": (descriptor([(0, 32, [])], [(TOP, NONE)]), "storage at sector 0: no image of snapshot"),
    "type": (descriptor([(0, 32, [(TOP, "Odd", "x")])], [(TOP, NONE)]), "Type at line 4: 'Odd' is neither Plain nor"),
    "no name": (descriptor([(0, 32, [(TOP, "Plain", "")])], [(TOP, NONE)]), "File at line 4: a name of 0 characters"),
    "long name": (descriptor([(0, 32, [(TOP, "Plain", "x" * 4097)])], [(TOP, NONE)]), "File at line 4: a name of 4097"),
    "other root": (
        descriptor(ONE, [(TOP, NONE)]).replace("<Parallels", "<a><Parallels") + "</a>",
        "a at line 2: is not Parallels",
    ),
    "guid": (descriptor([(0, 32, [("me", "Plain", "x")])], [(TOP, NONE)]), "GUID at line 4: 'me' is not a GUID"),
    "no top": (descriptor(ONE, [(TOP, NONE)], top=None), "the current state 5fbaabe3-.* is not one of 1 snapshots"),
    "no parent": (descriptor(ONE, [(TOP, BASE)]), "ParentGUID of 0+-.*3: there is no snapshot 0+-.*1"),
    "loop": (descriptor(ONE, [(TOP, BASE), (BASE, TOP)]), "ParentGUID of 0+-.*1: 0+-.*3 is above it, a loop"),
}


@pytest.mark.malformed
@pytest.mark.parametrize("name", BROKEN)
def test_a_descriptor_that_cannot_be_is_refused_by_element_and_line(tmp_path: Path, name: str) -> None:
    text, message = BROKEN[name]
    path = tmp_path / "DiskDescriptor.xml"
    path.write_text(text)
    (tmp_path / "disk.hds").write_bytes(bytes(32 * 512))
    with pytest.raises(ImageError, match=message) as caught:
        convert(path, tmp_path / "flat.raw")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "flat.raw").exists()


@pytest.mark.malformed
def test_a_descriptor_that_is_too_long_is_refused() -> None:
    text = descriptor(ONE, [(TOP, NONE)]) + " " * MIB
    with pytest.raises(ImageError, match=r"descriptor of \d+ bytes, 1048576 at most"):
        read(text.encode())


@pytest.mark.malformed
@pytest.mark.parametrize("name", ["../secret", "/etc/hostname"])
def test_a_descriptor_names_no_file_outside_its_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(32 * 512))
    (tmp_path / "disk.hdd").mkdir()
    path = tmp_path / "disk.hdd" / "DiskDescriptor.xml"
    path.write_text(descriptor([(0, 32, [(TOP, "Plain", name)])], [(TOP, NONE)]))
    with pytest.raises(AccessError, match="outside the image's directory"):
        convert(path, tmp_path / "flat.raw")


# -- real images


def expected(corpus: Path, name: str) -> str:
    with (corpus / "expected.tsv").open(newline="") as file:
        return next(row["expect"] for row in csv.DictReader(file, delimiter="\t") if row["name"] == name)


@pytest.mark.parametrize("name", ["parallels-v1", "parallels-v2"])
def test_real_images_of_both_versions_are_read_right(corpus: Path, tmp_path: Path, name: str) -> None:
    packed = corpus / "images" / "qemu-iotests" / f"{name}.xz"
    (tmp_path / "disk.hdd").write_bytes(lzma.decompress(packed.read_bytes()))
    content = convert(tmp_path / "disk.hdd", tmp_path / "flat.raw")
    assert hashlib.sha256(content).hexdigest() == expected(corpus, f"qemu-iotests/{name}")


def test_a_real_disk_with_a_descriptor_is_read_right(corpus: Path, reflink_dir: Path) -> None:
    for packed in (corpus / "images" / "dfvfs" / "hfsplus.hdd").iterdir():
        (reflink_dir / packed.stem).write_bytes(lzma.decompress(packed.read_bytes()))
    content = convert(reflink_dir / "DiskDescriptor.xml", reflink_dir / "flat.raw", zero_copy="require")
    assert hashlib.sha256(content).hexdigest() == expected(corpus, "dfvfs/hfsplus.hdd")


def test_the_plugin_is_found() -> None:
    assert installed().owners["format", "parallels"] == "vmconv-parallels"
