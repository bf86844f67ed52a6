"""Compressed archives, as vzdump makes them by default: read as a stream, from the beginning to the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmconv import plugin
from vmconv.plugin import Decompressed, ImageError, decoded_head

if TYPE_CHECKING:
    from vmconv.plugin import File

_LZOP = "lzop"
_LZOP_MAGIC = b"\x89LZO\0\r\n\x1a\n"


def stream_of(file: File) -> Decompressed:
    """Returns the decoded bytes of an archive; raises `ImageError` for a compression without a decoder."""
    compression = compression_of(file)
    if compression in (None, _LZOP):
        raise ImageError(
            f"{file.name}: is compressed by lzop, which vmconv does not decode",
            hint=f"lzop -d {file.name}, then convert the .vma",
        )
    return Decompressed(file, compression)


def compression_of(file: File) -> str | None:
    """Returns the compression of a file by its magic number; None for none that is known."""
    is_lzop = file.read(0, min(file.size, len(_LZOP_MAGIC))) == _LZOP_MAGIC
    return _LZOP if is_lzop else plugin.compression_of(file)


def begins_with(file: File, magic: bytes) -> bool:
    """True if a compressed file becomes one with this beginning. lzop is not decoded: then the name decides."""
    if compression_of(file) == _LZOP:
        return file.path.lower().endswith(".vma.lzo")
    return decoded_head(file, len(magic)) == magic
