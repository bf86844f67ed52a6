"""Writes QED images: a pure function from the guest's table to the table of the output file.

    header | L1 table | L2 tables | payload

Payload is placed so that it can be shared: in the order of its sources, each run congruent to its source. The L2
tables are computed on writing, a slice at a time.
"""

from __future__ import annotations

import os

import numpy as np

from vmconv.plugin import (
    Backing,
    Blob,
    Column,
    Columns,
    Extents,
    Image,
    Kind,
    Layout,
    OutFile,
    Placeholder,
    Placement,
    PlanError,
    Source,
    blocks,
    cut,
    distinct,
    spread,
)
from vmconv_qed import structs
from vmconv_qed.options import Options


def write(image: Image, options: Options, placement: Placement, *, backing: Backing | None = None) -> Layout:
    """Returns the layout of a QED image; raises `PlanError` if the disk is too large for its tables."""
    return _Writer(image, options, backing).layout(placement.modulus)


class _Writer:
    def __init__(self, image: Image, options: Options, backing: Backing | None) -> None:
        self.cluster = options.cluster_size
        self.table_bytes = options.table_size * options.cluster_size
        self.entries = self.table_bytes // 8
        self.options = options
        self.backing = backing
        self.size = -(-image.size // structs.SECTOR) * structs.SECTOR
        self._refuse_too_large()
        guest = blocks.padded(blocks.grown(image, self.size, on_parent=backing is not None), self.cluster)
        if backing and image.parent:
            guest = blocks.fill_partial_holes(guest, image.parent.flat.window(0, guest.size), self.cluster)
        self.guest = guest

    def _refuse_too_large(self) -> None:
        most = self.entries**2 * self.cluster
        if self.size <= most:
            return
        raise PlanError(
            f"qed with clusters of {self.cluster} bytes and tables of {self.options.table_size} of them cannot hold "
            f"{self.size} bytes, {most} at most",
            hint=f"use larger clusters, such as -o cluster_size={self.cluster * 4}",
        )

    def layout(self, modulus: int) -> Layout:
        runs = blocks.whole_blocks(self.guest, self.cluster)
        data = runs.take(runs.kind == Kind.DATA)
        # Without a parent nothing must be hidden, and zeros need no entry.
        zero = runs.take((runs.kind == Kind.ZERO) & bool(self.backing))
        tables = _l1_indices([data, zero], self.entries)
        l1, l2 = self.cluster, self.cluster + self.table_bytes
        end = l2 + len(tables) * self.table_bytes
        # Clusters stay unused only if the storage's blocks are larger than clusters.
        align = max(self.cluster, modulus)
        placed = blocks.place(self.guest, data, self.cluster, -(-end // align) * align, modulus)
        size = placed.end if len(placed.run) else end
        data = data.take(placed.run)
        host = self._host(data, placed.offset, zero, size)
        rows, length = cut(self.guest, data.first * self.cluster, data.blocks * self.cluster, placed.offset)
        metadata = [(0, self._header()), (l1, self._l1(tables, l2)), (l2, self._l2(host, tables))]
        return Layout((OutFile(blocks.output_table(metadata, self.guest, rows, length, size)),))

    def _header(self) -> Blob:
        name, features = b"", 0
        if self.backing:
            name, features = os.fsencode(self.backing.reference), structs.BACKING_FILE
            # Other formats are determined by the parent's content.
            features |= structs.BACKING_FORMAT_NO_PROBE if self.backing.format == "raw" else 0
        if len(name) > structs.MAX_BACKING_NAME:
            raise PlanError(f"qed: backing file name of {len(name)} bytes, {structs.MAX_BACKING_NAME} at most")
        header = structs.Header.build(
            {
                "cluster_size": self.cluster,
                "table_size": self.options.table_size,
                "header_size": 1,
                "features": features,
                "compat_features": 0,
                "autoclear_features": 0,
                "l1_table_offset": self.cluster,
                "image_size": self.size,
                "backing_filename_offset": structs.HEADER_LENGTH if name else 0,
                "backing_filename_size": len(name),
            }
        )
        return Blob("header", header + name)

    def _l1(self, tables: Column, l2: int) -> Blob:
        # All entries of the disk: in place, what is not written still has the old table while it is read back.
        entries = np.zeros(-(-self.size // (self.cluster * self.entries)), dtype="<u8")
        entries[tables] = l2 + np.arange(len(tables), dtype=np.int64) * self.table_bytes
        return Blob("L1 table", entries.tobytes())

    def _host(self, data: blocks.Runs, offset: Column, zero: blocks.Runs, size: int) -> Extents:
        """Returns the table from guest clusters to the output file."""
        first = np.concatenate([data.first, zero.first])
        count = np.concatenate([data.blocks, zero.blocks])
        kind = np.concatenate([data.kind, zero.kind])
        source = np.zeros(len(kind), dtype=np.int32)
        where = np.concatenate([offset, np.zeros(len(zero.first), dtype=np.int64)])
        order = np.argsort(first, kind="stable")
        rows = Columns(first * self.cluster, kind, source, where).take(order)
        length = (count * self.cluster)[order]
        return _with_holes(self.guest.size, rows, length, Placeholder("output", size))

    def _l2(self, host: Extents, tables: Column) -> Blob:
        """Returns the concatenated L2 tables of the given L1 entries."""

        def compute(offset: int, length: int) -> bytes:
            first, end = offset // 8, -(-(offset + length) // 8)
            parts = []
            at = first
            while at < end:
                number, skip = divmod(at, self.entries)
                step = min(end - at, self.entries - skip)
                kind, _, place = host.units(self.cluster, int(tables[number]) * self.entries + skip, step)
                place[kind == Kind.ZERO] = structs.ZERO
                parts.append(place.astype("<u8").tobytes())
                at += step
            return b"".join(parts)[offset - first * 8 :][:length]

        return Blob("L2 tables", compute, len(tables) * self.table_bytes)


def _l1_indices(runs: list[blocks.Runs], entries: int) -> Column:
    """Returns the entries of the L1 table that need an L2 table, in order."""
    first, count = (np.concatenate([column[i] for column in runs]) for i in (0, 1))
    low, high = first // entries, (first + count - 1) // entries
    run, place = spread(high - low + 1)
    return distinct(low[run] + place)


def _with_holes(size: int, rows: Columns, length: Column, source: Source) -> Extents:
    """Returns the table of sorted rows with HOLEs between them."""
    end = rows.start + length
    gap = np.concatenate([[0], end]).astype(np.int64)
    gap = gap[np.append(rows.start, size) > gap]
    nothing = np.full(len(gap), -1, dtype=np.int32)
    holes = Columns(gap, np.full(len(gap), Kind.HOLE, dtype=np.uint8), nothing, np.zeros(len(gap), dtype=np.int64))
    both = Columns.join([rows, holes])
    return Extents(size, both.take(np.argsort(both.start, kind="stable")), [source])
