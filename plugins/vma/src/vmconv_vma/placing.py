"""The layout of a new archive: each cluster of each device in turn, 59 to an extent.

Extents are 512 bytes out of step with the blocks of a filesystem. So that payload can be shared, headers without
entries fill the space up to a block, with which readers do nothing:

    +--------+-------+-------+- - -+--------+---------------+-------+- - -+--------+---------- - -
    | header | empty | empty |     | extent | blocks        | empty |     | extent | blocks
    +--------+-------+-------+- - -+--------+---------------+-------+- - -+--------+---------- - -
    0                                       n * 4096                               m * 4096

That costs 3.5 KiB for up to 3.7 MiB of payload. Extents whose clusters are all zero need none.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vmconv.plugin import Blob, Columns, Extents, Kind, cut, spread
from vmconv_vma import structs

if TYPE_CHECKING:
    from vmconv.plugin import Column, Source

_BLOCKS = 16 * structs.ENTRIES
"""Blocks of an extent."""

_UNIT = structs.EXTENT_HEADER_SIZE
_IN_STEP = structs.BLOCK // _UNIT


class _Runs(NamedTuple):
    """Runs of blocks with payload inside one extent: first block and the one behind, counted over all devices."""

    device: Column
    begin: Column
    end: Column


class Archive:
    """An archive of these devices' tables behind its header. With `aligned`, blocks lie at multiples of their size."""

    def __init__(self, header: bytes, uuid: bytes, tables: Sequence[Extents], *, aligned: bool) -> None:
        self._header = header
        self._uuid = uuid
        self._tables = tables
        sizes = np.array([table.size for table in tables], dtype=np.int64)
        counts = -(-sizes // structs.CLUSTER)
        self._clusters = int(counts.sum())
        self._first = np.cumsum(counts) - counts
        self._extents = -(-self._clusters // structs.ENTRIES)
        self._runs = self._found_runs()
        extent = self._runs.begin // _BLOCKS
        self._blocks = np.bincount(extent, self._runs.end - self._runs.begin, self._extents).astype(np.int64)
        empty = self._empty_before() if aligned else np.zeros(self._extents, dtype=np.int64)
        self._empty = empty
        self._group = np.cumsum(1 + empty) - (1 + empty)
        """Headers before the first empty one of each extent."""

    def _found_runs(self) -> _Runs:
        devices, begins, ends = [], [], []
        for number, table in enumerate(self._tables):
            data = table.kind == Kind.DATA
            begin, end = table.start[data] // structs.BLOCK, -(-table.end[data] // structs.BLOCK)
            # Two rows may share a block.
            first = np.ones(len(begin), dtype=bool)
            first[1:] = begin[1:] > end[:-1]
            starts = np.flatnonzero(first)
            begin = begin[starts] + 16 * self._first[number]
            end = end[np.append(starts[1:], len(end)) - 1] + 16 * self._first[number] if len(starts) else end
            devices.append(np.full(len(begin), number, dtype=np.int64))
            begins.append(begin)
            ends.append(end)
        empty = np.zeros(0, dtype=np.int64)
        device, begin, end = (np.concatenate([empty, *each]) for each in (devices, begins, ends))
        run, place = spread((end - 1) // _BLOCKS - begin // _BLOCKS + 1)
        extent = begin[run] // _BLOCKS + place
        return _Runs(
            device[run], np.maximum(begin[run], extent * _BLOCKS), np.minimum(end[run], (extent + 1) * _BLOCKS)
        )

    def _empty_before(self) -> Column:
        """Returns the number of empty headers before the header of each extent."""
        empty = np.zeros(self._extents, dtype=np.int64)
        used = np.flatnonzero(self._blocks)
        # Headers since the last multiple of a block: those of extents without payload, at first the archive's own.
        behind = np.diff(used, prepend=-1) - 1
        if len(behind):
            behind[0] += len(self._header) // _UNIT
        empty[used] = (-behind - 1) % _IN_STEP
        return empty

    def table(self) -> Extents:
        """Returns the table of the archive's file."""
        before = np.cumsum(self._blocks) - self._blocks
        start = len(self._header) + _UNIT * self._group + structs.BLOCK * before
        payload = start + _UNIT * (1 + self._empty)
        size = int(payload[-1] + structs.BLOCK * self._blocks[-1]) if self._extents else len(self._header)
        headers = Blob("headers of extents", self._headers, _UNIT * int((1 + self._empty).sum()))
        sources: list[Source] = [Blob("header", self._header), headers]
        rows = [_columns([0], 0, [0]), _columns(start, 1, _UNIT * self._group)]
        lengths = [np.array([len(self._header)], dtype=np.int64), _UNIT * (1 + self._empty)]
        extent = self._runs.begin // _BLOCKS
        ranks = np.cumsum(self._runs.end - self._runs.begin) - (self._runs.end - self._runs.begin)
        to = payload[extent] + structs.BLOCK * (ranks - before[extent])
        for number, table in enumerate(self._tables):
            found, length = self._payload(number, table, to)
            rows.append(found._replace(source=(found.source + len(sources)).astype(np.int32)))
            lengths.append(length)
            sources += table.sources
        return Extents.placed(size, Columns.join(rows), np.concatenate(lengths), sources)

    def _payload(self, number: int, table: Extents, to: Column) -> tuple[Columns, Column]:
        """Returns the rows of a device's payload in the archive, and their lengths."""
        own = self._runs.device == number
        low = structs.BLOCK * (self._runs.begin[own] - 16 * self._first[number])
        high = np.minimum(structs.BLOCK * (self._runs.end[own] - 16 * self._first[number]), table.size)
        found, length = cut(table, low, high - low, to[own])
        data = found.kind == Kind.DATA
        return found.take(data), length[data]

    def _headers(self, offset: int, length: int) -> bytes:
        """Returns bytes of the headers of extents, the empty ones among them."""
        if not length:
            return b""
        first, end = offset // _UNIT, -(-(offset + length) // _UNIT)
        low = int(np.searchsorted(self._group, first, "right")) - 1
        high = int(np.searchsorted(self._group, end - 1, "right"))
        empty = _sealed(b"VMAE" + bytes(4) + self._uuid + bytes(16 + 8 * structs.ENTRIES))
        parts = []
        for extent, data in zip(range(low, high), self._entries(low, high), strict=True):
            parts.append(empty * int(self._empty[extent]))
            count = struct.pack(">HH", 0, int(self._blocks[extent]))
            parts.append(_sealed(b"VMAE" + count + self._uuid + bytes(16) + data))
        begin = offset - _UNIT * int(self._group[low])
        return b"".join(parts)[begin : begin + length]

    def _entries(self, low: int, high: int) -> list[bytes]:
        """Returns the entries of extents `low` to `high`."""
        mine = slice(*np.searchsorted(self._runs.begin, [low * _BLOCKS, high * _BLOCKS]))
        edges = np.zeros((high - low) * _BLOCKS + 1, dtype=np.int8)
        # Runs do not touch each other, except where extents do.
        np.add.at(edges, self._runs.begin[mine] - low * _BLOCKS, 1)
        np.add.at(edges, self._runs.end[mine] - low * _BLOCKS, -1)
        there = np.cumsum(edges[:-1]).astype(bool).reshape(-1, 16)
        mask = (there << np.arange(16)).sum(axis=1).astype(np.uint64)
        cluster = np.arange(low * structs.ENTRIES, high * structs.ENTRIES, dtype=np.int64)
        device = np.searchsorted(self._first, cluster, "right") - 1
        number = cluster - self._first[device]
        info = mask << np.uint64(48) | (device + 1).astype(np.uint64) << np.uint64(32) | number.astype(np.uint64)
        info = np.where(cluster < self._clusters, info, np.uint64(0)).astype(">u8")
        return [row.tobytes() for row in info.reshape(-1, structs.ENTRIES)]


def _columns(start: Column | list[int], source: int, offset: Column | list[int]) -> Columns:
    """Returns rows of payload of one source."""
    count = len(start)
    return Columns(
        np.asarray(start, dtype=np.int64),
        np.full(count, Kind.DATA, dtype=np.uint8),
        np.full(count, source, dtype=np.int32),
        np.asarray(offset, dtype=np.int64),
    )


def _sealed(data: bytes) -> bytes:
    """Returns the header of an extent with its MD5."""
    digest = hashlib.md5(data, usedforsecurity=False).digest()
    return data[: structs.MD5_IN_EXTENT.start] + digest + data[structs.MD5_IN_EXTENT.stop :]
