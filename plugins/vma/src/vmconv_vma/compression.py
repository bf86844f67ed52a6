"""Compressed archives, as vzdump makes them by default: read as a stream, from the beginning to the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmconv.plugin import Decompressed, ImageError
from vmconv_vma import structs

if TYPE_CHECKING:
    from vmconv.plugin import File

_LZOP = "lzop"
_MAGICS = {b"\x28\xb5\x2f\xfd": "Zstandard", b"\x1f\x8b\x08": "gzip", b"\x89LZO\0\r\n\x1a\n": _LZOP}


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
    """Returns the compression of a file by its magic number; None for none that vzdump uses."""
    head = file.read(0, min(file.size, 16))
    return next((name for magic, name in _MAGICS.items() if head.startswith(magic)), None)


def is_archive(file: File) -> bool:
    """True if a compressed file is an archive. lzop is not decoded: then the name decides."""
    compression = compression_of(file)
    if compression is None:
        return False
    if compression == _LZOP:
        return file.path.lower().endswith(".vma.lzo")
    try:
        return stream_of(file).read(8) == structs.MAGIC + structs.VERSION.to_bytes(4, "big")
    except ImageError:
        return False
