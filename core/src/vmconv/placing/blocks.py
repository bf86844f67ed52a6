"""Disks in whole blocks (clusters, grains), for writers of block-allocating formats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from vmconv.model.extents import Column, Columns, Extents, Kind, Kinds, cut, distinct, gather
from vmconv.model.sources import Blob

if TYPE_CHECKING:
    from vmconv.model.image import Image


class Runs(NamedTuple):
    """Runs of blocks in guest order: `blocks` blocks from block number `first`.

    A run lies inside one row of the table. A `mixed` run is one block in which rows meet: its kind is DATA if any row
    is DATA, else ZERO if any is ZERO.
    """

    first: Column
    blocks: Column
    kind: Kinds
    mixed: npt.NDArray[np.bool_]

    def take(self, index: npt.NDArray[np.bool_] | Column) -> Runs:
        return Runs(self.first[index], self.blocks[index], self.kind[index], self.mixed[index])

    def joined(self, other: Runs) -> Runs:
        """Returns these runs followed by the others."""
        return Runs(
            np.concatenate([self.first, other.first]),
            np.concatenate([self.blocks, other.blocks]),
            np.concatenate([self.kind, other.kind]),
            np.concatenate([self.mixed, other.mixed]),
        )


def grown(image: Image, size: int, *, on_parent: bool) -> Extents:
    """Returns the table of a disk, grown to `size` bytes of zeros; with `on_parent`, of its layer alone."""
    if not on_parent:
        return image.flat.window(0, size, Kind.ZERO)
    # A HOLE would show the bytes of a parent that is longer than the layer.
    shown = image.parent is not None and image.parent.size > image.size
    return image.guest.window(0, size, Kind.ZERO if shown else Kind.HOLE)


def padded(table: Extents, unit: int) -> Extents:
    """Returns the table with its size rounded up to whole units; no guest reads the padding.

    The padding is a HOLE if the rest of the last unit is one, else ZERO.
    """
    # The last unit must not become partly HOLE: the parent's bytes would have to be copied into it.
    silent = len(table) and table.kind[-1] == Kind.HOLE and int(table.start[-1]) <= table.size // unit * unit
    return table.window(0, -(-table.size // unit) * unit, Kind.HOLE if silent else Kind.ZERO)


def whole_blocks(table: Extents, unit: int) -> Runs:
    """Returns the runs of a table; raises `ValueError` if its size is not a multiple of `unit`."""
    if table.size % unit:
        raise ValueError(f"{table.size} bytes are not whole units of {unit}")
    first, last = -(-table.start // unit), table.end // unit
    full = first < last
    # Blocks in which a row begins, but not at the block's start.
    inner = table.start[table.start % unit != 0]
    mixed = distinct(inner // unit)
    kind = np.empty(0, dtype=np.uint8)
    if len(mixed):
        rows = gather(table, mixed * unit, np.full(len(mixed), unit), mixed * unit)
        kind = np.maximum.reduceat(rows.kind, np.searchsorted(rows.start, mixed * unit))
    runs = Runs(
        np.concatenate([first[full], mixed]),
        np.concatenate([(last - first)[full], np.ones(len(mixed), dtype=np.int64)]),
        np.concatenate([table.kind[full], kind]),
        np.concatenate([np.zeros(int(full.sum()), dtype=bool), np.ones(len(mixed), dtype=bool)]),
    )
    return runs.take(np.argsort(runs.first, kind="stable"))


def pieces(runs: Runs, most: int) -> Iterator[tuple[int, int]]:
    """Yields first block and number of blocks of pieces of at most `most`; runs that follow each other are one."""
    first, count = runs.first, runs.blocks
    begins = np.ones(len(first), dtype=bool)
    begins[1:] = first[1:] != (first + count)[:-1]
    total = np.add.reduceat(count, np.flatnonzero(begins)) if len(first) else count
    for start, length in zip(first[begins].tolist(), total.tolist(), strict=True):
        for at in range(0, length, most):
            yield start + at, min(most, length - at)


def fill_partial_holes(table: Extents, parent: Extents, unit: int) -> Extents:
    """Returns the table with the parent's rows in each HOLE that is a part of a block.

    A format that allocates whole blocks cannot leave a part of a block to the parent.
    """
    runs = whole_blocks(table, unit)
    mixed = runs.first[runs.mixed] * unit
    if not len(mixed):
        return table
    rows, length = cut(table, mixed, np.full(len(mixed), unit), mixed)
    hole = rows.kind == Kind.HOLE
    if not hole.any():
        return table
    return table.replaced(table.over(parent).without_holes(), rows.start[hole], length[hole])


def allocated(table: Extents) -> Extents:
    """Returns ZERO where a layer is allocated (DATA or ZERO), else HOLE; for sector bitmaps.

    DATA may end inside a sector. Allocation does not, after `fill_partial_holes`.
    """
    kind = np.minimum(table.kind, np.uint8(Kind.ZERO))
    return Extents(table.size, table.columns._replace(kind=kind))


class Placed(NamedTuple):
    """The placement of runs: `run` indexes them, sorted by their `offset` in bytes; `end` is the end of the last."""

    run: Column
    offset: Column
    end: int


def preferred(table: Extents, address: Column) -> tuple[Column, Column]:
    """Returns the source of each block at `address`, and the block's offset in it: its preferred offset in the output.

    For a block in which rows meet, its first DATA row decides.
    """
    row = np.arange(len(table), dtype=np.int64)
    next_data = np.minimum.accumulate(np.where(table.kind == Kind.DATA, row, len(table) - 1)[::-1])[::-1]
    lead = next_data[table.row_at(address)]
    return table.source[lead].astype(np.int64), table.offset[lead] - (table.start[lead] - address)


def place(table: Extents, runs: Runs, unit: int, base: int, modulus: int) -> Placed:
    """Returns offsets for runs from `base` on, congruent to their sources modulo `modulus` if `unit` allows it.

    Runs are placed in source order instead of guest order: contiguous runs stay contiguous, so a fragmented disk is
    shared in few ranges. `base` must be a multiple of `unit` and `modulus`, which are powers of two.
    """
    source, wanted = preferred(table, runs.first * unit)
    order = np.lexsort((wanted, source))
    source, wanted, length = source[order], wanted[order], (runs.blocks * unit)[order]
    if not len(order):
        return Placed(order, order, base)
    # Groups of runs that are contiguous in their source; each is placed as one.
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (source[1:] != source[:-1]) | (wanted[1:] != wanted[:-1] + length[:-1])
    group = np.cumsum(begins) - 1
    phase = wanted[begins] % modulus
    # No block can begin at such a phase; the group is copied.
    phase[phase % unit != 0] = 0
    inside = np.cumsum(length) - length
    inside -= inside[begins][group]
    total = np.add.reduceat(length, np.flatnonzero(begins))
    span = -(-(phase + total) // modulus) * modulus
    start = base + np.cumsum(span) - span + phase
    offset = start[group] + inside
    return Placed(order, offset, int(offset[-1] + length[-1]))


def output_table(
    metadata: Sequence[tuple[int, Blob]], guest: Extents, rows: Columns, length: Column, size: int
) -> Extents:
    """Returns the table of an output file of `size` bytes: metadata at its offsets, and the given rows of payload.

    `rows` have the sources of `guest`.
    """
    there = [(offset, blob) for offset, blob in metadata if blob.size]
    first = len(guest.sources)
    made = Columns(
        np.array([offset for offset, _ in there], dtype=np.int64),
        np.full(len(there), Kind.DATA, dtype=np.uint8),
        np.arange(first, first + len(there), dtype=np.int32),
        np.zeros(len(there), dtype=np.int64),
    )
    made_length = np.array([blob.size for _, blob in there], dtype=np.int64)
    sources = (*guest.sources, *(blob for _, blob in there))
    return Extents.placed(size, Columns.join([made, rows]), np.concatenate([made_length, length]), sources)
