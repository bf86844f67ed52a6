"""Disks and files as strips: what most of each of some thousand equal parts is, for pictures and terminals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vmconv.errors import counted
from vmconv.io.physical import PhysicalMap
from vmconv.model.extents import Column, Extents, Kind, on_storage
from vmconv.model.image import Image
from vmconv.model.plan import Action, FilePlan, Plan
from vmconv.model.sources import Decoded, File, Source

Numbers = npt.NDArray[np.int64]

LAYERS = 6
"""Colours of layers; those further down begin again with the first."""


class Category(NamedTuple):
    """What a range is: `look` names its colour and pattern, `payload` that it never vanishes beside larger ranges."""

    look: str
    words: str
    payload: bool = True


UNALLOCATED = Category("hole", "not allocated, reads as zero", payload=False)
ZERO = Category("zero", "zero", payload=False)
METADATA = Category("metadata", "metadata, or not used")
COMPRESSED = Category("metadata", "metadata, compressed payload, or not used")
FILE_HOLE = Category("hole", "hole of the file", payload=False)
SHARED = Category("shared", "shared with the source")
KEPT = Category("shared", "kept where it is")
COPIED = Category("copied", "copied")
WRITTEN = Category("metadata", "written: metadata")


class Strip(NamedTuple):
    """An address space of `size` bytes in equal parts.

    `category` has the index in `categories` of each part, and `full` whether it is at least half of the part. `bytes`
    are the sums of the categories. A part with any payload shows payload.
    """

    title: str
    size: int
    categories: tuple[Category, ...]
    category: npt.NDArray[np.uint8]
    full: npt.NDArray[np.bool_]
    bytes: tuple[int, ...]


class Ranges(NamedTuple):
    """Ranges in order, in bytes, with the index of each one's category."""

    start: Column
    length: Column
    category: Numbers


def strip(title: str, size: int, ranges: Ranges, categories: Sequence[Category], parts: int) -> Strip:
    """Returns the strip of an address space; bytes in no range are of the first category."""
    edges = np.linspace(0, size, parts + 1)
    covered = np.zeros((len(categories), parts))
    sums = [0] * len(categories)
    for index in range(len(categories)):
        chosen = ranges.category == index
        start, length = ranges.start[chosen], ranges.length[chosen]
        sums[index] = int(length.sum())
        covered[index] = np.diff(_covered_before(edges, start, length))
    sums[0] += size - sum(sums)
    covered[0] += size / parts - covered.sum(axis=0)
    weight = covered.copy()
    payload = np.array([category.payload for category in categories])
    # A megabyte in a disk of a terabyte would not be seen otherwise. What rounding leaves is less than a part in 10^12.
    weight[~payload] *= np.where(covered[payload].sum(axis=0) > 0, 1e-9, 1.0)
    best = weight.argmax(axis=0).astype(np.uint8)
    full = covered[best, np.arange(parts)] * 2 * parts >= size
    return Strip(title, size, tuple(categories), best, full, tuple(sums))


def _covered_before(edges: npt.NDArray[np.float64], start: Column, length: Column) -> npt.NDArray[np.float64]:
    """Returns how many bytes of the ranges lie before each edge."""
    if not len(start):
        return np.zeros(len(edges))
    before = np.concatenate([[0], np.cumsum(length)]).astype(np.float64)
    row = np.searchsorted(start, edges, side="right") - 1
    inside = np.clip(edges - start[row], 0, length[row])
    return np.where(row < 0, 0.0, before[row] + inside)


def of_image(image: Image, parts: int, file_parts: int) -> list[Strip]:
    """Returns the strips of a guest's disk and of each file with its payload, the disk first."""
    disk, table, categories, index = _disk(image, parts)
    found = [disk]
    sources = [table.sources[one] for one in np.unique(table.source[table.kind == Kind.DATA]).tolist()]
    decoded = {id(source.file): source.file for source in sources if isinstance(source, Decoded)}
    files = {id(source): source for source in sources if isinstance(source, File)} | decoded
    for file in files.values():
        chosen = (table.kind == Kind.DATA) & np.isin(
            table.source, [i for i, s in enumerate(table.sources) if s is file]
        )
        payload = Ranges(table.offset[chosen], table.length[chosen], index[chosen])
        rest = COMPRESSED if id(file) in decoded else METADATA
        found.append(_of_file(file, payload, [rest, FILE_HOLE], categories, file_parts))
    return found


def of_disk(image: Image, parts: int) -> Strip:
    """Returns the strip of a guest's disk alone."""
    return _disk(image, parts)[0]


def _disk(image: Image, parts: int) -> tuple[Strip, Extents, Sequence[Category], Numbers]:
    """Returns the strip of a guest's disk, the table of all layers, its categories and the index of each row's."""
    table, depths = _stacked(image)
    categories, index = _categories(table, depths, [layer.file.name for layer in image.chain()])
    ranges = Ranges(table.start, table.length, index)
    found = strip(f"the guest's disk, {image.format_name}", image.size, ranges, categories, parts)
    return found, table, categories, index


def _stacked(image: Image) -> tuple[Extents, dict[int, int]]:
    """Returns the table of all layers, and the depth of each source in it."""
    depths: dict[int, int] = {}
    table = Extents.filled(image.size, Kind.HOLE)
    for depth, layer in enumerate(image.chain()):
        for source in layer.stored.sources:
            depths.setdefault(id(source), depth)
        table = table.over(layer.stored)
    return table, depths


def _categories(table: Extents, depths: dict[int, int], names: Sequence[str]) -> tuple[list[Category], Numbers]:
    """Returns the categories of a guest's disk, and the index of each row's."""
    categories = [UNALLOCATED, ZERO]
    of_source = []
    for source in table.sources:
        category = _category(source, depths[id(source)], names)
        if category not in categories:
            categories.append(category)
        of_source.append(categories.index(category))
    # Rows without a source have the index -1.
    index = np.array([*of_source, 0])[table.source]
    index[table.kind == Kind.ZERO] = 1
    return categories, index


def _category(source: Source, depth: int, names: Sequence[str]) -> Category:
    where = f" of {names[depth]}" if len(names) > 1 else ""
    if isinstance(source, Decoded):
        return Category(f"compressed layer{depth % LAYERS}", f"compressed payload{where}")
    return Category(f"layer{depth % LAYERS}", f"payload{where}")


def _of_file(
    file: File, payload: Ranges, others: Sequence[Category], categories: Sequence[Category], parts: int
) -> Strip:
    """Returns the strip of a file: payload, holes, and the rest; `others` are those of the rest and of holes."""
    shown = sorted(set(payload.category.tolist()))
    payload = payload._replace(category=np.searchsorted(shown, payload.category) + 2)
    ranges = _in_order(_once(payload), _holes(file))
    table = PhysicalMap(encoded=True).apply(Extents.whole(file))
    # Holes, and what has no address, keep their window onto the file.
    extents = int(np.isin(table.source, [index for index, one in enumerate(table.sources) if one is not file]).sum())
    title = f"{file.name}, {counted(extents, 'extent')} on storage" if extents else file.name
    return strip(title, file.size, ranges, [*others, *(categories[one] for one in shown)], parts)


def _holes(file: File) -> Ranges:
    """Returns the holes of a file, which have no payload: it would be ZERO in the table."""
    if file.is_device:
        return Ranges(*(np.zeros(0, dtype=np.int64) for _ in Ranges._fields))
    table = on_storage(file)
    hole = table.kind == Kind.ZERO
    return Ranges(table.start[hole], table.length[hole], np.ones(int(hole.sum()), dtype=np.int64))


def _in_order(*parts: Ranges) -> Ranges:
    joined = Ranges(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    order = np.argsort(joined.start, kind="stable")
    return Ranges(*(column[order] for column in joined))


def _once(ranges: Ranges) -> Ranges:
    """Returns the ranges in order, without the parts that an earlier one has: blocks can be used twice."""
    start, length, category = _in_order(ranges)
    end = start + length
    before = np.concatenate([[0], np.maximum.accumulate(end)[:-1]]) if len(end) else end
    start = np.maximum(start, before)
    there = end > start
    return Ranges(start[there], (end - start)[there], category[there])


def of_plan(plan: Plan, parts: int) -> list[Strip]:
    """Returns the strip of each file that a plan makes."""
    return [_planned(file, plan, parts) for file in plan.files]


def _planned(file: FilePlan, plan: Plan, parts: int) -> Strip:
    categories = [ZERO, KEPT if plan.destination == "source" else SHARED, COPIED, WRITTEN]
    place = {Action.SHARE: 1, Action.COPY: 2, Action.WRITE: 3}
    of_action = np.array([place[action] for action in Action])
    steps = file.steps
    return strip(file.name, file.size, Ranges(steps.offset, steps.length, of_action[steps.action]), categories, parts)
