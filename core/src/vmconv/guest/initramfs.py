"""The names of modules in an initramfs: cpio archives one after the other, each as it is or compressed.

The format is described in the kernel's documentation, "initramfs buffer format".
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

MAX_UNPACKED = 2 << 30
"""Bytes of an initramfs that are unpacked."""

MAX_NAME = 4096

_HEADER = 110
_PIECE = 4096
"""Bytes that are unpacked at once: the most compressible ones make 128 MiB of these."""

_LZ4, _LZ4_BLOCK = b"\x02\x21\x4c\x18", 8 << 20


class InitramfsError(Exception):
    """The initramfs is damaged, or compressed in a way that cannot be read."""


class _Bytes:
    """Bytes that come in pieces. `back` puts some in front again."""

    def __init__(self, pieces: Iterator[bytes], limit: int) -> None:
        self._pieces, self._buffer, self._left = pieces, b"", limit

    def peek(self, length: int) -> bytes:
        """Returns the next bytes; fewer at the end."""
        while len(self._buffer) < length and (piece := next(self._pieces, None)) is not None:
            self._left -= len(piece)
            if self._left < 0:
                raise InitramfsError("is too large when it is unpacked")
            self._buffer += piece
        return self._buffer[:length]

    def take(self, length: int) -> bytes:
        found = self.peek(length)
        self._buffer = self._buffer[len(found) :]
        return found

    def skip(self, length: int) -> None:
        while length and (found := self.take(min(length, 1 << 16))):
            length -= len(found)

    def back(self, data: bytes) -> None:
        self._buffer = data + self._buffer

    def at_end(self) -> bool:
        """Skips zeros between archives; True if nothing follows."""
        while (found := self.peek(4096)) and not found.strip(b"\0"):
            self.take(len(found))
        self.take(len(found) - len(found.lstrip(b"\0")))
        return not self.peek(1)


def names_in(read: Callable[[int, int], bytes], size: int) -> Iterator[str]:
    """Yields the names of all files; raises `InitramfsError`."""
    raw = _Bytes((read(at, 1 << 16) for at in range(0, size, 1 << 16)), size)
    while not raw.at_end():
        if _is_archive(raw):
            yield from _archive(raw)
        else:
            inner = _Bytes(_unpacked(raw), MAX_UNPACKED)
            while not inner.at_end():
                if not _is_archive(inner):
                    raise InitramfsError("holds no cpio archive")
                yield from _archive(inner)


def _is_archive(data: _Bytes) -> bool:
    return data.peek(6) in (b"070701", b"070702")


def _archive(data: _Bytes) -> Iterator[str]:
    """Yields the names of an archive of the format "newc"."""
    while True:
        header = data.take(_HEADER)
        try:
            size, length = (int(header[at : at + 8], 16) for at in (54, 94))
        except ValueError as exc:
            raise InitramfsError("has a damaged cpio header") from exc
        if not header.startswith(b"07070") or not 0 < length <= MAX_NAME:
            raise InitramfsError("has a damaged cpio header")
        name = data.take(length).rstrip(b"\0").decode("utf-8", "replace")
        data.skip(-(_HEADER + length) % 4)
        if name == "TRAILER!!!":
            return
        yield name
        data.skip(size + -size % 4)


def _unpacked(data: _Bytes) -> Iterator[bytes]:
    """Yields the unpacked bytes of one stream, and leaves what follows it in `data`."""
    head = data.peek(6)
    if head.startswith(_LZ4):
        return _lz4_blocks(data)
    if head.startswith(b"\x1f\x8b"):
        return _stream(data, zlib.decompressobj(31))
    if head.startswith((b"\xfd7zXZ\0", b"\x5d\0\0")):
        return _stream(data, lzma.LZMADecompressor(memlimit=256 << 20))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        import zstandard

        return _stream(data, zstandard.ZstdDecompressor(max_window_size=128 << 20).decompressobj())
    raise InitramfsError("is compressed in a way that is not known" if head else "is empty")


def _stream(data: _Bytes, unpacker: Any) -> Iterator[bytes]:
    while not unpacker.eof:
        piece = data.take(_PIECE)
        if not piece:
            raise InitramfsError("is cut off")
        try:
            yield unpacker.decompress(piece)
        # zstandard has an exception of its own, and the module may not be there.
        except Exception as exc:
            raise InitramfsError(f"cannot be unpacked: {exc}") from exc
    data.back(unpacker.unused_data)


def _lz4_blocks(data: _Bytes) -> Iterator[bytes]:
    """Yields blocks of the format that `lz4 -l` writes, the only one that the kernel reads."""
    try:
        from lz4.block import LZ4BlockError, decompress
    except ImportError as exc:
        raise InitramfsError("is compressed by lz4, and the library lz4 is not installed") from exc
    data.take(len(_LZ4))
    # A length of 0, or a larger one than any block has, is what follows the stream: padding, another stream, the end.
    while 0 < (length := int.from_bytes(data.peek(4), "little")) <= _LZ4_BLOCK + (_LZ4_BLOCK >> 7):
        data.take(4)
        try:
            yield decompress(data.take(length), uncompressed_size=_LZ4_BLOCK)
        except (LZ4BlockError, ValueError) as exc:
            raise InitramfsError(f"cannot be unpacked: {exc}") from exc
