"""Disks of every shape of end, in each subformat, as readers other than QEMU see them; and as QEMU does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import vmconv
from support.disks import MIB, QemuImg, qemu_io
from support.mounts import Mounts
from support.opinions import OTHER_OPTIONS, READERS, Reader, opinion_title, opinions, sum_of
from support.requirements import missing
from support.variants import Variant, make, options, qemu_name, self_contained, title
from vmconv.errors import PlanError, ZeroCopyError
from vmconv.io.registry import installed

KIB = 1 << 10
WHOLE = ("parallels", "qcow2", "qed", "vdi")
"""The formats whose files are blocks up to the end."""


class Shape(NamedTuple):
    """A disk of some bytes, with payload in `(start, length)` pieces and zeros elsewhere."""

    name: str
    size: int
    pieces: tuple[tuple[int, int], ...] = ()


def last(unit: int, size: int) -> Shape:
    """Returns a disk whose last block of `unit` bytes begins with data and ends in zeros."""
    return Shape(f"last-{unit >> 10}K-of-{size}", size, ((0, 12 * KIB), ((size - 1) // unit * unit, 100)))


SHAPES = (
    Shape("no-bytes", 0),
    Shape("empty-sector", 512),
    Shape("empty", 3 * MIB),
    Shape("empty-odd", 8 * MIB + 512),
    Shape("one-sector", 512, ((0, 512),)),
    Shape("two-sectors", 1024, ((0, 1024),)),
    Shape("floppy", 100 * KIB, ((0, 100 * KIB),)),
    Shape("odd-end", 8 * MIB + 512, ((0, 4096), (8 * MIB, 512))),
    Shape("odd-whole", 2 * MIB + 1024, ((0, 2 * MIB + 1024),)),
    Shape("zeros-at-the-odd-end", 8 * MIB + 512, ((0, 4096), (8 * MIB - 4096, 4096))),
    *(last(unit, 20 * MIB + 1536) for unit in (4 * KIB, 64 * KIB, MIB, 2 * MIB, 8 * MIB)),
    *(last(unit, 8 * MIB) for unit in (64 * KIB, MIB, 2 * MIB)),
)

OPTIONS: list[Variant] = [*self_contained(), *OTHER_OPTIONS, ("qcow2", "extended_l2=on"), ("qed", "cluster_size=4K")]


def disk(directory: Path, shape: Shape) -> Path:
    path = directory / f"{shape.name}.raw"
    with path.open("wb") as file:
        file.truncate(shape.size)
        for start, length in shape.pieces:
            file.seek(start)
            file.write(bytes(range(1, 251)) * (length // 250) + b"\xff" * (length % 250))
    return path


class Made(NamedTuple):
    """Disks and their images, which are of one variant."""

    variant: Variant
    images: list[tuple[Path, Path]]


def images(directory: Path, variant: Variant) -> Iterator[tuple[Path, Path]]:
    """Yields disks of all shapes that the variant can hold, and images of them."""
    for shape in SHAPES:
        if shape.size % (4096 if "4096" in variant[1] else 512):
            continue
        raw = disk(directory, shape)
        (directory / shape.name).mkdir()
        try:
            image = make(raw, variant, directory / shape.name)
        except PlanError as exc:
            assert not shape.size, exc
            assert "cannot hold 0 bytes, the nearest size it can hold is" in str(exc)
        else:
            yield raw, image


@pytest.fixture(scope="module")
def made(mounts: Mounts, request: pytest.FixtureRequest) -> Iterator[Made]:
    """The `images` of a variant, sharing the payload of their disks. No test changes them."""
    directory = mounts.get("xfs") / "ends"
    directory.mkdir()
    yield Made(request.param, list(images(directory, request.param)))
    shutil.rmtree(directory)


def assert_read(reader: Reader, made: list[tuple[Path, Path]]) -> None:
    """Fails where a reader sees another disk in an image than its raw one, if it can read all of such a disk."""
    wrong = {}
    made = [(raw, image) for raw, image in made if raw.stat().st_size % reader.unit == 0]
    for (raw, image), said in zip(made, reader.sums_of([image for _, image in made]), strict=True):
        size = vmconv.info(str(image))["virtual-size"]
        if said != (size, sum_of(raw, size)):
            wrong[raw.stem] = said
    assert not wrong, reader.name


OPINIONS = opinions([*self_contained(), *OTHER_OPTIONS])


@pytest.mark.parametrize(("made", "reader"), OPINIONS, ids=[*map(opinion_title, OPINIONS)], indirect=["made"])
def test_another_reader_sees_each_shape_of_end(made: Made, reader: Reader) -> None:
    lack = reader.what_is_missing()
    if lack:
        missing("oracle", f"{reader.name}: {lack}")
    assert_read(reader, made.images)


@pytest.mark.parametrize("made", [v for v in OPTIONS if "sector_size=4096" not in v[1]], ids=title, indirect=True)
def test_qemu_sees_each_shape_of_end(made: Made, qemu_img: QemuImg) -> None:
    name = qemu_name(made.variant)
    for raw, image in made.images:
        qemu_img("compare", "-f", "raw", "-F", name, raw, image)
        # 3: QEMU 7.2 finds space leaked in an empty Parallels disk, its own too, whose tables have several clusters.
        leaks = (3,) if name == "parallels" and "empty" in raw.name else ()
        qemu_img("check", "-f", name, image, ok=(0, 63, *leaks))


# -- files of whole blocks


def beyond_whole_blocks(image: Path) -> int:
    """Returns by how many bytes a file is longer than whole clusters or blocks."""
    said = vmconv.info(str(image))
    begin, unit = int(said["format-specific"]["data"].get("data-offset", 0)), int(said["cluster-size"])
    return (image.stat().st_size - begin) % unit


OF_WHOLE_BLOCKS = [variant for variant in OPTIONS if variant[0] in WHOLE]


@pytest.mark.parametrize("made", OF_WHOLE_BLOCKS, ids=title, indirect=True)
def test_a_file_ends_with_a_whole_block(made: Made) -> None:
    for raw, image in made.images:
        assert beyond_whole_blocks(image) == 0, raw.name


@pytest.mark.parametrize("variant", OF_WHOLE_BLOCKS, ids=title)
def test_a_copied_file_ends_with_a_whole_block(tmp_path: Path, variant: Variant) -> None:
    for raw, image in images(tmp_path, variant):
        assert beyond_whole_blocks(image) == 0, raw.name


IN_PLACE: list[Variant] = [
    *((name, "") for name, one in sorted(installed().formats.items()) if one.in_place),
    ("vhd", "subformat=fixed"),
    ("vmdk", "subformat=monolithicFlat"),
]


@pytest.mark.parametrize("variant", IN_PLACE, ids=title)
def test_each_shape_of_end_is_changed_in_place(ext4_dir: Path, qemu_img: QemuImg, variant: Variant) -> None:
    name = variant[0]
    made: list[tuple[Path, Path]] = []
    for shape in SHAPES:
        raw, kept = disk(ext4_dir, shape), ext4_dir / f"{shape.name}.kept"
        shutil.copy(raw, kept)
        image = ext4_dir / f"{shape.name}{installed().formats[name].suffixes[0]}"
        try:
            vmconv.convert(str(raw), str(image), in_place=True, options=options(variant))
        except PlanError as exc:
            assert not shape.size, (shape, exc)
            continue
        assert name not in WHOLE or beyond_whole_blocks(image) == 0, shape
        qemu_img("compare", "-f", "raw", "-F", qemu_name(variant), kept, image)
        made.append((kept, image))
    for reader in READERS[name]:
        if not reader.what_is_missing():
            assert_read(reader, made)


@pytest.mark.parametrize("variant", [("qcow2", ""), ("qcow2", "compat=0.10"), ("qed", ""), ("vdi", "")], ids=title)
def test_a_layer_ends_with_a_whole_block(tmp_path: Path, qemu_img: QemuImg, variant: Variant) -> None:
    base = disk(tmp_path, Shape("base", 20 * MIB + 1536, ((0, 20 * MIB + 1536),)))
    qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "raw", tmp_path / "top.qcow2")
    qemu_io(tmp_path / "top.qcow2", "write -P 1 4M 4k", "write -z 8M 1M", f"write -z {20 * MIB} 1536")
    target = tmp_path / "new" / f"top.{variant[0]}"
    target.parent.mkdir()
    vmconv.convert(str(tmp_path / "top.qcow2"), str(target), chain=True, options=options(variant))
    for layer in target.parent.iterdir():
        assert beyond_whole_blocks(layer) == 0, layer.name
    assert vmconv.compare(str(tmp_path / "top.qcow2"), str(target))


def test_the_odd_end_of_a_source_is_copied_and_a_hole_is_not(xfs_dir: Path) -> None:
    raw = disk(xfs_dir, Shape("odd", 8 * MIB + 512, ((0, 8 * MIB + 512),)))
    for name in WHOLE:
        target = xfs_dir / f"odd{installed().formats[name].suffixes[0]}"
        totals = vmconv.convert(str(raw), str(target)).totals
        assert (totals.shared, totals.copied) == (8 * MIB, 512), name
        with pytest.raises(ZeroCopyError, match="less than a 4096-byte block at the edge"):
            vmconv.convert(str(raw), str(target), force=True, zero_copy="require")
        with raw.open("r+b") as file:
            file.truncate(8 * MIB)
            file.truncate(8 * MIB + 512)
        vmconv.convert(str(raw), str(target), force=True, zero_copy="require")
        disk(xfs_dir, Shape("odd", 8 * MIB + 512, ((0, 8 * MIB + 512),)))
