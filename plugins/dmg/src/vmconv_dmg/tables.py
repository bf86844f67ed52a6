"""The chunks of an image, from the block tables in its property list: which sectors they are, and where they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vmconv.plugin import MAX_SIZE, Column, File, ImageError, Structure, damaged, read_part
from vmconv_dmg import structs

_Raw = npt.NDArray[np.uint64]
_ENTRY = np.dtype(structs.ENTRY)
_FAR = np.uint64(1 << 61)
_LAST = MAX_SIZE // structs.SECTOR
_COMPRESSED = (structs.ADC, structs.ZLIB, structs.BZIP2, structs.LZFSE, structs.LZMA)


class Chunks(NamedTuple):
    """The chunks that are not zeros, sorted: `kind` of structs; the other columns are bytes.

    `start` and `size` are of the disk, `offset` and `length` of the file.
    """

    kind: Column
    start: Column
    size: Column
    offset: Column
    length: Column

    def of(self, mask: npt.NDArray[np.bool_]) -> Chunks:
        return Chunks(*(column[mask] for column in self))


class Trailer(NamedTuple):
    """The fields of a trailer that reading needs, checked. `size` of the disk is bytes, 0 if it is not stated."""

    data: int
    plist_offset: int
    plist_length: int
    size: int
    master: bytes


class Sum(NamedTuple):
    """The checksum of a block table, empty if it has none that is known, and the ranges of the disk that it is of."""

    checksum: bytes
    ranges: tuple[tuple[int, int], ...]


def read_trailer(file: File) -> Trailer:
    """Returns the trailer of an image. Raises `ImageError` with the invalid field."""
    if file.size < structs.TRAILER_LENGTH:
        raise ImageError(f"{file.name}: {file.size} bytes, and a trailer has {structs.TRAILER_LENGTH}")
    head = Structure(file, structs.Trailer, file.size - structs.TRAILER_LENGTH, "trailer")
    raw = head.parse("no signature of a trailer (koly)", "signature")
    head.limit("version", raw.version, 4, 4)
    head.limit("header_size", raw.header_size, structs.TRAILER_LENGTH, structs.TRAILER_LENGTH)
    if raw.segment_count > 1:
        problem = f"segment {raw.segment_number} of {raw.segment_count}, and only images in one file are read"
        raise head.damaged("segment_count", problem, hint="hdiutil convert, on macOS, joins them")
    if not raw.plist_length:
        problem = "0: the block tables are in a resource fork, which is not read"
        raise head.damaged("plist_length", problem, hint="hdiutil convert, on macOS, makes a new image of it")
    head.limit("plist_length", raw.plist_length, 1, structs.MAX_PLIST)
    head.limit("plist_offset", raw.plist_offset, 0, head.offset - raw.plist_length)
    head.limit("data_fork_offset", raw.data_fork_offset, 0, head.offset)
    head.limit("sector_count", raw.sector_count, 0, MAX_SIZE // structs.SECTOR)
    size, master = raw.sector_count * structs.SECTOR, _crc_of(raw.master_checksum)
    return Trailer(raw.data_fork_offset, raw.plist_offset, raw.plist_length, size, master)


def _crc_of(checksum: Any) -> bytes:
    """Returns the four bytes of a CRC-32, none for another checksum."""
    known = (checksum.kind, checksum.bits) == (structs.CRC32, 32)
    return bytes(checksum.data[:4]) if known else b""


def read_chunks(file: File, trailer: Trailer) -> tuple[int, Chunks, list[Sum]]:
    """Returns the size of the disk, its chunks, and the checksums of its tables."""
    parts, sums = [], []
    for number, table in enumerate(_tables(file, trailer)):
        chunks, checksum = _entries(file, trailer, number, table)
        parts.append(chunks)
        sums.append(Sum(checksum, _summed(chunks)))
    if not parts:
        raise _damaged(file, trailer, "no block tables")
    found = Chunks(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    size = trailer.size or int((found.start + found.size).max(initial=0))
    found = found.of((found.size > 0) & (found.kind != structs.ZERO_FILL) & (found.kind != structs.IGNORED))
    found = Chunks(*(column[np.argsort(found.start, kind="stable")] for column in found))
    end = found.start + found.size
    twice = np.flatnonzero(end[:-1] > found.start[1:])
    if len(twice):
        at = int(found.start[1:][twice[0]])
        raise _damaged(file, trailer, f"two chunks for sector {at // structs.SECTOR}")
    if len(end) and int(end[-1]) > size:
        problem = f"a chunk up to sector {int(end[-1]) // structs.SECTOR}, the disk has {size // structs.SECTOR}"
        raise _damaged(file, trailer, problem)
    return size, found, sums


def _summed(chunks: Chunks) -> tuple[tuple[int, int], ...]:
    """Returns the ranges of the disk that the checksum of a table is of, neighbours joined."""
    order = np.argsort(chunks.start, kind="stable")
    order = order[(chunks.kind[order] != structs.IGNORED) & (chunks.size[order] > 0)]
    start, end = chunks.start[order], (chunks.start + chunks.size)[order]
    first = np.append(True, start[1:] != end[:-1])[: len(start)]
    begins, ends = start[first], end[np.append(first[1:], True)[: len(start)]]
    return tuple(zip(begins.tolist(), (ends - begins).tolist(), strict=True))


def _tables(file: File, trailer: Trailer) -> Iterator[bytes]:
    """Yields the block tables in the property list."""
    import plistlib

    data = read_part(file, "property list", trailer.plist_offset, trailer.plist_length)
    try:
        read = plistlib.loads(data, fmt=plistlib.FMT_XML)
    # It raises what its functions raise for values that are not there: nearly any exception.
    except Exception as exc:
        raise _damaged(file, trailer, f"is not valid ({type(exc).__name__})") from exc
    fork = read.get("resource-fork") if isinstance(read, dict) else None
    listed = fork.get("blkx") if isinstance(fork, dict) else None
    if not isinstance(listed, list):
        raise _damaged(file, trailer, "has no block tables (resource-fork, blkx)")
    if len(listed) > structs.MAX_TABLES:
        raise _damaged(file, trailer, f"{len(listed)} block tables, {structs.MAX_TABLES} at most")
    for number, one in enumerate(listed):
        table = one.get("Data") if isinstance(one, dict) else None
        if not isinstance(table, bytes):
            raise _damaged(file, trailer, f"block table {number} has no data")
        yield table


def _entries(file: File, trailer: Trailer, number: int, data: bytes) -> tuple[Chunks, bytes]:
    """Returns the chunks of a block table, with offsets of the disk and of the file, and its checksum."""
    head, entries = _split(file, trailer, number, data)
    named = {name: entries[name].astype(np.uint64) for name in ("sector", "count", "offset", "length")}
    for name, column in named.items():
        if (far := np.flatnonzero(column >= _FAR)).size:
            raise _wrong(file, trailer, number, int(far[0]), f"{name} {int(column[far[0]]):#x} is no number of a disk")
    kind = entries["kind"].astype(np.int64)
    sector, count, offset, length = (column.astype(np.int64) for column in named.values())
    sector += head.first_sector
    offset += head.data_offset + trailer.data
    for bad, problem in _impossible(kind, sector, count, offset, length, file.size):
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            raise _wrong(file, trailer, number, at, problem(at))
    found = Chunks(kind, sector * structs.SECTOR, count * structs.SECTOR, offset, length)
    return found.of((kind != structs.COMMENT) & (kind != structs.TERMINATOR)), _crc_of(head.checksum)


def _impossible(
    kind: Column, sector: Column, count: Column, offset: Column, length: Column, end: int
) -> Iterator[tuple[npt.NDArray[np.bool_], Callable[[int], str]]]:
    """Yields masks of entries that no image has, and what is wrong with the entry of an index."""
    used = (kind != structs.COMMENT) & (kind != structs.TERMINATOR)
    raw, packed = kind == structs.RAW, np.isin(kind, _COMPRESSED)
    known = raw | packed | (kind == structs.ZERO_FILL) | (kind == structs.IGNORED)
    yield used & ~known, lambda at: f"kind {int(kind[at]):#x} is unknown"
    yield (
        used & ((sector > _LAST) | (count > _LAST) | (sector + count > _LAST)),
        lambda at: f"{int(count[at])} sectors from {int(sector[at])} on are past any disk",
    )
    yield (
        (raw | packed) & (offset + length > end),
        lambda at: f"{int(length[at])} bytes at {int(offset[at]):#x} lie past the end of the file ({end:#x})",
    )
    yield (
        packed & ((count > structs.MAX_CHUNK // structs.SECTOR) | (length > structs.MAX_CHUNK)),
        lambda at: f"{int(count[at])} sectors of {int(length[at])} bytes, {structs.MAX_CHUNK} bytes at most",
    )
    yield (
        raw & (length != count * structs.SECTOR),
        lambda at: f"{int(count[at])} sectors that are stored in {int(length[at])} bytes",
    )


def _split(file: File, trailer: Trailer, number: int, data: bytes) -> tuple[Any, npt.NDArray[np.void]]:
    """Returns the header of a block table and its entries."""
    from construct import ConstructError

    begin = structs.BlockTable.sizeof()
    try:
        head = structs.BlockTable.parse(data)
    except ConstructError as exc:
        raise _damaged(file, trailer, f"block table {number}: no signature, or too short ({len(data)} bytes)") from exc
    for name, value, most in (
        ("first_sector", head.first_sector, _LAST),
        ("data_offset", head.data_offset, file.size),
        ("entry_count", head.entry_count, (len(data) - begin) // _ENTRY.itemsize),
    ):
        if value > most:
            raise _damaged(file, trailer, f"block table {number}: {name} {value} is not in 0..{most}")
    return head, np.frombuffer(data, dtype=_ENTRY, count=head.entry_count, offset=begin)


def _wrong(file: File, trailer: Trailer, number: int, entry: int, problem: str) -> ImageError:
    return _damaged(file, trailer, f"block table {number}, entry {entry}: {problem}")


def _damaged(file: File, trailer: Trailer, problem: str) -> ImageError:
    return damaged(file, "property list", trailer.plist_offset, problem)
