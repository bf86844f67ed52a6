"""Compressed pages of kdump files: each yields exactly one page."""

from __future__ import annotations

import zlib

COMPRESSIONS = {1: "zlib", 2: "lzo", 4: "snappy", 0x20: "zstd"}
"""Names of compressions by flag."""

_MAX_WINDOW = 1 << 20


def unpack(flag: int, data: bytes, size: int) -> bytes:
    """Returns the page of `size` bytes. Raises `ValueError` if the data is damaged, or makes more or less than that."""
    found = _UNPACK[flag](data, size)
    if len(found) != size:
        raise ValueError(f"yields {len(found)} bytes, not {size} ({COMPRESSIONS[flag]})")
    return found


def _zlib(data: bytes, size: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        # One byte more shows that a page is too long.
        found = stream.decompress(data, size + 1)
    except zlib.error as exc:
        raise ValueError(f"cannot be decompressed: {exc}") from exc
    if not stream.eof:
        raise ValueError("cannot be decompressed: the stream has no end, or makes more than a page")
    return found


def _lzo(data: bytes, size: int) -> bytes:
    import lzallright

    try:
        return lzallright.LZOCompressor.decompress(data, size)
    except lzallright.LZOError as exc:
        raise ValueError(f"cannot be decompressed (lzo): {exc.args[0]}") from exc


def _snappy(data: bytes, size: int) -> bytes:
    import cramjam

    page = bytearray(size)
    try:
        # It refuses data that announces more than the buffer has.
        return bytes(page[: cramjam.snappy.decompress_raw_into(data, page)])
    except cramjam.DecompressionError as exc:
        raise ValueError(f"cannot be decompressed: {exc}") from exc


def _zstd(data: bytes, size: int) -> bytes:
    import zstandard

    try:
        # A frame's header may announce any size, and the library would allocate it: check first.
        frame = zstandard.get_frame_parameters(data)
        unknown = frame.content_size == zstandard.CONTENTSIZE_UNKNOWN
        if not unknown and frame.content_size != size:
            raise ValueError(f"yields {frame.content_size} bytes, not {size} (zstd)")
        return zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompress(data, max_output_size=size)
    except zstandard.ZstdError as exc:
        raise ValueError(f"cannot be decompressed: {exc}") from exc


_UNPACK = {1: _zlib, 2: _lzo, 4: _snappy, 0x20: _zstd}
