"""The structural check of each format: what qemu-img says of the same images, and where it says less than there is."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vmconv
from support.corpus import ROWS, unpack
from support.disks import MIB, QemuImg, make_disk, qemu_io
from support.qcow2_images import image
from vmconv.cli.main import main
from vmconv.errors import ImageError, ReadError, VmconvError
from vmconv.inspect import checking
from vmconv.interface.format import CheckReport
from vmconv.io.registry import installed
from vmconv.model.extents import Extents, Kind
from vmconv.model.usage import Metadata, Usage, overlaps
from vmconv.testing.memory import MemoryFile

# -- the common part, against an independent model


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8)), max_size=12))
def test_overlaps_and_gaps_are_those_of_each_byte(ranges: list[tuple[int, int]]) -> None:
    usage = Usage()
    for number, (offset, length) in enumerate(ranges):
        usage.add("range", np.array([offset]), length, np.array([number]))
    users = [sum(at <= byte < at + length for at, length in ranges) for byte in range(60)]
    found = usage.overlaps()
    twice = {
        byte for at, n in zip(found.offset.tolist(), found.length.tolist(), strict=True) for byte in range(at, at + n)
    }
    assert twice == {byte for byte, count in enumerate(users) if count > 1}
    begin, free_length = usage.unused(0, 60)
    free = {byte for at, n in zip(begin.tolist(), free_length.tolist(), strict=True) for byte in range(at, at + n)}
    assert free == {byte for byte, count in enumerate(users) if not count}
    assert usage.end == max((at + n for at, n in ranges if n), default=0)


@pytest.mark.parametrize("twice", [None, 0, 77, (1 << 20) + 3])
def test_millions_of_ranges_are_examined_without_sorting(twice: int | None) -> None:
    count = (1 << 20) + 7
    place = np.random.default_rng(1).permutation(count).astype(np.int64) * 4096
    for shift in (0, 2048):
        usage = Usage()
        changed = place.copy()
        if twice is not None:
            changed[twice] = changed[twice - 5] + shift
        usage.add("block", changed, 4096, np.arange(count) * 2)
        assert len(usage.overlaps().offset) == (0 if twice is None else 2 if shift else 1)


def test_an_overlap_names_both_users_and_the_entry_inside_of_a_run() -> None:
    usage = Usage()
    usage.add("block", np.arange(10) * 100, 100, np.arange(10) + 5)
    usage.add("table", [730], 20)
    found = usage.overlaps()
    assert [found.text(index) for index in range(len(found.offset))] == ["table and block 12 both lie at 0x2da"]


def test_payload_of_a_table_is_named_by_guest_addresses() -> None:
    file = MemoryFile("disk", 1 << 20)
    rows = [(0, Kind.DATA, file, 4096), (4096, Kind.ZERO, None, 0), (8192, Kind.DATA, file, 4608)]
    found = overlaps(Extents.of(rows, 12288), file, [Metadata("header", [0], 512)])
    assert found.text(0) == "guest address 0x2000 and guest address 0x200 both lie at 0x1200"
    assert found.between_payload().all()
    over = overlaps(Extents.of([(0, Kind.DATA, file, 0)], 4096), file, [Metadata("header", [0], 512)])
    assert not over.between_payload().any()


# -- damaged images, beside qemu-img


class Table(NamedTuple):
    """The allocation table of an image: its place, and how an entry is written."""

    place: int
    entry: str

    def at(self, number: int) -> int:
        return self.place + number * struct.calcsize(self.entry)


def _vmdk(data: bytes) -> Table:
    (directory,) = struct.unpack_from("<Q", data, 56)
    (table,) = struct.unpack_from("<I", data, directory * 512)
    return Table(table * 512, "<I")


def _vhdx(data: bytes) -> Table:
    at = data.index(bytes.fromhex("6677c22d23f600429d64115e9bfd4a08"))
    return Table(struct.unpack_from("<Q", data, at + 16)[0], "<Q")


def _qed(data: bytes) -> Table:
    (first,) = struct.unpack_from("<Q", data, 40)
    return Table(struct.unpack_from("<Q", data, first)[0], "<Q")


TABLES: dict[str, Callable[[bytes], Table]] = {
    "vdi": lambda data: Table(struct.unpack_from("<I", data, 340)[0], "<I"),
    "qed": _qed,
    "parallels": lambda _: Table(64, "<I"),
    "vmdk": _vmdk,
    "vhdx": _vhdx,
    "vpc": lambda _: Table(1536, ">I"),
}
UNIT = {"vdi": MIB, "qed": 65536, "parallels": MIB, "vmdk": 65536, "vhdx": 8 * MIB, "vpc": 2 * MIB}


def made(directory: Path, name: str, qemu_img: QemuImg) -> Path:
    """Returns an image by QEMU whose first and fourth blocks have payload."""
    path = directory / f"disk.{'vhd' if name == 'vpc' else name}"
    qemu_img("create", "-q", "-f", name, path, "64M")
    pieces = (f"write -P 1 0 {UNIT[name]}", f"write -P 2 {3 * UNIT[name]} {UNIT[name]}")
    qemu_io(path, *pieces, format_name=name)
    return path


def change(path: Path, at: int, value: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(value)


def same_place_twice(path: Path, table: Table) -> None:
    value = path.read_bytes()[table.at(0) : table.at(1)]
    change(path, table.at(3), value)


def past_the_end(path: Path, table: Table) -> None:
    # Small enough for entries that count blocks, more than the file has in every format.
    value = 0x4000 if table.entry == "<I" and b"VirtualBox" in path.read_bytes()[:64] else 0x600000
    change(path, table.at(3), struct.pack(table.entry, value if table.entry[1] == "I" else value << 20 | 6))


def forgotten(path: Path, table: Table) -> None:
    """No entry refers to the last allocated block."""
    empty = b"\xff" * 4 if path.suffix in (".vdi", ".vhd") else bytes(struct.calcsize(table.entry))
    change(path, table.at(3), empty)


def cut_off(path: Path, _: Table) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 5000)


def sound(_: Path, __: Table) -> None:
    """Nothing is changed."""


def longer(path: Path, _: Table) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + MIB)


DAMAGES = (sound, same_place_twice, past_the_end, forgotten, cut_off, longer)
Damage = Callable[[Path, Table], None]

UNLIKE_QEMU: dict[tuple[str, Damage], tuple[int, int]] = {
    # QEMU 7.2 does not look for payload that is used twice in these (8.1 does in Parallels).
    ("parallels", same_place_twice): (3, 2),
    ("vmdk", same_place_twice): (0, 2),
    ("vhdx", same_place_twice): (0, 2),
    # QEMU looks at the number of a block, or where it begins, not at whether the file has all of it.
    ("vdi", cut_off): (0, 2),
    ("parallels", cut_off): (0, 2),
    # QEMU gives up where it finds a grain past the end.
    ("vmdk", past_the_end): (1, 2),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", [name for name in TABLES if name != "vpc"])
def test_the_verdict_is_that_of_qemu(
    tmp_path: Path, qemu_img: QemuImg, name: str, damage: Callable[[Path, Table], None]
) -> None:
    path = made(tmp_path, name, qemu_img)
    damage(path, TABLES[name](path.read_bytes()))
    theirs = qemu_img("check", "-f", name, path, ok=(0, 1, 2, 3)).returncode
    ours = main(["check", "-f", name, str(path)])
    assert (theirs, ours) == UNLIKE_QEMU.get((name, damage), (theirs, theirs))


def test_counts_are_those_of_qemu(tmp_path: Path, qemu_img: QemuImg) -> None:
    for name in ("qed", "parallels"):
        path = made(tmp_path, name, qemu_img)
        theirs = json.loads(qemu_img("check", "--output=json", "-f", name, path).stdout)
        ours = checked(path, name)
        assert (ours.allocated_clusters, ours.total_clusters) == (
            theirs["allocated-clusters"],
            theirs["total-clusters"],
        )
        assert ours.image_end == theirs.get("image-end-offset", ours.image_end)


def checked(path: Path, name: str | None = None) -> CheckReport:
    report = vmconv.check(str(path), format_name=name)
    assert report is not None
    return report


@pytest.mark.malformed
@pytest.mark.parametrize("name", TABLES)
def test_payload_that_is_used_twice_is_refused_and_found(tmp_path: Path, qemu_img: QemuImg, name: str) -> None:
    path = made(tmp_path, name, qemu_img)
    same_place_twice(path, TABLES[name](path.read_bytes()))
    if name == "vmdk":
        # Else the redundant grain directory, which is sound, is used instead.
        change(path, 8, struct.pack("<I", 1))
    known = "vhd" if name == "vpc" else name
    with pytest.raises(ImageError, match=r"both lie at|used twice"):
        vmconv.convert(str(path), str(tmp_path / "copy.raw"), source_format=known)
    assert any("both lie at" in text for text in checked(path, known).corruptions)


@pytest.mark.malformed
@pytest.mark.parametrize("name", ["qed", "vhdx", "vpc"])
def test_payload_over_metadata_is_refused_and_found(tmp_path: Path, qemu_img: QemuImg, name: str) -> None:
    path = made(tmp_path, name, qemu_img)
    table = TABLES[name](path.read_bytes())
    value = {"qed": table.place, "vhdx": table.place | 6, "vpc": 1536 // 512}[name]
    change(path, table.at(3), struct.pack(table.entry, value))
    known = "vhd" if name == "vpc" else name
    with pytest.raises(ImageError):
        vmconv.convert(str(path), str(tmp_path / "copy.raw"), source_format=known)
    assert any("both lie at" in text for text in checked(path, known).corruptions)


# -- VHD, which qemu-img does not check


@pytest.mark.of_format("vhd")
@pytest.mark.parametrize(("damage", "code"), [(sound, 0), (same_place_twice, 2), (past_the_end, 2), (forgotten, 3)])
def test_a_vhd_is_checked(tmp_path: Path, qemu_img: QemuImg, damage: Callable[[Path, Table], None], code: int) -> None:
    path = made(tmp_path, "vpc", qemu_img)
    damage(path, TABLES["vpc"](path.read_bytes()))
    assert main(["check", str(path)]) == code


@pytest.mark.of_format("vhd")
def test_a_footer_that_is_not_its_copy_is_found(tmp_path: Path, qemu_img: QemuImg) -> None:
    path = made(tmp_path, "vpc", qemu_img)
    change(path, 40, b"\1")
    assert checked(path).corruptions == (
        f"footer copy at 0x0: differs from the footer at {path.stat().st_size - 512:#x}",
    )
    change(path, 40, b"\0")
    assert not checked(path).corruptions
    change(path, path.stat().st_size - 480, b"\1")
    assert any("its copy at 0x0 was used" in text for text in checked(path).corruptions)


# -- streams and split disks


@pytest.mark.of_format("vmdk")
def test_markers_of_a_stream_are_checked(tmp_path: Path) -> None:
    raw, path = make_disk(tmp_path / "disk.raw", 4 * MIB), tmp_path / "disk.vmdk"
    vmconv.convert(str(raw), str(path), options={"subformat": "streamOptimized"})
    report = checked(path)
    assert (report.corruption_count, report.leak_count) == (0, 0)
    assert report.allocated_clusters
    data = path.read_bytes()
    change(path, 65536, struct.pack("<Q", 77))
    assert "sector 0x4d, sector 0x0 is expected" in checked(path).corruptions[0]
    path.write_bytes(data)
    change(path, 65536 + 8, struct.pack("<I", 1 << 30))
    assert checked(path).corruption_count == 1


@pytest.mark.of_format("vmdk")
def test_each_extent_of_a_split_disk_is_checked_under_its_name(tmp_path: Path, qemu_img: QemuImg) -> None:
    path = tmp_path / "disk.vmdk"
    qemu_img("create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", path, "3G")
    qemu_io(path, "write -P 1 0 64k", "write -P 2 2100M 128k")
    assert main(["check", str(path)]) == 0
    second = tmp_path / "disk-s002.vmdk"
    data = second.read_bytes()
    directory = struct.unpack_from("<Q", data, 56)[0] * 512
    table = struct.unpack_from("<I", data, directory + (2100 - 2048) // 32 * 4)[0] * 512
    place = table + (2100 - 2048) % 32 * 16 * 4
    change(second, place + 4, data[place : place + 4])
    assert main(["check", str(path)]) == 2
    assert checked(path).corruptions[0].startswith("disk-s002.vmdk: ")
    second.unlink()
    assert main(["check", str(path)]) == 1


# -- qcow2


@pytest.mark.of_format("qcow2")
@pytest.mark.malformed
def test_an_l1_table_that_is_too_small_is_a_corruption(tmp_path: Path, qemu_img: QemuImg) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "64M")
    qemu_io(path, "write -P 1 0 8M")
    change(path, 36, b"\0\0\0\1")
    assert "l1_size at 0x24: 1 entries, the disk needs 32" in checked(path).corruptions


@pytest.mark.of_format("qcow2")
@pytest.mark.malformed
def test_clusters_that_are_used_twice_are_read_with_a_warning(tmp_path: Path, qemu_img: QemuImg) -> None:
    """With a reference count of two it is legal, so the check alone can tell."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    qemu_io(path, "write -P 1 0 128k")
    data = path.read_bytes()
    (l1,) = struct.unpack_from(">Q", data, 40)
    l2 = struct.unpack_from(">Q", data, l1)[0] & 0xFFFFFFFFFFFF
    change(path, l2 + 16, data[l2 : l2 + 8])
    done = vmconv.convert(str(path), str(tmp_path / "copy.raw"))
    assert any("both lie at 0x50000" in text for text in done.warnings)
    assert main(["check", str(path)]) == 2
    # Over metadata it is never legal.
    change(path, l2 + 16, struct.pack(">Q", l2 | 1 << 63))
    with pytest.raises(ImageError, match="and L2 table both lie at"):
        vmconv.convert(str(path), str(tmp_path / "more.raw"))


@pytest.mark.of_format("qcow2")
def test_the_image_ends_with_its_last_cluster_in_use(tmp_path: Path, qemu_img: QemuImg) -> None:
    path, packed = tmp_path / "disk.qcow2", tmp_path / "packed.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    qemu_io(path, "write 0 64k")
    with path.open("r+b") as file:
        file.truncate(10 * MIB)
    qemu_img("convert", "-c", "-O", "qcow2", path, packed)
    for one in (path, packed):
        theirs = json.loads(qemu_img("check", "--output=json", one, ok=(0, 3)).stdout)
        assert checked(one).image_end == theirs["image-end-offset"]


@pytest.mark.of_format("qcow2")
@pytest.mark.malformed
def test_a_damaged_bitmap_directory_is_found_and_hinders_nothing_else(tmp_path: Path, qemu_img: QemuImg) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    for name in ("one", "two"):
        qemu_img("bitmap", "--add", path, name)
    assert [bitmap["name"] for bitmap in vmconv.info(str(path))["format-specific"]["data"]["bitmaps"]] == ["one", "two"]
    data = path.read_bytes()
    second = data.rindex(b"two") - 24
    change(path, second + 18, b"\xff\xff")
    facts = vmconv.info(str(path))
    assert [bitmap["name"] for bitmap in facts["format-specific"]["data"]["bitmaps"]] == ["one"]
    assert any("bitmap 1 at" in text for text in facts["warnings"])
    assert any("bitmap 1 at" in text for text in checked(path).corruptions)
    assert vmconv.convert(str(path), str(tmp_path / "copy.raw")).target


@pytest.mark.of_format("qcow2")
@pytest.mark.malformed
@pytest.mark.parametrize("field", [{"refcount_table_clusters": 1000}, {"refcount_table_offset": 1 << 40}], ids=str)
def test_a_refcount_table_outside_the_file_is_a_corruption(tmp_path: Path, field: dict[str, Any]) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image(**field))
    assert main(["check", str(path)]) == 2


# -- layers


def broken_chains(directory: Path, qemu_img: QemuImg) -> dict[str, Path]:
    """Returns images whose parent cannot be read, for a reason each."""
    base = make_disk(directory / "base.raw", 2 * MIB)
    found = {}
    for name, backing in {"missing": "gone.raw", "remote": "nbd://host/x", "json": 'json:{"driver":"raw"}'}.items():
        found[name] = directory / f"{name}.qcow2"
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "raw", found[name], "2M")
    found["loop"] = directory / "loop.qcow2"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "loop.qcow2", "-F", "qcow2", found["loop"], "2M")
    broken = directory / "broken.qcow2"
    vmconv.convert(str(base), str(broken))
    change(broken, 36, bytes(4))
    found["unreadable"] = directory / "unreadable.qcow2"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "broken.qcow2", "-F", "qcow2", found["unreadable"], "2M")
    flat = directory / "flat.vmdk"
    vmconv.convert(str(base), str(flat), options={"subformat": "monolithicFlat"})
    found["too short"] = directory / "short.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", "flat.vmdk", "-F", "vmdk", found["too short"], "2M")
    with (directory / "flat-flat.vmdk").open("r+b") as file:
        file.truncate(MIB)
    return found


def test_an_unreadable_lower_layer_is_reported_with_an_error_code(
    tmp_path: Path, qemu_img: QemuImg, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, path in broken_chains(tmp_path, qemu_img).items():
        capsys.readouterr()
        assert main(["check", str(path)]) == 1, name
        said = capsys.readouterr().out
        assert "Not checked: " in said, name
        assert "No errors" not in said
        assert checked(path).errors
        with pytest.raises(VmconvError):
            vmconv.convert(str(path), str(tmp_path / "copy.raw"), force=True)
        assert main(["check", "--output", "json", str(path)]) == 1
        assert json.loads(capsys.readouterr().out)["check-errors"] == 1


def test_a_raw_disk_and_a_missing_file_have_codes_of_their_own(tmp_path: Path) -> None:
    assert main(["check", str(make_disk(tmp_path / "disk.raw", MIB))]) == 63
    assert main(["check", str(tmp_path / "gone.qcow2")]) == 1


# -- maps

MAPPED = (
    ("qcow2", ""),
    ("qcow2", "preallocation=metadata"),
    ("vdi", ""),
    ("vdi", "static=on"),
    ("vpc", ""),
    ("vpc", "subformat=fixed"),
    ("vmdk", ""),
    ("vmdk", "zeroed_grain=on"),
    ("vmdk", "subformat=twoGbMaxExtentSparse"),
    ("vmdk", "subformat=monolithicFlat"),
    ("qed", ""),
    ("parallels", ""),
    ("raw", ""),
)


@pytest.mark.parametrize(("name", "options"), MAPPED)
def test_maps_are_those_of_qemu(
    xfs_dir: Path, qemu_img: QemuImg, capsys: pytest.CaptureFixture[str], name: str, options: str
) -> None:
    path = xfs_dir / f"disk.{'vhd' if name == 'vpc' else name}"
    arguments = ["-o", options] if options else []
    for write in (False, True):
        qemu_img("create", "-q", "-f", name, *arguments, path, "24M")
        if write:
            pieces = ["write -P 1 0 64k", "write -P 2 1M 3000k", "write -z 5M 1M", "write -P 3 15M 512"]
            qemu_io(path, *pieces, "discard 1M 1M", "write -z 8M 2M", "write -P 0 12M 64k", format_name=name)
        capsys.readouterr()
        assert main(["map", "--output", "json", "-f", "vhd" if name == "vpc" else name, str(path)]) == 0
        ours = capsys.readouterr().out
        assert ours == qemu_img("map", "--output=json", "-f", name, path).stdout, write


@pytest.mark.of_format("vhdx")
def test_a_map_of_vhdx_says_more_than_qemu(tmp_path: Path, qemu_img: QemuImg) -> None:
    """QEMU says of each VHDX that all of it is data, and not where."""
    path = made(tmp_path, "vhdx", qemu_img)
    assert [(row.start, row.length, row.present, row.zero, row.data) for row in vmconv.map_disk(str(path))] == [
        (0, 8 * MIB, True, False, True),
        (8 * MIB, 16 * MIB, True, True, False),
        (24 * MIB, 8 * MIB, True, False, True),
        (32 * MIB, 32 * MIB, True, True, False),
    ]


# -- real images


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_real_images_have_no_errors(row: dict[str, str], corpus: Path, tmp_path: Path) -> None:
    name = row["format"].split("-")[0]
    if row["expect"] == "must-refuse" or name not in installed().formats or row["format"] == "parallels-bundle":
        pytest.skip("is no image that is converted")
    report = checked(unpack(corpus, row["name"], tmp_path), name)
    # One was not closed: QEMU opens it only to repair it.
    expected = (
        ["log at 0x100000: was not replayed, the image was not closed cleanly"] if "dirtylog" in row["name"] else []
    )
    assert (list(report.corruptions), report.leaks, report.errors) == (expected, (), ())


def test_storage_that_fails_is_no_corruption(
    tmp_path: Path, qemu_img: QemuImg, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be read was not checked: exit code 1, not 2."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", str(path), "16M")

    monkeypatch.setattr(checking, "_refusal", lambda _: ReadError("disk.qcow2: cannot be read at 0x30000"))
    report = vmconv.check(str(path))
    assert report
    assert (report.errors, report.corruptions) == (("disk.qcow2: cannot be read at 0x30000",), ())
