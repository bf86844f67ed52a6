"""Reads and checks compressed loop images."""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import Any

import numpy as np

from vmconv.plugin import (
    MAX_SIZE,
    CheckReport,
    Column,
    Decoded,
    Extents,
    File,
    Findings,
    Image,
    Structure,
    UsageError,
    damaged,
    read_part,
)
from vmconv_cloop import structs

_KEPT = 8


def read(file: File, *, snapshot: str | None = None) -> Image:
    """Returns the disk in the image."""
    if snapshot is not None:
        raise UsageError(f"{file.name}: cloop has no snapshots, {snapshot!r} was requested")
    head = Structure(file, structs.Header)
    raw = head.parse("no signature of cloop 2.0", "signature")
    head.limit("block_size", raw.block_size, structs.SECTOR, structs.MAX_BLOCK)
    if raw.block_size % structs.SECTOR:
        raise head.damaged("block_size", f"{raw.block_size} is not whole sectors")
    head.limit("num_blocks", raw.num_blocks, 0, min(structs.MAX_BLOCKS, MAX_SIZE // raw.block_size))
    offsets = _offsets(head, raw)
    blocks = Blocks(file, raw.block_size, offsets)
    return Image(
        "cloop",
        file,
        blocks.size,
        lambda: Extents.whole(blocks),
        details=lambda: {
            "cluster-size": raw.block_size,
            "format-specific": {"type": "cloop", "data": {"blocks": raw.num_blocks}},
        },
    )


def check(image: Image) -> CheckReport:
    """Returns the report; the reader has checked all numbers, and blocks follow each other. They are not read."""
    count = image.details["format-specific"]["data"]["blocks"]
    end = max((source.end for source in image.guest.sources if isinstance(source, Blocks)), default=0)
    return Findings().report(allocated=count, total=count, end=end)


def _offsets(head: Structure, raw: Any) -> Column:
    """Returns the offsets of the blocks, and of the end of the last."""
    at, length = head.length, (raw.num_blocks + 1) * 8
    found = np.frombuffer(read_part(head.file, "offsets of blocks", at, length), dtype=">u8")
    first, end = at + length, head.file.size
    # Unsigned numbers wrap around where they descend, and are too long then.
    size = found[1:].astype(np.uint64) - found[:-1].astype(np.uint64)
    bad = (found[:-1] < first) | (found[1:] > end) | (size == 0) | (size > 2 * raw.block_size)
    if bad.any():
        block = int(np.flatnonzero(bad)[0])
        problem = f"{int(found[block]):#x} to {int(found[block + 1]):#x} is no block between {first:#x} and {end:#x}"
        raise damaged(head.file, f"offset of block {block}", at + 8 * block, problem, guest=block * raw.block_size)
    return found.astype(np.int64)


class Blocks(Decoded):
    """The disk, decoded block by block."""

    def __init__(self, file: File, block: int, offsets: Column) -> None:
        super().__init__(
            f"{file.name} (cloop)", file, unit=block, count=len(offsets) - 1, reason="cloop compresses blocks"
        )
        self._offsets = offsets
        self._one = lru_cache(max(1, _KEPT * 65536 // max(block, 65536)))(self._unpacked)

    @property
    def end(self) -> int:
        """The end of the last block in the file."""
        return int(self._offsets[-1])

    def units(self, offset: int, length: int) -> list[bytes]:
        if not length:
            return []
        first, end = offset // self.unit, -(-(offset + length) // self.unit)
        found = [self._one(number) for number in range(first, end)]
        found[-1] = found[-1][: offset + length - (end - 1) * self.unit]
        found[0] = found[0][offset - first * self.unit :]
        return found

    def _unpacked(self, number: int) -> bytes:
        begin, end = (int(one) for one in self._offsets[number : number + 2])
        stream = zlib.decompressobj()
        try:
            # One byte more shows that a block is too long; a hostile one decompresses without limit.
            found = stream.decompress(self.file.read(begin, end - begin), self.unit + 1)
        except zlib.error as exc:
            raise damaged(
                self.file, f"block {number}", begin, f"cannot be decompressed: {exc}", guest=number * self.unit
            ) from exc
        if not stream.eof or len(found) != self.unit:
            problem = f"does not decompress to {self.unit} bytes"
            raise damaged(self.file, f"block {number}", begin, problem, guest=number * self.unit)
        return found
