"""The QED writer, against a parser of its own: headers, tables and places."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from support.written import Said, disk, laid_out, scattered, unpacked
from vmconv.errors import PlanError
from vmconv.model.extents import Extents, Kind
from vmconv.model.image import Image
from vmconv.model.layout import Backing, Layout, Placement
from vmconv.testing import disk_of
from vmconv.testing.memory import MemoryFile
from vmconv_qed.options import Options
from vmconv_qed.writer import write

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40
VARIANTS = [
    {"cluster_size": 4096, "table_size": 2},
    {"cluster_size": 4096, "table_size": 4},
    {"cluster_size": 8192},
    {},
]


def check(image: Image, layout: Layout, *, on_parent: bool = False) -> dict[str, Any]:
    """Checks that the tables say of each cluster what they have to, and that nothing else is in the file."""
    file = layout.files[-1].table
    magic, cluster, table_size, head, features, *others = unpacked(file, 0, "<4sIIIQQQQQII")
    compatible, autoclear, l1, size, name_at, name_length = others
    assert (magic, head, compatible, autoclear) == (b"QED\0", 1, 0, 0)
    assert (size, l1) == (-(-image.size // 512) * 512, cluster)
    length = cluster * table_size
    wanted = Said(image, on_parent=on_parent)
    found: dict[int, int] = {}
    places = [0]
    first = np.frombuffer(file.read(l1, min(length, file.size - l1)), dtype="<u8")
    for number in np.flatnonzero(first).tolist():
        places.append(int(first[number]) // cluster)
        entries = np.frombuffer(file.read(int(first[number]), length), dtype="<u8")
        assert entries.any()
        found |= {number * (length // 8) + i: int(entries[i]) for i in np.flatnonzero(entries).tolist()}
    tables = len(places) - 1
    assert sorted(places[1:]) == [1 + table_size * (1 + i) for i in range(tables)]
    used = []
    for number in range(-(-size // cluster)):
        entry = found.pop(number, 0)
        block = wanted.block(number * cluster, cluster)
        kind = block.kind.max()
        if kind == Kind.DATA:
            assert entry > 1
            used.append(entry // cluster)
            assert file.window(entry, cluster) == block
        else:
            assert entry == (1 if kind == Kind.ZERO and on_parent else 0)
    assert not found
    head_clusters = 1 + table_size * (1 + tables)
    assert sorted(used) == list(range(file.size // cluster - len(used), file.size // cluster))
    assert len(set(used)) == len(used)
    assert file.size == (head_clusters + len(used)) * cluster
    return {"features": features, "name": file.read(name_at, name_length), "name_at": name_at}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_each_cluster_is_where_its_entry_says(variant: dict[str, Any]) -> None:
    cluster = variant.get("cluster_size", 65536)
    for seed, size in enumerate([40 * cluster, 21 * cluster + 512, cluster, 700, 0]):
        image = scattered(seed, size, cluster // 2)
        assert check(image, write(image, Options(**variant), Placement(512))) == {
            "features": 0,
            "name": b"",
            "name_at": 0,
        }


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("base", ["raw", "qcow2"])
def test_a_layer_allocates_what_is_needed_and_no_more(variant: dict[str, Any], base: str) -> None:
    cluster = variant.get("cluster_size", 65536)
    for seed, size in enumerate([40 * cluster, 21 * cluster + 512]):
        below = scattered(100 + seed, size, cluster // 2, kinds=(Kind.DATA, Kind.ZERO))
        image = scattered(seed, size, cluster // 2, parent=below)
        found = check(
            image, write(image, Options(**variant), Placement(), backing=Backing("b.img", base)), on_parent=True
        )
        assert found == {"features": 5 if base == "raw" else 1, "name": b"b.img", "name_at": 64}


def test_a_run_that_begins_in_one_table_and_ends_in_the_next_but_one() -> None:
    image = disk([(4 * MIB + 4096, 0, 8 * MIB)], 32 * MIB)
    check(image, write(image, Options(cluster_size=4096, table_size=2), Placement()))


def test_tables_of_distant_addresses_are_neighbours_in_the_file() -> None:
    image = disk([(0, 0, 4096), (4 * MIB - 4096, MIB, 8192), (12 * MIB, 512 * KIB, 4096)], 12 * MIB + 4096)
    layout = write(image, Options(cluster_size=4096, table_size=2), Placement())
    check(image, layout)
    assert laid_out(layout) == [
        "0x0 header",
        "0x1000 L1 table",
        "0x3000 L2 tables",
        "0x9000 payload 0x0+0x1000",
        "0xa000 payload 0x80000+0x1000",
        "0xb000 payload 0x100000+0x2000",
        "0xd000 end",
    ]
    blob = next(row.source for row in layout.files[0].table if row.source and row.source.name == "L2 tables")
    whole = blob.read(0, blob.size)
    for start in (0, 1, 8, 4090, 8185, 16383, 16384):
        for length in (1, 7, 8, 9, 4096, 8200):
            assert blob.read(start, min(length, blob.size - start)) == whole[start : start + length]


def test_payload_begins_where_the_storage_can_share_it() -> None:
    image = disk([(0, 0x30000, 4096), (8192, 0x11000, 4096)], MIB)
    assert laid_out(write(image, Options(cluster_size=4096, table_size=2), Placement(65536)))[-3:] == [
        "0x11000 payload 0x11000+0x1000",
        "0x20000 payload 0x30000+0x1000",
        "0x21000 end",
    ]


def test_a_layer_of_zeros_needs_tables_and_no_clusters() -> None:
    below = disk([(0, 0, MIB)], MIB)
    image = disk_of(Extents.filled(MIB), MemoryFile("top", 0), parent=below)
    check(image, write(image, Options(), Placement(), backing=Backing("b", "raw")), on_parent=True)


def test_a_layer_needs_no_tables_for_its_parents_ranges() -> None:
    image = disk_of(Extents.filled(16 * MIB, Kind.HOLE), MemoryFile("top", 0), parent=disk([(0, 0, MIB)], 16 * MIB))
    layout = write(image, Options(cluster_size=4096, table_size=2), Placement(), backing=Backing("b", "raw"))
    check(image, layout, on_parent=True)


def test_a_parent_that_was_not_opened_can_be_named() -> None:
    image = disk([(0, 0, MIB)], 2 * MIB)
    layout = write(image, Options(), Placement(), backing=Backing("b", "qcow2"))
    assert check(image, layout, on_parent=True)["features"] == 1


def test_a_disk_that_is_flattened_has_no_parent() -> None:
    image = scattered(1, 40 * 65536, 32768, parent=scattered(2, 40 * 65536, 32768))
    assert check(image, write(image, Options(), Placement()))["name"] == b""


def test_a_disk_of_zeros_is_a_header_and_room_for_a_table() -> None:
    layout = write(disk([], MIB), Options(cluster_size=4096, table_size=2), Placement())
    # The table is written: in place, there may be an old one.
    assert laid_out(layout) == ["0x0 header", "0x1000 L1 table", "0x3000 end"]


def test_the_largest_disk_and_the_longest_name() -> None:
    def plan(size: int, name: str = "", **fields: Any) -> None:
        image = disk_of(Extents.filled(size, Kind.HOLE), MemoryFile("top", 0), parent=disk([], size))
        write(image, Options(**fields), Placement(), backing=Backing(name, "raw") if name else None)

    plan(1 << 32, cluster_size=4096, table_size=2)
    with pytest.raises(PlanError, match="hold 4294967808 bytes, 4294967296 at most") as caught:
        plan((1 << 32) + 512, cluster_size=4096, table_size=2)
    assert "cluster_size=16384" in str(caught.value.hint)
    plan(512, "a" * 1023)
    with pytest.raises(PlanError, match="name of 1024 bytes, 1023 at most"):
        plan(512, "a" * 1024)


def test_the_last_entry_of_a_full_table_is_its_end() -> None:
    image = disk([((1 << 32) - 4096, 0, 4096)], 1 << 32)
    layout = write(image, Options(cluster_size=4096, table_size=2), Placement())
    assert laid_out(layout) == [
        "0x0 header",
        "0x1000 L1 table",
        "0x3000 L2 tables",
        "0x5000 payload 0x0+0x1000",
        "0x6000 end",
    ]
