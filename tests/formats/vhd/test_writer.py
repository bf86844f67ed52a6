"""The VHD writer, against a parser of its own: footers, headers, BAT, bitmaps and places."""

from __future__ import annotations

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
from vmconv.testing import disk_of
from vmconv_vhd.options import Options
from vmconv_vhd.writer import write

MIB, GIB = 1 << 20, 1 << 30
BLOCK = 2 * MIB
IDENTITY = bytes(range(16))
PARENT = "00112233-4455-6677-8899-aabbccddeeff"


def placement(modulus: int = 1) -> Placement:
    return Placement(modulus, identity=IDENTITY)


def summed(data: bytes, field: int) -> int:
    return ~sum(data[:field] + data[field + 4 :]) & 0xFFFFFFFF


def footer(file: Any, at: int, kind: int, size: int) -> tuple[int, ...]:
    """Checks what a footer says, and returns its geometry."""
    data = file.read(at, 512)
    cookie, features, version, next_at, stamp, creator, creator_version, host = unpacked(file, at, ">8sIIQI4sI4s")
    assert (cookie, features, version, stamp) == (b"conectix", 2, 0x10000, 0)
    assert next_at == (0xFFFFFFFFFFFFFFFF if kind == 2 else 512)
    assert (creator, creator_version, host) == (b"win ", 0xA0000, b"Wi2k")
    original, current, cylinders, heads, sectors, found, checksum, unique, saved = unpacked(
        file, at + 40, ">QQHBBII16sB"
    )
    assert (original, current, found, unique, saved) == (size, size, kind, IDENTITY, 0)
    assert checksum == summed(data, 64)
    return cylinders, heads, sectors


def check(image: Image, layout: Layout, *, kind: int = 3, align: int = 4096) -> dict[str, Any]:
    """Checks that every block has what it has to, congruent or aligned, and that nothing else is in the file."""
    file = layout.files[-1].table
    size = -(-image.size // 512) * 512
    assert footer(file, 0, kind, size) == footer(file, file.size - 512, kind, size)
    header = file.read(512, 1024)
    cookie, next_at, bat_at, version, entries, block, checksum, parent, stamp = unpacked(file, 512, ">8sQQIIII16sI")
    assert (cookie, next_at, version, block, stamp) == (b"cxsparse", 0xFFFFFFFFFFFFFFFF, 0x10000, BLOCK, 0)
    assert checksum == summed(header, 36)
    assert entries == -(-size // BLOCK)
    assert parent == (UUID(PARENT).bytes if kind == 4 else bytes(16))
    name = unpacked(file, 512 + 64, ">512s")[0].decode("utf-16-be").rstrip("\0")
    code, space, length, locator_at = unpacked(file, 512 + 576, ">4sIIxxxxQ")
    assert bat_at == 1536 + space
    assert file.read(512 + 600, 424) == bytes(424)
    bat = np.frombuffer(file.read(bat_at, -(-entries * 4 // 512) * 512), dtype=">u4").tolist()
    assert set(bat[entries:]) <= {0xFFFFFFFF}
    wanted, ends = Said(image, on_parent=kind == 4), [bat_at + len(bat) * 4]
    for number, entry in enumerate(bat[:entries]):
        sectors = range(number * BLOCK, min((number + 1) * BLOCK, size), 512)
        table = wanted.guest.window(number * BLOCK, len(sectors) * 512)
        least = Kind.ZERO if kind == 4 else Kind.DATA
        assert (entry != 0xFFFFFFFF) == (int(table.kind.max()) >= least)
        if entry == 0xFFFFFFFF:
            continue
        bitmap = np.unpackbits(np.frombuffer(file.read(entry * 512, 512), dtype=np.uint8)).astype(bool)
        said = [True] * 4096
        if kind == 4:
            said = [bool(one != Kind.HOLE) for one in table.units(512, 0, len(sectors))[0].tolist()]
            said += [bool(bitmap[-1])] * (4096 - len(sectors))
        assert bitmap.tolist() == said
        data = entry * 512 + 512
        block_table = file.window(data, len(sectors) * 512)
        assert block_table == table.without_holes()
        ends.append(data)
    places = sorted(ends[1:])
    assert all(one + BLOCK <= other - 512 for one, other in pairwise(places))
    if places:
        assert ends[0] + 512 <= places[0] < ends[0] + 512 + 2 * align
        assert places[-1] - places[0] <= (len(places) - 1) * (BLOCK + align) + align
    assert file.size == (places[-1] + BLOCK if places else ends[0]) + 512
    return {"code": code, "length": length, "name": name, "path": file.read(locator_at, length).decode("utf-16-le")}


NOBODY = {"code": bytes(4), "length": 0, "name": "", "path": ""}


@pytest.mark.parametrize("modulus", [1, 512, 4096, 65536])
def test_each_block_is_where_the_bat_says(modulus: int) -> None:
    for seed, size in enumerate([40 * MIB, 21 * MIB + 512, BLOCK, 700]):
        image = scattered(seed, size, MIB // 2, shift=1024)
        layout = write(image, Options(), placement(modulus))
        assert check(image, layout, align=max(4096, modulus)) == NOBODY
    image = disk([(0, 512, BLOCK), (4 * MIB, 100, BLOCK), (8 * MIB + 4096, 16 * MIB + 8192 + 1536, 4096)], 300 * MIB)
    check(image, write(image, Options(), placement(modulus)), align=max(4096, modulus))


def test_places_are_congruent_where_sectors_allow_it() -> None:
    image = disk(
        [(0, 512, BLOCK), (4 * MIB, 100 + GIB, BLOCK), (8 * MIB + 4096, 16 * MIB + 8192 + 1536, 4096)], 10 * MIB
    )
    assert laid_out(write(image, Options(), placement(4096))) == [
        "0x0 footer copy",
        "0x200 dynamic header",
        "0x600 BAT",
        "0x1000 bitmaps",
        "0x1200 payload 0x200+0x200000",
        "0x202400 bitmaps 0x200",
        "0x203600 payload 0x1002600+0x1000",
        "0x402e00 bitmaps 0x400",
        "0x403000 payload 0x40000064+0x200000",
        "0x603000 footer",
        "0x603200 end",
    ]


def test_the_first_block_is_as_near_as_it_can_be() -> None:
    """The BAT of 384 blocks ends at 0xc00: there is just room for a footer's sector and a bitmap."""
    image = disk([(0, 0, BLOCK)], 384 * BLOCK)
    assert laid_out(write(image, Options(), placement(4096)))[3:5] == ["0xe00 bitmaps", "0x1000 payload 0x0+0x200000"]
    more = disk([(0, 0, BLOCK)], 385 * BLOCK)
    assert laid_out(write(more, Options(), placement(4096)))[3:5] == ["0x1e00 bitmaps", "0x2000 payload 0x0+0x200000"]


def test_a_block_that_begins_with_zeros_is_placed_by_its_first_payload() -> None:
    image = disk([(4 * MIB + 1536, 16 * MIB + 3584, 4096), (4 * MIB + 8192, 20 * MIB + 512, 4096)], 10 * MIB)
    table = write(image, Options(), placement(4096)).files[0].table
    first, second = (row for row in table if row.source is image.flat.sources[0])
    assert (first.start - first.offset) % 4096 == 0
    assert second.start - first.start == 8192 - 1536


@pytest.mark.parametrize(
    ("reference", "code", "path"),
    [
        ("dir/b.vhd", b"W2ru", ".\\dir\\b.vhd"),
        ("/x/b.vhd", b"W2ku", "\\x\\b.vhd"),
        ("é" * 300, b"W2ru", ".\\" + "é" * 300),
    ],
)
def test_a_layer_allocates_what_is_needed_and_no_more(reference: str, code: bytes, path: str) -> None:
    for seed, size in enumerate([12 * MIB, 5 * MIB + 512]):
        below = of_format("vhd", disk([(0, 0, size)], size), {}, DiskFacts(identity=UUID(PARENT)))
        image = scattered(seed, size, 4096, parent=below, longest=200)
        found = check(image, write(image, Options(), placement(), backing=Backing(reference, "vhd")), kind=4)
        name = path.removeprefix(".\\")
        assert found == {"code": code, "length": len(path) * 2, "name": name[-255:], "path": path}
        same_in_pieces(write(image, Options(), placement(), backing=Backing(reference, "vhd")))


def test_a_sector_that_is_in_part_the_parents_is_whole() -> None:
    below = of_format("vhd", disk([(0, MIB, BLOCK)], BLOCK), {}, DiskFacts(identity=UUID(PARENT)))
    top = disk([(512, 5120, 700)], BLOCK)
    holes = [(0, Kind.HOLE, None, 0), (512, Kind.DATA, top.flat.sources[0], 5120), (1212, Kind.HOLE, None, 0)]
    image = disk_of(Extents.of(holes, BLOCK), Payload("top", 0), parent=below)
    file = write(image, Options(), placement(), backing=Backing("b.vhd", "vhd")).files[0].table
    (entry,) = unpacked(file, unpacked(file, 512 + 16, ">Q")[0], ">I")
    assert file.read(entry * 512, 2) == bytes([0b01100000, 0])
    found = file.window(entry * 512 + 512, 2048)
    wanted = [(0, Kind.ZERO, None, 0), (512, Kind.DATA, top.flat.sources[0], 5120)]
    wanted += [(1212, Kind.DATA, below.flat.sources[0], MIB + 1212), (1536, Kind.ZERO, None, 0)]
    assert found == Extents.of(wanted, 2048)


def test_a_disk_that_is_flattened_has_no_parent() -> None:
    image = scattered(1, 12 * MIB, 4096, parent=scattered(2, 20 * MIB, 4096, longest=200), longest=200)
    assert check(image, write(image, Options(), placement())) == NOBODY


def test_a_fixed_disk_is_the_disk_and_a_footer() -> None:
    image = disk([(512, 1024, MIB)], 3 * MIB + 100)
    layout = write(image, Options(subformat="fixed"), placement())
    assert laid_out(layout) == ["0x200 payload 0x400+0x100000", "0x300200 footer", "0x300400 end"]
    assert footer(layout.files[0].table, 0x300200, 2, 0x300200) == (90, 4, 17)
    assert layout.losses == ()


@pytest.mark.parametrize(
    ("fields", "size", "rounded", "unit"),
    [
        ({"subformat": "fixed", "azure": True}, MIB + 1, 2 * MIB, "MiB"),
        ({"subformat": "fixed", "azure": True}, 2 * MIB, 2 * MIB, ""),
        ({"force_size": False}, 5 * MIB, 151 * 4 * 17 * 512, "cylinders"),
        ({"force_size": False}, 68 * 512, 68 * 512, ""),
        ({"force_size": False}, 512, 68 * 512, "cylinders"),
        # As qemu-img has them.
        ({"force_size": False}, 69601 * 512, 69615 * 512, "cylinders"),
        ({"force_size": False}, 69637 * 512, 69700 * 512, "cylinders"),
        ({"force_size": False}, 87016 * 512, 87108 * 512, "cylinders"),
    ],
)
def test_sizes_are_rounded_as_requested_and_reported(
    fields: dict[str, Any], size: int, rounded: int, unit: str
) -> None:
    layout = write(disk([], size), Options(**fields), placement())
    assert unpacked(layout.files[0].table, layout.files[0].table.size - 512 + 48, ">Q") == (rounded,)
    expected = (f"size {-(-size // 512) * 512}: rounded up to whole {unit}, {rounded} bytes",) if unit else ()
    assert layout.losses == expected


def test_impossible_vhd_images_are_refused() -> None:
    def plan(size: int, below: Image | None = None, reference: str = "", **fields: Any) -> Layout:
        image = scattered(1, size, MIB, parent=below) if below else disk([], size)
        backing = Backing(reference or "b.vhd", "vhd") if below or reference else None
        return write(image, Options(**fields), placement(), backing=backing)

    plan(2040 * GIB)
    with pytest.raises(PlanError, match="2190433320960 bytes"):
        plan(2040 * GIB + 512)
    with pytest.raises(PlanError, match="VHD cannot hold 0 bytes, the nearest size it can hold is 512"):
        plan(0)
    sound = of_format("vhd", disk([], MIB), {}, DiskFacts(identity=UUID(PARENT)))
    plan(MIB, sound)
    # Two bytes a character, and ".\".
    plan(MIB, sound, "a" * 2046)
    with pytest.raises(PlanError, match="parent name of 4098 bytes: a VHD has room for 4096"):
        plan(MIB, sound, "a" * 2047)
    with pytest.raises(PlanError, match="as large as its parent"):
        plan(MIB + 512, sound)
    with pytest.raises(PlanError, match="a fixed VHD cannot have a parent"):
        plan(MIB, sound, subformat="fixed")
    with pytest.raises(PlanError, match=r"b\.vhd is one without a unique id"):
        plan(MIB, of_format("vhd", disk([], MIB), {}))
    with pytest.raises(PlanError, match=r"x\.vhd is one without a unique id"):
        plan(MIB, None, "x.vhd")
    with pytest.raises(PlanError, match=r"b is one of format raw"):
        write(scattered(1, MIB, MIB, parent=sound), Options(), placement(), backing=Backing("b", "raw"))
    image = disk([], MIB)
    with pytest.raises(PlanError, match="a dynamic VHD needs space for a bitmap before each block"):
        write(image, Options(), Placement(1, carrier=image.file))
    assert write(image, Options(subformat="fixed"), Placement(1, carrier=image.file))
    with pytest.raises(PlanError, match="blocks aligned to 1073741824: its file ends at 2T"):
        write(disk([(0, 0, 1500 * BLOCK)], 1500 * BLOCK), Options(), placement(GIB))


def test_creator_and_geometry_are_carried_where_they_can_be() -> None:
    def made(
        geometry: Geometry | None = None, creator: str | None = None
    ) -> tuple[bytes, tuple[int, ...], tuple[str, ...]]:
        layout = write(disk([], 68 * 512, facts=DiskFacts(geometry=geometry, creator=creator)), Options(), placement())
        file = layout.files[0].table
        return file.read(28, 4), unpacked(file, 56, ">HBB"), layout.losses

    assert made() == (b"win ", (1, 4, 17), ())
    assert made(creator="tap") == (b"tap\0", (1, 4, 17), ())
    assert made(creator="vpc") == (b"vpc ", (1, 4, 17), ())
    assert made(creator="vmconv")[::2] == (b"win ", ("creator vmconv: its VHD code has 4 characters",))
    geometry = Geometry(cylinders=65535, heads=255, sectors=255)
    assert made(geometry=geometry, creator="vpc")[:2] == (b"win ", (65535, 255, 255))
    assert "take the geometry" in made(geometry=geometry, creator="vpc")[2][0]
    for field, most in (("cylinders", 65536), ("heads", 256), ("sectors", 256)):
        wide = geometry._replace(**{field: most})
        text = "/".join(str(number) for number in wide)
        loss = f"geometry {text}: VHD has 16, 8 and 8 bits for it"
        assert made(geometry=wide)[1:] == ((1, 4, 17), (loss,))
