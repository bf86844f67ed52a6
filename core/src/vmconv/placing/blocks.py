"""A disk in whole blocks: what every writer of a block-allocating format (clusters, grains, blocks) starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from vmconv.model.extents import Column, Columns, Extents, Kind, Kinds, cut, distinct, gather
from vmconv.model.sources import Blob, Source

if TYPE_CHECKING:
    from vmconv.model.image import Image


class Runs(NamedTuple):
    """Blocks in guest order, without a gap: `blocks` blocks from block number `first`.

    A run that is not `mixed` lies inside one row of the table; a mixed run is one block in which rows meet, and its
    kind is DATA when any of it is, else ZERO when any of it is.
    """

    first: Column
    blocks: Column
    kind: Kinds
    mixed: npt.NDArray[np.bool_]

    def take(self, index: npt.NDArray[np.bool_] | Column) -> Runs:
        return Runs(self.first[index], self.blocks[index], self.kind[index], self.mixed[index])

    def joined(self, other: Runs) -> Runs:
        """Returns these runs and then the others."""
        return Runs(
            np.concatenate([self.first, other.first]),
            np.concatenate([self.blocks, other.blocks]),
            np.concatenate([self.kind, other.kind]),
            np.concatenate([self.mixed, other.mixed]),
        )


def grown(image: Image, size: int, *, on_parent: bool) -> Extents:
    """Returns the table of a disk whose format rounds its size up to `size`; with `on_parent`, of its layer alone.

    What is added reads as zero. A parent that is longer than the layer would show there, so it is ZERO above one.
    """
    if not on_parent:
        return image.flat.window(0, size, Kind.ZERO)
    shown = image.parent is not None and image.parent.size > image.size
    return image.guest.window(0, size, Kind.ZERO if shown else Kind.HOLE)


def padded(table: Extents, unit: int) -> Extents:
    """Returns the table with its size rounded up to whole units.

    What is added is a HOLE where all of the last unit is one, else ZERO: no guest sees it, so nothing of a parent has
    to be copied for it.
    """
    silent = len(table) and table.kind[-1] == Kind.HOLE and int(table.start[-1]) <= table.size // unit * unit
    return table.window(0, -(-table.size // unit) * unit, Kind.HOLE if silent else Kind.ZERO)


def whole_blocks(table: Extents, unit: int) -> Runs:
    """Returns the runs of a table whose size is whole units."""
    if table.size % unit:
        raise ValueError(f"{table.size} bytes are not whole units of {unit}")
    first, last = -(-table.start // unit), table.end // unit
    full = first < last
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


def fill_partial_holes(table: Extents, parent: Extents, unit: int) -> Extents:
    """Returns the table with no block that is partly a HOLE: in those, the HOLE is what the parent says there.

    A format that allocates whole blocks cannot leave a part of one to the parent.
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
    """Returns where a layer says anything: ZERO there, whatever it says, else HOLE. For bitmaps of sectors.

    Payload may end in the middle of a sector; what a layer says does not once partial holes are filled.
    """
    kind = np.minimum(table.kind, np.uint8(Kind.ZERO))
    return Extents(table.size, table.columns._replace(kind=kind))


class Placed(NamedTuple):
    """Where runs of blocks go: `run` indexes the runs in the order of their `offset`, bytes; `end` of all."""

    run: Column
    offset: Column
    end: int


def preferred(table: Extents, runs: Runs, unit: int) -> tuple[Column, Column]:
    """Returns the source of each run of blocks, and the offset in it where the run begins: where it would like to be.

    Of a run in which rows meet, the first row of DATA decides.
    """
    address = runs.first * unit
    row = np.arange(len(table), dtype=np.int64)
    next_data = np.minimum.accumulate(np.where(table.kind == Kind.DATA, row, len(table) - 1)[::-1])[::-1]
    lead = next_data[table.row_at(address)]
    return table.source[lead].astype(np.int64), table.offset[lead] - (table.start[lead] - address)


def place(table: Extents, runs: Runs, unit: int, base: int, modulus: int) -> Placed:
    """Returns places for runs of blocks from offset `base` on, each congruent to its source where blocks allow it.

    Runs go in the order of their sources, not of the guest: what lies together in a source stays together, so that it
    can be shared in one piece however the guest's disk is scattered over it. `base` must be a multiple of both `unit`
    and `modulus`, which are powers of two.
    """
    source, wanted = preferred(table, runs, unit)
    order = np.lexsort((wanted, source))
    source, wanted, length = source[order], wanted[order], (runs.blocks * unit)[order]
    if not len(order):
        return Placed(order, order, base)
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (source[1:] != source[:-1]) | (wanted[1:] != wanted[:-1] + length[:-1])
    group = np.cumsum(begins) - 1
    phase = wanted[begins] % modulus
    phase[phase % unit != 0] = 0
    inside = np.cumsum(length) - length
    inside -= inside[begins][group]
    total = np.add.reduceat(length, np.flatnonzero(begins))
    span = -(-(phase + total) // modulus) * modulus
    start = base + np.cumsum(span) - span + phase
    offset = start[group] + inside
    return Placed(order, offset, int(offset[-1] + length[-1]))


class Output(Source):
    """The address space of an output file that is being planned, for tables that say where in it a block goes."""

    name = "output"

    def __init__(self, size: int) -> None:
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        raise NotImplementedError("the output is being planned")


def output_table(
    metadata: Sequence[tuple[int, Blob]], guest: Extents, rows: Columns, length: Column, size: int
) -> Extents:
    """Returns the table of an output file of `size` bytes: metadata at its offsets, the rows of `guest` at theirs."""
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
