"""Reads Apple disk images: stored chunks are windows onto the file, compressed ones are decoded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vmconv.plugin import (
    Columns,
    Extents,
    File,
    Image,
    ImageError,
    Kind,
    Metadata,
    RangesCrc,
    UsageError,
    refuse_overlaps,
)
from vmconv_dmg import structs
from vmconv_dmg.decoding import DECODED, NAMES, Packed
from vmconv_dmg.tables import Chunks, Sum, Trailer, read_chunks, read_trailer


class DmgImage(Image):
    """An image with its chunks, for the check."""

    chunks: Chunks
    trailer: Trailer
    sums: Sequence[Sum]


def read(file: File, *, snapshot: str | None = None) -> Image:
    """Returns the disk in the image."""
    if snapshot is not None:
        raise UsageError(f"{file.name}: a DMG has no snapshots, {snapshot!r} was requested")
    trailer = read_trailer(file)
    size, chunks, sums = read_chunks(file, trailer)
    image = DmgImage(
        "dmg",
        file,
        size,
        lambda: _table(file, trailer, chunks, size),
        details=lambda: {
            "format-specific": {
                "type": "dmg",
                "data": {"chunks": len(chunks.kind), "compression": _compression(chunks)},
            },
        },
        crcs=_crcs(sums, size),
    )
    image.chunks, image.trailer, image.sums = chunks, trailer, sums
    return image


def qemu_incompatibility(image: Image) -> str | None:
    """Returns why QEMU does not read this image; None if it does."""
    assert isinstance(image, DmgImage)
    for kind in (structs.ADC, structs.LZMA):
        if (image.chunks.kind == kind).any():
            return f"QEMU does not decompress {NAMES[kind]} in a DMG"
    return None


def _crcs(sums: Sequence[Sum], size: int) -> tuple[RangesCrc, ...]:
    """Returns the checksums of the tables; none if no table has one."""
    if not any(one.checksum for one in sums):
        return ()
    return tuple(
        RangesCrc(
            f"block table {number}",
            int.from_bytes(one.checksum) if one.checksum else None,
            [(start, min(length, size - start)) for start, length in one.ranges if start < size],
        )
        for number, one in enumerate(sums)
    )


def _compression(chunks: Chunks) -> list[str]:
    return [name for kind, name in NAMES.items() if (chunks.kind == kind).any()]


def _table(file: File, trailer: Trailer, chunks: Chunks, size: int) -> Extents:
    packed = chunks.kind != structs.RAW
    if len(unknown := set(chunks.kind[packed].tolist()) - DECODED):
        name = NAMES[min(unknown)]
        raise ImageError(
            f"{file.name}: chunks are compressed by {name}, which is not supported",
            hint="hdiutil convert -format UDZO, on macOS, makes an image with zlib of it",
        )
    source = packed.astype(np.int32)
    rows = Columns(
        chunks.start,
        np.full(len(source), Kind.DATA, dtype=np.uint8),
        source,
        np.where(packed, chunks.start, chunks.offset),
    )
    table = Extents.placed(size, rows, chunks.size, [file, Packed(file, chunks.of(packed), size)])
    refuse_overlaps(
        table,
        file,
        [
            Metadata("property list", [trailer.plist_offset], trailer.plist_length),
            Metadata("trailer", [file.size - structs.TRAILER_LENGTH], structs.TRAILER_LENGTH),
        ],
    )
    return table
