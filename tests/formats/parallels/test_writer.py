"""The Parallels writer, against a parser of its own: header, BAT and places."""

from __future__ import annotations

import numpy as np
import pytest

from support.written import Said, disk, laid_out, same_in_pieces, scattered, unpacked
from vmconv.errors import PlanError
from vmconv.model.extents import Kind
from vmconv.model.image import Image
from vmconv.model.layout import Layout, Placement
from vmconv_parallels.options import Options
from vmconv_parallels.writer import write

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40


def check(image: Image, layout: Layout, *, tight: bool = True) -> None:
    """Checks that the BAT says of each cluster what it has to, and that nothing else is in the file."""
    file = layout.files[-1].table
    magic, version, heads, cylinders, tracks, entries, sectors, *rest = unpacked(file, 0, "<16sIIIIIQIIIQ")
    in_use, data_at, flags, extension = rest
    assert (magic, version, heads) == (b"WithouFreSpacExt", 2, 16)
    assert (in_use, flags, extension) == (0x312E3276, 0, 0)
    size, cluster = sectors * 512, tracks * 512
    assert size == -(-image.size // 512) * 512
    assert cylinders == min(sectors // (16 * 32), 0xFFFFFFFF)
    assert entries == -(-size // cluster)
    assert 64 + entries * 4 <= data_at * 512
    bat = np.frombuffer(file.read(64, entries * 4), dtype="<u4").tolist()
    wanted = Said(image, on_parent=False)
    for number, entry in enumerate(bat):
        block = wanted.block(number * cluster, cluster)
        assert bool(entry) == (block.kind.max() == Kind.DATA)
        if entry:
            assert entry * cluster >= data_at * 512
            assert file.window(entry * cluster, cluster) == block
    used = [entry for entry in bat if entry]
    assert len(set(used)) == len(used)
    if tight:
        assert data_at * 512 == -(-(64 + entries * 4) // cluster) * cluster
        assert sorted(used) == list(range(data_at * 512 // cluster, file.size // cluster))
    assert file.size == (max(used) + 1) * cluster if used else data_at * 512
    assert layout.files[-1].slack


@pytest.mark.parametrize("cluster", [512, 4096, 65536, MIB])
@pytest.mark.parametrize("seed", range(2))
def test_each_cluster_is_where_its_entry_says(cluster: int, seed: int) -> None:
    for size in (150 * cluster, 112 * cluster, 21 * cluster + 512, cluster, 700, 0):
        image = scattered(seed, size, max(512, cluster // 2))
        check(image, write(image, Options(cluster_size=cluster), Placement()))


def test_payload_begins_where_the_storage_can_share_it() -> None:
    image = disk([(0, 0x30000, 4096), (8192, 0x11000, 4096)], MIB)
    layout = write(image, Options(cluster_size=4096), Placement(65536))
    check(image, layout, tight=False)
    assert laid_out(layout) == [
        "0x0 header",
        "0x40 BAT",
        "0x11000 payload 0x11000+0x1000",
        "0x20000 payload 0x30000+0x1000",
        "0x21000 end",
    ]
    same_in_pieces(layout)


def test_payload_in_the_place_of_the_bat_moves() -> None:
    image = disk([(0, 0, 3 * MIB), (8 * MIB, 5 * MIB, MIB)], 16 * MIB + 512, source_size=6 * MIB)
    source = image.flat.sources[0]
    layout = write(image, Options(), Placement(1, "image", carrier=source))  # type: ignore[arg-type]
    check(image, layout, tight=False)
    assert laid_out(layout) == [
        "0x0 header",
        "0x40 BAT",
        "0x100000 payload 0x100000+0x200000",
        "0x500000 payload 0x500000+0x100000",
        "0x600000 payload 0x0+0x100000",
        "0x700000 end",
    ]


def test_the_largest_disks() -> None:
    def plan(size: int, cluster: int, end: int = 0) -> None:
        write(disk([(0, 0, end)] if end else [], size, source_size=1 << 61), Options(cluster_size=cluster), Placement())

    most = (0x7FFFFFFF // 4) * 4096
    plan(most, 4096)
    with pytest.raises(PlanError, match=f"hold {most + 512} bytes, {most} at most") as caught:
        plan(most + 512, 4096)
    assert "cluster_size=8192" in str(caught.value.hint)
    with pytest.raises(PlanError) as caught:
        plan(0x7FFFFFFF // 4 * 8192, 4096)
    assert "cluster_size=8192" in str(caught.value.hint)
    with pytest.raises(PlanError) as caught:
        plan(0x7FFFFFFF // 4 * 8192 + 512, 4096)
    assert "cluster_size=16384" in str(caught.value.hint)
    with pytest.raises(PlanError) as caught:
        plan(1 << 61, 4096)
    assert "cluster_size=1073741824" in str(caught.value.hint)


def test_a_cluster_has_a_number_of_32_bits() -> None:
    """In place, payload lies where it lies: in a device, that may be far behind the beginning."""

    def plan(at: int) -> Layout:
        image = disk([(0, at, 4096)], MIB, source_size=at + 4096)
        carrier = image.flat.sources[0]
        return write(image, Options(cluster_size=4096), Placement(1, "image", carrier=carrier))  # type: ignore[arg-type]

    most = 0xFFFFFFFF * 4096
    assert unpacked(plan(most).files[0].table, 64, "<I") == (0xFFFFFFFF,)
    with pytest.raises(PlanError, match="clusters of 4096 bytes cannot name clusters past 0x100000000000"):
        plan(most + 4096)


def test_the_geometry_of_the_largest_disks() -> None:
    (cylinders,) = unpacked(write(disk([], 1 << 50), Options(cluster_size=GIB), Placement()).files[0].table, 24, "<I")
    assert cylinders == 0xFFFFFFFF
