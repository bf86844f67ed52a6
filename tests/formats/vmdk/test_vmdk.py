"""VMDK: the conformance kit, and what other people's tools make of it."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import vmconv
from support.corpus import ROWS, unpack
from support.disks import MIB, QemuImg, make_disk, qemu_io, scribble
from support.kits.storage import OnStorage
from support.kits.vmdk import FLAT, GRAIN, SPARSE, STREAM, VmdkKit
from support.requirements import oracle_program
from vmconv.errors import AccessError, ImageError, PlanError, VmconvError
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry, installed
from vmconv.model.extents import Extents, Kind
from vmconv.model.facts import DiskFacts, Geometry
from vmconv.model.image import Image
from vmconv.model.layout import Layout, Placement
from vmconv.system.linux import clone_range
from vmconv.testing import image_file, make_in_memory, patterned, random_bytes
from vmconv.testing.disks import content, disk_of, raw_disk
from vmconv.testing.memory import MemoryFile
from vmconv.testing.reading import Siblings
from vmconv_vmdk import Vmdk
from vmconv_vmdk.options import Options


class TestVmdk(VmdkKit):
    """The conformance kit."""


class TestVmdkOnStorage(OnStorage):
    format = VmdkKit.format
    variants = (*SPARSE, *FLAT)
    written_by_qemu = ({}, {"subformat": "monolithicFlat"})
    made_by_qemu = ({}, {"zeroed_grain": "on"}, {"subformat": "monolithicFlat"})
    in_place = ({}, {"subformat": "monolithicFlat"})


SECTOR = 512


def in_memory(data: bytes, siblings: Mapping[str, bytes] | None = None) -> Image:
    """Reads an image whose extents are given as bytes."""
    files = {name: image_file(content, name) for name, content in (siblings or {}).items()}
    return Vmdk().read(image_file(data, "disk.vmdk"), Siblings(Registry({"vmdk": Vmdk()}), files))


def write(image: Image, name: str = "disk.vmdk", **options: Any) -> Layout:
    return Vmdk().write(image, Options(**options), Placement(512, name))


def guest_bytes(path: Path) -> bytes:
    with Opener(installed()) as opener:
        return content(opener.image(str(path), "vmdk").flat)


# -- on real storage, with QEMU and libvmdk


@pytest.mark.parametrize("options", [*SPARSE, *FLAT, STREAM], ids=str)
def test_libvmdk_and_qemu_know_what_was_written(xfs_dir: Path, qemu_img: QemuImg, options: dict[str, str]) -> None:
    raw, image = make_disk(xfs_dir / "disk.raw", 8 * MIB), xfs_dir / "disk.vmdk"
    vmconv.convert(str(raw), str(image), options=options)
    told = json.loads(qemu_img("info", "--output=json", image).stdout)
    mine = vmconv.info(str(image))
    assert told["virtual-size"] == mine["virtual-size"] == 8 * MIB
    theirs, ours = told["format-specific"]["data"], mine["format-specific"]["data"]
    assert theirs["create-type"] == ours["create-type"] == options.get("subformat", "monolithicSparse")
    assert theirs["cid"] == ours["cid"]
    assert theirs["parent-cid"] == ours["parent-cid"] == 0xFFFFFFFF
    done = subprocess.run([oracle_program("vmdkinfo"), str(image)], capture_output=True, text=True, check=True)
    assert "Media size:\t\t\t8.0 MiB (8388608 bytes)" in done.stdout
    assert f"Content identifier:\t\t{ours['cid']:#010x}" in done.stdout


@pytest.mark.parametrize(
    "subformat", ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"]
)
def test_images_of_qemu_are_read_without_copying(xfs_dir: Path, qemu_img: QemuImg, subformat: str) -> None:
    image, raw, back = (xfs_dir / name for name in ("disk.vmdk", "disk.raw", "back.raw"))
    zeroed = "on" if subformat.endswith("Sparse") else "off"
    qemu_img("create", "-f", "vmdk", "-o", f"subformat={subformat},zeroed_grain={zeroed}", image, "20M")
    scribble(image, 20 * MIB, 1, unit=GRAIN)
    qemu_img("convert", "-O", "raw", image, raw)
    vmconv.convert(str(image), str(back), zero_copy="require")
    assert raw.read_bytes() == back.read_bytes()


@pytest.mark.parametrize("size", [1, 511, 513, 4097, GRAIN + 1, 5 * MIB + 1536, 858993664 // 64])
@pytest.mark.parametrize("options", [{}, FLAT[0], STREAM], ids=str)
def test_disks_of_odd_sizes(xfs_dir: Path, qemu_img: QemuImg, options: dict[str, str], size: int) -> None:
    raw, image, back = (xfs_dir / name for name in ("disk.raw", "disk.vmdk", "back.raw"))
    raw.write_bytes(random_bytes(size))
    vmconv.convert(str(raw), str(image), options=options)
    vmconv.convert(str(image), str(back))
    assert back.read_bytes() == raw.read_bytes() + bytes(-size % SECTOR)
    qemu_img("compare", "-f", "raw", "-F", "vmdk", raw, image)


def test_the_last_grain_is_whole_and_only_the_odd_end_of_a_source_is_copied(xfs_dir: Path) -> None:
    raw, image = xfs_dir / "disk.raw", xfs_dir / "disk.vmdk"
    raw.write_bytes(random_bytes(5 * MIB + 1536))
    result = vmconv.convert(str(raw), str(image))
    assert (result.totals.shared, result.totals.copied) == (5 * MIB, 1536)
    assert image.stat().st_size % GRAIN == 0


def test_misaligned_payload_goes_to_grains_that_can_share_it(reflink_dir: Path, qemu_img: QemuImg) -> None:
    (reflink_dir / "container").write_bytes(random_bytes(16 * MIB + 4096))
    source = reflink_dir / "source.vmdk"
    source.write_bytes(descriptor(f'RW {16 * MIB // SECTOR} FLAT "container" 3', "monolithicFlat"))
    result = vmconv.convert(str(source), str(reflink_dir / "disk.vmdk"), zero_copy="require")
    assert result.totals.shared >= 16 * MIB
    assert vmconv.prove(str(source), str(reflink_dir / "disk.vmdk"))
    qemu_img("compare", source, reflink_dir / "disk.vmdk")
    qemu_img("check", reflink_dir / "disk.vmdk")


def test_misaligned_pieces_are_shared_with_their_surroundings() -> None:
    """Pieces at odd sectors of a container, in any order, some of them less than a grain, with zeros between."""
    container = patterned(64 * MIB, [(0, 64 * MIB)])
    rows, at = [], 0
    for number, place in enumerate([9, 70001, 301, 35000, 1000]):
        length = (128 * (number + 1) - (number % 2) * 5) * SECTOR
        rows += [(at, Kind.DATA, container, place * SECTOR), (at + length, Kind.ZERO, None, 0)]
        at += -(-length // GRAIN) * GRAIN + GRAIN
    image = disk_of(Extents.of(rows, at), container)
    layout = Vmdk().write(image, Options(), Placement(4096))
    table = layout.files[0].table
    found = [row for row in table if row.source is container]
    assert all((row.start - row.offset) % 4096 == row.start % 4096 == 0 for row in found)
    # Where zeros of the same grain follow, the last block cannot be completed.
    assert [row.end % 4096 == 0 for row in found].count(False) == 2
    _, files = make_in_memory(layout, image)
    assert content(in_memory(files[0].read(0, files[0].size)).flat)[:at] == content(image.flat)


def test_a_disk_of_several_extents(reflink_dir: Path, qemu_img: QemuImg) -> None:
    raw, boundary = reflink_dir / "disk.raw", 4192256 * SECTOR
    with raw.open("wb") as file:
        file.truncate(5 << 30)
        for start in (0, boundary - MIB, 2 * boundary - 4096, (5 << 30) - 4096):
            file.seek(start)
            file.write(random_bytes(min(2 * MIB, (5 << 30) - start), start))
    for subformat, letter in (("twoGbMaxExtentSparse", "s"), ("twoGbMaxExtentFlat", "f")):
        folder = reflink_dir / subformat
        folder.mkdir()
        vmconv.convert(str(raw), str(folder / "disk.vmdk"), options={"subformat": subformat}, zero_copy="require")
        names = {f"disk-{letter}00{number}.vmdk" for number in (1, 2, 3)}
        assert set(os.listdir(folder)) == {"disk.vmdk", *names}
        qemu_img("compare", "-f", "raw", "-F", "vmdk", raw, folder / "disk.vmdk")
        assert vmconv.prove(str(raw), str(folder / "disk.vmdk"))


_SCALE = """
import json, sys, vmconv
result = vmconv.convert(sys.argv[1], sys.argv[2])
same = vmconv.compare(sys.argv[1], sys.argv[2])
# The peak of this program: what getrusage says includes the one that started it.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(json.dumps([result.totals.shared, result.totals.copied, same.identical, same.read, result.seconds,
                  int(peak.split()[1])]))
"""


def test_a_disk_of_one_tebibyte_takes_memory_for_metadata_only(xfs_dir: Path) -> None:
    raw, size, piece = xfs_dir / "disk.raw", 1 << 40, 256 * MIB
    with raw.open("w+b") as file:
        for _ in range(piece // (16 * MIB)):
            file.write(os.urandom(16 * MIB))
        file.flush()
        os.fsync(file.fileno())
        file.truncate(size)
        length = piece
        while length < size:
            step = min(length, size - length)
            clone_range(file.fileno(), file.fileno(), 0, step, length)
            length += step
    arguments = [str(raw), str(xfs_dir / "disk.vmdk")]
    done = subprocess.run([sys.executable, "-c", _SCALE, *arguments], capture_output=True, text=True, check=True)
    shared, copied, identical, read, seconds, peak = json.loads(done.stdout)
    assert seconds < 15
    assert (shared, copied, identical, read) == (size, 0, True, 0)
    # Most of it is not the image's: the physical map that comparing asks the filesystem for.
    assert peak < 320 * 1024


# -- chains


def test_a_chain_of_qemu_is_flattened_without_copying(reflink_dir: Path, qemu_img: QemuImg) -> None:
    chain(reflink_dir, qemu_img)
    result = vmconv.convert(str(reflink_dir / "top.vmdk"), str(reflink_dir / "flat.raw"), zero_copy="require")
    assert result.totals.shared > 0
    qemu_img("compare", "-F", "raw", reflink_dir / "top.vmdk", reflink_dir / "flat.raw")


def chain(directory: Path, qemu_img: QemuImg) -> None:
    """Makes base.vmdk (flat), middle.vmdk and top.vmdk (sparse) with QEMU."""
    make_disk(directory / "base.raw", 8 * MIB)
    qemu_img("convert", "-O", "vmdk", "-o", "subformat=monolithicFlat", directory / "base.raw", directory / "base.vmdk")
    for seed, (name, below) in enumerate((("middle", "base"), ("top", "middle"))):
        image = directory / f"{name}.vmdk"
        qemu_img("create", "-f", "vmdk", "-o", "zeroed_grain=on", "-b", f"{below}.vmdk", "-F", "vmdk", image)
        scribble(image, 8 * MIB, seed, unit=GRAIN)


@pytest.mark.parametrize("options", SPARSE, ids=str)
@pytest.mark.parametrize("backing", ["base.vmdk", "middle.vmdk"])
def test_a_kept_parent_stays_the_parent(
    xfs_dir: Path, qemu_img: QemuImg, options: dict[str, str], backing: str
) -> None:
    chain(xfs_dir, qemu_img)
    top, target = xfs_dir / "top.vmdk", xfs_dir / "target.vmdk"
    result = vmconv.convert(str(top), str(target), backing_file=backing, options=options, zero_copy="require")
    assert result.totals.copied == 0
    info = vmconv.info(str(target))
    assert info["backing-filename"] == backing
    assert info["format-specific"]["data"]["parent-cid"] == cid_of(xfs_dir / backing)
    qemu_img("check", target)
    qemu_img("compare", top, target)
    assert vmconv.compare(str(top), str(target))


def cid_of(image: Path) -> int:
    """Returns the content id as a number: QEMU leaves leading zeros out."""
    return int(image.read_bytes().split(b"\nCID=")[1].split(b"\n")[0], 16)


@pytest.mark.malformed
def test_a_parent_that_was_written_to_is_refused_with_a_hint(tmp_path: Path, qemu_img: QemuImg) -> None:
    chain(tmp_path, qemu_img)
    qemu_io(tmp_path / "base.vmdk", "write -P 1 0 64k")
    with pytest.raises(ImageError, match=r"middle\.vmdk: parentCID [0-9a-f]{8}: the CID of base\.vmdk is") as caught:
        vmconv.convert(str(tmp_path / "top.vmdk"), str(tmp_path / "flat.raw"))
    assert "written to" in str(caught.value.hint)


def test_only_a_vmdk_can_be_the_parent_of_one(xfs_dir: Path, qemu_img: QemuImg) -> None:
    make_disk(xfs_dir / "base.raw", MIB)
    qemu_img("create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", xfs_dir / "top.qcow2")
    with pytest.raises(PlanError, match=r"parent must be a VMDK, base\.raw is raw"):
        vmconv.convert(str(xfs_dir / "top.qcow2"), str(xfs_dir / "top.vmdk"), backing_file="base.raw")


@pytest.mark.parametrize("options", [*FLAT, STREAM], ids=str)
def test_subformats_that_are_whole_disks_have_no_parent(
    tmp_path: Path, qemu_img: QemuImg, options: dict[str, str]
) -> None:
    chain(tmp_path, qemu_img)
    with pytest.raises(PlanError, match="cannot have a backing file"):
        vmconv.convert(
            str(tmp_path / "top.vmdk"), str(tmp_path / "new.vmdk"), backing_file="base.vmdk", options=options
        )


# -- descriptors


def descriptor(extents: str, create_type: str = "custom", *lines: str, encoding: str = "utf-8") -> bytes:
    """Returns the text of a descriptor."""
    head = ["# Disk DescriptorFile", "version=1", "CID=12345678", "parentCID=ffffffff", f'createType="{create_type}"']
    return "\n".join([*head, *lines, "# Extent description", extents, ""]).encode(encoding)


def test_extents_follow_each_other() -> None:
    one, two = random_bytes(8 * SECTOR, 1), random_bytes(8 * SECTOR, 2)
    text = descriptor('RW 2 FLAT "one" 3\nRW 3 ZERO\nRDONLY 4 VMFS "two"\nrw 1 flat "one"\nNOACCESS 2 FLAT "gone" 0')
    image = in_memory(text, {"one": one, "two": two})
    assert image.size == 12 * SECTOR
    expected = one[3 * SECTOR : 5 * SECTOR] + bytes(3 * SECTOR) + two[: 4 * SECTOR] + one[:SECTOR] + bytes(2 * SECTOR)
    assert content(image.flat) == expected
    assert image.warnings == ("disk.vmdk: 1024 bytes that the guest may not read are converted as zeros",)


@pytest.mark.parametrize("line", ['encoding="windows-1252"', "encoding = windows-1252"])
def test_file_names_are_in_the_encoding_that_is_named(line: str) -> None:
    text = descriptor('RW 1 FLAT "Gerät.bin" 0', "monolithicFlat", line, encoding="cp1252")
    assert content(in_memory(text, {"Gerät.bin": b"\1" * SECTOR}).flat) == b"\1" * SECTOR


@pytest.mark.parametrize("encoding", ["gbk", "shift_jis", "utf-8"])
def test_names_of_the_east_are_read(encoding: str) -> None:
    text = descriptor('RW 1 FLAT "日本.bin" 0', "monolithicFlat", f'encoding="{encoding}"', encoding=encoding)
    assert content(in_memory(text, {"日本.bin": b"\1" * SECTOR}).flat) == b"\1" * SECTOR


def test_names_that_are_no_text_name_their_file_without_an_encoding(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff\xfe.bin")).write_bytes(b"\1" * SECTOR)
    (tmp_path / "disk.vmdk").write_bytes(descriptor('RW 1 FLAT "?" 0').replace(b"?", b"\xff\xfe.bin"))
    assert guest_bytes(tmp_path / "disk.vmdk") == b"\1" * SECTOR


def test_spaces_tabs_line_ends_and_case_do_not_matter() -> None:
    text = (
        b'\xef\xbb\xbf# Disk DescriptorFile\r\nVERSION = 4\r\n\r\n cid\t=\t"0000abcd" \r\n\tparentcid=FFFFFFFF\r\n'
        b'CreateType = monolithicFlat\r\n RW\t1  FLAT\t"a b.vmdk"\r\n'
        b'ddb.uuid.image="6000c29f-e40c-8733-ea3e-c31b2b4352e9"'
    )
    image = in_memory(text, {"a b.vmdk": b"\2" * SECTOR})
    assert content(image.flat) == b"\2" * SECTOR
    assert image.details["format-specific"]["data"]["cid"] == 0xABCD
    assert image.disk.identity == UUID("6000c29f-e40c-8733-ea3e-c31b2b4352e9")
    assert image.details["format-specific"]["data"]["image-uuid"] == "6000c29f-e40c-8733-ea3e-c31b2b4352e9"


def test_change_tracking_is_a_loss() -> None:
    text = descriptor('RW 1 FLAT "one" 0', "vmfs", "# Change Tracking File", 'changeTrackPath="disk-ctk.vmdk"')
    assert in_memory(text, {"one": bytes(SECTOR)}).losses == ("change tracking in 'disk-ctk.vmdk'",)


def test_an_empty_geometry_is_not_carried() -> None:
    lines = ['ddb.geometry.cylinders = "16"', 'ddb.geometry.heads = "16"', 'ddb.geometry.sectors = "63"']
    usual = in_memory(descriptor('RW 16384 FLAT "one" 0', "vmfs", *lines))
    assert usual.facts.geometry is None
    odd = in_memory(descriptor('RW 20000 FLAT "one" 0', "vmfs", *lines))
    assert odd.facts.geometry == Geometry(cylinders=16, heads=16, sectors=63)


@pytest.mark.malformed
@pytest.mark.parametrize(
    ("extents", "create_type", "lines", "problem"),
    [
        ('RW 63 FLAT "/dev/sda" 0', "fullDevice", [], "createType fullDevice: the disk is a physical device"),
        ('RW 63 FLAT "/dev/sda" 0', "partitionedDevice", [], "createType partitionedDevice: .* physical device"),
        ('RW 63 VMFSRDM "x-rdm.vmdk"', "vmfsRawDeviceMap", [], "VMFSRDM: the disk is a raw device"),
        ('RW 63 VMFSRAW "x"', "custom", [], "VMFSRAW: the disk is a raw device"),
        ('RW 1 FLAT "one" 0', "holographic", [], "createType 'holographic' is not known"),
        ("", "vmfs", [], "names no extent"),
        ('RW 0 FLAT "one" 0', "vmfs", [], "line 7: extent of 0 sectors"),
        ('RW 99999999999999999 FLAT "one" 0', "vmfs", [], "extent of 99999999999999999 sectors"),
        ('RW 1 FLAT "one" 99999999999999999', "vmfs", [], "extent at sector 99999999999999999"),
        ("\n".join(["RW 9007199254740992 ZERO"] * 2), "vmfs", [], "extents of 9223372036854775808 bytes together"),
        ("RW 1 FLAT", "vmfs", [], "extent of kind FLAT names no file"),
        ('RW 1 FLOPPY "one"', "vmfs", [], "extent of unknown kind 'FLOPPY'"),
        ('RW many FLAT "one"', "vmfs", [], "'RW many FLAT \"one\"' is not an extent"),
        ('RW 9 FLAT "one" 0', "vmfs", [], "4608 bytes from 0x0 lie past the end of the file \\(0x1000\\)"),
        ('RW 1 FLAT "one" 8', "vmfs", [], "512 bytes from 0x1000 lie past the end of the file"),
        ('RW 1 SPARSE "one"', "custom", [], "magic at 0x0: .* is not that of a SPARSE extent"),
        ('RW 1 FLAT "gone" 0', "vmfs", [], "extent 'gone'"),
        ('RW 1 FLAT "../gone" 0', "vmfs", [], "extent '../gone' lies outside"),
        ('RW 1 FLAT "one" 0', "vmfs", ['encoding="rot13"'], "encoding 'rot13' of the descriptor is not known"),
        ('RW 1 FLAT "one" 0', "vmfs", ['encoding="none"'], "encoding 'none' of the descriptor is not known"),
        ('RW 1 FLAT "Ä" 0', "vmfs", ['encoding="us-ascii"'], "is not us-ascii"),
        ('RW 1 FLAT "one" 0', "vmfs", ['encryption.keySafe="vmware:key"'], "encrypted"),
        ('RW 1 FLAT "one" 0', "vmfs", ['ddb.iofilters = "vmwarevmcrypt"'], "encrypted"),
    ],
)
def test_bad_descriptors_are_refused_in_one_line(
    extents: str, create_type: str, lines: Sequence[str], problem: str
) -> None:
    with pytest.raises(VmconvError, match=problem) as caught:
        content(in_memory(descriptor(extents, create_type, *lines), {"one": random_bytes(4096)}).flat)
    assert "\n" not in str(caught.value)


@pytest.mark.malformed
@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (b"CID=12345678", b"CID=123456789", "CID '123456789' is not a number"),
        (b"parentCID=ffffffff", b"parentCID=none", "parentCID 'none' is not a number"),
        (b"parentCID=ffffffff", b"parentCID=00000001", "parentCID 00000001 states a parent, but no line"),
        (b"# Disk DescriptorFile", b"A story", "neither a descriptor nor an extent"),
        (b"# Extent", b"#" * (1 << 20), "descriptor of 1048[0-9]* bytes, 1048576 at most"),
    ],
)
def test_bad_lines_are_refused(old: bytes, new: bytes, problem: str) -> None:
    with pytest.raises(ImageError, match=problem):
        in_memory(descriptor('RW 1 FLAT "one" 0', "vmfs").replace(old, new))


def test_a_large_file_of_another_format_is_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "disk.vmdk").write_bytes(b"QFI\xfb" + bytes(2 << 20))
    with pytest.raises(ImageError, match="neither a descriptor nor an extent of a VMDK"):
        vmconv.info(tmp_path / "disk.vmdk", format_name="vmdk")


@pytest.mark.malformed
def test_a_missing_extent_is_named(tmp_path: Path) -> None:
    (tmp_path / "disk.vmdk").write_bytes(descriptor('RW 1 FLAT "disk-flat.vmdk" 0', "vmfs"))
    with pytest.raises(AccessError, match=r"extent 'disk-flat\.vmdk'"):
        guest_bytes(tmp_path / "disk.vmdk")


def test_an_extent_without_its_descriptor_is_refused_with_a_hint() -> None:
    for data in (sparse_extent(), cowd_extent([0], []), se_extent([])):
        with pytest.raises(ImageError, match="an extent of a disk, without its descriptor") as caught:
            in_memory(data)
        assert "the disk's descriptor" in str(caught.value.hint)


@pytest.mark.parametrize(
    "create_type", ["2GbMaxExtentFlat", "vmfsThin", "vmfsEagerZeroedThick", "TWOGBMAXEXTENTFLAT", ""]
)
def test_other_names_of_the_same_are_known(create_type: str) -> None:
    image = in_memory(descriptor('RW 1 VMFS "one"', create_type), {"one": b"\1" * SECTOR})
    assert content(image.flat) == b"\1" * SECTOR


@pytest.mark.parametrize(
    "hint", ["base.vmdk", r"C:\Virtual Machines\vm\base.vmdk", r"\\server\share\base.vmdk", r".\base.vmdk"]
)
def test_parents_are_found_by_paths_of_windows_too(tmp_path: Path, hint: str) -> None:
    (tmp_path / "one").write_bytes(b"\1" * SECTOR)
    (tmp_path / "base.vmdk").write_bytes(descriptor('RW 1 FLAT "one" 0', "vmfs"))
    child = descriptor('RW 8 VMFSSPARSE "delta"', "vmfsSparse", f'parentFileNameHint="{hint}"')
    (tmp_path / "disk.vmdk").write_bytes(child.replace(b"parentCID=ffffffff", b"parentCID=12345678"))
    (tmp_path / "delta").write_bytes(cowd_extent([0, 40], [b"\2" * SECTOR]))
    assert guest_bytes(tmp_path / "disk.vmdk") == b"\1" * SECTOR + b"\2" * SECTOR + bytes(6 * SECTOR)


def test_a_header_without_capacity_only_carries_the_descriptor() -> None:
    text = descriptor('RW 1 FLAT "one" 0\nRW 2 ZERO', "custom")
    data = sparse_header(capacity=0, descriptor=1, descriptor_size=2) + text.ljust(2 * SECTOR, b"\0")
    assert content(in_memory(data, {"one": b"\1" * SECTOR}).flat) == b"\1" * SECTOR + bytes(2 * SECTOR)


@pytest.mark.malformed
@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"descriptor_size": 0}, "descriptorSize at 0x24: 0 bytes are not in 1"),
        ({"descriptor_size": 1 << 40}, "descriptorSize at 0x24: "),
        ({"descriptor": 1 << 40}, "descriptorOffset at 0x1c: descriptor at 0x2000000000000 lies past the end"),
        ({}, "embedded descriptor names 2 extents"),
    ],
)
def test_embedded_descriptors_that_cannot_be_are_refused(fields: Mapping[str, int | bytes], problem: str) -> None:
    text = descriptor('RW 1 SPARSE "one"\nRW 2 SPARSE "two"', "custom").ljust(2 * SECTOR, b"\0")
    with pytest.raises(ImageError, match=problem):
        in_memory(sparse_header(**{"descriptor": 1, "descriptor_size": 2, **fields}) + text)


# -- sparse extents, built by hand

_HEADER = "<4sIIQQQQIQQQB4sH433x"


def sparse_header(**fields: int | bytes) -> bytes:
    """Returns the header of an extent of 16 grains whose only grain table has all of its entries in sector 4."""
    values: dict[str, int | bytes] = {
        "magic": b"KDMV",
        "version": 1,
        "flags": 3,
        "capacity": 16 * 128,
        "grain": 128,
        "descriptor": 0,
        "descriptor_size": 0,
        "entries": 512,
        "rgd": 1,
        "gd": 2,
        "overhead": 128,
        "unclean": 0,
        "newlines": b"\n \r\n",
        "compression": 0,
    }
    assert fields.keys() <= values.keys()
    return struct.pack(_HEADER, *(values | fields).values())


def sparse_extent(
    grains: Sequence[int] = (128, 0, 256),
    *,
    table: int = 4,
    redundant_table: int = 8,
    redundant: Sequence[int] | None = None,
    **fields: int | bytes,
) -> bytes:
    """Returns an extent with both directories (sectors 1 and 2), tables (4 and 8) and two grains at 128 and 256."""
    sectors = {
        0: sparse_header(**fields),
        1: struct.pack("<I", redundant_table),
        2: struct.pack("<I", table),
        4: struct.pack(f"<{len(grains)}I", *grains),
        8: struct.pack(f"<{len(redundant or grains)}I", *(redundant or grains)),
        128: b"\1" * GRAIN,
        256: b"\2" * GRAIN,
    }
    data = bytearray(384 * SECTOR)
    for sector, piece in sectors.items():
        data[sector * SECTOR : sector * SECTOR + len(piece)] = piece
    return bytes(data)


def one_extent(data: bytes, kind: str = "SPARSE", sectors: int = 16 * 128) -> Image:
    return in_memory(descriptor(f'RW {sectors} {kind} "one.vmdk"'), {"one.vmdk": data})


EXPECTED = b"\1" * GRAIN + bytes(GRAIN) + b"\2" * GRAIN + bytes(13 * GRAIN)


def test_a_sparse_extent_is_read() -> None:
    image = one_extent(sparse_extent())
    assert content(image.flat) == EXPECTED
    assert [row.kind for row in image.guest] == [Kind.DATA, Kind.HOLE, Kind.DATA, Kind.HOLE]
    assert image.warnings == ()


def test_zeroed_grains_hide_the_parent() -> None:
    image = one_extent(sparse_extent((128, 1, 256), flags=7, version=2))
    assert [row.kind for row in image.guest] == [Kind.DATA, Kind.ZERO, Kind.DATA, Kind.HOLE]


@pytest.mark.parametrize(
    ("table", "grains", "problem"),
    [
        (1 << 30, (128, 0, 256), "grain directory entry 0 at 0x400: table at 0x8000000000 lies past the end"),
        (0, (128, 0, 256), "grain directory entry 0 at 0x400: 0, but the redundant"),
        (4, (128, 0, 1 << 31), "grain table 0 entry 2 .* grain at 0x10000000000 lies past the end"),
    ],
)
def test_a_damaged_grain_directory_is_replaced_by_the_redundant_one(
    table: int, grains: Sequence[int], problem: str
) -> None:
    data = sparse_extent(grains, table=table, redundant=(128, 0, 256))
    image = one_extent(data)
    assert content(image.flat) == EXPECTED
    assert len(image.warnings) == 1
    with pytest.raises(ImageError, match=problem):
        raise ImageError(image.warnings[0])
    assert "the redundant grain directory is used instead" in image.warnings[0]


@pytest.mark.malformed
def test_damage_that_the_redundant_directory_shares_is_an_error() -> None:
    with pytest.raises(ImageError, match="grain directory entry 0 at 0x400"):
        content(one_extent(sparse_extent(table=1 << 30, redundant_table=1 << 30)).flat)


def test_a_damaged_redundant_directory_is_reported_and_not_needed() -> None:
    image = one_extent(sparse_extent(redundant_table=1 << 30))
    assert content(image.flat) == EXPECTED
    assert "redundant grain directory" in image.warnings[0]


def test_an_unclean_shutdown_is_reported() -> None:
    assert "not closed cleanly" in _warned(one_extent(sparse_extent(unclean=1)))


def _warned(image: Image) -> str:
    assert content(image.flat) == EXPECTED
    return "\n".join(image.warnings)


@pytest.mark.malformed
@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"version": 4}, "version at 0x4: 4 is not in 1..3"),
        ({"flags": 0x103}, "flags at 0x8: unknown features 0x100"),
        ({"newlines": b"\n \n\n"}, "newlines at 0x49: 0a200a0a: the file was damaged by a transfer as text"),
        ({"capacity": 1 << 63}, "capacity at 0xc: 9223372036854775808 sectors"),
        ({"capacity": 1 << 50}, "capacity at 0xc: needs a grain directory of"),
        ({"capacity": 2000}, "capacity of 1024000 bytes, disk.vmdk says that it has 1048576"),
        ({"grain": 0}, "grainSize at 0x14: 0 sectors is not a power of two"),
        ({"grain": 100}, "grainSize at 0x14: 100 sectors is not a power of two"),
        ({"grain": 1 << 40}, "grainSize at 0x14"),
        ({"entries": 0}, "numGTEsPerGT at 0x2c: 0 is not in 1..512"),
        ({"entries": 1 << 31}, "numGTEsPerGT at 0x2c"),
        ({"gd": 1 << 40, "flags": 1}, "gdOffset at 0x38: sector 0x10000000000 lies past the end"),
        ({"gd": 0, "flags": 1}, "grain directory at 0x0"),
        ({"gd": (1 << 64) - 1}, "footer marker at .* the file may be incomplete"),
        ({"flags": 0x30001, "compression": 2}, "compressAlgorithm at 0x4d: 2 is not known"),
        ({"flags": 0x30001, "compression": 1, "grain": 1 << 14}, "grainSize at 0x14"),
        ({"flags": 0x30001, "compression": 1}, "compressed grain at 0x10000: is marked as sector"),
        ({"flags": 0x10001, "compression": 1}, "compressed grain at 0x10000"),
    ],
)
def test_headers_that_cannot_be_are_refused_by_name(fields: Mapping[str, Any], problem: str) -> None:
    with pytest.raises(ImageError, match=problem) as caught:
        content(one_extent(sparse_extent(**fields)).flat)
    assert "\n" not in str(caught.value)


@pytest.mark.malformed
def test_tables_that_are_used_twice_are_refused() -> None:
    data = bytearray(sparse_extent(flags=1, capacity=1024 * 128))
    data[2 * SECTOR : 2 * SECTOR + 8] = struct.pack("<II", 4, 4)
    with pytest.raises(ImageError, match="grain directory entry 1 at 0x404: table at 0x800 is used twice"):
        content(one_extent(bytes(data)).flat)


@pytest.mark.malformed
def test_more_grains_than_the_file_has_room_for_are_refused() -> None:
    with pytest.raises(ImageError, match="16 grains are allocated, the file has room for 4"):
        content(one_extent(sparse_extent([128] * 16)).flat)


@pytest.mark.malformed
def test_an_extent_that_is_named_twice_is_refused() -> None:
    text = descriptor("\n".join([f'RW {16 * 128} SPARSE "one.vmdk"'] * 2))
    with pytest.raises(ImageError, match=r"extent 'one\.vmdk' is named twice"):
        content(in_memory(text, {"one.vmdk": sparse_extent()}).flat)


@pytest.mark.malformed
def test_ranges_of_a_flat_file_that_are_named_twice_are_reported() -> None:
    image = in_memory(descriptor('RW 2 FLAT "one" 0\nRW 2 FLAT "one" 1', "vmfs"), {"one": bytes(range(256)) * 6})
    assert content(image.flat)
    assert "guest address 0x400 and guest address 0x200 both lie at 0x200" in " ".join(image.warnings)


@pytest.mark.malformed
def test_an_image_that_names_itself_as_an_extent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk.vmdk").write_bytes(descriptor('RW 1 FLAT "disk.vmdk" 0'))
    with pytest.raises(ImageError, match="is the image itself"):
        guest_bytes(tmp_path / "disk.vmdk")


# -- extents of ESX


def cowd_extent(grains: Sequence[int], pieces: Sequence[bytes], **fields: int) -> bytes:
    """Returns an extent of 64 grains of one sector, its directory in sector 4, its table in 5, grains from 40 on."""
    values = {"version": 1, "flags": 3, "sectors": 64, "grain": 1, "gd": 4, "entries": 1, "free": 40} | fields
    head = struct.pack("<4s7I", b"COWD", *values.values())
    data = head.ljust(4 * SECTOR, b"\0") + struct.pack("<I", 5).ljust(SECTOR, b"\0")
    data += struct.pack(f"<{len(grains)}I", *grains).ljust(4096 * 4, b"\0")
    return data.ljust(40 * SECTOR, b"\0") + b"".join(pieces)


def se_extent(grains: Sequence[int], pieces: Sequence[bytes] = (), **fields: int) -> bytes:
    """Returns an extent of 8192 sectors: directory in sector 8, one table from 16 on, grains from 128 on."""
    values = {
        "version": 0x200000001, "capacity": 8192, "grain_size": 8, "grain_table_size": 64, "flags": 0,
        "r1": 0, "r2": 0, "r3": 0, "r4": 0, "volatile": 1, "volatile_size": 1, "journal_header": 2,
        "journal_header_size": 2, "journal": 4, "journal_size": 4, "gd": 8, "gd_size": 8, "gt": 16, "gt_size": 64,
        "bitmap": 80, "bitmap_size": 8, "backmap": 88, "backmap_size": 8, "grains": 128, "grains_size": 1024,
        "replay": 0, "entry": 0x1000000000000000,
    } | fields  # fmt: skip
    replay, entry = values.pop("replay"), values.pop("entry")
    data = bytearray(128 * SECTOR)
    pieces_at = {
        0: struct.pack("<26Q", 0xCAFEBABE, *values.values()),
        1: struct.pack("<4Q", 0xCAFECAFE, 0, 0, replay),
        8: struct.pack("<Q", entry),
        16: struct.pack(f"<{len(grains)}Q", *grains),
    }
    for sector, piece in pieces_at.items():
        data[sector * SECTOR : sector * SECTOR + len(piece)] = piece
    return bytes(data) + b"".join(pieces)


@pytest.mark.parametrize("create_type", ["vmfsSparse"])
def test_a_cowd_extent_reads_as_in_qemu(tmp_path: Path, qemu_img: QemuImg, create_type: str) -> None:
    sectors = [random_bytes(SECTOR, seed) for seed in range(4)]
    (tmp_path / "delta.vmdk").write_bytes(cowd_extent([40, 0, 42, 41, 0, 43], sectors))
    (tmp_path / "disk.vmdk").write_bytes(descriptor('RW 64 VMFSSPARSE "delta.vmdk"', create_type))
    expected = sectors[0] + bytes(SECTOR) + sectors[2] + sectors[1] + bytes(SECTOR) + sectors[3] + bytes(58 * SECTOR)
    assert guest_bytes(tmp_path / "disk.vmdk") == expected
    qemu_img("convert", "-O", "raw", tmp_path / "disk.vmdk", tmp_path / "qemu.raw")
    assert (tmp_path / "qemu.raw").read_bytes() == expected


def test_a_sesparse_extent_reads_as_in_qemu(tmp_path: Path, qemu_img: QemuImg) -> None:
    grains = [random_bytes(4096, seed) for seed in range(3)]
    # The low 12 bits of a grain's number are bits 48 to 59 of its entry.
    entries = [0x3 << 60, 0, 0x3 << 60 | 2 << 48, 0x2 << 60, 0x1 << 60, 0x3 << 60 | 1 << 48]
    (tmp_path / "disk-sesparse.vmdk").write_bytes(se_extent(entries, grains))
    (tmp_path / "disk.vmdk").write_bytes(descriptor('RW 8192 SESPARSE "disk-sesparse.vmdk"', "seSparse"))
    expected = grains[0] + bytes(4096) + grains[2] + bytes(8192) + grains[1]
    assert guest_bytes(tmp_path / "disk.vmdk") == expected.ljust(8192 * SECTOR, b"\0")
    with Opener(installed()) as opener:
        kinds = [row.kind for row in opener.image(str(tmp_path / "disk.vmdk"), "vmdk").guest]
    assert kinds == [Kind.DATA, Kind.HOLE, Kind.DATA, Kind.ZERO, Kind.DATA, Kind.HOLE]
    qemu_img("convert", "-O", "raw", tmp_path / "disk.vmdk", tmp_path / "qemu.raw")
    assert (tmp_path / "qemu.raw").read_bytes() == expected.ljust(8192 * SECTOR, b"\0")


@pytest.mark.malformed
@pytest.mark.parametrize(
    ("data", "kind", "problem"),
    [
        (cowd_extent([40], [bytes(512)], version=2), "VMFSSPARSE", "version at 0x4: 2 is not 1"),
        (cowd_extent([40], [bytes(512)], grain=0), "VMFSSPARSE", "grainSize at 0x10: 0 sectors"),
        (cowd_extent([40], [bytes(512)], entries=0), "VMFSSPARSE", "numGDEntries at 0x18: 0 tables"),
        (cowd_extent([40], [bytes(512)], gd=1 << 30), "VMFSSPARSE", "grain directory at 0x8000000000"),
        (cowd_extent([1 << 20], [bytes(512)]), "VMFSSPARSE", "grain at 0x20000000 lies past the end"),
        (
            cowd_extent([40, 40], [bytes(512)]),
            "VMFSSPARSE",
            "guest address 0x200 and guest address 0x0 both lie at 0x5000",
        ),
        (cowd_extent([6], [bytes(512)]), "VMFSSPARSE", "guest address 0x0 and grain table both lie at 0xc00"),
        (se_extent([3 << 60] * 2, [bytes(4096)]), "SESPARSE", "guest address 0x1000 and guest address 0x0 both lie at"),
        (se_extent([], version=3), "SESPARSE", "version at 0x8: 0x3 is not 0x200000001"),
        (se_extent([], flags=1), "SESPARSE", "flags at 0x28: 0x1 is not 0x0"),
        (se_extent([], grain_size=16), "SESPARSE", "grain_size at 0x18: 0x10 is not 0x8"),
        (se_extent([], capacity=1 << 62), "SESPARSE", "capacity at 0x10"),
        (se_extent([], gd_size=0), "SESPARSE", "grain_dir_size at 0x88: 0 sectors"),
        (se_extent([], gd=1 << 40), "SESPARSE", "grain directory at 0x20000000000"),
        (se_extent([], replay=1), "SESPARSE", "replay_journal at 0x218: the journal was not replayed"),
        (se_extent([], volatile=5), "SESPARSE", "volatile header at 0xa00: has not the signature"),
        (se_extent([], entry=0x2000000000000000), "SESPARSE", "grain directory entry 0 at 0x1000: 0x2000000000000000"),
        (se_extent([], entry=0x1000000000000009), "SESPARSE", "table at 0x4a000 lies past the end"),
        (se_extent([5]), "SESPARSE", "grain table 0 entry 0 .* 0x5 is of no known kind"),
        (se_extent([0x4 << 60]), "SESPARSE", "0x4000000000000000 is of no known kind"),
        (se_extent([(0x3 << 60) | (1 << 59) - 1]), "SESPARSE", "lies past the end of the file"),
    ],
)
def test_extents_of_esx_that_cannot_be_are_refused_by_name(data: bytes, kind: str, problem: str) -> None:
    with pytest.raises(ImageError, match=problem):
        content(one_extent(data, kind, 64).flat)


# -- streams


def test_a_stream_compresses_and_announces_it(xfs_dir: Path, qemu_img: QemuImg) -> None:
    raw, image, back = (xfs_dir / name for name in ("disk.raw", "disk.vmdk", "back.raw"))
    text = b"some text that compresses " * 4096
    raw.write_bytes(text * 90 + bytes(3 * MIB) + random_bytes(2 * MIB) + bytes(30 * MIB) + text)
    result = vmconv.convert(str(raw), str(image), options=STREAM)
    assert [copy.reason for copy in result.copies] == ["streamOptimized compresses every grain"]
    assert image.stat().st_size < 3 * MIB
    qemu_img("check", image)
    qemu_img("compare", "-f", "raw", "-F", "vmdk", raw, image)
    again = vmconv.convert(str(image), str(back))
    assert [copy.reason for copy in again.copies] == ["compressed grains have to be decompressed (deflate)"]
    assert back.read_bytes() == raw.read_bytes() + bytes(-raw.stat().st_size % SECTOR)


def test_a_stream_is_read_by_its_markers(xfs_dir: Path) -> None:
    """Reads a stream as an importer does, from front to back, by its markers alone."""
    raw, image = make_disk(xfs_dir / "disk.raw", 70 * MIB), xfs_dir / "disk.vmdk"
    vmconv.convert(str(raw), str(image), options=STREAM)
    data, disk, at, kinds = image.read_bytes(), bytearray(70 * MIB), GRAIN, []
    while True:
        value, size, kind = struct.unpack_from("<QII", data, at)
        if size:
            piece = zlib.decompress(data[at + 12 : at + 12 + size])
            disk[value * SECTOR : value * SECTOR + len(piece)] = piece
            at += -(-(12 + size) // SECTOR) * SECTOR
            continue
        kinds.append(kind)
        at += SECTOR * (1 + value)
        if kind == 0:
            break
    assert at == len(data)
    assert kinds == [1, 1, 1, 2, 3, 0]
    assert disk == raw.read_bytes()


def test_streams_of_qemu_are_read(xfs_dir: Path, qemu_img: QemuImg) -> None:
    raw, image, back = (xfs_dir / name for name in ("disk.raw", "disk.vmdk", "back.raw"))
    make_disk(raw, 20 * MIB)
    qemu_img("convert", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, image)
    vmconv.convert(str(image), str(back))
    assert back.read_bytes() == raw.read_bytes()


@pytest.mark.malformed
@pytest.mark.parametrize(
    ("at", "value", "problem"),
    [
        (-1, b"", "footer marker at .* the file may be incomplete"),
        (-3 * SECTOR + 12, b"\2", "footer marker at"),
        (-2 * SECTOR, b"x", "footer at .* has not the signature"),
        (-2 * SECTOR + 12, b"\0\1", "capacity at .* in the footer"),
        (GRAIN, b"\7", "compressed grain at 0x10000: is marked as sector 0x7, not 0x0"),
        (GRAIN + 8, b"\xff\xff\xff\xff", "compressed grain at 0x10000: is marked as 4294967295 bytes"),
        (GRAIN + 8, b"\0\0\0\0", "compressed grain at 0x10000: is marked as 0 bytes"),
        (GRAIN + 12, b"\0", "compressed grain at 0x10000"),
        (GRAIN + 5000, b"\0\0\0\0", "compressed grain at 0x10000"),
        (GRAIN + 8, b"\x40\0\0\0", "compressed grain at 0x10000: "),
    ],
)
def test_damaged_streams_are_refused(at: int, value: bytes, problem: str) -> None:
    source = patterned(2 * MIB, [(0, MIB)])
    image = raw_disk(source)
    _, files = make_in_memory(write(image, subformat="streamOptimized"), image)
    data = bytearray(files[0].read(0, files[0].size))
    if value:
        place = at % len(data)
        data[place : place + len(value)] = value
    else:
        del data[at:]
    with pytest.raises(ImageError, match=problem):
        content(in_memory(bytes(data)).flat)


def test_a_source_that_changes_while_it_is_compressed_is_noticed() -> None:
    source = patterned(MIB, [(0, MIB)])
    image = raw_disk(source)
    layout = write(image, subformat="streamOptimized")
    source.write(0, bytes(1024) + b"x" * 60000)
    with pytest.raises(AccessError, match="changed while it was being converted"):
        make_in_memory(layout, image)


# -- what cannot be written


def test_sizes_that_cannot_be_are_refused_with_the_nearest() -> None:
    for size, nearest in ((0, 512), ((64 << 40) + 512, 64 << 40)):
        with pytest.raises(PlanError, match=f"cannot hold {size} bytes, the nearest size it can hold is {nearest}"):
            write(raw_disk(MemoryFile("source.raw", size)))


def test_the_largest_disk_is_written_and_read(xfs_dir: Path) -> None:
    raw = xfs_dir / "disk.raw"
    with raw.open("wb") as file:
        file.write(random_bytes(GRAIN))
        file.seek((8 << 40) - GRAIN)
        file.write(random_bytes(GRAIN))
    result = vmconv.convert(str(raw), str(xfs_dir / "disk.vmdk"), zero_copy="require")
    assert result.totals.shared == 2 * GRAIN
    assert vmconv.compare(str(raw), str(xfs_dir / "disk.vmdk"))


def test_payload_past_what_grain_tables_can_say_is_refused_with_a_hint() -> None:
    class Endless(MemoryFile):
        def data_ranges(self, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
            return [(0, self.size)]

    with pytest.raises(PlanError, match="cannot hold 2199023255552 bytes of payload") as caught:
        write(raw_disk(Endless("source.raw", 2 << 40)))
    assert "twoGbMaxExtentSparse" in str(caught.value.hint)


def test_an_adapter_that_vmware_does_not_have_is_a_loss() -> None:
    layout = write(raw_disk(patterned(MIB, []), DiskFacts(adapter_type="virtio")))
    assert layout.losses == (
        "adapter type virtio: VMDK knows ide, buslogic, lsilogic, legacyESX, pvscsi, ide is written",
    )


@pytest.mark.parametrize(("name", "extent"), [("my disk.v2.vmdk", "my disk.v2-flat.vmdk"), ("disk", "disk-flat.vmdk")])
def test_extents_have_the_name_of_the_target(name: str, extent: str) -> None:
    layout = write(raw_disk(patterned(MIB, [])), name, subformat="vmfs")
    assert [out.name for out in layout.files] == [extent, None]
    assert f'VMFS "{extent}"'.encode() in layout.files[-1].table.read(0, layout.files[-1].table.size)


@pytest.mark.parametrize("name", ['a"b.vmdk', "a\nb.vmdk"])
def test_names_that_a_descriptor_cannot_hold_are_refused(name: str) -> None:
    with pytest.raises(PlanError, match="cannot hold the file name"):
        write(raw_disk(patterned(MIB, [])), name)


# -- real images


@pytest.mark.parametrize("row", [row for row in ROWS if row["name"].endswith(".vmdk")], ids=lambda row: row["name"])
def test_images_of_the_corpus_are_converted_right_or_refused(row: dict[str, str], corpus: Path, xfs_dir: Path) -> None:
    if row["expect"] == "aux":
        pytest.skip("is an extent of another image")
    image, target = unpack(corpus, row["name"], xfs_dir), xfs_dir / "target.raw"
    if row["expect"] == "must-refuse":
        with pytest.raises(VmconvError) as caught:
            vmconv.convert(str(image), str(target))
        assert "\n" not in str(caught.value)
        assert not target.exists()
        return
    vmconv.convert(str(image), str(target))
    assert hashlib.sha256(target.read_bytes()).hexdigest() == row["expect"]
    if target.stat().st_size > 64 * MIB:
        return
    for number, options in enumerate((SPARSE[1], FLAT[0], STREAM)):
        folder = xfs_dir / str(number)
        folder.mkdir()
        vmconv.convert(str(image), str(folder / "disk.vmdk"), options=options)
        assert hashlib.sha256(guest_bytes(folder / "disk.vmdk")).hexdigest() == row["expect"]
