"""The pages of a RAM block that is mapped into a file: a bitmap of those that were written, and their place."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vmconv.plugin import Column, Extents, File, Kind, Kinds, damaged
from vmconv_memory.ranges import PAGE

_SLICE = 1 << 20
"""Bytes of a bitmap that are read at once: 32 GiB of RAM."""


def mapped_table(file: File, length: int, bitmap: int, pages: int) -> Extents:
    """Returns the table of a block of `length` bytes; pages that were never written are ZERO."""
    count = length // PAGE

    def slices() -> Iterator[tuple[Kinds, int, Column] | int]:
        for first in range(0, count, _SLICE * 8):
            n = min(_SLICE * 8, count - first)
            size = -(-n // 8)
            at = bitmap + first // 8
            if not file.data_ranges(at, at + size):
                yield n
                continue
            bits = np.unpackbits(np.frombuffer(file.read(at, size), dtype=np.uint8), bitorder="little")[:n]
            kind = np.where(bits, Kind.DATA, Kind.HOLE).astype(np.uint8)
            where = pages + (first + np.arange(n, dtype=np.int64)) * PAGE
            past = np.flatnonzero((kind == Kind.DATA) & (where + PAGE > file.size))
            if len(past):
                page, place = (first + int(past[0])) * PAGE, int(where[past[0]])
                raise damaged(file, "page", place, f"ends past the end of the file ({file.size:#x})", guest=page)
            yield kind, 0, np.where(kind == Kind.DATA, where, 0)

    return Extents.from_units(PAGE, length, slices(), [file]).without_holes()
