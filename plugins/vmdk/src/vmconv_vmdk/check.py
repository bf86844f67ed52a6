"""The structural check of a VMDK: the grain directories and grain tables of each sparse extent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vmconv.plugin import CheckReport, Column, File, Findings, Structure, Usage, counted, table_slices
from vmconv_vmdk import structs
from vmconv_vmdk.esx import Cowd, SeSparse
from vmconv_vmdk.hosted import Hosted
from vmconv_vmdk.sparse import SLICE, RawEntries

_WINDOW = 4 << 20
"""Bytes of a file that are read at once for its markers."""

Sparse = Hosted | Cowd | SeSparse


def check(extents: Sequence[Sparse], image_end: int) -> CheckReport:
    """Returns the report on the sparse extents of a disk; flat ones have no structure.

    The format has no leaks: no writer reuses unreferenced space. `image_end` is the end of the image's own file if that
    is no extent.
    """
    findings = Findings()
    # A single extent needs no name in its findings.
    checks = [_Check(extent, findings, f"{extent.file.name}: " if len(extents) > 1 else "") for extent in extents]
    for one in checks:
        one.run()
    allocated = sum(one.allocated for one in checks)
    total = sum(-(-extent.size // extent.grain) for extent in extents)
    end = checks[0].end if len(checks) == 1 and not image_end else image_end
    return findings.report(allocated=allocated, total=total, end=end)


class _Check:
    def __init__(self, extent: Sparse, findings: Findings, name: str) -> None:
        self.extent = extent
        self.file = extent.file
        self.findings = findings
        self.name = name
        self.usage = Usage()
        self.allocated = 0

    @property
    def end(self) -> int:
        return max(self.usage.end, self.extent.headers_end)

    def run(self) -> None:
        extent = self.extent
        if not extent.size:
            return
        self.usage.add(f"{self.name}header", [0], extent.headers_end)
        for name, offset, length in extent.more_metadata():
            self.usage.add(f"{self.name}{name}", [offset], length)
        if isinstance(extent, Hosted) and extent.header.uncleanShutdown:
            place = Structure(self.file, structs.SparseExtentHeader).offset_of("uncleanShutdown")
            self.findings.doubt(f"{self.name}uncleanShutdown at {place:#x}: was not closed cleanly")
        tables = self._directories()
        for first, _, raw in extent.entries_of(tables):
            if raw is not None:
                self._grains(raw, first)
            if self.findings.enough:
                return
        self.findings.overlaps(self.usage, extent.grain)

    # -- directories and tables

    def _directories(self) -> Column:
        """Returns the offsets of the grain tables for the reader, each once, 0 for invalid ones."""
        found: list[Column] = []
        length = self.extent.entries * self.extent.width
        for name, offset in self.extent.directories:
            self.usage.add(f"{self.name}{name}", [offset], self.extent.tables_needed * self.extent.width)
            tables = self.extent.places_of_tables(offset)
            bad = (tables != 0) & ((tables > self.file.size - length) | (tables < 0))
            self._outside(bad, name, offset, tables)
            tables[bad] = 0
            there = np.flatnonzero(tables)
            self.usage.add(f"{self.name}grain table of {name}", tables[there], length, there)
            order = there[np.argsort(tables[there], kind="stable")]
            tables[order[1:][np.diff(tables[order]) == 0]] = 0
            found.append(tables)
        if len(found) > 1:
            self._compare(*found)
        return found[0]

    def _outside(self, bad: npt.NDArray[np.bool_], name: str, offset: int, tables: Column) -> None:
        self.findings.corrupt_where(
            bad,
            lambda entry: (
                f"{self.name}{name} entry {entry} at {offset + entry * self.extent.width:#x}: table at "
                f"{int(tables[entry]):#x} lies past the end of the file ({self.file.size:#x})"
            ),
        )

    def _compare(self, tables: Column, others: Column) -> None:
        """Reports redundant tables that differ; the reader uses the first ones."""
        missing = (tables == 0) & (others != 0)
        self.findings.corrupt_where(
            missing, lambda entry: f"{self.name}grain directory entry {entry}: 0, the redundant one has a table"
        )
        length = self.extent.entries * self.extent.width
        step = max(1, _WINDOW // length)
        differ = 0
        for first in range(0, len(tables), step):
            one, two = (self._entries(some[first : first + step], length) for some in (tables, others))
            differ += int(np.count_nonzero(one != two))
        if differ:
            self.findings.doubt(f"{self.name}redundant grain tables: {counted(differ, 'entry')} unlike the others")

    def _entries(self, tables: Column, length: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Returns the entries of grain tables as numbers, zeros for missing tables."""
        return _tables(self.file, tables, length).view(f"<u{self.extent.width}")

    # -- grains

    def _grains(self, raw: RawEntries, first: int) -> None:
        extent = self.extent
        there, offset, unknown = extent.decode(raw)
        self.findings.corrupt_where(unknown, lambda index: f"{self._where(first + index)}: of no known kind")
        self.allocated += int(np.count_nonzero(there))
        bad = there & ((offset < structs.SECTOR) | (offset >= self.file.size))
        self.findings.corrupt_where(
            bad,
            lambda index: (
                f"{self._where(first + index)}: grain at {int(offset[index]):#x} does not lie inside the "
                f"file ({self.file.size:#x})"
            ),
        )
        number = np.flatnonzero(there & ~bad)
        if isinstance(extent, Hosted) and extent.compressed:
            self._compressed(extent, first + number, offset[number])
            return
        # Up to the end of the disk: the rest of its last grain is not needed.
        left = np.minimum(extent.size - (first + number) * extent.grain, extent.grain)
        cut = offset[number] + left > self.file.size
        if cut.any():
            index = int(number[np.flatnonzero(cut)[0]])
            self.findings.doubt(f"{self._where(first + index)}: the file ends inside the grain; the rest reads as zero")
        self.usage.add(f"{self.name}grain", offset[number], extent.grain, first + number)

    def _compressed(self, extent: Hosted, number: Column, offset: Column) -> None:
        """Checks compressed grains: their markers must state their sectors and lengths."""
        if not extent.flags & structs.MARKERS:
            self.usage.add(f"{self.name}grain", offset, 1, number)
            return
        fits = offset + structs.GRAIN_MARKER_LENGTH <= self.file.size
        marker = np.zeros((len(offset), structs.GRAIN_MARKER_LENGTH), dtype=np.uint8)
        marker[fits] = _pieces(self.file, offset[fits], structs.GRAIN_MARKER_LENGTH)
        sector = np.ascontiguousarray(marker[:, :8]).view("<u8").reshape(-1)
        size = np.ascontiguousarray(marker[:, 8:]).view("<u4").reshape(-1).astype(np.int64)
        expected = (number * (extent.grain // structs.SECTOR)).astype(np.uint64)
        end = offset + structs.GRAIN_MARKER_LENGTH + size
        bad = ~fits | (sector != expected) | (size == 0) | (end > self.file.size)
        self.findings.corrupt_where(
            bad,
            lambda index: (
                f"{self._where(int(number[index]))}: marker at {int(offset[index]):#x}: {int(size[index])} "
                f"bytes of sector {int(sector[index]):#x}, sector {int(expected[index]):#x} is expected"
            ),
        )
        length = -(-(structs.GRAIN_MARKER_LENGTH + size) // structs.SECTOR) * structs.SECTOR
        self.usage.add_each(f"{self.name}grain", offset[~bad], length[~bad], number[~bad])

    def _where(self, grain: int) -> str:
        table, entry = divmod(grain, self.extent.entries)
        return f"{self.name}grain table {table} entry {entry}"


def _tables(file: File, tables: Column, length: int) -> npt.NDArray[np.uint8]:
    """Returns the concatenated grain tables, zeros for missing ones."""
    parts = [
        np.zeros(count * length, dtype=np.uint8) if data is None else np.frombuffer(data, dtype=np.uint8)
        for _, count, data in table_slices(file, tables, length, SLICE)
    ]
    return np.concatenate(parts)


def _pieces(file: File, offset: Column, length: int) -> npt.NDArray[np.uint8]:
    """Returns `length` bytes from each offset; neighbours are read together."""
    pieces = np.zeros((len(offset), length), dtype=np.uint8)
    order = np.argsort(offset, kind="stable")
    places = offset[order]
    at = 0
    while at < len(places):
        begin = int(places[at])
        end = int(np.searchsorted(places, begin + _WINDOW - length, side="right"))
        data = np.frombuffer(file.read(begin, int(places[end - 1]) + length - begin), dtype=np.uint8)
        pieces[order[at:end]] = data[(places[at:end] - begin)[:, np.newaxis] + np.arange(length)]
        at = end
    return pieces
