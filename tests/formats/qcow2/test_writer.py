"""The qcow2 writer, against a parser of its own: tables, reference counts and places of small and of huge disks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from support.written import Said, disk, laid_out, same_in_pieces, scattered, unpacked
from vmconv.errors import PlanError
from vmconv.model.extents import Extents, Kind
from vmconv.model.image import Image
from vmconv.model.layout import Backing, Layout, Placement
from vmconv.model.sources import Blob
from vmconv.testing import disk_of
from vmconv.testing.malformed import memory_limit
from vmconv.testing.memory import MemoryFile
from vmconv_qcow2 import clusters
from vmconv_qcow2.options import Options
from vmconv_qcow2.writer import _Writer, write

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
COPIED = 1 << 63


class Parsed:
    """A qcow2 file as its specification has it."""

    def __init__(self, table: Extents) -> None:
        self.table = table
        magic, self.version, self.name_at, self.name_length, bits, self.size, crypt, *rest = unpacked(
            table, 0, ">4sIQIIQI"
        )
        assert (magic, crypt, rest) == (b"QFI\xfb", 0, [])
        self.l1_size, self.l1, self.counting, self.counting_clusters, *snapshots = unpacked(table, 36, ">IQQIIQ")
        assert snapshots == [0, 0]
        self.incompatible, self.compatible, self.autoclear, order, self.length = 0, 0, 0, 4, 72
        if self.version == 3:
            self.incompatible, self.compatible, self.autoclear, order, self.length = unpacked(table, 72, ">QQQII")
            assert (self.length, unpacked(table, 104, ">Q")) == (112, (0,))
        self.cluster, self.refcount_bits = 1 << bits, 1 << order
        self.entry = 16 if self.incompatible & 16 else 8
        self.entries = self.cluster // self.entry
        self.each = self.cluster * 8 // self.refcount_bits
        assert table.size % self.cluster == 0
        self.tables = self.words(self.l1, self.l1_size)
        self.blocks = self.words(self.counting, self.counting_clusters * self.cluster // 8)

    def words(self, at: int, count: int) -> list[int]:
        """Returns big-endian words, without zeros at the end."""
        found = np.frombuffer(self.table.read(at, count * 8), dtype=">u8")
        return [int(word) for word in found[: np.flatnonzero(found).max(initial=-1) + 1]]

    def extensions(self) -> Iterator[tuple[int, bytes]]:
        at = self.length
        while True:
            kind, length = unpacked(self.table, at, ">II")
            if not kind:
                return
            yield kind, self.table.read(at + 8, length)
            at += 8 + -(-length // 8) * 8

    def mapped(self) -> dict[int, tuple[int, int]]:
        """Returns entry and bitmap of each guest cluster that has one."""
        found: dict[int, tuple[int, int]] = {}
        for number, table in enumerate(self.tables):
            if table:
                assert table & COPIED
                data = np.frombuffer(self.table.read(table ^ COPIED, self.cluster), dtype=">u8")
                words = data.reshape(self.entries, -1)
                some = {
                    number * self.entries + i: (int(words[i, 0]), int(words[i, 1:].sum()))
                    for i in np.flatnonzero(words.any(axis=1)).tolist()
                }
                assert some, "a table that says nothing"
                found |= some
        return found

    def used(self) -> Counter[int]:
        """Returns how often each cluster of the file is referred to."""
        found = [0, *range(self.counting // self.cluster, self.counting // self.cluster + self.counting_clusters)]
        found += [block // self.cluster for block in self.blocks if block]
        l1_clusters = -(-self.l1_size * 8 // self.cluster)
        found += range(self.l1 // self.cluster, self.l1 // self.cluster + l1_clusters)
        found += [(table ^ COPIED) // self.cluster for table in self.tables if table]
        found += [(entry ^ COPIED) // self.cluster for entry, _ in self.mapped().values() if entry & COPIED]
        return Counter(found)

    def counted(self) -> Counter[int]:
        """Returns the stored count of each cluster of the file."""
        found: Counter[int] = Counter()
        bits = self.refcount_bits
        for number, block in enumerate(self.blocks):
            data = self.table.read(block, self.cluster).rstrip(b"\0") if block else b""
            data += bytes(-len(data) % 8)
            stream = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little" if bits < 8 else "big")
            for i in np.flatnonzero(stream.reshape(-1, bits).any(axis=1)).tolist():
                value = stream[i * bits : (i + 1) * bits]
                found[number * self.each + i] = int(
                    sum(2**k for k in np.flatnonzero(value if bits < 8 else value[::-1]))
                )
        return found


def options(**fields: Any) -> Options:
    return Options(**fields)


VARIANTS = [
    {},
    {"cluster_size": 512},
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 512, "refcount_bits": 32},
    {"cluster_size": 1024, "refcount_bits": 8},
    {"cluster_size": 4096, "refcount_bits": 1},
    {"cluster_size": 512, "refcount_bits": 2},
    {"cluster_size": 512, "refcount_bits": 4},
    {"cluster_size": 2 * MIB},
    {"cluster_size": 512, "compat": "0.10"},
    {"cluster_size": 16384, "extended_l2": True},
    {"extended_l2": True, "lazy_refcounts": True},
]


def check(image: Image, layout: Layout, *, on_parent: bool = False, tight: bool = True) -> Parsed:
    """Checks that an image says of each cluster of the disk what it has to, and counts each cluster that it uses."""
    file = layout.files[-1].table
    found = Parsed(file)
    cluster, extended = found.cluster, found.entry == 16
    unit = cluster // 32 if extended else cluster
    assert found.size == -(-image.size // 512) * 512
    assert found.l1_size == max(1, -(-found.size // (cluster * found.entries)))
    mapped, wanted = found.mapped(), Said(image, on_parent=on_parent)
    for number in range(-(-found.size // cluster)):
        entry, bitmap = mapped.pop(number, (0, 0))
        parts = [wanted.block(number * cluster + at, unit) for at in range(0, cluster, unit)]
        kinds = [Kind(int(part.kind.max())) for part in parts]
        real = {Kind.DATA, Kind.ZERO} if on_parent and found.version == 2 else {Kind.DATA}
        if real & set(kinds):
            assert entry & COPIED
            host = entry ^ COPIED
            assert host % cluster == 0
            for i, part in enumerate(parts):
                assert file.window(host + i * unit, unit) == part.without_holes()
        else:
            assert entry == (1 if Kind.ZERO in kinds and on_parent and not extended else 0)
        if extended:
            bits = sum(1 << i for i, kind in enumerate(kinds) if kind == Kind.DATA)
            bits |= sum(1 << 32 + i for i, kind in enumerate(kinds) if kind == Kind.ZERO and on_parent)
            # What it says of subclusters past the end of the disk does not matter.
            inside = (1 << -(-min(cluster, found.size - number * cluster) // unit)) - 1
            assert bitmap & (inside << 32 | inside) == bits & (inside << 32 | inside)
    assert not mapped
    used = found.used()
    assert set(used.values()) == {1}
    assert found.counted() == used
    assert (max(used) + 1) * cluster == file.size
    last = max(i for i, block in enumerate(found.blocks) if block)
    assert last == max(used) // found.each
    assert found.counting_clusters == -(-(last + 1) * 8 // cluster)
    if tight:
        assert len(used) * cluster == file.size
    return found


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("modulus", [1, 4096])
def test_each_cluster_is_where_its_entry_says_and_is_counted(variant: dict[str, Any], modulus: int) -> None:
    cluster = variant.get("cluster_size", 65536)
    blocks = 10 if cluster > 4096 else 150
    for seed, size in enumerate([blocks * cluster, blocks * cluster // 2 + 512, cluster, 700, 0]):
        unit = max(512, cluster // 2)
        image = scattered(seed, size, unit)
        layout = write(image, options(**variant), Placement(modulus))
        found = check(image, layout, tight=modulus <= cluster)
        assert (found.cluster, found.refcount_bits) == (cluster, variant.get("refcount_bits", 16))
        assert found.version == (2 if variant.get("compat") == "0.10" else 3)
        assert found.incompatible == (16 if variant.get("extended_l2") else 0)
        assert found.compatible == (1 if variant.get("lazy_refcounts") else 0)
        assert found.autoclear == 0
        assert (found.name_at, found.name_length, list(found.extensions())) == (0, 0, [])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_layer_allocates_what_is_needed_and_no_more(variant: dict[str, Any]) -> None:
    cluster = variant.get("cluster_size", 65536)
    blocks = 10 if cluster > 4096 else 80
    for seed, size in enumerate([blocks * cluster, blocks * cluster // 2 + 512]):
        unit = max(512, cluster // 64)
        below = scattered(100 + seed, size, unit, kinds=(Kind.DATA, Kind.ZERO), longest=128)
        image = scattered(seed, size, unit, parent=below, longest=256)
        layout = write(image, options(**variant), Placement(512), backing=Backing("base.img", "raw"))
        found = check(image, layout, on_parent=True)
        assert found.table.read(found.name_at, found.name_length) == b"base.img"
        assert list(found.extensions()) == [(0xE2792ACA, b"raw")]


def test_many_refcount_blocks_and_two_clusters_of_their_table() -> None:
    """Of 64 counts to a block and 64 blocks to a cluster of the table."""
    image = disk([(0, 0, 2 * MIB)], 2 * MIB)
    layout = write(image, options(cluster_size=512, refcount_bits=64), Placement())
    assert check(image, layout).counting_clusters == 2


def test_a_run_that_begins_in_one_table_and_ends_in_the_next_but_one() -> None:
    image = disk([(32 * KIB + 512, 0, 64 * KIB)], MIB)
    assert [bool(table) for table in check(image, write(image, options(cluster_size=512), Placement())).tables] == [
        False,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("size", "fields", "written"),
    [
        (0, {}, 8),
        (65536, {}, 16),
        (4 * 65536, {}, 24),
        (65536, {"refcount_bits": 1}, 8),
        (512 * 64, {"cluster_size": 512, "refcount_bits": 64}, 512 + 6 * 8),
    ],
    ids=str,
)
def test_counts_are_written_up_to_the_last_that_is_not_zero(size: int, fields: dict[str, Any], written: int) -> None:
    """In whole words: with little payload, the header, two clusters that count, L1 and L2 table are counted too."""
    image = disk([(0, 0, size)] if size else [], MIB)
    file = write(image, options(**fields), Placement()).files[0].table
    assert [row.length for row in file if row.source and row.source.name == "refcount blocks"] == [written]


def test_tables_of_distant_addresses_are_neighbours_in_the_file() -> None:
    image = disk([(0, 0, 512), (MIB, MIB, 512), (3 * MIB, 512, 512)], 4 * MIB)
    layout = write(image, options(cluster_size=512), Placement(512))
    assert laid_out(layout) == [
        "0x0 header",
        "0x200 refcount table",
        "0x400 refcount blocks",
        "0x600 L1 table",
        "0xa00 L2 tables",
        "0x1000 payload 0x0+0x400",
        "0x1400 payload 0x100000+0x200",
        "0x1600 end",
    ]
    same_in_pieces(layout)
    same_in_pieces(write(image, options(cluster_size=16384, extended_l2=True), Placement(512)))


def test_payload_goes_to_congruent_places_behind_the_tables() -> None:
    image = disk([(0, 0x30000, 0x10000), (0x40000, 0x50000, 0x20000)], MIB)
    assert laid_out(write(image, options(), Placement(1 << 18)))[-3:] == [
        "0xb0000 payload 0x30000+0x10000",
        "0xd0000 payload 0x50000+0x20000",
        "0xf0000 end",
    ]


def test_values_past_a_limit_are_refused() -> None:
    def plan(size: int, pieces: list[tuple[int, int, int]], **fields: Any) -> None:
        write(disk(pieces, size), options(**fields), Placement())

    # 4 Mi entries of an L1 table, each for 64 clusters.
    plan(128 * GIB, [], cluster_size=512)
    with pytest.raises(PlanError, match=f"L1 table of 33554440 bytes; {128 * GIB} bytes are the largest") as caught:
        plan(128 * GIB + 512, [], cluster_size=512)
    assert "cluster_size=8192" in str(caught.value.hint)
    with pytest.raises(PlanError, match="needs an L1 table") as caught:
        plan(1 << 61, [], cluster_size=1 << 20)
    assert "cluster_size=2097152" in str(caught.value.hint)
    # With payload everywhere, as a compressed archive is planned: no table is counted before the size is refused.
    full = Extents.of([(0, Kind.DATA, Blob("payload", lambda _, length: bytes(length), 1 << 61), 0)], 1 << 61)
    with memory_limit(), pytest.raises(PlanError, match="needs an L1 table"):
        write(disk_of(full, MemoryFile("x.raw", 0)), options(), Placement())
    with pytest.raises(PlanError, match=r"a refcount table of 8[0-9]* bytes, 8388608 at most"):
        plan(40 * GIB, [(0, 0, 32 * GIB)], cluster_size=512, refcount_bits=64)
    writer = _Writer(disk([], 512), options(cluster_size=512), Placement(), None)
    assert writer._tables(512, np.arange(1 << 20)).first_block == 512 + 8 * MIB
    with pytest.raises(PlanError, match="8388616 bytes, 8388608 at most"):
        writer._tables(512, np.arange((1 << 20) + 1))


# -- the size of clusters


@pytest.mark.parametrize("shift", [1 << bits for bits in range(9, 16)])
@pytest.mark.parametrize("spare", [0, 512])
def test_clusters_are_the_largest_that_share_what_can_be_shared(shift: int, spare: int) -> None:
    image = disk([(0, shift, 64 * MIB), (80 * MIB, 80 * MIB + 3 * shift + spare * 0, 64 * MIB)], GIB)
    expected = shift if shift >= 1024 else 65536
    # Tables of 512-byte clusters are 1/64 of the payload and more; refcounts of 16 bits add 1/256.
    expected = 512 if shift == 512 else expected
    assert clusters.cluster_size(image.flat, 65536, 16) == expected


def test_clusters_stay_large_for_little_payload_and_little_gain() -> None:
    aligned, shifted = (0, 0, 8 * MIB), (16 * MIB, 4096, 8 * MIB - 4096)
    table = disk([aligned, shifted], 64 * MIB).flat
    # Half can be shared as it is.
    assert clusters.cluster_size(table, 4096, 16) == 65536
    table = disk([(0, 0, 7 * MIB), shifted], 64 * MIB).flat
    assert clusters.cluster_size(table, 65536, 16) == 4096
    # Half of it and no more: the shifted half would need small clusters.
    halves = [(0, 65536, 8 * MIB), (16 * MIB + 4096, 32 * MIB, 8 * MIB)]
    assert clusters.cluster_size(disk(halves, 64 * MIB).flat, 65536, 16) == 65536
    # Small clusters share half of it, large ones nothing.
    halves = [(0, 100, 8 * MIB), (16 * MIB + 4096, 32 * MIB, 8 * MIB)]
    assert clusters.cluster_size(disk(halves, 64 * MIB).flat, 65536, 16) == 4096
    # Nothing can be shared at all.
    assert clusters.cluster_size(disk([(0, 100, 8 * MIB)], 64 * MIB).flat, 4096, 16) == 65536
    # One page in each MiB: an L2 table for each.
    sparse = [(at * MIB, 4096 * (2 * at + 1) + 512, 8192) for at in range(32)]
    assert clusters.cluster_size(disk(sparse, 64 * MIB).flat, 512, 16) == 65536


@pytest.mark.parametrize("modulus", [512, 4096, 65536])
def test_only_whole_blocks_at_congruent_places_can_be_shared(modulus: int) -> None:
    pieces = [(0, 100, 3000), (8192, 8192, 8192), (MIB, MIB + 512, 200000), (2 * MIB, 5 * MIB - 1, 65538)]
    pieces += [(3 * MIB + 1024, 6 * MIB, 262144), (4 * MIB, 7 * MIB + 4096, 300), (5 * MIB, 8 * MIB + 4096, 131072)]
    payload = clusters._Payload.of(disk(pieces, 9 * MIB).flat, modulus)
    assert payload.bytes == sum(length for *_, length in pieces)
    for unit in (512, 1024, 4096, 65536):
        shared = 0
        for address, offset, length in pieces:
            inside = [at for at in range(0, 10 * MIB, modulus) if offset <= at and at + modulus <= offset + length]
            if (offset - address) % min(unit, modulus) == 0:
                shared += len(inside) * modulus
        assert payload.shared_in(unit) == shared


def tables_of(pieces: list[tuple[int, int, int]], size: int, unit: int, bits: int) -> float:
    """Returns the bytes of all tables, counted one by one."""
    span = unit // 8 * unit
    l2 = {at // span for address, _, length in pieces for at in range(address, address + length, 512)}
    data = sum(len({at // unit for at in range(address, address + length, 512)}) for address, _, length in pieces)
    l1 = -(-size // span) * 8
    refcounts = ((data + len(l2)) * unit + l1) // unit * bits // 8
    return len(l2) * unit + l1 + refcounts + -(-refcounts // unit) * 8


@pytest.mark.parametrize("unit", [512, 4096])
@pytest.mark.parametrize("bits", [1, 16, 64])
def test_tables_are_counted_before_the_cluster_is_chosen(unit: int, bits: int) -> None:
    for pieces in (
        [],
        [(0, 0, 512)],
        [(0, 0, MIB), (5 * MIB + 512, 512, MIB)],
        [(32768 - 512, 0, 1024), (3 * MIB, MIB, 32768)],
        [(0, 0, 512), (600 * 512, 0, 9 * 512), (7 * MIB, 0, 3 * MIB + 1536)],
    ):
        table = disk(pieces, 16 * MIB + 512).flat
        assert clusters._tables(table, unit, bits) == tables_of(pieces, 16 * MIB + 512, unit, bits)


def test_tables_that_the_format_has_no_room_for_are_infinite() -> None:
    empty = disk([], 128 * GIB).flat
    assert clusters._tables(empty, 512, 16) == (128 * GIB >> 15) * 8 + (128 * GIB >> 15) * 8 // 512 * 2 * 65 // 64
    assert clusters._tables(disk([], 128 * GIB + 512).flat, 512, 16) == float("inf")
    # 8 MiB of refcount table: 1 Mi blocks of 64 counts, and a hundredth less.
    assert clusters._tables(disk([(0, 0, 31 * GIB)], 64 * GIB).flat, 512, 64) < float("inf")
    assert clusters._tables(disk([(0, 0, 32 * GIB)], 64 * GIB).flat, 512, 64) == float("inf")


# -- in place


def in_place(image: Image, **fields: Any) -> Layout:
    return write(image, options(**fields), Placement(1, "image", carrier=image.flat.sources[0]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shift", "cluster"), [(0, 65536), (65536, 65536), (4096, 4096), (3 * 4096, 4096), (512, 512), (32768 + 1024, 1024)]
)
def test_payload_stays_in_the_largest_clusters_that_it_can_stay_in(shift: int, cluster: int) -> None:
    pieces = [
        (65536, 65536 + shift, 65536),
        (131072, 5 * 65536 + shift, 131072),
        (1024 * KIB, 640 * KIB + shift, 65536),
    ]
    image = disk(pieces, 2 * MIB, source_size=MIB)
    layout = in_place(image)
    found = check(image, layout, tight=False)
    assert found.cluster == cluster
    places = [row for row in layout.files[0].table if row.source is image.flat.sources[0]]
    assert all(row.start == row.offset for row in places)
    assert min(found.counting, found.l1, *(t ^ COPIED for t in found.tables if t)) >= MIB
    assert layout.files[0].slack


def test_the_header_is_counted_where_nothing_else_is_near() -> None:
    """A block of refcounts speaks for 2 GiB."""
    image = disk([(0, 4 * GIB, 65536)], MIB, source_size=5 * GIB)
    found = check(image, in_place(image, cluster_size=65536), tight=False)
    assert [bool(block) for block in found.blocks] == [True, False, True]


def test_payload_in_the_place_of_the_header_moves_behind_the_end() -> None:
    image = disk([(0, 0, 196608)], MIB, source_size=196608)
    layout = in_place(image)
    check(image, layout, tight=False)
    assert laid_out(layout) == [
        "0x0 header",
        "0x10000 payload 0x10000+0x20000",
        "0x30000 payload 0x0+0x10000",
        "0x40000 refcount table",
        "0x50000 refcount blocks",
        "0x60000 L1 table",
        "0x70000 L2 tables",
        "0x80000 end",
    ]


def test_an_empty_disk_becomes_an_image_in_place() -> None:
    source = MemoryFile("source.raw", 0)
    layout = write(disk_of(Extents.filled(0), source), options(), Placement(1, "image", carrier=source))
    assert laid_out(layout) == ["0x0 header", "0x10000 refcount table", "0x20000 refcount blocks", "0x40000 end"]


def test_tables_too_heavy_for_what_stays_are_refused_in_place() -> None:
    pieces = [(at * 40 * KIB, at * 1024 + 512, 512) for at in range(1, 4096)]
    image = disk(pieces, 256 * MIB, source_size=8 * MIB)
    with pytest.raises(PlanError, match=r"clusters of 512 bytes, which need [0-9]* bytes of tables for 2096640 bytes"):
        in_place(image)
    with pytest.raises(PlanError, match="need 1049600 bytes of tables for 970752 bytes"):
        in_place(disk(pieces[:1896], 256 * MIB, source_size=8 * MIB))
    # 1 MiB of tables is never too heavy.
    image = disk(pieces[:1895], 256 * MIB, source_size=8 * MIB)
    assert Parsed(in_place(image).files[0].table).cluster == 512


def test_clusters_of_a_data_file_lie_at_their_addresses() -> None:
    source = MemoryFile("disk.raw", GIB)
    for at in (0, 1, 5, 9000):
        source.write(at * 65536, b"x" * 65536)
    image = disk_of(Extents.whole(source).without_holes(), source)
    found = Parsed(write(image, options(data_file="disk.raw"), Placement()).files[0].table)
    assert found.mapped() == {at: (at * 65536 | COPIED, 0) for at in (0, 1, 5, 9000)}


def test_in_place_nothing_may_refer_to_the_source_or_hide_the_parent_with_clusters() -> None:
    below = disk([(0, 0, MIB)], MIB)
    rows = disk([(65536, 65536, 65536)], MIB, source_size=MIB)
    image = disk_of(rows.guest, rows.file, parent=below)  # type: ignore[arg-type]
    backing = Backing("base.img", "raw")
    carrier = Placement(1, "image", carrier=image.flat.sources[0])  # type: ignore[arg-type]
    check(image, write(image, options(), carrier, backing=backing), on_parent=True, tight=False)
    with pytest.raises(PlanError, match="version 2 cannot hide its parent's content"):
        write(image, options(compat="0.10"), carrier, backing=backing)
    with pytest.raises(PlanError, match="in place, an image cannot refer to its source"):
        write(image, options(subformat="reference"), carrier, backing=backing)
    with pytest.raises(PlanError, match="subformat=reference needs its source as backing file"):
        write(image, options(subformat="reference"), Placement())


# -- the header


def test_names_of_other_files_must_fit_into_the_header_cluster() -> None:
    image = disk_of(Extents.filled(512, Kind.HOLE), MemoryFile("top", 512), parent=disk([], 512))

    def plan(name: str, **fields: Any) -> Parsed:
        layout = write(image, options(**fields), Placement(), backing=Backing(name, "raw"))
        return Parsed(layout.files[0].table)

    # 112 bytes of header, 8 + 8 of the parent's format, 8 of the last extension.
    found = plan("a" * (512 - 136), cluster_size=512)
    assert (found.name_at, found.name_length) == (136, 376)
    with pytest.raises(PlanError, match="need 401 bytes of the header cluster, it has 400, and 1023"):
        plan("a" * (512 - 135), cluster_size=512)
    assert plan("b" * 1023).name_length == 1023
    with pytest.raises(PlanError, match="names of other files need"):
        plan("b" * 1024)
    assert plan("c", compat="0.10").name_at == 72 + 24
