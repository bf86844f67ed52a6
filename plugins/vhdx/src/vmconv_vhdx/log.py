"""The log of a VHDX image that was not closed cleanly, replayed in memory; [MS-VHDX] section 2.3.

The log is a ring of entries, each of whole 4 KiB sectors: a header, descriptors, and a data sector for each data
descriptor. Contiguous entries with consecutive numbers are a sequence. The active sequence has the greatest number and
is replayed from its tail to its head. The file itself is never changed: a replay returns a view of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from vmconv.plugin import Blob, Column, Columns, Extents, File, Kind, damaged, distinct
from vmconv_vhdx import structs

_HINT = "open it once with the program that wrote it, which can repair it, or restore a backup"
_SECTOR = structs.LOG_SECTOR
_MOST = 1 << 61
"""Largest accepted offset of a file, bytes: its double still fits into a signed 64-bit integer."""


@dataclass(frozen=True)
class Log:
    """The range of the log, bytes, and the GUID of its entries; zeros if the log is empty."""

    offset: int
    length: int
    guid: bytes


@dataclass(frozen=True)
class _Entry:
    """A log entry with valid numbers; `start` is its offset in the log, bytes."""

    start: int
    length: int
    tail: int
    sequence: int
    descriptors: int
    flushed: int
    last: int


@dataclass(frozen=True)
class _Patches:
    """The writes of the entries, in order: ranges of the file, and the sector of `data` (-1: zeros)."""

    start: Column
    length: Column
    sector: Column
    data: bytes


def replay(file: File, log: Log) -> Extents:
    """Returns the view of the file after the replay of its log. Raises `ImageError` if the log is not valid."""
    return _Replay(file, log).view()


class _Replay:
    def __init__(self, file: File, log: Log) -> None:
        self.file = file
        self.log = log
        if log.length % structs.MIB or not 0 < log.length <= structs.MAX_DIRTY_LOG:
            self._refuse(f"{log.length} bytes are not whole MiB, {structs.MAX_DIRTY_LOG} at most are replayed")
        if log.offset % structs.MIB or log.offset < structs.HEADER_SECTION or log.offset + log.length > file.size:
            self._refuse(f"{log.length} bytes do not lie at whole MiB between the headers and the end of the file")
        self.data = np.frombuffer(file.read(log.offset, log.length), dtype=np.uint8)

    def _refuse(self, problem: str, at: int = 0) -> NoReturn:
        raise damaged(self.file, "log", self.log.offset + at, problem, hint=_HINT)

    def view(self) -> Extents:
        active = self._active()
        head = active[-1]
        if head.flushed > self.file.size:
            self._refuse(f"the file had {head.flushed:#x} bytes when it was written, it has {self.file.size:#x}")
        size = max([self.file.size, *(entry.last for entry in active)])
        if size > _MOST:
            self._refuse(f"the file would have {size:#x} bytes", head.start)
        count = sum(entry.descriptors for entry in active)
        if count > structs.MAX_DESCRIPTORS:
            self._refuse(f"{count} descriptors, {structs.MAX_DESCRIPTORS} at most are replayed", head.start)
        patches = _joined([self._patches(entry) for entry in active])
        beyond = np.flatnonzero(patches.start + patches.length > size)
        if len(beyond):
            at = int(patches.start[beyond[0]])
            self._refuse(f"writes to {at:#x}, past the end of the file ({size:#x})", head.start)
        # The part by which the log extends the file is zero until the log writes it.
        base = Extents.whole(self.file).window(0, size).without_holes()
        return _painted(base, patches)

    # -- active entries

    def _active(self) -> list[_Entry]:
        """Returns the entries to replay, oldest first."""
        entries = {entry.start: entry for entry in self._entries()}
        valid = {start: entry for start, entry in entries.items() if self._problem(entry) is None}
        best: list[_Entry] = []
        for sequence in self._sequences(valid):
            head = sequence[-1]
            places = [entry.start for entry in sequence]
            if head.tail in places and (not best or head.sequence > best[-1].sequence):
                best = sequence[places.index(head.tail) :]
        newest = max(entries.values(), key=lambda entry: entry.sequence, default=None)
        if newest is None:
            self._refuse("the image was not closed cleanly, but its log has no entry")
        if not best or newest.sequence > best[-1].sequence:
            problem = self._problem(newest) or "entries before it are missing"
            self._refuse(f"is torn: entry {newest.sequence} cannot be replayed: {problem}", newest.start)
        return best

    def _entries(self) -> Iterator[_Entry]:
        """Yields all entries with the log's GUID and possible lengths, valid or not."""
        ring, sectors = self.log.length, self.data.reshape(-1, _SECTOR)
        size = structs.LogEntryHeader.itemsize
        headers = np.ascontiguousarray(sectors[:, :size]).view(structs.LogEntryHeader).reshape(-1)
        mine = headers["log_guid"] == np.void(self.log.guid)
        chosen = np.flatnonzero((headers["signature"] == b"loge") & mine)
        total = 0
        for index, header in zip(chosen.tolist(), headers[chosen].tolist(), strict=True):
            _, _, length, tail, sequence, descriptors, _, _, flushed, last = header
            if length % _SECTOR or not 0 < length <= ring or not sequence:
                continue
            if size + descriptors * structs.LogDescriptor.itemsize > length:
                continue
            total += length
            if total > 2 * ring:
                self._refuse("its entries overlap", index * _SECTOR)
            yield _Entry(index * _SECTOR, length, tail, sequence, descriptors, flushed, last)

    def _sequences(self, valid: dict[int, _Entry]) -> Iterator[list[_Entry]]:
        """Yields each run of entries that are contiguous in the ring and have consecutive numbers."""

        def following(entry: _Entry) -> _Entry | None:
            after = valid.get((entry.start + entry.length) % self.log.length)
            return after if after is not None and after.sequence == entry.sequence + 1 else None

        inner = {after.start for entry in valid.values() if (after := following(entry))}
        for entry in valid.values():
            if entry.start not in inner:
                sequence, after = [entry], following(entry)
                while after:
                    sequence.append(after)
                    after = following(after)
                yield sequence

    def _bytes(self, start: int, length: int) -> npt.NDArray[np.uint8]:
        """Returns bytes of the ring, which wraps around."""
        start %= self.log.length
        part = self.data[start : start + length]
        return part if len(part) == length else np.concatenate([part, self.data[: length - len(part)]])

    def _problem(self, entry: _Entry) -> str | None:
        """Returns why an entry is invalid; None if it is valid."""
        data = self._bytes(entry.start, entry.length).tobytes()
        stated = int.from_bytes(data[4:8], "little")
        found = structs.checksum(data)
        if stated != found:
            return f"checksum {stated:#010x}, its bytes have {found:#010x}"
        if entry.tail % _SECTOR or entry.tail >= self.log.length:
            return f"tail {entry.tail:#x} is not a sector of the log"
        descriptors, sectors = self._parts(entry)
        kinds = descriptors["signature"]
        if (
            not ((kinds == b"desc") | (kinds == b"zero")).all()
            or (descriptors["sequence_number"] != entry.sequence).any()
        ):
            return "a descriptor is not of this entry"
        lengths = np.where(kinds == b"zero", descriptors["leading"], _SECTOR)
        if (descriptors["file_offset"] % _SECTOR).any() or (lengths % _SECTOR).any():
            return "a descriptor is not of whole sectors"
        if len(sectors) != int((kinds == b"desc").sum()):
            return f"{int((kinds == b'desc').sum())} data descriptors for {len(sectors)} data sectors"
        high, low = entry.sequence >> 32, entry.sequence & 0xFFFFFFFF
        if (sectors["signature"] != b"data").any() or (sectors["sequence_high"] != high).any():
            return "a data sector is not of this entry"
        return "a data sector is torn" if (sectors["sequence_low"] != low).any() else None

    def _parts(self, entry: _Entry) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Returns descriptors and data sectors of an entry."""
        head, size = structs.LogEntryHeader.itemsize, structs.LogDescriptor.itemsize
        front = -(-(head + entry.descriptors * size) // _SECTOR) * _SECTOR
        data = self._bytes(entry.start, entry.length)
        descriptors = data[head : head + entry.descriptors * size]
        return descriptors.view(structs.LogDescriptor), data[front:].view(structs.LogDataSector)

    # -- writes

    def _patches(self, entry: _Entry) -> _Patches:
        descriptors, sectors = self._parts(entry)
        is_data = descriptors["signature"] == b"desc"
        limit = np.uint64(_MOST)
        length = np.where(is_data, np.uint64(_SECTOR), descriptors["leading"])
        if (descriptors["file_offset"] > limit).any() or (length > limit).any():
            self._refuse("writes past the largest possible file", entry.start)
        # The first 8 and the last 4 bytes of a sector are in its descriptor, because the log has a number in their
        # place.
        content = sectors.copy().view(np.uint8).reshape(-1, _SECTOR)
        chosen = descriptors[is_data]
        content[:, :8] = np.ascontiguousarray(chosen["leading"]).view(np.uint8).reshape(-1, 8)
        content[:, -4:] = np.ascontiguousarray(chosen["trailing"]).view(np.uint8).reshape(-1, 4)
        sector = np.where(is_data, np.cumsum(is_data) - 1, -1)
        return _Patches(descriptors["file_offset"].astype(np.int64), length.astype(np.int64), sector, content.tobytes())


def _joined(parts: list[_Patches]) -> _Patches:
    sectors, sector = 0, []
    for part in parts:
        sector.append(np.where(part.sector >= 0, part.sector + sectors, -1))
        sectors += len(part.data) // _SECTOR
    return _Patches(
        np.concatenate([part.start for part in parts]),
        np.concatenate([part.length for part in parts]),
        np.concatenate(sector),
        b"".join(part.data for part in parts),
    )


def _painted(base: Extents, patches: _Patches) -> Extents:
    """Returns the table with all patches applied, in order."""
    end = patches.start + patches.length
    edges = distinct(np.concatenate([patches.start, end]))
    owner = np.full(len(edges), -1, dtype=np.int32)
    low, high = np.searchsorted(edges, patches.start), np.searchsorted(edges, end)
    for number, (first, last) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        owner[first:last] = number
    cell = np.flatnonzero(owner >= 0)
    if not len(cell):
        return base
    start, length, patch = edges[cell], edges[cell + 1] - edges[cell], owner[cell]
    sector = patches.sector[patch]
    data = sector >= 0
    blob = Blob("log", patches.data)
    rows = Columns(
        start,
        np.where(data, Kind.DATA, Kind.ZERO).astype(np.uint8),
        np.where(data, 0, -1).astype(np.int32),
        np.where(data, sector * _SECTOR + start - patches.start[patch], 0),
    )
    return base.replaced(Extents.placed(base.size, rows, length, [blob]), start, length)
