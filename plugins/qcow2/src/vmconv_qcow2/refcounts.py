"""Reference counts of an edited qcow2 file: those that the check counts in it, and the COPIED flags that follow.

An edit changes tables, and allocates clusters that nothing used before. `settle` then makes counts and flags right, so
no edit counts for itself.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vmconv.plugin import Column, Draft, PlanError, Structure, distinct, spread, table_slices
from vmconv_qcow2 import structs
from vmconv_qcow2.check import Check
from vmconv_qcow2.header import Header, read_header
from vmconv_qcow2.steps import Steps, differences, steps_of

Raw = npt.NDArray[np.uint64]
_SLICE = 1 << 20
_SEARCHED = 1 << 16
"""Gaps that are searched for room; a file may have millions."""
_GROUP = 64
"""Entries of a table that are written together: one sector."""


class Space:
    """The clusters that nothing uses, in the file as it was before an edit."""

    def __init__(self, check: Check, stored: Steps) -> None:
        """`check` has counted all references of that file."""
        counted, self.cluster = steps_of(check.runs), check.cluster
        self.end = check.clusters
        cuts = distinct(np.concatenate([counted.start, stored.start, [self.end]]))
        cuts = cuts[cuts <= self.end]
        idle = (counted.at(cuts[:-1]) == 0) & (stored.at(cuts[:-1]) == 0)
        self.start, self.length = cuts[:-1][idle], np.diff(cuts)[idle]
        self.next = 0
        """The first gap that may have room."""

    def take(self, count: int) -> int:
        """Returns the offset of contiguous clusters: the first that are free, or those behind the end."""
        while self.next < len(self.length) and not self.length[self.next]:
            self.next += 1
        fits = np.flatnonzero(self.length[self.next : self.next + _SEARCHED] >= count)
        if not len(fits):
            self.end += count
            return (self.end - count) * self.cluster
        found = self.next + int(fits[0])
        first = int(self.start[found])
        self.start[found] += count
        self.length[found] -= count
        return first * self.cluster


class _Tables(NamedTuple):
    """The refcount structures: table and blocks, as offsets; a block of 0 is missing."""

    offset: int
    clusters: int
    blocks: Column

    def runs(self, cluster: int) -> list[tuple[Column, Column]]:
        blocks = self.blocks[self.blocks != 0] // cluster
        table = np.array([self.offset // cluster]), np.array([self.clusters])
        return [table, (blocks, np.ones_like(blocks))]


def opened(draft: Draft, size: int) -> Space:
    """Returns the free space of a file that is not edited yet; the disk has `size` bytes."""
    check = Check(read_header(draft))
    stored = check.stored_counts()
    check.count_references(size, stored)
    return Space(check, stored)


def settle(draft: Draft, space: Space, size: int, *, frees: bool = True) -> None:
    """Makes reference counts and COPIED flags those of the references; `frees` the blocks of clusters without any.

    Raises `PlanError` if a count is too large for the format of this image.
    """
    header, check = _checked(draft)
    stored = check.stored_counts()
    check.runs = []
    check.count_references(size, stored)
    before = space.end
    tables, counted = _room(header, check, space)
    _refuse_overflow(header, counted)
    _write_counts(draft, header, tables, counted, stored, check.blocks, space.end)
    _write_flags(draft, header, counted)
    if frees:
        _free(draft, counted, stored, before, check.cluster)


def drop_leaks(draft: Draft, size: int) -> None:
    """Makes the counts of unreferenced clusters 0, and changes nothing else."""
    header, check = _checked(draft)
    stored = check.stored_counts()
    check.count_references(size, stored)
    counted = steps_of(check.runs)
    start = distinct(np.concatenate([counted.start, stored.start]))
    wanted = Steps(start, np.where(counted.at(start) == 0, 0, stored.at(start)))
    if check.has_table:
        blocks = np.zeros(header.refcount_table_clusters * check.cluster // 8, dtype=np.int64)
        blocks[: len(check.blocks)] = check.blocks
        # Counts would overwrite what else lies there.
        blocks[counted.at(blocks // check.cluster) > 1] = 0
        tables = _Tables(header.refcount_table_offset, header.refcount_table_clusters, blocks)
        _write_blocks(draft, header, tables, wanted, stored, check.blocks, check.clusters)


def _free(draft: Draft, counted: Steps, stored: Steps, end: int, cluster: int) -> None:
    low, high, references, _ = differences(counted, stored, end)
    for first, last in zip(low[references == 0].tolist(), high[references == 0].tolist(), strict=True):
        inside = min(last, draft.file.size // cluster) - first
        if inside > 0:
            draft.free(first * cluster, inside * cluster)


def _checked(draft: Draft) -> tuple[Header, Check]:
    header = read_header(draft)
    return header, Check(header)


# -- room for the counts


def _room(header: Header, check: Check, space: Space) -> tuple[_Tables, Steps]:
    """Returns refcount structures with a block for each counted cluster, and the references to all clusters."""
    others, cluster = steps_of(check.runs), check.cluster
    per_block = cluster * 8 >> header.refcount_order
    tables = _usable(header, check, others)
    while True:
        # Each new block is a cluster that needs a count, maybe in a further block.
        counted = steps_of([*check.runs, *tables.runs(cluster)])
        needed = _blocks_of(counted, per_block)
        most = int(needed[-1]) + 1 if len(needed) else 0
        if most * 8 > tables.clusters * cluster:
            tables = _grown(tables, most, cluster, space)
            continue
        missing = needed[tables.blocks[needed] == 0]
        if not len(missing):
            return tables, counted
        for index in missing.tolist():
            tables.blocks[index] = space.take(1)


def _usable(header: Header, check: Check, others: Steps) -> _Tables:
    """Returns the present structures without those that lie where something else does."""
    cluster, offset, clusters = check.cluster, header.refcount_table_offset, header.refcount_table_clusters
    first = offset // cluster
    taken = np.array([first]) if not check.has_table else np.arange(first, first + clusters)
    sound = check.has_table and bool((others.at(taken) == 0).all())
    blocks = np.zeros(clusters * cluster // 8 if check.has_table else 0, dtype=np.int64)
    blocks[: len(check.blocks)] = check.blocks
    number = blocks // cluster
    bad = (blocks != 0) & (others.at(number) != 0)
    bad |= sound & (number >= first) & (number < first + clusters)
    blocks[bad] = 0
    return _Tables(offset, clusters, blocks) if sound else _Tables(0, 0, blocks)


def _blocks_of(counted: Steps, per_block: int) -> Column:
    """Returns the indices of the refcount blocks with counts."""
    used = np.flatnonzero(counted.value[:-1] != 0)
    first, last = counted.start[used] // per_block, (counted.start[used + 1] - 1) // per_block
    row, step = spread(last - first + 1)
    return distinct(first[row] + step)


def _grown(tables: _Tables, most: int, cluster: int, space: Space) -> _Tables:
    """Returns a table with `most` entries and some more, at another place."""
    clusters = -(-(most + most // 8 + 1) * 8 // cluster)
    if clusters * cluster > structs.MAX_REFCOUNT_TABLE_BYTES:
        raise PlanError(
            f"the refcount table would have {clusters * cluster} bytes, {structs.MAX_REFCOUNT_TABLE_BYTES} at most"
        )
    blocks = np.zeros(clusters * cluster // 8, dtype=np.int64)
    blocks[: len(tables.blocks)] = tables.blocks[: len(blocks)]
    return _Tables(space.take(clusters), clusters, blocks)


def _refuse_overflow(header: Header, counted: Steps) -> None:
    most = min((1 << (1 << header.refcount_order)) - 1, (1 << 63) - 1)
    if int(counted.value.max()) > most:
        row = int(counted.value.argmax())
        raise PlanError(
            f"{header.file.name}: cluster {counted.start[row]} would have {counted.value[row]} references, "
            f"refcount_order {header.refcount_order} counts {most} at most",
            hint="vmconv convert -o refcount_bits=16 makes an image with larger counts",
        )


# -- writing


def _write_counts(
    draft: Draft, header: Header, tables: _Tables, counted: Steps, stored: Steps, old: Column, end: int
) -> None:
    """Writes the blocks whose counts change, the table, and the header if the table moves."""
    _write_blocks(draft, header, tables, counted, stored, old, end)
    if tables.offset != header.refcount_table_offset:
        place = Structure(draft, structs.HeaderV2).offset_of("refcount_table_offset")
        draft.write(place, struct.pack(">QI", tables.offset, tables.clusters))
    draft.write(tables.offset, tables.blocks.astype(">u8").tobytes())


def _write_blocks(
    draft: Draft, header: Header, tables: _Tables, counted: Steps, stored: Steps, old: Column, end: int
) -> None:
    per_block = header.cluster_size * 8 >> header.refcount_order
    low, high, _, _ = differences(counted, stored, end)
    row, step = spread((high - 1) // per_block - low // per_block + 1)
    changed = low[row] // per_block + step
    before = np.zeros(len(tables.blocks), dtype=np.int64)
    before[: len(old)] = old[: len(before)]
    moved = np.flatnonzero(tables.blocks != before)
    for index in distinct(np.concatenate([changed, moved])).tolist():
        if index < len(tables.blocks) and tables.blocks[index]:
            counts = _dense(counted, index * per_block, per_block)
            draft.write(int(tables.blocks[index]), _encoded(counts, header.refcount_order))


def _dense(counted: Steps, first: int, count: int) -> Raw:
    """Returns the counts of clusters one by one."""
    low = int(np.searchsorted(counted.start, first, side="right")) - 1
    high = int(np.searchsorted(counted.start, first + count))
    cuts = np.append(counted.start[low:high], first + count)
    cuts[0] = first
    return np.repeat(counted.value[low:high], np.diff(cuts)).astype(np.uint64)


def _encoded(counts: Raw, order: int) -> bytes:
    """Returns the bytes of a refcount block."""
    bits = 1 << order
    if bits >= 8:
        return counts.astype(f">u{bits // 8}").tobytes()
    parts = counts.reshape(-1, 8 // bits) << np.arange(0, 8, bits, dtype=np.uint64)
    return bytes(np.bitwise_or.reduce(parts, axis=1).astype(np.uint8))


def _write_flags(draft: Draft, header: Header, counted: Steps) -> None:
    """Writes the COPIED flags of the active tables: set where a cluster has one reference."""
    size = header.l1_size * 8
    if not size or header.l1_offset + size > draft.size or size > structs.MAX_L1_BYTES:
        return
    raw = np.frombuffer(draft.read(header.l1_offset, size), dtype=">u8").astype(np.uint64)
    tables = _offsets(raw)
    tables[(tables % header.cluster_size != 0) | (tables > draft.size - header.cluster_size)] = 0
    _write_table(draft, header.l1_offset, raw, _flagged(header, raw, tables, tables != 0, counted))
    if header.incompatible & structs.EXTERNAL_DATA:
        return
    for first, _, data in table_slices(draft, tables, header.cluster_size, _SLICE):
        if data is not None:
            raw = np.frombuffer(data, dtype=">u8").astype(np.uint64)
            entries = raw[0::2] if header.extended_l2 else raw
            offset = _offsets(entries)
            plain = ((entries & np.uint64(structs.COMPRESSED)) == 0) & (offset != 0)
            plain &= offset % header.cluster_size == 0
            new = raw.copy()
            new[:: 2 if header.extended_l2 else 1] = _flagged(header, entries, offset, plain, counted)
            _write_table(draft, int(tables[first]), raw, new)


def _offsets(raw: Raw) -> Column:
    return (raw & np.uint64(structs.OFFSET_MASK)).astype(np.int64)


def _flagged(header: Header, raw: Raw, offset: Column, chosen: npt.NDArray[np.bool_], counted: Steps) -> Raw:
    """Returns table entries with the right flags where they are `chosen`."""
    once = counted.at(offset // header.cluster_size) == 1
    flag = np.where(once, np.uint64(structs.COPIED), np.uint64(0))
    return np.where(chosen, raw & ~np.uint64(structs.COPIED) | flag, raw)


def _write_table(draft: Draft, offset: int, old: Raw, new: Raw) -> None:
    """Writes the sectors of a table with changed entries."""
    groups = distinct(np.flatnonzero(old != new) // _GROUP)
    data = new.astype(">u8")
    for group in groups.tolist():
        draft.write(offset + group * _GROUP * 8, data[group * _GROUP : (group + 1) * _GROUP].tobytes())
