"""A qcow2 layer that is written to while a guest runs on it.

Refcounts are right at every moment at which the machine may stop. New tables are in memory until a flush, which writes

    1  data, the refcounts of new clusters, and new L2 tables, to which nothing points yet
    2  entries of the refcount table for new refcount blocks, if there are any
    3  entries of L2 tables, and entries of the L1 table for new L2 tables

with fdatasync after each step. A cluster that is not needed any more is free once step 3 is durable. So an interruption
leaves clusters that nothing points to, at worst. This is the order of QEMU's caches (block/qcow2-cache.c).
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vmconv.plugin import Decoded, Image, Kind, PlanError, View, WritableLayer
from vmconv_qcow2 import structs
from vmconv_qcow2.check import check
from vmconv_qcow2.header import Header, read_header

_BITS = 16
_CLUSTER = 1 << _BITS
_ENTRIES = _CLUSTER // 8
_L2_BYTES = _ENTRIES << _BITS
"""Bytes of the disk that one L2 table maps."""
_COUNTS = _CLUSTER // 2
"""Refcounts of one block."""
_SECTOR = 512

_MAX_TABLES = 1024
"""L2 tables in memory, beside those that a flush has to write: 64 MiB."""
_MAX_DIRTY = 128
"""Changed L2 tables at which a write flushes by itself."""
_MAX_AGE = 5.0
"""Seconds after which a write flushes what came before it: what a guest loses that never asks for a flush."""
_MAX_PIECES = 512
"""Pieces of one pwritev; Linux takes 1024."""

_SWAPS = sys.byteorder == "little"


def open_layer(image: Image, descriptor: int) -> Layer:
    """Returns the disk of `image` with writes going to its file, open for writing as `descriptor`.

    Raises `PlanError` if the image is not of the form that new layers have, or its structure is damaged.
    """
    header = read_header(image.file)
    for what, found, wanted in (
        ("version", header.version, 3),
        ("cluster_bits", header.cluster_bits, _BITS),
        ("refcount_order", header.refcount_order, 4),
        ("incompatible features", header.incompatible, 0),
        ("autoclear features", header.autoclear, 0),
        ("snapshots", header.snapshot_count, 0),
        ("encryption", "luks" if header.encryption else "none", "none"),
    ):
        if found != wanted:
            raise PlanError(
                f"{image.file.name}: cannot be written to: {what} {found}, {wanted} is needed",
                hint="make a new layer on it",
            )
    used = np.unique(image.guest.source[image.guest.kind == Kind.DATA]).tolist()
    if any(isinstance(image.guest.sources[number], Decoded) for number in used):
        raise PlanError(f"{image.file.name}: cannot be written to: it has compressed clusters")
    report = check(image)
    faults = (*report.corruptions, *report.errors, *report.doubts)
    if faults:
        raise PlanError(f"{image.file.name}: is damaged: {faults[0]}", hint="vmconv check -r all repairs what it can")
    below = View(image.parent.flat.window(0, image.size).without_holes()) if image.parent else None
    return Layer(header, descriptor, below)


class _Run(NamedTuple):
    """A contiguous part of a request: in the file at `place`, in the disk below, or zeros (`place` None)."""

    length: int
    place: int | None
    is_below: bool = False


class Layer(WritableLayer):
    """See `open_layer`; the image was checked, so its tables are trusted."""

    def __init__(self, header: Header, descriptor: int, below: View | None) -> None:
        self.size = header.size
        self._name = header.file.name
        self._descriptor = descriptor
        self._below = below
        self._lock = threading.Lock()
        self._l1_offset = header.l1_offset
        self._l1 = self._load(header.l1_offset, header.l1_size * 8, "Q")
        self._counts_offset = header.refcount_table_offset
        self._counts_table = self._load(header.refcount_table_offset, header.refcount_table_clusters << _BITS, "Q")
        self._tables: dict[int, array[int]] = {}
        self._changed: dict[int, set[int]] = {}
        """The changed sectors of L2 tables in the file."""
        self._new_tables: set[int] = set()
        self._blocks: dict[int, array[int]] = {}
        self._changed_blocks: set[int] = set()
        self._new_blocks: set[int] = set()
        self._free: deque[int] = deque()
        self._leaving: list[int] = []
        """Clusters that the file's tables still point to."""
        self._end = -(-os.fstat(descriptor).st_size // _CLUSTER)
        self._unsynced = False
        self._flushed = time.monotonic()
        self._failed: str | None = None
        if len(self._l1) * _L2_BYTES < self.size:
            raise PlanError(f"{self._name}: cannot be written to: its L1 table ends before its disk")

    # -- reading

    def read_into(self, offset: int, buffer: memoryview) -> None:
        with self._lock:
            self._read(offset, buffer)

    def _read(self, offset: int, buffer: memoryview) -> None:
        at = 0
        for run in self._runs(offset, len(buffer)):
            part = buffer[at : at + run.length]
            if run.is_below and self._below:
                self._below.read_into(offset + at, part)
            elif run.place is None:
                part[:] = bytes(len(part))
            else:
                self._fill(run.place, part)
            at += run.length

    def _fill(self, place: int, part: memoryview) -> None:
        """Fills a part from the file; what lies past its end is zero, as for QEMU."""
        while part:
            count = os.preadv(self._descriptor, [part], place)
            if not count:
                part[:] = bytes(len(part))
                return
            part, place = part[count:], place + count

    def _runs(self, offset: int, length: int) -> Iterator[_Run]:
        """Yields where the bytes of a range are; neighbours are joined."""
        latest = _Run(0, None)
        end = offset + length
        while offset < end:
            step = min(_CLUSTER - offset % _CLUSTER, end - offset)
            entry = self._entry(offset >> _BITS)
            if entry & structs.ZERO:
                run = _Run(step, None)
            elif entry:
                run = _Run(step, (entry & structs.OFFSET_MASK) + offset % _CLUSTER)
            else:
                run = _Run(step, None, is_below=self._below is not None)
            follows = latest.place + latest.length if latest.place is not None else None
            if latest.length and (run.place, run.is_below) == (follows, latest.is_below):
                latest = latest._replace(length=latest.length + step)
            else:
                if latest.length:
                    yield latest
                latest = run
            offset += step
        if latest.length:
            yield latest

    def spans(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        with self._lock:
            runs = list(self._runs(offset, length))
        for run in runs:
            if run.is_below and self._below:
                yield from self._below.spans(offset, run.length)
            else:
                yield run.length, run.place is not None
            offset += run.length

    # -- tables

    def _entry(self, cluster: int) -> int:
        """Returns an L2 entry; 0 if the cluster is not in this layer."""
        table = self._table(cluster // _ENTRIES)
        entry = table[cluster % _ENTRIES] if table else 0
        return entry if entry & (structs.OFFSET_MASK | structs.ZERO) else 0

    def _table(self, index: int) -> array[int] | None:
        """Returns an L2 table, None if there is none."""
        table = self._tables.get(index)
        if table is None and self._l1[index] & structs.OFFSET_MASK:
            if len(self._tables) >= _MAX_TABLES:
                self._forget()
            table = self._tables[index] = self._load(self._l1[index] & structs.OFFSET_MASK, _CLUSTER, "Q")
        return table

    def _forget(self) -> None:
        """Drops L2 tables that are in the file."""
        for index in [one for one in self._tables if one not in self._changed and one not in self._new_tables]:
            del self._tables[index]

    def _set(self, cluster: int, entry: int) -> None:
        """Sets an L2 entry, in a new table if there is none."""
        index, place = divmod(cluster, _ENTRIES)
        table = self._table(index)
        if table is None:
            self._l1[index] = self._allocate() << _BITS | structs.COPIED
            table = self._tables[index] = array("Q", bytes(_CLUSTER))
            self._new_tables.add(index)
        table[place] = entry
        if index not in self._new_tables:
            self._changed.setdefault(index, set()).add(place * 8 // _SECTOR)

    # -- refcounts

    def _block(self, index: int) -> array[int]:
        block = self._blocks.get(index)
        if block is None:
            place = self._counts_table[index] & structs.REFCOUNT_TABLE_MASK
            block = self._blocks[index] = self._load(place, _CLUSTER, "H")
        return block

    def _count(self, cluster: int, change: int) -> int:
        """Changes the refcount of a cluster, and returns the new one."""
        index, place = divmod(cluster, _COUNTS)
        block = self._block(index)
        block[place] += change
        self._changed_blocks.add(index)
        return block[place]

    def _allocate(self) -> int:
        """Returns the number of a cluster, in use from now on. Raises `OSError` if the file cannot grow."""
        if self._free:
            cluster = self._free.popleft()
        else:
            self._add_block(self._end // _COUNTS)
            cluster = self._end
            self._end += 1
        self._count(cluster, 1)
        return cluster

    def _add_block(self, index: int) -> None:
        """Makes the refcount block of the next cluster, in that cluster, if there is none."""
        if index >= len(self._counts_table):
            raise OSError(errno.EFBIG, "the refcount table is full", self._name)
        if not self._counts_table[index]:
            self._counts_table[index] = self._end << _BITS
            self._blocks[index] = array("H", bytes(_CLUSTER))
            self._new_blocks.add(index)
            self._count(self._end, 1)
            self._end += 1
            # The block's own cluster may be the last that it counts.
            self._add_block(self._end // _COUNTS)

    def _release(self, cluster: int) -> None:
        """Gives up one reference to a cluster that no table in the file points to."""
        if not self._count(cluster, -1):
            self._free.append(cluster)

    # -- writing

    def write(self, offset: int, data: memoryview) -> None:
        with self._lock:
            self._refuse_failed()
            self._write(offset, data)
            self._unsynced = True
            if len(self._changed) + len(self._new_tables) > _MAX_DIRTY or self._age() > _MAX_AGE:
                self._flush()

    def _age(self) -> float:
        return time.monotonic() - self._flushed

    def _write(self, offset: int, data: memoryview) -> None:
        pieces: list[tuple[int, memoryview]] = []
        new: list[tuple[int, int]] = []
        at = 0
        try:
            while at < len(data):
                cluster, skip = divmod(offset + at, _CLUSTER)
                step = min(_CLUSTER - skip, len(data) - at)
                piece = data[at : at + step]
                entry = self._entry(cluster)
                if entry & structs.COPIED and not entry & structs.ZERO:
                    place = (entry & structs.OFFSET_MASK) + skip
                else:
                    if step < _CLUSTER:
                        piece = self._completed(cluster, skip, piece)
                    new.append((cluster, self._allocate()))
                    place = new[-1][1] << _BITS
                pieces.append((place, piece))
                at += step
            self._put(pieces)
            for cluster, place in new:
                old = self._entry(cluster)
                self._set(cluster, place << _BITS | structs.COPIED)
                self._leave(old)
        except OSError:
            for cluster, place in new:
                if self._entry(cluster) & structs.OFFSET_MASK != place << _BITS:
                    self._release(place)
            raise

    def _leave(self, entry: int) -> None:
        if entry & structs.OFFSET_MASK:
            self._leaving.append((entry & structs.OFFSET_MASK) >> _BITS)

    def _completed(self, cluster: int, skip: int, piece: memoryview) -> memoryview:
        """Returns a whole cluster: a piece, and around it what the disk has there now."""
        whole = bytearray(_CLUSTER)
        start = cluster << _BITS
        self._read(start, memoryview(whole)[: min(_CLUSTER, self.size - start)])
        whole[skip : skip + len(piece)] = piece
        return memoryview(whole)

    def _put(self, pieces: list[tuple[int, memoryview]]) -> None:
        """Writes pieces to the file; neighbours in one call."""
        first = 0
        while first < len(pieces):
            place = end = pieces[first][0]
            group: list[memoryview] = []
            for at, piece in pieces[first : first + _MAX_PIECES]:
                if at != end:
                    break
                group.append(piece)
                end += len(piece)
            first += len(group)
            self._write_all(place, group)

    def _write_all(self, place: int, group: list[memoryview]) -> None:
        done = os.pwritev(self._descriptor, group, place)
        length = sum(map(len, group))
        if done < length:
            # A short write: the rest gives the error, or succeeds.
            rest = memoryview(b"".join(group))
            while done < length:
                done += os.pwrite(self._descriptor, rest[done:], place + done)

    def zero(self, offset: int, length: int, *, exact: bool = True) -> None:
        with self._lock:
            self._refuse_failed()
            end = offset + length
            first = -(-offset // _CLUSTER) << _BITS
            # The last cluster of the disk is whole if the disk ends in it.
            last = end if end == self.size else end // _CLUSTER << _BITS
            if exact:
                if last < first:
                    self._zero_part(offset, length)
                else:
                    self._zero_part(offset, min(first, end) - offset)
                    self._zero_part(max(last, offset), end - max(last, offset))
            at = first
            while at < last:
                step = min(_L2_BYTES - at % _L2_BYTES, last - at)
                self._zero_clusters(at, step)
                at += step
            self._unsynced = True
            if len(self._changed) + len(self._new_tables) > _MAX_DIRTY:
                self._flush()

    def _zero_part(self, offset: int, length: int) -> None:
        """Writes zeros into a part of a cluster, unless it has zeros."""
        if length <= 0:
            return
        now = bytearray(length)
        self._read(offset, memoryview(now))
        if any(now):
            self._write(offset, memoryview(bytes(length)))

    def _zero_clusters(self, offset: int, length: int) -> None:
        """Zeros whole clusters that one L2 table maps."""
        if self._table(offset // _L2_BYTES) is None and self._is_zero_below(offset, length):
            return
        for cluster in range(offset >> _BITS, -(-(offset + length) >> _BITS)):
            old = self._entry(cluster)
            if old & structs.ZERO and not old & structs.OFFSET_MASK:
                continue
            if not old and self._is_zero_below(cluster << _BITS, _CLUSTER):
                continue
            self._set(cluster, structs.ZERO)
            self._leave(old)

    def _is_zero_below(self, offset: int, length: int) -> bool:
        length = min(length, self.size - offset)
        return self._below is None or not any(is_data for _, is_data in self._below.spans(offset, length))

    # -- flushing

    def flush(self) -> None:
        with self._lock:
            self._refuse_failed()
            self._flush()

    def _flush(self) -> None:
        try:
            if self._changed or self._new_tables or self._changed_blocks:
                self._flush_tables()
            elif self._unsynced:
                os.fdatasync(self._descriptor)
        except OSError as exc:
            # The kernel reports a failed write once: nothing is known of what was written before.
            self._failed = f"an earlier flush failed: {exc.strerror}"
            raise
        self._unsynced = False
        self._flushed = time.monotonic()

    def _flush_tables(self) -> None:
        for index in self._changed_blocks:
            self._store(self._counts_table[index], self._blocks[index])
        for index in self._new_tables:
            self._store(self._l1[index] & structs.OFFSET_MASK, self._tables[index])
        os.fdatasync(self._descriptor)
        if self._new_blocks:
            for index in self._new_blocks:
                self._store(self._counts_offset + index * 8, self._counts_table[index : index + 1])
            os.fdatasync(self._descriptor)
        for index, sectors in self._changed.items():
            place = self._l1[index] & structs.OFFSET_MASK
            for sector in sorted(sectors):
                first = sector * _SECTOR // 8
                self._store(place + sector * _SECTOR, self._tables[index][first : first + _SECTOR // 8])
        for index in self._new_tables:
            self._store(self._l1_offset + index * 8, self._l1[index : index + 1])
        if self._changed or self._new_tables:
            os.fdatasync(self._descriptor)
        self._changed_blocks.clear()
        self._new_blocks.clear()
        self._new_tables.clear()
        self._changed.clear()
        # Nothing in the file points to them any more. Their refcounts follow with the next flush.
        leaving, self._leaving = self._leaving, []
        for cluster in leaving:
            self._release(cluster)

    def close(self) -> None:
        with self._lock:
            try:
                # The second one writes the refcounts of what the first one has freed.
                for _ in range(0 if self._failed else 2):
                    self._flush()
            finally:
                descriptor, self._descriptor = self._descriptor, -1
                self._failed = "the layer is closed"
                os.close(descriptor)

    def _refuse_failed(self) -> None:
        if self._failed is not None:
            raise OSError(errno.EIO, self._failed, self._name)

    def _load(self, place: int, length: int, kind: str) -> array[int]:
        """Returns big-endian numbers from the file."""
        data = bytearray(length)
        self._fill(place, memoryview(data))
        found = array(kind, bytes(data))
        if _SWAPS:
            found.byteswap()
        return found

    def _store(self, place: int, numbers: array[int]) -> None:
        data = array(numbers.typecode, numbers)
        if _SWAPS:
            data.byteswap()
        self._write_all(place, [memoryview(data).cast("B")])
