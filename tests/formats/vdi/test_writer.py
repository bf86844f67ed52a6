"""The VDI writer, against a parser of its own: header, block map and places."""

from __future__ import annotations

from uuid import UUID

import numpy as np
import pytest

from support.written import Said, disk, laid_out, of_format, scattered, unpacked
from vmconv.errors import PlanError
from vmconv.model.extents import Kind
from vmconv.model.facts import DiskFacts, Geometry
from vmconv.model.identity import derived
from vmconv.model.image import Image
from vmconv.model.layout import Backing, Layout, Placement
from vmconv_vdi.options import Options
from vmconv_vdi.writer import write

MIB, GIB = 1 << 20, 1 << 30
IDENTITY = bytes(range(16))
PARENT = "00112233-4455-6677-8899-aabbccddeeff"
IDENTIFIED = DiskFacts(identity=UUID(PARENT))
MODIFIED = "12345678-9abc-def0-1234-56789abcdef0"
MOST = ((1 << 32) - MIB - 512) // 4


def placement(modulus: int = 1) -> Placement:
    return Placement(modulus, identity=IDENTITY)


def check(
    image: Image, layout: Layout, *, kind: int = 1, phase: int = 0, geometry: tuple[int, ...] = (0, 0, 0)
) -> None:
    """Checks that the header and the map say what they have to, and that nothing else is in the file."""
    file = layout.files[-1].table
    text, signature, version, length, kind_found, flags, comment, map_at, data_at = unpacked(file, 0, "<64sIIIII256sII")
    assert (text.rstrip(b"\0"), comment) == (b"<<< vmconv Virtual Disk Image >>>\n", bytes(256))
    assert (signature, version, length, kind_found, flags, map_at) == (0xBEDA107F, 0x00010001, 400, kind, 0, 512)
    assert unpacked(file, 348, "<IIIII") == (0, 0, 0, 512, 0)
    size, block, extra, count, used = unpacked(file, 368, "<QIIII")
    assert (size, block, extra, count) == (-(-image.size // 512) * 512, MIB, 0, -(-size // MIB))
    ids = [UUID(bytes_le=file.read(392 + i * 16, 16)) for i in range(4)]
    assert ids[:2] == [UUID(bytes=IDENTITY), UUID(bytes=derived(IDENTITY, "vdi modification"))]
    assert [str(found) for found in ids[2:]] == ([PARENT, MODIFIED] if kind == 4 else [str(UUID(int=0))] * 2)
    assert unpacked(file, 456, "<IIII") == (*geometry, 512)
    assert data_at == -(-(512 + count * 4) // MIB) * MIB + phase
    assert file.size == data_at + used * MIB
    wanted, places = Said(image, on_parent=kind == 4), []
    for number, entry in enumerate(np.frombuffer(file.read(512, count * 4), dtype="<u4").tolist()):
        said = wanted.block(number * MIB, MIB)
        if kind == 2 or said.kind.max() == Kind.DATA:
            places.append(entry)
            assert file.window(data_at + entry * MIB, MIB) == said
        else:
            assert entry == (0xFFFFFFFE if kind == 4 and said.kind.max() == Kind.ZERO else 0xFFFFFFFF)
    assert sorted(places) == list(range(used))
    if kind == 2:
        assert places == list(range(count))


@pytest.mark.parametrize("static", [False, True])
def test_each_block_is_where_the_map_says(static: bool) -> None:
    for seed, size in enumerate([40 * MIB, 21 * MIB + 512, MIB, 700, 0]):
        image = scattered(seed, size, MIB // 2)
        check(image, write(image, Options(static=static), placement()), kind=2 if static else 1)


def test_a_layer_allocates_what_is_needed_and_no_more() -> None:
    for seed, size in enumerate([40 * MIB, 21 * MIB + 512]):
        content = scattered(100 + seed, size, MIB // 2, kinds=(Kind.DATA, Kind.ZERO))
        below = of_format("vdi", content, {"modification-uuid": MODIFIED}, IDENTIFIED)
        image = scattered(seed, size, MIB // 2, parent=below)
        check(image, write(image, Options(), placement(), backing=Backing("b.vdi", "vdi")), kind=4)


def test_a_geometry_is_carried() -> None:
    image = disk([], MIB, facts=DiskFacts(geometry=Geometry(100, 16, 63)))
    check(image, write(image, Options(), placement()), geometry=(100, 16, 63))


def test_the_data_area_has_the_phase_of_most_payload() -> None:
    pieces = [
        (0, 512, MIB),
        (2 * MIB, 4 * MIB + 1536, 2 * MIB),
        (6 * MIB, 10 * MIB + 100, 4 * MIB),
        (12 * MIB, 512, 4096),
    ]
    image = disk(pieces, 20 * MIB)
    check(image, write(image, Options(), placement(1 << 30)), phase=1536)
    check(image, write(image, Options(), placement(1024)), phase=512)
    check(image, write(image, Options(), placement(1)), phase=0)
    image = disk([(0, 100, MIB)], MIB)
    check(image, write(image, Options(), placement(4096)))
    image = disk([(1024, 4 * MIB + 2560, MIB), (4 * MIB + 1536, 8 * MIB + 3072, MIB)], 8 * MIB)
    check(image, write(image, Options(), placement(4096)), phase=1536)


def test_the_map_reads_the_same_in_pieces() -> None:
    image = disk([(at * MIB, (40 - at) * MIB, MIB) for at in (1, 2, 3, 7)], 10 * MIB)
    layout = write(image, Options(), placement())
    assert laid_out(layout)[-2:] == ["0x200000 payload 0x2500000+0x300000", "0x500000 end"]
    block_map = next(row.source for row in layout.files[0].table if row.source and row.source.name == "block map")
    whole = block_map.read(0, block_map.size)
    assert all(block_map.read(at, n) == whole[at : at + n] for at in range(16) for n in range(1, 16))


def test_the_largest_disk_and_what_cannot_be_a_parent() -> None:
    assert write(disk([], MOST * MIB), Options(), placement()).files[0].table.size == 0xFFF00000
    with pytest.raises(PlanError, match=f"{MOST + 1} blocks of 1048576 bytes, {MOST} at most") as caught:
        write(disk([], MOST * MIB + 512), Options(), placement())
    assert str(MOST * MIB) in str(caught.value.hint)

    def on(below: Image | None, *, static: bool = False) -> None:
        image = scattered(1, MIB, MIB, parent=below)
        write(image, Options(static=static), placement(), backing=Backing("b.vdi", "vdi"))

    facts = {"modification-uuid": MODIFIED}
    on(of_format("vdi", disk([], MIB), facts, IDENTIFIED))
    for below in (
        None,
        of_format("vhd", disk([], MIB), facts, IDENTIFIED),
        of_format("vdi", disk([], MIB), facts),
    ):
        with pytest.raises(PlanError, match="the parent of a VDI must be a VDI with a UUID"):
            on(below)
    with pytest.raises(PlanError, match="a static VDI cannot have a parent"):
        on(of_format("vdi", disk([], MIB), facts, IDENTIFIED), static=True)
    with pytest.raises(PlanError, match="as large as its parent"):
        on(of_format("vdi", disk([], 2 * MIB), facts, IDENTIFIED))
