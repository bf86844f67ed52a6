"""Reads a persistent bitmap: the ranges of the disk that were written while it was enabled."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vmconv.plugin import Column, DirtyBitmap, Image, PlanError, UsageError, counted, damaged, read_part
from vmconv_qcow2 import structs
from vmconv_qcow2.header import Bitmap, Header, read_bitmaps, read_header

if TYPE_CHECKING:
    from vmconv_qcow2.options import Options

_SLICE = 1 << 20
"""Bytes of a bitmap that are parsed at once; that needs about 100 times as much."""
_MOST_RANGES = 1 << 24
_CLUSTER = 64 << 10
"""Bytes of a cluster if the user names none."""

_Pair = tuple[Column, Column]


def dirty_ranges(image: Image, name: str) -> _Pair:
    """Returns `(start, length)` of the ranges that a bitmap of the image has as written, in bytes.

    They are sorted, and may touch. Raises `UsageError` if there is no such bitmap, `PlanError` if it may lack writes,
    `ImageError` if it is damaged.
    """
    header = read_header(image.file)
    bitmap = bitmap_named(header, name)
    _refuse_incomplete(header, bitmap)
    return ranges_of(header, bitmap)


def ranges_of(header: Header, bitmap: Bitmap) -> _Pair:
    """Returns the ranges that a bitmap has as written, complete or not."""
    count, starts, lengths = 0, [], []
    for start, length in _slices(header, bitmap):
        count += len(start)
        if count > _MOST_RANGES:
            raise PlanError(f"{header.file.name}: bitmap {bitmap.name!r} has more than {_MOST_RANGES} ranges")
        starts.append(start)
        lengths.append(length)
    return np.concatenate(starts), np.concatenate(lengths)


def with_bitmaps(image: Image, *, skip_broken: bool) -> Image:
    """Returns the image with its bitmaps to carry over. Raises `PlanError` if one may lack writes, is unknown, or has
    the name of another.
    """
    header = read_header(image.file)
    found: list[DirtyBitmap] = []
    lost = []
    for bitmap in read_bitmaps(header):
        problem = _unusable(bitmap)
        if problem and not skip_broken:
            raise PlanError(
                f"{image.file.name}: bitmap {bitmap.name!r} {problem}", hint="--skip-broken-bitmaps leaves it out"
            )
        if problem:
            lost.append(f"bitmap {bitmap.name!r}, which {problem}")
            continue
        if any(other.name == bitmap.name for other in found):
            raise PlanError(f"{image.file.name}: several bitmaps are named {bitmap.name!r}")
        enabled = bool(bitmap.flags & structs.BITMAP_AUTO)
        found.append(DirtyBitmap(bitmap.name, 1 << bitmap.granularity_bits, enabled, *ranges_of(header, bitmap)))
    dropped = losses_of_bitmaps(header)
    losses = [loss for loss in image.losses if loss not in dropped]
    return image.carrying(tuple(found), (*losses, *lost))


def _unusable(bitmap: Bitmap) -> str | None:
    """Returns why a bitmap cannot be copied."""
    if bitmap.flags & structs.BITMAP_IN_USE:
        return "is in use, or its last user did not save it, so it may lack writes"
    if bitmap.flags & ~structs.BITMAP_AUTO or bitmap.extra_size:
        return f"has unknown flags ({bitmap.flags:#x}) or data"
    return f"has the unknown type {bitmap.type}" if bitmap.type != structs.DIRTY_BITMAP else None


def losses_of_bitmaps(header: Header) -> list[str]:
    """Returns what a conversion loses that carries over no bitmaps."""
    return [counted(header.bitmaps.nb_bitmaps, "persistent bitmap")] if header.bitmaps is not None else []


def bitmaps_size(image: Image, options: Options) -> int | None:
    """Returns the bytes of copies of all bitmaps with all their clusters; None if either version has no bitmaps.

    Bitmaps that their last user did not save are not copied.
    """
    if image.format_name != "qcow2" or options.version < 3:
        return None
    header = read_header(image.file)
    if header.version < 3:
        return None
    cluster = options.cluster_size or _CLUSTER
    total, directory = 0, 0
    for bitmap in read_bitmaps(header):
        if not bitmap.flags & structs.BITMAP_IN_USE:
            clusters = -(-image.size // ((1 << bitmap.granularity_bits) * 8 * cluster))
            total += clusters * cluster + _rounded(clusters * 8, cluster)
            # An entry ends at a multiple of 8 bytes.
            directory += _rounded(structs.BitmapEntry.sizeof() + len(os.fsencode(bitmap.name)), 8)
    return total + _rounded(directory, cluster)


def _rounded(length: int, unit: int) -> int:
    return -(-length // unit) * unit


def bitmap_named(header: Header, name: str) -> Bitmap:
    """Returns the bitmap with this name; raises `UsageError` if there is none."""
    bitmaps = list(read_bitmaps(header))
    found = [bitmap for bitmap in bitmaps if bitmap.name == name]
    if len(found) != 1:
        have = ", ".join(repr(bitmap.name) for bitmap in bitmaps[:8]) or "none"
        problem = f"{len(found)} bitmaps are named {name!r}" if found else f"no bitmap {name!r}"
        raise UsageError(f"{header.file.name}: {problem}", hint=f"its bitmaps: {have}")
    return found[0]


def _refuse_incomplete(header: Header, bitmap: Bitmap) -> None:
    """Raises `PlanError` if the bitmap may lack writes."""
    what = f"{header.file.name}: bitmap {bitmap.name!r}"
    if bitmap.flags & structs.BITMAP_IN_USE:
        raise PlanError(f"{what} is in use, or its last user did not save it, so it may lack writes")
    if not bitmap.flags & structs.BITMAP_AUTO:
        raise PlanError(f"{what} is disabled, so it may lack writes")
    if bitmap.flags & ~(structs.BITMAP_IN_USE | structs.BITMAP_AUTO) or bitmap.extra_size:
        raise PlanError(f"{what} has unknown flags ({bitmap.flags:#x}) or data")
    if bitmap.type != structs.DIRTY_BITMAP:
        raise PlanError(f"{what} has the unknown type {bitmap.type}")


def _slices(header: Header, bitmap: Bitmap) -> Iterator[_Pair]:
    """Yields the ranges of successive parts of the bitmap."""
    unit, cluster, end = 1 << bitmap.granularity_bits, header.cluster_size, header.size
    span = cluster * 8 * unit
    needed = -(-end // span)
    what, place = f"bitmap {bitmap.name!r}", bitmap.table_offset
    if bitmap.table_size != needed or needed * cluster > structs.MAX_BITMAP_BYTES:
        problem = f"its table has {bitmap.table_size} entries, {needed} expected"
        raise damaged(header.file, what, place, problem)
    table = np.frombuffer(read_part(header.file, what, place, needed * 8), dtype=">u8").astype(np.uint64)
    offset = (table & np.uint64(structs.OFFSET_MASK)).astype(np.int64)
    full = table == 1
    bad = ((table & np.uint64(structs.BITMAP_RESERVED)) != 0) | (offset % cluster != 0)
    bad |= (table & np.uint64(1) != 0) & ~full
    if bad.any():
        number = int(np.flatnonzero(bad)[0])
        raise damaged(header.file, what, place + number * 8, f"entry {number} is {int(table[number]):#x}")
    at_once = max(1, _SLICE // cluster)
    for first in range(0, needed, at_once):
        some = slice(first, min(first + at_once, needed))
        parts = [
            read_part(header.file, what, at, cluster) if at else (b"\xff" if ones else b"\0") * cluster
            for at, ones in zip(offset[some].tolist(), full[some].tolist(), strict=True)
        ]
        yield _ranges(np.frombuffer(b"".join(parts), dtype=np.uint8), first * span, unit, end)
    # An empty disk has no parts.
    yield np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)


def _ranges(data: npt.NDArray[np.uint8], base: int, unit: int, end: int) -> _Pair:
    """Returns the ranges of the bits set; bits past the end of the disk do not count."""
    count = min(len(data) * 8, -(-(end - base) // unit))
    bits = np.unpackbits(data, count=count, bitorder="little")
    edges = np.flatnonzero(np.diff(bits, prepend=np.uint8(0), append=np.uint8(0)))
    start, stop = base + edges[::2] * unit, np.minimum(base + edges[1::2] * unit, end)
    return start, stop - start
