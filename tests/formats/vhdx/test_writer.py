"""The VHDX writer, against a parser of its own: headers, regions, metadata, BAT, bitmaps and places."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple
from uuid import UUID

import google_crc32c
import numpy as np
import pytest

from support.written import Payload, disk, laid_out, of_format, same_in_pieces, scattered, unpacked
from vmconv.errors import PlanError
from vmconv.model.extents import Extents, Kind
from vmconv.model.facts import DiskFacts
from vmconv.model.image import Image
from vmconv.model.layout import Backing, Layout, Placement
from vmconv.testing import disk_of
from vmconv_vhdx.options import Options
from vmconv_vhdx.writer import write

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
IDENTITY = bytes(range(16))
PARENT = "00112233-4455-6677-8899-aabbccddeeff"
IDENTIFIED = DiskFacts(identity=UUID(PARENT))
LINKAGE = "12345678-9abc-def0-1234-56789abcdef0"
BAT, METADATA = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08"), UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
PARAMETERS, SIZE, PAGE_83, LOGICAL, PHYSICAL, LOCATOR = (
    UUID(text)
    for text in (
        "caa16737-fa36-4d43-b3b6-33f0aa44e76b",
        "2fa54224-cd1b-4876-b211-5dbed83bf4b8",
        "beca12ab-b2e6-4523-93ef-c309e000c746",
        "8141bf1d-a96f-4709-ba47-f233a8faab5f",
        "cda348c7-445d-4471-9cc9-e9885251c556",
        "a8d35f2d-b30b-454d-abf7-d3d84834ab0c",
    )
)
NOT_PRESENT, ZERO, FULLY, PARTIALLY = 0, 2, 6, 7


def placement(modulus: int = 1) -> Placement:
    return Placement(modulus, identity=IDENTITY)


class Wanted(NamedTuple):
    """What a file has to say, but for what its image says."""

    block: int = MIB
    sector: int = 512
    physical: int = 512
    log: int = MIB
    fixed: bool = False
    layer: bool = False
    identity: UUID = UUID(bytes=IDENTITY)
    creator: str = "vmconv"
    tight: bool = True


def check(image: Image, layout: Layout, wanted: Wanted = Wanted()) -> dict[str, str]:  # noqa: B008
    """Checks all that is in a file, and that nothing else is; returns the pairs of the parent locator."""
    (out,) = layout.files
    file = out.table
    assert out.slack
    creator = wanted.creator.encode("utf-16-le").ljust(512, b"\0")
    assert unpacked(file, 0, "<8s512s") == (b"vhdxfile", creator)
    regions = headers(file, wanted)
    items = metadata(file, regions["metadata"][0], layer=wanted.layer)
    size = -(-image.size // 512) * 512
    flags = 1 if wanted.fixed else 2 if wanted.layer else 0
    assert unpacked(file, items[PARAMETERS][0], "<II") == (wanted.block, flags)
    assert unpacked(file, items[SIZE][0], "<Q") == (size,)
    assert unpacked(file, items[PAGE_83][0], "<16s") == (wanted.identity.bytes_le,)
    assert unpacked(file, items[LOGICAL][0], "<I") == (wanted.sector,)
    assert unpacked(file, items[PHYSICAL][0], "<I") == (wanted.physical,)
    payload, bitmaps = tables(file, regions["BAT"], said(image, size, wanted), wanted)
    regions |= {f"bitmap {number}": (at, MIB) for number, at in enumerate(bitmaps)}
    front = sorted(regions.values())
    assert front[0][0] == MIB
    assert all(one + length == other for (one, length), (other, _) in pairwise(front))
    end = sum(front[-1])
    places = sorted(payload)
    assert all(one + wanted.block <= other for one, other in pairwise(places))
    if wanted.fixed:
        assert payload == places
    if wanted.tight:
        assert places == list(range(end, file.size, wanted.block))
    assert file.size == max([end, *(place + wanted.block for place in places)])
    return locator(file, *items[LOCATOR]) if wanted.layer else {}


def headers(file: Extents, wanted: Wanted) -> dict[str, tuple[int, int]]:
    """Checks the headers and region tables, which are there twice; returns the regions."""
    sequences, others = [], []
    for at in (64 * KIB, 128 * KIB):
        signature, checksum, sequence, *rest = unpacked(file, at, "<4sIQ16s16s16sHHIQ4016s")
        assert (signature, checksum) == (b"head", summed(file, at, 4 * KIB))
        sequences.append(sequence)
        others.append(rest)
    assert sequences == [1, 2]
    assert others[0] == others[1]
    file_write, data_write, log_id, log_version, version, log_length, log_at, reserved = others[0]
    assert len({IDENTITY, UUID(bytes_le=file_write).bytes, UUID(bytes_le=data_write).bytes, bytes(16)}) == 4
    assert (log_id, log_version, version, log_length, reserved) == (bytes(16), 0, 1, wanted.log, bytes(4016))
    regions = {"log": (log_at, log_length)}
    tables = []
    for at in (192 * KIB, 256 * KIB):
        tables.append(file.read(at, 64 * KIB))
        signature, checksum, count, reserved = unpacked(file, at, "<4sIII")
        assert (signature, checksum, count, reserved) == (b"regi", summed(file, at, 64 * KIB), 2, 0)
        for number in range(count):
            guid, offset, length, required = unpacked(file, at + 16 + number * 32, "<16sQII")
            regions[{BAT: "BAT", METADATA: "metadata"}[UUID(bytes_le=guid)]] = (offset, length)
            assert (offset % MIB, length % MIB, required) == (0, 0, 1)
    assert tables[0] == tables[1]
    assert not any(tables[0][16 + 2 * 32 :])
    assert regions["metadata"][1] == MIB
    return regions


def summed(file: Extents, at: int, length: int) -> int:
    return int(google_crc32c.value(file.read(at, 4) + bytes(4) + file.read(at + 8, length - 8)))


def metadata(file: Extents, at: int, *, layer: bool) -> dict[UUID, tuple[int, int]]:
    """Returns the place and length of each item of metadata; they lie one after the other behind their table."""
    signature, reserved, count, more = unpacked(file, at, "<8sHH20s")
    assert (signature, reserved, more) == (b"metadata", 0, bytes(20))
    items = {}
    end = 64 * KIB
    for number in range(count):
        guid, offset, length, flags, zero = unpacked(file, at + 32 + number * 32, "<16sIIII")
        key = UUID(bytes_le=guid)
        assert (offset, flags, zero) == (end, 4 if key in (PARAMETERS, LOCATOR) else 6, 0)
        items[key] = (at + offset, length)
        end += length
    assert set(items) == {PARAMETERS, SIZE, PAGE_83, LOGICAL, PHYSICAL} | ({LOCATOR} if layer else set())
    lengths = {key: length for key, (_, length) in items.items() if key != LOCATOR}
    assert lengths == {PARAMETERS: 8, SIZE: 8, PAGE_83: 16, LOGICAL: 4, PHYSICAL: 4}
    assert not any(file.read(at + 32 + count * 32, 64 * KIB - 32 - count * 32))
    assert not any(file.read(at + end, MIB - end))
    return items


def said(image: Image, size: int, wanted: Wanted) -> Extents:
    """Returns what the disk has to be, in whole blocks: a HOLE in each sector that is left to the parent."""
    whole = -(-size // wanted.block) * wanted.block
    if not wanted.layer:
        return image.flat.window(0, whole).without_holes()
    longer = image.parent is not None and image.parent.size > image.size
    table = image.guest.window(0, size, Kind.ZERO if longer else Kind.HOLE)
    silent = table.kind[-1] == Kind.HOLE and table.start[-1] <= size // wanted.block * wanted.block
    table = table.window(0, whole, Kind.HOLE if silent else Kind.ZERO)
    start = np.arange(0, size, wanted.sector)
    inside = np.unique(table.start[table.start % wanted.sector != 0] // wanted.sector)
    torn = [at for at in start[inside].tolist() if kinds_in(table, at, wanted.sector) > {Kind.HOLE}]
    if torn and image.parent:
        full = table.over(image.parent.flat.window(0, whole)).without_holes()
        table = table.replaced(full, np.array(torn), np.full(len(torn), wanted.sector))
    return table


def kinds_in(table: Extents, at: int, length: int) -> set[int]:
    return set(table.window(at, length).kind.tolist())


def tables(file: Extents, region: tuple[int, int], said: Extents, wanted: Wanted) -> tuple[list[int], list[int]]:
    """Checks what BAT and bitmaps say of each block, and what is in it; returns the places of payload and bitmaps."""
    ratio = (1 << 23) * wanted.sector // wanted.block
    count = said.size // wanted.block
    entries = count + (count - 1) // ratio
    if wanted.layer:
        entries = -(-count // ratio) * (ratio + 1)
    at, length = region
    assert length == max(1, -(-entries * 8 // MIB)) * MIB
    assert [row.length for row in file if row.source and row.source.name == "BAT"] == [entries * 8]
    bat = np.frombuffer(file.read(at, entries * 8), dtype="<u8").tolist()
    payload, bitmaps = [], []
    for chunk in range(-(-count // ratio)):
        own = bat[chunk * (ratio + 1) :][: ratio + 1]
        bits = None
        if len(own) > ratio and own[ratio]:
            place, state = divmod(own[ratio], MIB)
            assert state == 6
            bitmaps.append(place * MIB)
            bits = np.unpackbits(np.frombuffer(file.read(place * MIB, MIB), dtype=np.uint8), bitorder="little")
        partial = 0
        for number, entry in enumerate(own[:ratio]):
            if chunk * ratio + number >= count:
                assert entry == 0
                continue
            block = said.window((chunk * ratio + number) * wanted.block, wanted.block)
            kinds = set(block.kind.tolist())
            place, state = divmod(entry, MIB)
            if Kind.HOLE in kinds and len(kinds) > 1:
                partial += 1
                assert state == PARTIALLY
            elif wanted.fixed or Kind.DATA in kinds:
                assert state == FULLY
            else:
                assert entry == (ZERO if Kind.ZERO in kinds else NOT_PRESENT)
                continue
            payload.append(place * MIB)
            assert file.window(place * MIB, wanted.block) == block.without_holes()
        assert (bits is not None) == (partial > 0)
        if bits is not None:
            check_bits(bits, said.window(chunk * ratio * wanted.block, ratio * wanted.block), wanted.sector)
    assert len(set(bitmaps)) == len(bitmaps)
    return payload, bitmaps


def check_bits(bits: np.ndarray[Any, Any], chunk: Extents, sector: int) -> None:
    """Checks that there is a bit for each sector in which the layer says something."""
    edges = -(-np.append(chunk.start, chunk.size) // sector)
    expected = np.repeat(chunk.kind != Kind.HOLE, np.diff(edges))
    for row in chunk:
        # Payload may begin in the middle of a sector that begins with zeros.
        if row.kind != Kind.HOLE:
            expected[row.start // sector : -(-row.end // sector)] = True
    assert np.array_equal(bits, expected)


def locator(file: Extents, at: int, length: int) -> dict[str, str]:
    guid, reserved, count = unpacked(file, at, "<16sHH")
    assert (UUID(bytes_le=guid), reserved) == (UUID("b04aefb7-d19e-4a81-b789-25b8e9445913"), 0)
    pairs = {}
    end = 20 + count * 12
    for number in range(count):
        key_at, value_at, key_length, value_length = unpacked(file, at + 20 + number * 12, "<IIHH")
        assert (key_at, value_at) == (end, end + key_length)
        end = value_at + value_length
        key, value = (file.read(at + start, n) for start, n in ((key_at, key_length), (value_at, value_length)))
        pairs[key.decode("utf-16-le")] = value.decode("utf-16-le")
    assert end == length
    return pairs


# -- whole disks


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
@pytest.mark.parametrize("sector", [512, 4096])
def test_each_block_is_where_the_bat_says(subformat: Any, sector: int) -> None:
    wanted = Wanted(sector=sector, physical=4096, fixed=subformat == "fixed")
    options = Options(subformat=subformat, block_size=MIB, logical_sector_size=sector, physical_sector_size=4096)
    for seed, size in enumerate([40 * MIB, 21 * MIB + 4096, MIB, 4096]):
        image = scattered(seed, size, MIB // 2, shift=512)
        layout = write(image, options, placement())
        assert check(image, layout, wanted) == {}
        same_in_pieces(layout)


def test_a_disk_is_whole_sectors_of_512_bytes_at_least() -> None:
    for size in (1, 511, 512, 513, MIB + 1):
        image = disk([(0, 0, size)], size)
        check(image, write(image, Options(block_size=MIB), placement()))


def test_a_layer_allocates_what_is_needed_and_no_more() -> None:
    wanted = Wanted(layer=True, identity=UUID(PARENT))
    for seed, (size, longer) in enumerate([(40 * MIB, 0), (21 * MIB + 512, 0), (21 * MIB + 512, MIB)]):
        image = scattered(seed, size, MIB // 4, parent=parent(size + longer), longest=7)
        layout = write(image, Options(block_size=MIB), placement(), backing=Backing("dir/b.vhdx", "vhdx"))
        assert check(image, layout, wanted) == {
            "parent_linkage": f"{{{LINKAGE}}}",
            "relative_path": ".\\dir\\b.vhdx",
        }
        same_in_pieces(layout)


def parent(size: int, facts: DiskFacts = IDENTIFIED) -> Image:
    content = scattered(100, size, MIB // 4, kinds=(Kind.DATA, Kind.ZERO))
    return of_format("vhdx", content, {"data-write-guid": LINKAGE}, facts)


def test_sectors_that_are_in_part_the_parents_are_whole() -> None:
    wanted = Wanted(sector=4096, physical=4096, layer=True, identity=UUID(PARENT))
    image = scattered(3, 4 * MIB, 512, parent=parent(4 * MIB), longest=70)
    options = Options(block_size=MIB, logical_sector_size=4096)
    layout = write(image, options, placement(), backing=Backing("b.vhdx", "vhdx"))
    check(image, layout, wanted)


def test_chunks_have_a_bitmap_only_where_blocks_are_in_part_the_parents() -> None:
    """A bitmap speaks for 4 GiB of sectors of 512 bytes: here, for 16 blocks."""
    block = 256 * MIB
    for last in (0, 1):
        size = 64 * block - last
        below = of_format("vhdx", disk([], size), {"data-write-guid": LINKAGE})
        source = Payload("source.raw", 1 << 40)
        rows = [
            (0, Kind.DATA, source, 0),
            (block, Kind.HOLE, None, 0),
            (17 * block + MIB, Kind.DATA, source, GIB),
            (17 * block + 5 * MIB, Kind.HOLE, None, 0),
            (20 * block + 512, Kind.ZERO, None, 0),
            (20 * block + 1024, Kind.HOLE, None, 0),
            (50 * block, Kind.ZERO, None, 0),
            (51 * block, Kind.HOLE, None, 0),
            (64 * block - 8192, Kind.DATA, source, 2 * GIB),
            (64 * block - 4096, Kind.HOLE, None, 0),
        ]
        image = disk_of(Extents.of(rows, size), source, parent=below)
        layout = write(image, Options(block_size=block), placement(), backing=Backing("b.vhdx", "vhdx"))
        check(image, layout, Wanted(block=block, layer=True))


@pytest.mark.parametrize("blocks", [15, 16, 17, 32, 33])
def test_the_bat_has_a_place_for_a_bitmap_between_chunks(blocks: int) -> None:
    block = 256 * MIB
    image = disk([((blocks - 1) * block, 0, 4096)], blocks * block)
    check(image, write(image, Options(block_size=block), placement()), Wanted(block=block))
    below = of_format("vhdx", disk([], blocks * block), {"data-write-guid": LINKAGE})
    image = disk_of(image.guest, Payload("source.raw", 1 << 40), parent=below)
    layout = write(image, Options(block_size=block), placement(), backing=Backing("b.vhdx", "vhdx"))
    check(image, layout, Wanted(block=block, layer=True))


@pytest.mark.parametrize("extra", [0, 1])
def test_the_bat_has_room_for_all_its_entries(extra: int) -> None:
    """131072 entries fill a MiB: 131040 blocks, and 31 places for bitmaps between 32 chunks of 4096 blocks."""
    size = (131072 - 31 + extra) * MIB
    image = disk([(size - MIB, 0, MIB)], size)
    layout = write(image, Options(block_size=MIB), placement())
    file = layout.files[0].table
    (bat,) = (row for row in file if row.source and row.source.name == "BAT")
    assert bat.length == MIB + 8 * extra
    assert unpacked(file, bat.start + bat.length - 8, "<Q") == ((4 + extra) * MIB | FULLY,)
    assert headers(file, Wanted())["BAT"] == (3 * MIB, (1 + extra) * MIB)
    same_in_pieces(layout)


# -- places


def test_payload_begins_where_the_storage_can_share_it() -> None:
    image = disk([(0, 7 * MIB, MIB), (2 * MIB, 2 * MIB, 2 * MIB), (5 * MIB, 12 * MIB + 512, 512)], 9 * MIB)
    layout = write(image, Options(block_size=MIB, log_size=2 * MIB), placement(4 * MIB))
    check(image, layout, Wanted(log=2 * MIB, tight=False))
    assert laid_out(layout) == [
        "0x0 file type identifier",
        "0x10000 header 1",
        "0x20000 header 2",
        "0x30000 region table",
        "0x40000 region table",
        "0x300000 metadata",
        "0x400000 BAT",
        "0xa00000 payload 0x200000+0x200000",
        "0xf00000 payload 0x700000+0x100000",
        "0x1000000 payload 0xc00200+0x200",
        "0x1100000 end",
    ]
    fixed = write(image, Options(subformat="fixed", block_size=MIB), placement(4 * MIB))
    check(image, fixed, Wanted(fixed=True, tight=False))
    assert laid_out(fixed)[-4:] == [
        "0x400000 payload 0x700000+0x100000",
        "0x600000 payload 0x200000+0x200000",
        "0x900000 payload 0xc00200+0x200",
        "0xd00000 end",
    ]


def test_in_place_only_what_lies_where_the_headers_are_moves() -> None:
    pieces = [(0, 0, 3 * MIB), (8 * MIB, 5 * MIB, MIB), (12 * MIB, 4 * MIB, MIB)]
    image = disk(pieces, 16 * MIB + 512, source_size=6 * MIB)
    carrier = Placement(1, "image", carrier=image.flat.sources[0], identity=IDENTITY)  # type: ignore[arg-type]
    layout = write(image, Options(log_size=2 * MIB), carrier)
    file = layout.files[0].table
    assert headers(file, Wanted(log=2 * MIB)) == {
        "log": (7 * MIB, 2 * MIB),
        "metadata": (9 * MIB, MIB),
        "BAT": (10 * MIB, MIB),
    }
    places, _ = tables(file, (10 * MIB, MIB), said(image, 16 * MIB + 512, Wanted()), Wanted())
    assert [place // MIB for place in places] == [6, 1, 2, 5, 4]
    assert file.size == 11 * MIB
    assert layout.files[0].slack


def test_a_fixed_disk_cannot_be_made_in_place() -> None:
    image = disk([(0, 0, MIB)], MIB, source_size=MIB)
    carrier = Placement(1, "image", carrier=image.flat.sources[0])  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="a VHDX cannot be fixed"):
        write(image, Options(subformat="fixed"), carrier)


# -- what the metadata says


@pytest.mark.parametrize(
    ("size", "block"),
    [
        (GIB, 8 * MIB),
        (GIB + 512, 16 * MIB),
        (100 * GIB, 16 * MIB),
        (100 * GIB + 512, 32 * MIB),
        (32 * TIB, 32 * MIB),
        (32 * TIB + 512, 64 * MIB),
        (64 * TIB, 64 * MIB),
    ],
)
def test_blocks_are_larger_in_larger_disks(size: int, block: int) -> None:
    file = write(disk([], size), Options(), placement()).files[0].table
    assert unpacked(file, 2 * MIB + 64 * KIB, "<IIQ") == (block, 0, size)


@pytest.mark.parametrize(
    ("facts", "options", "sector", "physical"),
    [
        (DiskFacts(), {}, 512, 512),
        (DiskFacts(logical_sector_size=4096), {}, 4096, 4096),
        (DiskFacts(physical_sector_size=4096), {}, 512, 4096),
        (DiskFacts(logical_sector_size=4096, physical_sector_size=512), {}, 4096, 512),
        (DiskFacts(logical_sector_size=4096), {"logical_sector_size": 512}, 512, 512),
        (DiskFacts(physical_sector_size=4096), {"physical_sector_size": 512}, 512, 512),
    ],
)
def test_sectors_are_those_of_the_source_or_as_requested(
    facts: DiskFacts, options: dict[str, Any], sector: int, physical: int
) -> None:
    image = disk([], MIB, facts=facts)
    layout = write(image, Options(block_size=MIB, **options), placement())
    check(image, layout, Wanted(sector=sector, physical=physical))


@pytest.mark.parametrize(
    ("creator", "kept"),
    [
        ("", "vmconv"),
        ("qemu", "qemu"),
        ("a" * 255, "a" * 255),
        ("a" * 256, "a" * 127),
        ("\N{GRINNING FACE}" * 128, "\N{GRINNING FACE}" * 127),
        ("\ud800", "?"),
    ],
    ids=["none", "short", "longest", "too long", "of four bytes each", "no character"],
)
def test_a_creator_is_carried_as_far_as_there_is_room(creator: str, kept: str) -> None:
    image = disk([], MIB, facts=DiskFacts(creator=creator))
    check(image, write(image, Options(block_size=MIB), placement()), Wanted(creator=kept))


@pytest.mark.parametrize(
    ("reference", "key", "path"),
    [
        ("/x/b.vhdx", "absolute_win32_path", "\\x\\b.vhdx"),
        ("b\N{GRINNING FACE}.vhdx", "relative_path", ".\\b\N{GRINNING FACE}.vhdx"),
    ],
)
def test_the_parent_has_a_path_of_windows_and_its_write_id(reference: str, key: str, path: str) -> None:
    image = disk_of(Extents.filled(MIB, Kind.HOLE), Payload("top", 0), parent=parent(MIB, DiskFacts()))
    layout = write(image, Options(block_size=MIB), placement(), backing=Backing(reference, "vhdx"))
    found = check(image, layout, Wanted(layer=True))
    assert found == {"parent_linkage": f"{{{LINKAGE}}}", key: path}


def test_impossible_vhdx_images_are_refused() -> None:
    def plan(size: int, below: Image | None = None, reference: str = "b.vhdx", **fields: Any) -> None:
        image = scattered(1, size, MIB, parent=below) if below else disk([], size)
        write(image, Options(**fields), placement(), backing=Backing(reference, "vhdx") if below else None)

    with pytest.raises(PlanError, match=f"cannot hold {64 * TIB + 512} bytes: {64 * TIB} bytes"):
        plan(64 * TIB + 1)
    with pytest.raises(PlanError, match="VHDX cannot hold 0 bytes, the nearest size it can hold is 4096"):
        plan(0, logical_sector_size=4096)
    with pytest.raises(PlanError, match="sectors of 4096 bytes cannot hold 5120 bytes") as caught:
        plan(4096 + 513, logical_sector_size=4096)
    assert caught.value.hint == "the nearest sizes are 4096 and 8192"
    sound = parent(MIB)
    # Two bytes a character, and ".\".
    plan(MIB, sound, "a" * 32765)
    with pytest.raises(PlanError, match="parent name of 65536 bytes: a VHDX has room for 65535"):
        plan(MIB, sound, "a" * 32766)
    with pytest.raises(PlanError, match="a fixed VHDX cannot have a parent"):
        plan(MIB, sound, subformat="fixed")
    for below in (
        of_format("vhdx", disk([], MIB), {}),
        of_format("vhd", disk([], MIB), {"data-write-guid": LINKAGE}),
    ):
        with pytest.raises(PlanError, match=r"the parent of a VHDX must be a VHDX, b\.vhdx is not"):
            plan(MIB, below)
    with pytest.raises(PlanError, match=r"the parent of a VHDX must be a VHDX, b\.vhdx is not"):
        write(disk([], MIB), Options(), placement(), backing=Backing("b.vhdx", "vhdx"))
    with pytest.raises(PlanError, match="the parent of a VHDX must be a VHDX, b is not"):
        write(scattered(1, MIB, MIB, parent=sound), Options(), placement(), backing=Backing("b", "raw"))
