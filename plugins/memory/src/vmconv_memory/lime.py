"""Reads and writes LiME images, version 1: ranges of RAM, each behind a header of 32 bytes.

Headers shift the payload by 32 bytes each, and 128 of them by 4096. So 127 ranges of 16 bytes before the large one
bring its payload to an offset where it can be shared.
"""

from __future__ import annotations

import numpy as np

from vmconv.plugin import (
    Blob,
    Column,
    Columns,
    Extents,
    File,
    Image,
    ImageError,
    Kind,
    Layout,
    OutFile,
    Placement,
    PlanError,
    UsageError,
    cut,
    damaged,
    read_part,
    spread,
)
from vmconv_memory import structs
from vmconv_memory.ranges import MAX_RANGES, Entries, Segments, behind, segments

_HEADER = structs.LIME.size
_MAGIC = structs.LIME_MAGIC.to_bytes(4, "little")
_SMALL = 16
"""Bytes of RAM in a small range. With its header it takes 48 bytes of the file, 32 more than of the memory."""


def read(file: File, *, snapshot: str | None = None) -> Image:
    """Returns the memory in `file`; all headers are read now."""
    if snapshot is not None:
        raise UsageError(f"{file.name}: LiME images have no snapshots, {snapshot!r} was requested")
    entries = Entries(file, "range")
    at = 0
    while at < file.size and not (at and behind(file, at, _HEADER, _MAGIC)):
        at = _add(entries, file, at)
    if not len(entries):
        raise ImageError(f"{file.name}: has no ranges")
    table = entries.table()
    data = {"ranges": len(entries), "machine-state": "none"}
    details = {"format-specific": {"type": "lime", "data": data}}
    warning = behind(file, at, _HEADER, _MAGIC)
    return Image(
        "lime",
        file,
        table.size,
        lambda: table,
        kind="memory",
        warnings=(warning,) if warning else (),
        details=lambda: details,
    )


def _add(entries: Entries, file: File, at: int) -> int:
    """Adds the range whose header is at an offset; returns the offset of the next header."""
    head = structs.LIME.unpack(read_part(file, "range header", at, _HEADER))
    magic, version, first, last, _ = (int(value) for value in head)
    if magic != structs.LIME_MAGIC:
        raise entries.error(at, f"{magic:#x} is not the magic number {structs.LIME_MAGIC:#x}")
    if version != structs.LIME_VERSION:
        raise damaged(file, "version", at + 4, f"{version} is not {structs.LIME_VERSION}")
    if last < first:
        raise entries.error(at, f"last address {last:#x} is less than the first, {first:#x}")
    length = last - first + 1
    entries.add(at, first, length, length, at + _HEADER)
    return at + _HEADER + length


def write(image: Image, placement: Placement) -> Layout:
    """Returns the layout of a LiME image; raises `PlanError` if the RAM has too many ranges."""
    table = image.stored
    modulus = placement.modulus
    try:
        found = segments(image, table, modulus, MAX_RANGES // max(1, modulus // _HEADER), _SMALL)
    except PlanError:
        # With so many ranges, small ones between them are too many.
        modulus = 1
        found = segments(image, table, modulus, MAX_RANGES)
    start, length, header = _pieces(found, modulus)
    size = int(header[-1] + _HEADER + length[-1])
    rows, lengths = cut(table, start, length, header + _HEADER)
    own = Columns(
        header,
        np.full(len(header), Kind.DATA, dtype=np.uint8),
        np.full(len(header), len(table.sources), dtype=np.int32),
        np.arange(len(header), dtype=np.int64) * _HEADER,
    )
    every = np.concatenate([np.full(len(header), _HEADER, dtype=np.int64), lengths])
    sources = (*table.sources, Blob("range headers", _headers(start, length)))
    return Layout((OutFile(Extents.placed(size, Columns.join([own, rows]), every, sources)),))


def _headers(start: Column, length: Column) -> bytes:
    headers = np.zeros(len(start), dtype=structs.LIME_TYPE)
    headers["magic"], headers["version"] = structs.LIME_MAGIC, structs.LIME_VERSION
    headers["first"], headers["last"] = start, start + length - 1
    return headers.tobytes()


def _pieces(found: Segments, modulus: int) -> tuple[Column, Column, Column]:
    """Returns start and length of each range to write, and the offset of its header."""
    small = _small_ranges(found, modulus)
    segment, place = spread(small + 1)
    is_last = place == small[segment]
    start = found.start[segment] + place * _SMALL
    length = np.where(is_last, found.length[segment] - small[segment] * _SMALL, _SMALL)
    span = length + _HEADER
    return start, length, np.cumsum(span) - span


def _small_ranges(found: Segments, modulus: int) -> Column:
    """Returns the number of small ranges before the rest of each segment, so that its payload keeps its phase."""
    counts = np.zeros(len(found.start), dtype=np.int64)
    at = 0
    most = modulus // _HEADER - 1
    for number, (length, phase) in enumerate(zip(found.length.tolist(), found.phase.tolist(), strict=True)):
        shift, odd = divmod((phase - at) % modulus, _HEADER)
        count = (shift - 1) % (most + 1) if most > 0 and phase >= 0 and not odd else 0
        # A range that is not longer than its small ranges gains nothing.
        counts[number] = count if count * _SMALL + modulus <= length else 0
        at += length + _HEADER * (int(counts[number]) + 1)
    return counts
