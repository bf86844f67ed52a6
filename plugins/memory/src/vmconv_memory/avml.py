"""Reads AVML images: ranges of RAM, each behind a header like LiME's, as a stream of framed Snappy.

    header  magic number, version 2, first and last address, 0
    stream  chunks: type, length (24 bits); CRC-32C and up to 64 KiB, compressed or not
    length  of the stream, u64

All numbers are little-endian (AVML, src/image.rs; Snappy, framing_format.txt). AVML leaves out pieces of 16 MiB that
are all zeros: nothing tells them from addresses without RAM.
"""

from __future__ import annotations

from array import array
from functools import lru_cache

import numpy as np

from vmconv.plugin import Decoded, File, Image, ImageError, UsageError, damaged, read_part
from vmconv_memory import structs
from vmconv_memory.ranges import Entries, behind

_HEADER = structs.LIME.size
_MAGIC = structs.AVML_MAGIC.to_bytes(4, "little")
_COMPRESSED, _PLAIN, _SKIPPED = 0, 1, 0x80
_STREAM = b"\xff\x06\0\0sNaPpY"
"""The chunk that a stream begins with."""
_MOST = 1 << 16
"""Bytes in a chunk."""
_MAX_CHUNKS = 1 << 23
"""Chunks of an image: 512 GiB of RAM."""
_MAX_OTHERS = 16
"""Chunks of a stream that are not RAM: padding, and what a reader may skip."""
_CHECKSUM = 4


class Chunks(Decoded):
    """The RAM of all ranges, one behind the other, decoded chunk by chunk; each is verified by its checksum."""

    def __init__(self, file: File) -> None:
        super().__init__(
            f"{file.name} (snappy)", file, unit=_MOST, count=0, reason="AVML compresses memory, or puts headers into it"
        )
        self._places, self._begins = array("q"), array("q", [0])
        self._kept = lru_cache(2)(self._decoded)

    def add(self, place: int, length: int) -> None:
        """Adds the chunk whose header is at an offset of the file, and which has `length` bytes of RAM."""
        if len(self._places) >= _MAX_CHUNKS:
            raise damaged(self.file, "chunk", place, f"more than {_MAX_CHUNKS} chunks")
        self._places.append(place)
        self.size += length
        self._begins.append(self.size)

    def units(self, offset: int, length: int) -> list[bytes]:
        if not length:
            return []
        begins = np.frombuffer(self._begins, dtype=np.int64)
        first = int(np.searchsorted(begins, offset, side="right")) - 1
        last = int(np.searchsorted(begins, offset + length, side="left"))
        parts = [self._kept(number) for number in range(first, last)]
        parts[-1] = parts[-1][: offset + length - int(begins[last - 1])]
        parts[0] = parts[0][offset - int(begins[first]) :]
        return parts

    def _decoded(self, number: int) -> bytes:
        import cramjam

        place, length = self._places[number], self._begins[number + 1] - self._begins[number]
        size = int.from_bytes(self.file.read(place + 1, 3), "little")
        try:
            # The library verifies the checksum, and refuses chunks of more than 64 KiB.
            found = bytes(cramjam.snappy.decompress(_STREAM + self.file.read(place, 4 + size)))
        except cramjam.DecompressionError as exc:
            raise damaged(self.file, "chunk", place, f"cannot be decompressed: {exc}") from exc
        if len(found) != length:
            raise damaged(self.file, "chunk", place, f"yields {len(found)} bytes, not {length}")
        return found


def read(file: File, *, snapshot: str | None = None) -> Image:
    """Returns the memory in `file`; the headers of all chunks are read now."""
    if snapshot is not None:
        raise UsageError(f"{file.name}: AVML images have no snapshots, {snapshot!r} was requested")
    chunks = Chunks(file)
    ranges, end = _ranges(file, chunks)
    if not ranges:
        raise ImageError(f"{file.name}: has no ranges")
    entries = Entries(file, "range", chunks)
    for place, first, length, offset in ranges:
        entries.add(place, first, length, length, offset)
    table = entries.table()
    details = {"format-specific": {"type": "avml", "data": {"ranges": len(entries), "machine-state": "none"}}}
    warning = behind(file, end, _HEADER, _MAGIC)
    return Image(
        "avml",
        file,
        table.size,
        lambda: table,
        kind="memory",
        warnings=(warning,) if warning else (),
        details=lambda: details,
    )


def _ranges(file: File, chunks: Chunks) -> tuple[list[tuple[int, int, int, int]], int]:
    """Returns the ranges, and the offset behind the last one.

    Of each range: the offset of its header, address and length of its RAM, and where that begins in `chunks`.
    """
    found: list[tuple[int, int, int, int]] = []
    at = 0
    while at < file.size and not (at and behind(file, at, _HEADER, _MAGIC)):
        what = f"range {len(found)}"
        magic, version, first, last, _ = structs.LIME.unpack(read_part(file, what, at, _HEADER))
        if (magic, version) != (structs.AVML_MAGIC, structs.AVML_VERSION):
            wanted = f"{structs.AVML_MAGIC:#x}, version {structs.AVML_VERSION}"
            raise damaged(file, what, at, f"magic number {magic:#x}, version {version} is not {wanted}")
        if last < first:
            raise damaged(file, what, at, f"last address {last:#x} is less than the first, {first:#x}")
        begin = chunks.size
        place, at = at, _stream(file, chunks, at + _HEADER, last - first + 1)
        found.append((place, first, last - first + 1, begin))
    return found, at


def _stream(file: File, chunks: Chunks, at: int, length: int) -> int:
    """Adds the chunks of a stream that has `length` bytes of RAM; returns the offset behind it and its length."""
    begin, end = at, chunks.size + length
    if read_part(file, "stream", at, len(_STREAM)) != _STREAM:
        raise damaged(file, "stream", at, "no signature of a Snappy stream")
    others = 0
    while chunks.size < end:
        head = read_part(file, "chunk", at, 4)
        kind, size = head[0], int.from_bytes(head[1:], "little")
        if at + 4 + size > file.size:
            raise damaged(file, "chunk", at, f"{size} bytes reach past the end of the file ({file.size:#x})")
        if kind in (_COMPRESSED, _PLAIN):
            there = size - _CHECKSUM if kind == _PLAIN else _announced(file, at, size)
            if not 0 < there <= min(_MOST, end - chunks.size):
                most = min(_MOST, end - chunks.size)
                raise damaged(file, "chunk", at, f"has {there} bytes of RAM, from 1 to {most} are possible")
            chunks.add(at, there)
        else:
            others += 1
            if kind < _SKIPPED or others > _MAX_OTHERS:
                raise damaged(file, "chunk", at, f"type {kind:#x} is not known, or there after {_MAX_OTHERS} others")
        at += 4 + size
    stated = int.from_bytes(read_part(file, "length of the stream", at, 8), "little")
    if chunks.size != end or stated != at - begin:
        raise damaged(file, "length of the stream", at, f"{stated} is not {at - begin}, which the chunks have")
    return at + 8


def _announced(file: File, at: int, size: int) -> int:
    """Returns the number of bytes of RAM in a compressed chunk: a varint at its beginning."""
    value = 0
    for number, byte in enumerate(file.read(at + 4 + _CHECKSUM, max(0, min(5, size - _CHECKSUM)))):
        value |= (byte & 0x7F) << 7 * number
        if byte < 0x80:
            return value
    return 0
