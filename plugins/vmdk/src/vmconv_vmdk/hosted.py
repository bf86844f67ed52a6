"""Extents of VMware's hosted products: header, descriptor, redundant and compressed grains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from vmconv.plugin import MAX_SIZE, Column, Extents, File, ImageError, Kind, Structure
from vmconv_vmdk import structs
from vmconv_vmdk.compression import CompressedGrains
from vmconv_vmdk.sparse import Extent, Grains, RawEntries, Slice, parse

Warn = Callable[[str], None]


class Hosted(Extent):
    """An extent of VMware's hosted products, monolithic, split or stream-optimized; `size` is the header's capacity."""

    width = 4

    def __init__(self, file: File, warn: Warn) -> None:
        self.file = file
        self.warn = warn
        # The valid one: the header, or its copy in the footer.
        self._head = Structure(file, structs.SparseExtentHeader)
        header = parse(self._head)
        self._check_identity(header)
        if header.gdOffset == structs.GD_AT_END:
            header = self._footer(header)
        self.header = header
        self.flags: int = header.flags
        self.compressed = bool(self.flags & structs.COMPRESSED)
        self.size = header.capacity * structs.SECTOR
        self.grain = header.grainSize * structs.SECTOR
        self.entries = header.numGTEsPerGT
        self._check_numbers(header)
        if header.uncleanShutdown:
            warn(f"{file.name}: was not closed cleanly; its readable content is converted")

    def _check_identity(self, header: Any) -> None:
        """Raises `ImageError` for other versions, and unknown features."""
        self._head.limit("version", header.version, 1, 3)
        unknown = header.flags & ~structs.KNOWN_FLAGS
        if unknown:
            raise self._head.damaged("flags", f"unknown features {unknown:#x}")
        if header.flags & structs.NEWLINE_TEST and header.newlines != structs.NEWLINES:
            raise self._head.damaged("newlines", f"{header.newlines.hex()}: the file was damaged by a transfer as text")
        algorithm = header.compressAlgorithm
        if header.flags & structs.COMPRESSED and algorithm != structs.DEFLATE:
            raise self._head.damaged("compressAlgorithm", f"{algorithm} is not known, deflate is 1")

    def _footer(self, header: Any) -> Any:
        """Returns the copy of the header at the end of a stream, which has the offset of the grain directory."""
        offset = self.file.size - 3 * structs.SECTOR
        if offset < structs.SECTOR:
            raise self._head.damaged(
                "gdOffset", f"announces a footer, which does not fit into a file of {self.file.size:#x}"
            )
        marker_head = Structure(self.file, structs.Marker, offset, "footer marker")
        marker = parse(marker_head)
        end = parse(Structure(self.file, structs.Marker, offset + 2 * structs.SECTOR, "end-of-stream marker"))
        if (marker.size, marker.type) != (0, structs.FOOTER) or (end.val, end.size, end.type) != (0, 0, 0):
            raise marker_head.refused("is missing, the file may be incomplete")
        self._head = Structure(self.file, structs.SparseExtentHeader, offset + structs.SECTOR, "footer")
        footer = parse(self._head)
        self._check_identity(footer)
        for field in ("capacity", "grainSize", "numGTEsPerGT", "flags"):
            if footer[field] != header[field]:
                raise self._head.damaged(field, f"{footer[field]:#x} in the footer, {header[field]:#x} in the header")
        return footer

    def _check_numbers(self, header: Any) -> None:
        most = MAX_SIZE // structs.SECTOR
        if header.capacity > most:
            raise self._head.damaged("capacity", f"{header.capacity} sectors, {most} at most")
        grains = structs.MAX_COMPRESSED_GRAIN_SECTORS if self.compressed else structs.MAX_GRAIN_SECTORS
        if not 1 <= header.grainSize <= grains or header.grainSize & (header.grainSize - 1):
            raise self._head.damaged("grainSize", f"{header.grainSize} sectors is not a power of two in 1..{grains}")
        self._head.limit("numGTEsPerGT", header.numGTEsPerGT, 1, structs.ENTRIES)
        if self.tables_needed > structs.MAX_DIRECTORY:
            raise self._head.damaged(
                "capacity", f"needs a grain directory of {self.tables_needed} entries, {structs.MAX_DIRECTORY} at most"
            )

    def embedded(self) -> bytes | None:
        """Returns the descriptor inside the extent; None if there is none."""
        head = Structure(self.file, structs.SparseExtentHeader)
        header = head.parse()
        if not header.descriptorOffset:
            return None
        offset, size = header.descriptorOffset * structs.SECTOR, header.descriptorSize * structs.SECTOR
        if not 0 < size <= structs.MAX_DESCRIPTOR:
            raise head.damaged("descriptorSize", f"{size} bytes are not in 1..{structs.MAX_DESCRIPTOR}")
        if offset + size > self.file.size:
            raise head.damaged(
                "descriptorOffset", f"descriptor at {offset:#x} lies past the end of the file ({self.file.size:#x})"
            )
        return self.file.read(offset, size)

    def table(self) -> Extents:
        """Returns the table by the grain directory, or by the redundant one if the first is damaged."""
        redundant = bool(self.flags & structs.REDUNDANT)
        try:
            return self._table(self.header.gdOffset, "gdOffset")
        except ImageError as damage:
            if not redundant or self.header.rgdOffset == self.header.gdOffset:
                raise
            try:
                table = self._table(self.header.rgdOffset, "rgdOffset")
            except ImageError:
                raise damage from None
            self.warn(f"{damage}; the redundant grain directory is used instead")
            return table

    def _table(self, sector: int, field: str) -> Extents:
        if not self.size:
            return Extents.filled(0)
        if sector > self.file.size // structs.SECTOR:
            raise self._head.damaged(field, f"sector {sector:#x} lies past the end of the file ({self.file.size:#x})")
        tables = self._directory(sector * structs.SECTOR)
        if field == "gdOffset" and self.flags & structs.REDUNDANT:
            self._check_missing(tables, sector * structs.SECTOR)
        self.allocated = 0
        self.grains = CompressedGrains(self.file, self.grain, self.size, markers=bool(self.flags & structs.MARKERS))
        return self._mapped(tables, self.grains.source if self.compressed else self.file)

    @property
    def directories(self) -> Sequence[tuple[str, int]]:  # type: ignore[override]
        first = ("grain directory", self.header.gdOffset * structs.SECTOR)
        if not self.flags & structs.REDUNDANT or self.header.rgdOffset == self.header.gdOffset:
            return (first,)
        return first, ("redundant grain directory", self.header.rgdOffset * structs.SECTOR)

    def more_metadata(self) -> Iterator[tuple[str, int, int]]:
        header = structs.SparseExtentHeader.parse(self.file.read(0, structs.SECTOR))
        if header.descriptorOffset:
            # Absurd headers were refused when the descriptor was read.
            offset, size = (
                min(field * structs.SECTOR, 1 << 62) for field in (header.descriptorOffset, header.descriptorSize)
            )
            yield "descriptor", offset, min(size, structs.MAX_DESCRIPTOR)
        if self._head.offset:
            yield "footer", self._head.offset - structs.SECTOR, 3 * structs.SECTOR

    def places_of_tables(self, directory: int) -> Column:
        return self._read_directory(directory, self.tables_needed, "<u4").astype(np.int64) * structs.SECTOR

    def _directory(self, offset: int) -> Column:
        tables = self.places_of_tables(offset)
        self._check_tables(tables, offset)
        return tables

    def _check_missing(self, tables: Column, offset: int) -> None:
        """Raises `ImageError` if only the redundant directory has a table, and is valid."""
        try:
            others = self._directory(self.header.rgdOffset * structs.SECTOR)
        except ImageError as damage:
            self.warn(f"redundant grain directory: {damage}")
            return
        missing = (tables == 0) & (others != 0)
        if missing.any():
            entry = int(np.flatnonzero(missing)[0])
            raise self._bad_entry(offset, entry, "0, but the redundant grain directory has a table")

    @property
    def _knows_zeroed(self) -> bool:
        return bool(self.flags & structs.ZEROED_GRAINS) or self.header.version >= 2

    def decode(self, raw: RawEntries) -> Grains:
        there = raw > structs.ZEROED if self._knows_zeroed else raw != 0
        return Grains(there, raw.astype(np.int64) * structs.SECTOR, np.zeros(len(raw), dtype=bool))

    def _slice(self, raw: RawEntries, first: int) -> Slice:
        zero = raw == structs.ZEROED if self._knows_zeroed else None
        kind, source, offset = self._columns(raw, zero, first)
        data = kind == Kind.DATA
        self.allocated += int(np.count_nonzero(data))
        # A compressed grain takes at least one sector, any other its whole size (the last may be partial).
        room = self.file.size // (structs.SECTOR if self.compressed else self.grain) + 1
        if self.allocated > room:
            raise ImageError(
                f"{self.file.name}: grain tables: {self.allocated} grains are allocated, the file has room for {room}"
            )
        if self.compressed and data.any():
            guest = np.flatnonzero(data) + first
            self.grains.add(guest, offset[data])
            offset[data] = guest * self.grain
        return kind, source, offset
