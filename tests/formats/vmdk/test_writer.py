"""The VMDK writer, against a parser of its own: descriptors, headers, grain tables and places."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from support.written import Payload, Said, disk, laid_out, of_format, same_in_pieces, scattered, unpacked
from vmconv.errors import PlanError
from vmconv.model.extents import Extents, Kind
from vmconv.model.facts import DiskFacts, Geometry
from vmconv.model.image import Image
from vmconv.model.layout import Backing, Layout, Placement
from vmconv.model.sources import File
from vmconv.testing import disk_of
from vmconv_vmdk.options import Options
from vmconv_vmdk.writer import write

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
GRAIN = 64 * KIB
SPLIT = 2047 * MIB
IDENTITY = bytes(range(16))


def placement(modulus: int = 1, name: str = "disk.vmdk", **fields: Any) -> Placement:
    return Placement(modulus, name, identity=IDENTITY, **fields)


# -- descriptors


class Text:
    """A descriptor, line by line: `values` by name, `extents` as they stand there, and `ddb`."""

    def __init__(self, data: bytes) -> None:
        lines = data.decode("utf-8", "surrogateescape").splitlines()
        assert lines[:3] == ["# Disk DescriptorFile", "version=1", 'encoding="UTF-8"']
        lines = [line for line in lines if line and not line.startswith("#")]
        self.extents = [line for line in lines if line.startswith("RW ")]
        values = dict(line.split("=", 1) for line in lines if not line.startswith(("RW ", "ddb.")))
        self.values = {key: value.removeprefix('"').removesuffix('"') for key, value in values.items()}
        self.ddb = dict(re.fullmatch(r'ddb\.(\S+) = "(.*)"', line).groups() for line in lines if line[:4] == "ddb.")  # type: ignore[union-attr, misc]
        assert len(lines) == len(self.extents) + len(self.values) + len(self.ddb)


NIL = str(UUID(int=0))


def told(layout: Layout, create_type: str, *, parent: tuple[str, str] | None = None, **ddb: str) -> list[str]:
    """Checks what a descriptor says, and returns its extents."""
    file = layout.files[-1].table
    embedded = create_type in ("monolithicSparse", "streamOptimized")
    text = Text(file.read(512, 20 * 512).rstrip(b"\0") if embedded else file.read(0, file.size))
    content = text.ddb.pop("longContentID")
    cid = text.values.pop("CID")
    assert re.fullmatch("[0-9a-f]{32}", content)
    assert content[24:] == cid
    assert int(cid, 16) not in (0, 0xFFFFFFFE, 0xFFFFFFFF)
    known = {"version": "1", "encoding": "UTF-8", "isNativeSnapshot": "no", "createType": create_type}
    known |= {"parentCID": parent[0], "parentFileNameHint": parent[1]} if parent else {"parentCID": "ffffffff"}
    assert text.values == known
    usual = {"adapterType": "ide", "geometry.heads": "16", "geometry.sectors": "63"}
    given = {key.replace("_", "."): value for key, value in ddb.items()}
    assert text.ddb.pop("uuid.image") == str(UUID(bytes=IDENTITY))
    assert text.ddb.pop("uuid.modification") not in (NIL, str(UUID(bytes=IDENTITY)))
    if parent is None:
        assert (text.ddb.pop("uuid.parent"), text.ddb.pop("uuid.parentmodification")) == (NIL, NIL)
    cylinders = text.ddb.pop("geometry.cylinders")
    assert text.ddb == {**usual, "toolsVersion": "2147483647", "virtualHWVersion": "4"} | given
    sectors = sum(int(line.split()[1]) for line in text.extents)
    assert int(cylinders) == sectors // (int(text.ddb["geometry.heads"]) * 63)
    return text.extents


# -- sparse extents


def check(
    image: Image, file: Extents, *, embedded: bool = True, layer: bool = False, zeroed: bool = False, align: int = GRAIN
) -> list[int]:
    """Checks that the tables say of each grain what they have to; returns the places of grains."""
    magic, version, flags, capacity, grain, *rest = unpacked(file, 0, "<4sIIQQQQIQQQB4sH433s")
    text_at, text_length, entries, second, first, overhead, unclean, newlines, compression, padding = rest
    assert (magic, version, flags) == (b"KDMV", 2 if zeroed else 1, 7 if zeroed else 3)
    assert (capacity, grain) == (-(-image.size // 512), GRAIN // 512)
    assert (text_at, text_length) == ((1, 20) if embedded else (0, 0))
    assert (entries, unclean, newlines, compression, padding) == (512, 0, b"\n \r\n", 0, bytes(433))
    tables = -(-capacity // (grain * 512))
    directory = -(-tables * 4 // 512)
    assert second == (21 if embedded else 1)
    assert first == second + directory + tables * 4
    end = first + directory + tables * 4
    assert overhead * 512 == -(-end * 512 // align) * align
    copies = []
    for at in (second, first):
        places = np.frombuffer(file.read(at * 512, directory * 512), dtype="<u4")
        assert places.tolist() == [at + directory + i * 4 for i in range(tables)] + [0] * (directory * 128 - tables)
        copies.append(file.read((at + directory) * 512, tables * 2048))
    assert copies[0] == copies[1]
    found = np.frombuffer(copies[0], dtype="<u4")
    count = -(-image.size // GRAIN)
    assert not found[count:].any()
    wanted, used = Said(image, on_parent=layer), []
    # Most of a large disk says nothing at all.
    said = set(np.flatnonzero(found).tolist()) | loud(wanted.guest, count)
    for number in sorted(said):
        block, entry = wanted.block(number * GRAIN, GRAIN), int(found[number])
        kind = block.kind.max()
        if kind == Kind.DATA or (layer and not zeroed and kind == Kind.ZERO):
            assert entry >= overhead
            used.append(entry * 512)
            assert file.window(entry * 512, GRAIN) == block
        else:
            assert entry == (1 if layer and kind == Kind.ZERO else 0)
    assert all(one + GRAIN <= other for one, other in pairwise(sorted(used)))
    assert max([overhead * 512, *(at + GRAIN for at in used)]) <= file.size
    return used


def loud(table: Extents, count: int) -> set[int]:
    """Returns the numbers of grains in rows that are not zero, and around the ends of rows."""
    numbers = {0, count - 1}
    for row in table:
        last = (row.end - 1) // GRAIN
        numbers |= set(range(row.start // GRAIN, last + 1) if row.kind == Kind.DATA else (row.start // GRAIN, last))
    return numbers


def parent(size: int, cid: int | None = 0x1234ABC, *, unit: int = GRAIN // 2) -> Image:
    content = scattered(100, size, unit, kinds=(Kind.DATA, Kind.ZERO))
    return of_format("vmdk", content, {} if cid is None else {"cid": cid})


@pytest.mark.parametrize("size", [40 * GRAIN, 21 * GRAIN + 512, GRAIN, 700, 32 * MIB, 32 * MIB + 512])
def test_each_grain_is_where_its_entry_says(size: int) -> None:
    image = scattered(size, size, GRAIN // 2, shift=512, longest=20)
    layout = write(image, Options(), placement())
    file = layout.files[0].table
    used = check(image, file)
    assert sorted(used) == list(range(file.size - len(used) * GRAIN, file.size, GRAIN))
    assert told(layout, "monolithicSparse") == [f'RW {-(-size // 512)} SPARSE "disk.vmdk"']
    assert [out.slack for out in layout.files] == [True]
    assert not layout.losses
    assert not layout.references
    same_in_pieces(layout)


@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.parametrize("size", [40 * GRAIN, 21 * GRAIN + 512, 32 * MIB + 5 * GRAIN])
def test_a_layer_allocates_what_is_needed_and_no_more(size: int, zeroed: bool) -> None:
    for seed in range(2):
        image = scattered(seed, size, GRAIN // 2, parent=parent(size), longest=20)
        layout = write(image, Options(zeroed_grain=zeroed), placement(), backing=Backing("dir/b.vmdk", "vmdk"))
        check(image, layout.files[0].table, layer=True, zeroed=zeroed)
        told(layout, "monolithicSparse", parent=("01234abc", "dir/b.vmdk"))
        same_in_pieces(layout)


def test_a_layer_of_zeros_and_one_of_nothing() -> None:
    for kind, zeroed in ((Kind.ZERO, True), (Kind.ZERO, False), (Kind.HOLE, False)):
        image = disk_of(Extents.filled(3 * GRAIN, kind), Payload("top", 0), parent=parent(3 * GRAIN))
        layout = write(image, Options(zeroed_grain=zeroed), placement(), backing=Backing("b.vmdk", "vmdk"))
        check(image, layout.files[0].table, layer=True, zeroed=zeroed)


def test_a_table_without_an_entry_takes_no_space() -> None:
    """A table speaks for 32 MiB: the first and the last two of seven say something."""
    image = disk([(MIB, 0, MIB), (192 * MIB - GRAIN, MIB, 2 * GRAIN)], 200 * MIB)
    layout = write(image, Options(), placement())
    check(image, layout.files[0].table)
    assert laid_out(layout) == [
        "0x0 header",
        "0x2a00 redundant grain directory",
        "0x2c00 grain tables",
        "0x5400 grain tables 0x2800",
        "0x6400 grain directory",
        "0x6600 grain tables",
        "0x8e00 grain tables 0x2800",
        "0x10000 payload 0x0+0x120000",
        "0x130000 end",
    ]


def test_directories_are_whole_sectors() -> None:
    for size in (4 * GIB, 4 * GIB + 512):
        image = disk([(size - 512, 0, 512)], size)
        check(image, write(image, Options(), placement()).files[0].table)


def test_extents_of_2047_mib_are_the_disk_one_after_the_other() -> None:
    size = 2 * SPLIT + 3 * GRAIN + 512
    pieces = [(0, 0, GRAIN), (SPLIT - GRAIN, GIB, 3 * GRAIN), (2 * SPLIT - 512, 2 * GIB, 1024), (size - 512, 1, 512)]
    image = disk(pieces, size)
    layout = write(image, Options(subformat="twoGbMaxExtentSparse"), placement())
    assert told(layout, "twoGbMaxExtentSparse") == [
        'RW 4192256 SPARSE "disk-s001.vmdk"',
        'RW 4192256 SPARSE "disk-s002.vmdk"',
        'RW 385 SPARSE "disk-s003.vmdk"',
    ]
    assert [out.name for out in layout.files] == ["disk-s001.vmdk", "disk-s002.vmdk", "disk-s003.vmdk", None]
    for number, out in enumerate(layout.files[:-1]):
        window = image.flat.window(number * SPLIT, min(SPLIT, size - number * SPLIT))
        check(disk_of(window, Payload("x", 0)), out.table, embedded=False)
    flat = write(image, Options(subformat="twoGbMaxExtentFlat"), placement(name="a.b"))
    assert told(flat, "twoGbMaxExtentFlat") == [
        'RW 4192256 FLAT "a.b-f001.vmdk" 0',
        'RW 4192256 FLAT "a.b-f002.vmdk" 0',
        'RW 385 FLAT "a.b-f003.vmdk" 0',
    ]
    whole = image.flat.window(0, size, Kind.ZERO)
    for number, out in enumerate(flat.files[:-1]):
        assert out.table == whole.window(number * SPLIT, min(SPLIT, size - number * SPLIT))
        assert not out.slack


def test_an_extent_is_split_only_where_it_is_too_long() -> None:
    for size, count in ((SPLIT, 1), (SPLIT + 512, 2)):
        layout = write(disk([], size), Options(subformat="twoGbMaxExtentSparse"), placement())
        assert len(told(layout, "twoGbMaxExtentSparse")) == count == len(layout.files) - 1


@pytest.mark.parametrize(("subformat", "kind"), [("monolithicFlat", "FLAT"), ("vmfs", "VMFS")])
def test_a_flat_extent_is_the_disk(subformat: Any, kind: str) -> None:
    image = disk([(512, 1024, MIB)], 5 * GIB + 100)
    layout = write(image, Options(subformat=subformat), placement())
    place = " 0" if kind == "FLAT" else ""
    assert told(layout, subformat) == [f'RW {10 * MIB + 1} {kind} "disk-flat.vmdk"{place}']
    assert [out.name for out in layout.files] == ["disk-flat.vmdk", None]
    assert layout.files[0].table == image.flat.window(0, 5 * GIB + 512, Kind.ZERO)


def test_a_compressed_disk_has_its_descriptor_inside() -> None:
    layout = write(disk([], 100 * GRAIN + 5), Options(subformat="streamOptimized"), placement())
    assert told(layout, "streamOptimized") == ['RW 12801 SPARSE "disk.vmdk"']
    assert [out.slack for out in layout.files] == [False]


# -- places


def test_payload_begins_where_the_storage_can_share_it() -> None:
    """Rows grow to whole blocks where nothing is in the way, and the source has the bytes."""
    pieces = [
        (0, 512 * 9, GRAIN),
        (2 * GRAIN, MIB + 512 * 3, GRAIN - 4096),
        (4 * GRAIN, 2 * MIB + 512 * 5, 2 * GRAIN),
        (7 * GRAIN + 1024, 3 * MIB + 1024, 512),
        (9 * GRAIN, 4 * MIB - GRAIN - 512, GRAIN),
    ]
    image = disk(pieces, 10 * GRAIN, source_size=4 * MIB - 512)
    layout = write(image, Options(), placement(4096))
    check(image, layout.files[0].table, align=GRAIN)
    assert laid_out(layout)[-7:] == [
        "0x3600 grain tables",
        "0x10000 payload 0x1000+0x11000",
        "0x21000 payload 0x100000+0xf600",
        "0x32000 payload 0x200000+0x21000",
        "0x53400 payload 0x300400+0x200",
        "0x63000 payload 0x3ef000+0x10e00",
        "0x73e00 end",
    ]


@pytest.mark.parametrize("modulus", [1024, 4096, GRAIN, 4 * GRAIN])
@pytest.mark.parametrize("seed", range(3))
def test_congruent_rows_begin_and_end_with_blocks(modulus: int, seed: int) -> None:
    image = scattered(seed, 60 * GRAIN, GRAIN // 4, shift=512 * (1 + 2 * seed))
    file = write(image, Options(), placement(modulus)).files[0].table
    grains = sorted(check(image, file, align=max(GRAIN, modulus)))
    touched = 0
    for row in file:
        if not isinstance(row.source, File) or (row.start - row.offset) % modulus:
            continue
        for low, high in ((row.start - row.start % modulus, row.start), (row.end, row.end + -row.end % modulus)):
            in_the_way = (
                any(at < high and low < at + GRAIN for at in grains) or row.offset + high - row.start > row.source.size
            )
            assert low == high or in_the_way
        touched += 1
    assert touched > 5


def in_place(pieces: list[tuple[int, int, int]], size: int, end: int, **fields: Any) -> Layout:
    image = disk(pieces, size, source_size=end)
    carrier = image.flat.sources[0] if pieces else image.file
    return write(image, Options(**fields), placement(4096, carrier=carrier))


def test_in_place_only_the_grain_where_the_header_is_moves() -> None:
    pieces = [(0, 0, 3 * GRAIN), (8 * GRAIN, 5 * GRAIN + 512, GRAIN), (12 * GRAIN, 4 * GRAIN, GRAIN)]
    layout = in_place(pieces, 16 * GRAIN + 512, 6 * GRAIN + 512)
    assert laid_out(layout) == [
        "0x0 header",
        "0x10000 payload 0x10000+0x20000",
        "0x40000 payload 0x40000+0x10000",
        "0x50200 payload 0x50200+0x10000",
        "0x70000 payload 0x0+0x10000",
        "0x80000 redundant grain directory",
        "0x80200 grain tables",
        "0x80a00 grain directory",
        "0x80c00 grain tables",
        "0x81400 end",
    ]
    file = layout.files[0].table
    assert unpacked(file, 48, "<QQQ") == (0x80000 // 512, 0x80A00 // 512, 0x10000 // 512)
    for at in (0x80200, 0x80C00):
        entries = np.frombuffer(file.read(at, 2048), dtype="<u4") * 512
        assert {i: int(entries[i]) for i in np.flatnonzero(entries).tolist()} == {
            0: 0x70000,
            1: 0x10000,
            2: 0x20000,
            8: 0x50200,
            12: 0x40000,
        }
    assert [unpacked(file, at, "<I") for at in (0x80000, 0x80A00)] == [(0x80200 // 512,), (0x80C00 // 512,)]
    same_in_pieces(layout)


@pytest.mark.parametrize("grain", [8192, 16384, 32768, 65536])
def test_grains_in_place_are_as_large_as_payload_allows(grain: int) -> None:
    pieces = [(2 * GRAIN, 2 * GRAIN, grain), (2 * GRAIN + grain, 3 * GRAIN + 512, GRAIN)]
    layout = in_place(pieces, 600 * GRAIN, 5 * GRAIN)
    file = layout.files[0].table
    assert unpacked(file, 20, "<Q") == (grain // 512,)
    tables = -(-600 * GRAIN // (grain * 512))
    directory, first, overhead = unpacked(file, 48, "<QQQ")
    assert overhead == 2 * GRAIN // 512
    assert (first - directory) * 512 == 512 + tables * 2048
    entries = np.frombuffer(file.read(first * 512 + 512, tables * 2048), dtype="<u4")
    assert entries[2 * GRAIN // grain] * 512 == 2 * GRAIN
    assert entries[2 * GRAIN // grain + 1] * 512 == 3 * GRAIN + 512
    with pytest.raises(PlanError, match="payload cannot stay where it lies"):
        in_place([(2 * GRAIN, 2 * GRAIN, 4096), (2 * GRAIN + 4096, 3 * GRAIN, 4096)], 4 * GRAIN, 5 * GRAIN)


def test_in_place_zeros_over_a_parent_take_an_entry() -> None:
    source = Payload("source.raw", 4 * GRAIN)
    rows = [(0, Kind.HOLE, None, 0), (GRAIN, Kind.DATA, source, 2 * GRAIN), (2 * GRAIN, Kind.ZERO, None, 0)]
    image = disk_of(Extents.of(rows, 3 * GRAIN), source, parent=parent(3 * GRAIN))
    backing, carrier = Backing("b.vmdk", "vmdk"), placement(carrier=source)
    layout = write(image, Options(zeroed_grain=True), carrier, backing=backing)
    (first,) = unpacked(layout.files[0].table, 56, "<Q")
    assert unpacked(layout.files[0].table, first * 512 + 512, "<III") == (0, 2 * GRAIN // 512, 1)
    with pytest.raises(PlanError, match="zeros that hide the parent need zeroed grains"):
        write(image, Options(), carrier, backing=backing)
    image = disk_of(Extents.of(rows[:2], 2 * GRAIN), source, parent=parent(2 * GRAIN))
    assert write(image, Options(), carrier, backing=backing)


def test_in_place_without_payload_the_tables_come_first() -> None:
    layout = in_place([], 3 * GRAIN, 4 * GRAIN)
    assert laid_out(layout)[1:3] == ["0x40000 redundant grain directory", "0x40a00 grain directory"]
    assert unpacked(layout.files[0].table, 64, "<Q") == ((0x40A00 + 512 + 2048) // 512,)


# -- limits


def test_grains_lie_within_32_bits_of_sectors() -> None:
    """Tables for 4 TiB take 512 MiB and a little, so grains begin at the next 64 KiB."""
    base = 2 * (131072 * 2048 + 131072 * 4) + 21 * 512
    base += -base % GRAIN
    room = 2 * TIB - base

    def plan(count: int, **fields: Any) -> Layout:
        image = disk([(0, 0, count)], 4 * TIB, source_size=4 * TIB)
        return write(image, Options(**fields), placement())

    layout = plan(room)
    assert layout.files[0].table.size == 2 * TIB
    tables = unpacked(layout.files[0].table, 48, "<QQQ")
    assert tables[2] * 512 == base
    last = tables[1] * 512 + 131072 * 4 + (room // GRAIN - 1) * 4
    assert unpacked(layout.files[0].table, last, "<II") == ((2 * TIB - GRAIN) // 512, 0)
    message = f"cannot hold {room + GRAIN} bytes of payload: {room} at most"
    with pytest.raises(PlanError, match=message) as caught:
        plan(room + 1)
    assert caught.value.hint == "use -o subformat=twoGbMaxExtentSparse or a flat subformat"
    assert plan(room + 1, subformat="monolithicFlat")
    image = disk_of(
        disk([(0, 0, 3 * TIB)], 4 * TIB, source_size=4 * TIB).guest, Payload("x", 0), parent=parent(4 * TIB, unit=TIB)
    )
    with pytest.raises(PlanError) as caught:
        write(image, Options(), placement(), backing=Backing("b.vmdk", "vmdk"))
    assert caught.value.hint == "flatten the chain, with -o subformat=twoGbMaxExtentSparse"
    with pytest.raises(PlanError) as caught:
        in_place([(0, GRAIN, GRAIN)], GRAIN, 2 * TIB)
    assert caught.value.hint == "convert to another file"


def test_impossible_vmdk_images_are_refused() -> None:
    def plan(size: int, below: Image | None = None, name: str = "disk.vmdk", refer: str = "b", **fields: Any) -> None:
        image = disk_of(Extents.filled(size, Kind.HOLE), Payload("top", 0), parent=below)
        write(image, Options(**fields), placement(name=name), backing=Backing(refer, "vmdk") if below else None)

    plan(64 * TIB)
    with pytest.raises(
        PlanError, match=f"cannot hold {64 * TIB + 1} bytes, the nearest size it can hold is {64 * TIB}"
    ):
        plan(64 * TIB + 1)
    with pytest.raises(PlanError, match="VMDK cannot hold 0 bytes, the nearest size it can hold is 512"):
        plan(0)
    for character in '"\n\r\0':
        with pytest.raises(PlanError, match="cannot hold the file name"):
            plan(512, None, f"a{character}b")
        with pytest.raises(PlanError, match="cannot hold the backing file"):
            plan(512, parent(512), refer=f"a{character}b")
    for subformat in ("monolithicFlat", "vmfs", "twoGbMaxExtentFlat", "streamOptimized", "reference"):
        with pytest.raises(PlanError, match=f"{subformat} cannot have a backing file"):
            plan(512, parent(512), subformat=subformat)
    plan(512, parent(512), subformat="twoGbMaxExtentSparse")
    for subformat in ("twoGbMaxExtentFlat", "twoGbMaxExtentSparse", "streamOptimized", "reference"):
        with pytest.raises(PlanError, match=f"{subformat} cannot be made in place"):
            in_place([], GRAIN, GRAIN, subformat=subformat)
    for subformat in ("monolithicFlat", "vmfs"):
        in_place([], GRAIN, GRAIN, subformat=subformat)
    with pytest.raises(PlanError, match="a VMDK's parent must be a VMDK, b is raw"):
        write(disk([], 512), Options(), placement(), backing=Backing("b", "raw"))
    with pytest.raises(PlanError, match="as large as its parent"):
        plan(512, parent(1024))
    plan(513, parent(1024))
    for below in (parent(512, None), of_format("raw", disk([], 512), {"cid": 5})):
        with pytest.raises(PlanError, match="CID of the parent b is not known"):
            plan(512, below)
    with pytest.raises(PlanError, match="CID of the parent b is not known"):
        write(disk([], 512), Options(), placement(), backing=Backing("b", "vmdk"))


def test_an_embedded_descriptor_has_20_sectors() -> None:
    def plan(length: int) -> bytes:
        below = parent(512)
        layout = write(disk_of(Extents.filled(512, Kind.HOLE), Payload("top", 0), parent=below), Options(), placement(),
                       backing=Backing("b" * length, "vmdk"))  # fmt: skip
        return layout.files[0].table.read(512, 20 * 512).rstrip(b"\0")

    spare = 20 * 512 - len(plan(1))
    assert len(plan(1 + spare)) == 20 * 512
    with pytest.raises(PlanError, match="VMDK descriptor of 10241 bytes, 10240 at most"):
        plan(2 + spare)


# -- what the descriptor says


@pytest.mark.parametrize("number", [0, 1, 0xFFFFFFFC, 0xFFFFFFFD, 0xFFFFFFFE, 0xFFFFFFFF])
def test_content_ids_avoid_reserved_values(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr("vmconv_vmdk.writer.derived", lambda *_: number.to_bytes(4, "big") + bytes(11) + b"\1")
    told(write(disk([], MIB), Options(), placement()), "monolithicSparse")


def test_an_identity_that_was_given_is_the_uuid() -> None:
    layout = write(disk([], MIB), Options(identity=IDENTITY), placement())
    told(layout, "monolithicSparse", uuid="00 01 02 03 04 05 06 07-08 09 0a 0b 0c 0d 0e 0f")


def test_a_child_names_its_parent_by_the_ids_of_virtualbox() -> None:
    known = {"image-uuid": str(UUID(int=1)), "modification-uuid": str(UUID(int=2))}
    for ids in (known, {}):
        below = of_format("vmdk", disk([], MIB), {"cid": 5, **ids})
        image = disk_of(Extents.filled(MIB, Kind.HOLE), Payload("top", 0), parent=below)
        layout = write(image, Options(), placement(), backing=Backing("b.vmdk", "vmdk"))
        ddb = {f"uuid_{own}": ids[name] for own, name in zip(("parent", "parentmodification"), ids, strict=False)}
        told(layout, "monolithicSparse", parent=("00000005", "b.vmdk"), **ddb)


def test_versions_are_those_requested() -> None:
    layout = write(disk([], MIB), Options(hwversion="14", toolsversion="7"), placement())
    told(layout, "monolithicSparse", virtualHWVersion="14", toolsVersion="7")


@pytest.mark.parametrize(
    ("source", "asked", "written", "lost"),
    [
        (None, None, "ide", False),
        ("lsilogic", None, "lsilogic", False),
        ("lsilogic", "ide", "ide", False),
        ("lsilogic", "buslogic", "buslogic", False),
        ("nvme", None, "ide", True),
        ("nvme", "pvscsi", "pvscsi", False),
    ],
)
def test_the_adapter_decides_the_heads(source: str | None, asked: Any, written: str, lost: bool) -> None:
    layout = write(disk([], 10 * GIB, facts=DiskFacts(adapter_type=source)), Options(adapter_type=asked), placement())
    told(layout, "monolithicSparse", adapterType=written, geometry_heads="16" if written == "ide" else "255")
    loss = "adapter type nvme: VMDK knows ide, buslogic, lsilogic, legacyESX, pvscsi, ide is written"
    assert layout.losses == ((loss,) if lost else ())


def test_a_geometry_is_carried() -> None:
    geometry = Geometry(cylinders=MIB // 512 // (4 * 63), heads=4, sectors=63)
    layout = write(disk([], MIB, facts=DiskFacts(geometry=geometry)), Options(), placement())
    told(layout, "monolithicSparse", geometry_heads="4")
