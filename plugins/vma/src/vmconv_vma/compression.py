"""Compressed archives, as vzdump makes them by default: read as a stream, from the beginning to the end."""

from __future__ import annotations

import io
import zlib
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vmconv.plugin import ImageError
from vmconv_vma import structs

if TYPE_CHECKING:
    from vmconv.plugin import File

_MAGICS = {b"\x28\xb5\x2f\xfd": "Zstandard", b"\x1f\x8b\x08": "gzip", b"\x89LZO\0\r\n\x1a\n": "lzop"}
_AT_ONCE = 1 << 20
_MAX_WINDOW = 1 << 27
"""Bytes of a window that a decoder may have to hold; `zstd` itself takes no larger one without being asked."""


class _Reader(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Raw(io.RawIOBase):
    """The bytes of a file in order, for decoders."""

    def __init__(self, file: File) -> None:
        self._file = file
        self.at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = min(len(buffer), self._file.size - self.at)
        buffer[:count] = self._file.read(self.at, count)
        self.at += count
        return count


class Stream(NamedTuple):
    """The decoded bytes of an archive, in order."""

    file: File
    compression: str
    raw: _Raw
    decoder: _Reader

    @classmethod
    def of(cls, file: File, compression: str) -> Stream:
        """Opens a stream; raises `ImageError` for a compression without a decoder."""
        if compression == "lzop":
            raise ImageError(
                f"{file.name}: is compressed by lzop, which vmconv does not decode",
                hint=f"lzop -d {file.name}, then convert the .vma",
            )
        raw = _Raw(file)
        buffered = io.BufferedReader(raw, _AT_ONCE)
        decoder: _Reader
        if compression == "gzip":
            from gzip import GzipFile

            decoder = GzipFile(fileobj=buffered, mode="rb")
        else:
            import zstandard

            decoder = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).stream_reader(
                buffered, read_across_frames=True
            )
        return cls(file, compression, raw, decoder)

    def read(self, length: int) -> bytes:
        """Returns the next bytes, fewer at the end; raises `ImageError` if they cannot be decoded."""
        parts = []
        try:
            while length and (part := self.decoder.read(min(length, _AT_ONCE))):
                parts.append(part)
                length -= len(part)
        except (OSError, EOFError, zlib.error) as exc:
            raise self._damaged(exc) from exc
        except Exception as exc:
            # ZstdError derives from Exception, and its module is imported only here.
            if type(exc).__name__ != "ZstdError":
                raise
            raise self._damaged(exc) from exc
        return b"".join(parts)

    def _damaged(self, exc: Exception) -> ImageError:
        reason = " ".join(str(exc).split())
        return ImageError(f"{self.file.name}: {self.compression} data before {self.raw.at:#x} are damaged: {reason}")


def compression_of(file: File) -> str | None:
    """Returns the compression of a file by its magic number; None for none that vzdump uses."""
    head = file.read(0, min(file.size, 16))
    return next((name for magic, name in _MAGICS.items() if head.startswith(magic)), None)


def is_archive(file: File) -> bool:
    """True if a compressed file is an archive. lzop is not decoded: then the name decides."""
    compression = compression_of(file)
    if compression is None:
        return False
    if compression == "lzop":
        return file.path.lower().endswith(".vma.lzo")
    try:
        return Stream.of(file, compression).read(8) == structs.MAGIC + structs.VERSION.to_bytes(4, "big")
    except ImageError:
        return False
