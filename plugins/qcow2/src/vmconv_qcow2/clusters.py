"""The default cluster size: 64K, or less if only smaller clusters can share the payload.

Small clusters have a price: large tables, of which QEMU's cache covers a smaller part of the disk, and a smaller
maximum size. So they are chosen only if most of the disk would be copied otherwise, and the tables stay small.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vmconv.plugin import Column, Extents, Kind, distinct, spread
from vmconv_qcow2 import structs

DEFAULT = 65536
SMALLEST = 512
LARGEST_TABLES = 0.025
"""Limit of table bytes per byte of payload for small clusters."""


def cluster_size(table: Extents, modulus: int, refcount_bits: int) -> int:
    """Returns the cluster size in bytes: 64K, or the largest that shares nearly as much as any size."""
    payload = _Payload.of(table, modulus)
    if payload.shared_in(DEFAULT) * 2 >= payload.bytes:
        return DEFAULT
    best = payload.shared_in(SMALLEST)
    if best * 2 < payload.bytes:
        return DEFAULT
    units = (1 << bits for bits in range(DEFAULT.bit_length() - 2, SMALLEST.bit_length() - 2, -1))
    unit = next(unit for unit in units if payload.shared_in(unit) >= 0.99 * best)
    return unit if _tables(table, unit, refcount_bits) <= LARGEST_TABLES * payload.bytes else DEFAULT


class _Payload(NamedTuple):
    """The shareable parts of a disk: for each row its whole blocks, in bytes, and its shift."""

    modulus: int
    bytes: int
    shift: Column
    whole: Column

    @classmethod
    def of(cls, table: Extents, modulus: int) -> _Payload:
        rows = table.in_files()
        offset, length = table.offset[rows], table.length[rows]
        whole = (offset + length) // modulus - -(-offset // modulus)
        return cls(modulus, int(length.sum()), offset - table.start[rows], np.maximum(whole, 0) * modulus)

    def shared_in(self, unit: int) -> int:
        """Returns the bytes that clusters of `unit` bytes can place at congruent offsets, and so share."""
        return int(self.whole[self.shift % min(unit, self.modulus) == 0].sum())


def _tables(table: Extents, unit: int, refcount_bits: int) -> float:
    """Returns the bytes of all tables for clusters of `unit` bytes; infinite if the format has no room for them."""
    data = table.kind == Kind.DATA
    start, end = table.start[data], table.start[data] + table.length[data]
    span = unit // 8 * unit
    low, high = start // span, (end - 1) // span
    row, place = spread(high - low + 1)
    l2 = len(distinct(low[row] + place)) * unit
    l1 = -(-table.size // span) * 8
    clusters = (int((-(-end // unit) - start // unit).sum()) * unit + l2 + l1) // unit
    refcounts = clusters * refcount_bits // 8
    refcount_table = -(-refcounts // unit) * 8
    # A margin for rounding up.
    fits = l1 <= structs.MAX_L1_BYTES and refcount_table * 1.01 <= structs.MAX_REFCOUNT_TABLE_BYTES
    return l1 + l2 + refcounts + refcount_table if fits else float("inf")
