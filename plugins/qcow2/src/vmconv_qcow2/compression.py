"""Compressed clusters: the part of a qcow2 image that guests cannot read as it is."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vmconv.plugin import Column, Decoded, damaged
from vmconv_qcow2.header import Header

SECTOR = 512
# Neighbouring clusters are read in one piece if it is at most this many times as long as they are.
_SPREAD = 2
# QEMU's windows are at most a cluster. Frames that need more memory than this are not from QEMU.
_ZSTD_MAX_WINDOW = 32 << 20


class CompressedClusters:
    """The compressed clusters of one disk; `source` is their content at guest addresses."""

    def __init__(self, header: Header, size: int) -> None:
        self.file = header.file
        self.cluster_size = header.cluster_size
        self._offset_bits = 62 - (header.cluster_bits - 8)
        self._inflate = _inflate_zstd if header.compression == "zstd" else inflate_zlib
        self._parts: list[tuple[Column, Column, Column]] = []
        self._columns: tuple[Column, Column, Column] | None = None
        self.source = Decoded(
            f"{header.file.name} ({header.compression})",
            header.file,
            unit=self.cluster_size,
            count=-(-size // self.cluster_size),
            decode=self._decode,
            reason=f"compressed clusters have to be decompressed ({header.compression})",
            encoding=encoding(header.compression, self.cluster_size),
            encoded=self._encoded,
        )

    def add(self, guest: Column, raw: npt.NDArray[np.uint64]) -> int | None:
        """Adds L2 entries of guest clusters, in order; returns the first one past the end of the file."""
        offset, length = locate(raw, self._offset_bits)
        bad = offset >= self.file.size
        if bad.any():
            return int(guest[bad][0])
        self._parts.append((guest, offset, np.minimum(length, self.file.size - offset)))
        self._columns = None
        return None

    def places(self) -> tuple[Column, Column]:
        """Returns the guest addresses of all compressed clusters, and the offsets of their data."""
        if not self._parts:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        guest, offset, _ = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        return guest * self.cluster_size, offset

    def _located(self) -> tuple[Column, Column, Column]:
        """Returns number, offset and length of all compressed clusters."""
        if self._columns is None:
            guest, offset, length = (np.concatenate(column) for column in zip(*self._parts, strict=True))
            self._columns = guest, offset, length
        return self._columns

    def _encoded(self, units: Column) -> tuple[Column, Column]:
        guest, offset, length = self._located()
        row = np.searchsorted(guest, units)
        return offset[row], length[row]

    def _decode(self, first: int, count: int) -> list[bytes]:
        """Returns the content of neighbouring compressed clusters."""
        guest, offset, length = self._located()
        row = int(np.searchsorted(guest, first))
        places, lengths = offset[row : row + count], length[row : row + count]
        begin, end = int(places.min()), int((places + lengths).max())
        if end - begin > _SPREAD * int(lengths.sum()):
            # Clusters written later lie elsewhere, and the gap is not worth reading.
            return [
                self._inflated(self.file.read(at, n), at)
                for at, n in zip(places.tolist(), lengths.tolist(), strict=True)
            ]
        data = memoryview(self.file.read(begin, end - begin))
        pairs = zip(places.tolist(), lengths.tolist(), strict=True)
        return [self._inflated(data[at - begin : at - begin + n], at) for at, n in pairs]

    def _inflated(self, encoded: bytes | memoryview, place: int) -> bytes:
        try:
            data = self._inflate(encoded, self.cluster_size)
        except Exception as exc:
            # Any error of the libraries means that the data is damaged.
            raise damaged(self.file, "compressed cluster", place, str(exc)) from exc
        if len(data) != self.cluster_size:
            problem = f"yields {len(data)} bytes, not {self.cluster_size}"
            raise damaged(self.file, "compressed cluster", place, problem)
        return data


def locate(raw: npt.NDArray[np.uint64], offset_bits: int) -> tuple[Column, Column]:
    """Returns offset and length in bytes of the data that entries of compressed clusters point to.

    The length is the entry's count of sectors; the data may be shorter.
    """
    offset = (raw & np.uint64((1 << offset_bits) - 1)).astype(np.int64)
    sectors = ((raw & np.uint64((1 << 62) - 1)) >> np.uint64(offset_bits)).astype(np.int64) + 1
    return offset, sectors * SECTOR - offset % SECTOR


def inflate_zlib(data: bytes | memoryview, size: int) -> bytes:
    from isal import igzip_lib

    # QEMU writes windows of 12 bits; the largest window reads all. Bytes after the stream are padding.
    inflater = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_DEFLATE, hist_bits=15)
    result: bytes = inflater.decompress(data, size)
    return result


# A decompressor is expensive to create, and not thread-safe.
_zstd = threading.local()


def _inflate_zstd(data: bytes | memoryview, size: int) -> bytes:
    import zstandard

    # A frame's header may announce any size, and the library would allocate it: check first.
    frame = zstandard.get_frame_parameters(data)
    announced = 0 if frame.content_size == zstandard.CONTENTSIZE_UNKNOWN else frame.content_size
    if announced > size or frame.window_size > _ZSTD_MAX_WINDOW:
        raise ValueError(f"frame of {frame.content_size} bytes with a window of {frame.window_size}")
    if not hasattr(_zstd, "decompressor"):
        _zstd.decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW)
    result: bytes = _zstd.decompressor.decompress(data, max_output_size=size, allow_extra_data=True)
    return result


# -- writing

_ZLIB_LEVEL = 6
"""The default of the library and of QEMU."""
_ZSTD_LEVEL = 2
"""As small as level 3 of QEMU, which does not tell the library the size of a cluster, and faster."""
_WINDOW_BITS = 12
"""QEMU inflates with a window of 4096 bytes."""
_MEMORY_LEVEL = 9


def encoding(kind: str, cluster_size: int) -> str:
    """Returns the name of the encoding of compressed clusters, for `Decoded`."""
    return f"qcow2 {kind} {cluster_size}"


def compressor(kind: str, level: int | None) -> Callable[[memoryview], bytes]:
    """Returns a function that compresses a cluster, for this thread."""
    if kind == "zstd":
        return _zstd_compressor(level or _ZSTD_LEVEL)
    return lambda data: _deflate(data, level or _ZLIB_LEVEL)


def _deflate(data: memoryview, level: int) -> bytes:
    # Twice as fast as zlib at the same level. isal is faster still, and its clusters are 7 % larger.
    from zlib_ng import zlib_ng

    packer = zlib_ng.compressobj(level, zlib_ng.DEFLATED, -_WINDOW_BITS, _MEMORY_LEVEL)
    packed: bytes = packer.compress(data) + packer.flush()
    return packed


def _zstd_compressor(level: int) -> Callable[[memoryview], bytes]:
    import zstandard

    found = getattr(_zstd, "compressor", None)
    if found is None or found[0] != level:
        # Content sizes are in the frame, as the cluster's size is known.
        found = _zstd.compressor = level, zstandard.ZstdCompressor(level=level)
    compress: Callable[[memoryview], bytes] = found[1].compress
    return compress
