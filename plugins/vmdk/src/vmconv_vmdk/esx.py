"""Sparse extents of ESX, the layers of its snapshots: vmfsSparse ("COWD") and seSparse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vmconv.plugin import MAX_SIZE, Column, Extents, File, Kind, Structure
from vmconv_vmdk import structs
from vmconv_vmdk.sparse import Extent, Grains, RawEntries, Slice, parse


class Cowd(Extent):
    """An extent of ESX: vmfsSparse, "COWD"."""

    width = 4
    entries = structs.COWD_ENTRIES

    def __init__(self, file: File) -> None:
        self.file = file
        head = Structure(file, structs.CowdHeader)
        header = parse(head)
        if header.version != 1:
            raise head.damaged("version", f"{header.version} is not 1")
        if not 1 <= header.grainSize <= structs.MAX_GRAIN_SECTORS:
            raise head.damaged("grainSize", f"{header.grainSize} sectors are not in 1..{structs.MAX_GRAIN_SECTORS}")
        self.header = header
        self.size = header.numSectors * structs.SECTOR
        self.grain = header.grainSize * structs.SECTOR
        if header.numGDEntries < self.tables_needed:
            raise head.damaged("numGDEntries", f"{header.numGDEntries} tables, the disk needs {self.tables_needed}")

    @property
    def directories(self) -> Sequence[tuple[str, int]]:  # type: ignore[override]
        return (("grain directory", self.header.gdOffset * structs.SECTOR),)

    def places_of_tables(self, directory: int) -> Column:
        return self._read_directory(directory, self.tables_needed, "<u4").astype(np.int64) * structs.SECTOR

    def table(self) -> Extents:
        if not self.size:
            return Extents.filled(0)
        offset = self.header.gdOffset * structs.SECTOR
        tables = self.places_of_tables(offset)
        self._check_tables(tables, offset)
        return self._mapped(tables, self.file)

    def decode(self, raw: RawEntries) -> Grains:
        return Grains(raw != 0, raw.astype(np.int64) * structs.SECTOR, np.zeros(len(raw), dtype=bool))

    def _slice(self, raw: RawEntries, first: int) -> Slice:
        return self._columns(raw, None, first)


class SeSparse(Extent):
    """An extent of ESXi 6.5 and later: seSparse, "space-efficient"."""

    width = 8
    grain = structs.SE_GRAIN_SECTORS * structs.SECTOR
    entries = structs.SE_TABLE_SECTORS * structs.SECTOR // 8

    def __init__(self, file: File) -> None:
        self.file = file
        self._head = Structure(file, structs.SeSparseHeader)
        header = parse(self._head)
        self.header = header
        for field, only in (
            ("version", structs.SE_VERSION),
            ("flags", 0),
            ("grain_size", structs.SE_GRAIN_SECTORS),
            ("grain_table_size", structs.SE_TABLE_SECTORS),
        ):
            if header[field] != only:
                raise self._head.damaged(field, f"{header[field]:#x} is not {only:#x}")
        # A quarter, so that sums of two offsets fit into 64 bits.
        most = MAX_SIZE // structs.SECTOR // 4
        for field in ("capacity", "grain_dir_offset", "grain_tables_offset", "grains_offset", "volatile_header_offset"):
            if header[field] > most:
                raise self._head.damaged(field, f"{header[field]:#x} sectors, {most:#x} at most")
        self.size = header.capacity * structs.SECTOR
        self._check_journal(header)

    def _check_journal(self, header: Any) -> None:
        offset = header.volatile_header_offset * structs.SECTOR
        head = Structure(self.file, structs.SeSparseVolatile, offset, "volatile header")
        volatile = parse(head)
        if volatile.magic != structs.SE_VOLATILE_MAGIC:
            raise head.refused("has not the signature of one")
        if volatile.replay_journal:
            raise head.damaged(
                "replay_journal",
                "the journal was not replayed",
                hint="open the disk once in ESXi, or consolidate it there",
            )

    def table(self) -> Extents:
        if not self.size:
            return Extents.filled(0)
        header = self.header
        directory = header.grain_dir_offset * structs.SECTOR
        needed = self.tables_needed
        if header.grain_dir_size * structs.SECTOR < needed * 8:
            raise self._head.damaged(
                "grain_dir_size", f"{header.grain_dir_size} sectors, the disk needs {needed * 8} bytes"
            )
        tables = self.places_of_tables(directory)
        self._check_tables(tables, directory)
        return self._mapped(tables, self.file)

    @property
    def directories(self) -> Sequence[tuple[str, int]]:  # type: ignore[override]
        return (("grain directory", self.header.grain_dir_offset * structs.SECTOR),)

    def places_of_tables(self, directory: int) -> Column:
        raw = self._read_directory(directory, self.tables_needed, "<u8")
        bad = (raw != 0) & (raw & np.uint64(structs.SE_TABLE_KIND) != np.uint64(structs.SE_TABLE_ALLOCATED))
        if bad.any():
            entry = int(np.flatnonzero(bad)[0])
            raise self._bad_entry(directory, entry, f"{int(raw[entry]):#x} is of no known kind")
        number = (raw & np.uint64(0xFFFFFFFF)).astype(np.int64)
        base = self.header.grain_tables_offset * structs.SECTOR
        return np.where(raw != 0, base + number * structs.SE_TABLE_SECTORS * structs.SECTOR, 0)

    def decode(self, raw: RawEntries) -> Grains:
        """Returns kinds and grain numbers of entries.

        The kind is in the top nibble, and a number has its low bits on top.
        """
        what = raw & np.uint64(structs.SE_KIND)
        unknown = (what > np.uint64(structs.SE_ALLOCATED)) | ((what == 0) & (raw != 0))
        data = what == np.uint64(structs.SE_ALLOCATED)
        low = (raw >> np.uint64(48)) & np.uint64(0xFFF)
        number = (low | ((raw & np.uint64(0xFFFFFFFFFFFF)) << np.uint64(12))).astype(np.int64)
        # Numbers that would overflow are past the end of any file.
        number = np.minimum(number, MAX_SIZE // self.grain // 2)
        offset = np.where(data, self.header.grains_offset * structs.SECTOR + number * self.grain, 0)
        return Grains(data, offset, unknown)

    def _slice(self, raw: RawEntries, first: int) -> Slice:
        data, offset, unknown = self.decode(raw)
        if unknown.any():
            entry = int(np.flatnonzero(unknown)[0])
            self._refuse(entry, first, f"{int(raw[entry]):#x} is of no known kind")
        empty = raw & np.uint64(structs.SE_KIND) == 0
        kind = np.where(data, Kind.DATA, np.where(empty, Kind.HOLE, Kind.ZERO)).astype(np.uint8)
        self._check_places(offset, data, first)
        return kind, 0, offset
