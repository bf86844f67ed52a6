"""Compressed grains: the part of a VMDK that cannot be referenced and is decompressed on reading."""

from __future__ import annotations

import numpy as np

from vmconv.plugin import Column, Decoded, File, ImageError, damaged
from vmconv_vmdk import structs


class CompressedGrains:
    """The compressed grains of one extent; `source` is their content at the extent's addresses."""

    def __init__(self, file: File, grain: int, size: int, *, markers: bool) -> None:
        self.file = file
        self.grain = grain
        self.size = size
        self.markers = markers
        self._parts: list[tuple[Column, Column]] = []
        self._columns: tuple[Column, Column, Column] | None = None
        self.source = Decoded(
            f"{file.name} (deflate)",
            file,
            unit=grain,
            count=-(-size // grain),
            decode=lambda first, count: [self._decode(index) for index in range(first, first + count)],
            reason="compressed grains have to be decompressed (deflate)",
        )

    def add(self, guest: Column, offset: Column) -> None:
        """Adds the numbers of grains and the offsets of their data, which begin inside the file."""
        self._parts.append((guest, offset))
        self._columns = None

    def _located(self) -> tuple[Column, Column, Column]:
        """Returns number, offset and limit of length of each grain: at most up to the start of the next one."""
        if self._columns is None:
            guest, offset = (np.concatenate(column) for column in zip(*self._parts, strict=True))
            places = np.append(np.sort(offset), self.file.size)
            room = places[np.searchsorted(places, offset, side="right")] - offset
            # QEMU allows compressed data of up to twice the grain's size.
            self._columns = guest, offset, np.minimum(room, 2 * self.grain + structs.GRAIN_MARKER_LENGTH)
        return self._columns

    def _decode(self, index: int) -> bytes:
        guest, offset, room = self._located()
        row = int(np.searchsorted(guest, index))
        place = int(offset[row])
        encoded = self._encoded(self.file.read(place, int(room[row])), index, place)
        needed = min(self.grain, self.size - index * self.grain)
        try:
            data, whole = _inflate(encoded, self.grain)
        except Exception as exc:
            # Any error of the library means that the data is damaged.
            raise self._damaged(place, str(exc)) from exc
        if not needed <= len(data) <= self.grain:
            raise self._damaged(place, f"yields {len(data)} bytes, not {self.grain}")
        if not whole:
            raise self._damaged(place, "ends in the middle of its data")
        return data if len(data) == self.grain else data.ljust(self.grain, b"\0")

    def _encoded(self, data: bytes, index: int, place: int) -> bytes:
        """Returns the compressed data behind the marker of the grain `index`."""
        if not self.markers:
            return data
        if len(data) < structs.GRAIN_MARKER_LENGTH:
            raise self._damaged(place, f"{len(data)} bytes have no room for its marker")
        lba, size = structs.GrainMarker.unpack_from(data)
        sector = index * (self.grain // structs.SECTOR)
        if lba != sector:
            raise self._damaged(place, f"is marked as sector {lba:#x}, not {sector:#x}")
        room = len(data) - structs.GRAIN_MARKER_LENGTH
        if not 0 < size <= room:
            raise self._damaged(place, f"is marked as {size} bytes, there is room for {room}")
        return data[structs.GRAIN_MARKER_LENGTH : structs.GRAIN_MARKER_LENGTH + int(size)]

    def _damaged(self, place: int, problem: str) -> ImageError:
        return damaged(self.file, "compressed grain", place, problem)


def _inflate(data: bytes, size: int) -> tuple[bytes, bool]:
    """Returns the data, at most one byte more than `size`, and whether it ended with the right checksum."""
    from isal import isal_zlib

    stream = isal_zlib.decompressobj()
    out = stream.decompress(data, size + 1)
    return out, bool(stream.eof)
