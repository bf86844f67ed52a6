"""The compressed chunks of an image, decoded: each must become exactly the sectors that it stands for."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np

from vmconv.plugin import Decoded, File, ImageError, damaged, read_part
from vmconv_dmg import adc, structs
from vmconv_dmg.tables import Chunks

_KEPT = 2
"""Chunks that are kept decoded: reads are shorter than a chunk, and mostly in order."""
_XZ_MEMORY = 128 << 20
"""Bytes that a stream of xz may need to be decoded; xz -9 needs 65 MiB."""

NAMES = {
    structs.ADC: "ADC",
    structs.ZLIB: "zlib",
    structs.BZIP2: "bzip2",
    structs.LZFSE: "LZFSE",
    structs.LZMA: "xz",
}


def _by(stream: Callable[[], Any]) -> Callable[[bytes, int], bytes]:
    """Returns the decoder that such a stream is; it returns no bytes for data that do not end the stream."""

    def decode(data: bytes, size: int) -> bytes:
        one = stream()
        # One byte more shows that a chunk is too long; a hostile one decompresses without limit.
        found: bytes = one.decompress(data, size + 1)
        return found if one.eof else b""

    return decode


_DECODERS: dict[int, Callable[[bytes, int], bytes]] = {
    structs.ADC: adc.decompress,
    structs.ZLIB: _by(zlib.decompressobj),
    structs.BZIP2: _by(bz2.BZ2Decompressor),
    structs.LZMA: _by(partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)),
}

DECODED = frozenset(_DECODERS)


class Packed(Decoded):
    """The compressed chunks, at their addresses of the disk; there is nothing between them."""

    def __init__(self, file: File, chunks: Chunks, size: int) -> None:
        super().__init__(
            f"{file.name} (DMG)",
            file,
            unit=structs.SECTOR,
            count=size // structs.SECTOR,
            reason="DMG compresses chunks",
        )
        self.chunks = chunks
        self._one = lru_cache(_KEPT)(self._unpacked)

    def units(self, offset: int, length: int) -> list[bytes]:
        found: list[bytes] = []
        end = offset + length
        while offset < end:
            index = int(np.searchsorted(self.chunks.start, offset, side="right")) - 1
            begin = offset - int(self.chunks.start[index])
            if index < 0 or begin >= int(self.chunks.size[index]):
                raise ImageError(f"{self.file.name}: has no chunk for sector {offset // structs.SECTOR}")
            piece = self._one(index)[begin : begin + end - offset]
            found.append(piece)
            offset += len(piece)
        return found

    def _unpacked(self, index: int) -> bytes:
        kind, start, size, at, length = (int(column[index]) for column in self.chunks)
        data = read_part(self.file, "chunk", at, length)
        try:
            found = _DECODERS[kind](data, size)
        except (zlib.error, OSError, EOFError, lzma.LZMAError, adc.AdcError) as exc:
            problem = f"cannot be decompressed by {NAMES[kind]}: {exc}"
            raise damaged(self.file, "chunk", at, problem, guest=start) from exc
        if len(found) != size:
            problem = f"does not decompress to {size} bytes by {NAMES[kind]}"
            raise damaged(self.file, "chunk", at, problem, guest=start)
        return found
