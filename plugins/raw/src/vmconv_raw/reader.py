"""Reads a raw disk: its holes are what the filesystem says they are."""

from __future__ import annotations

from vmconv.errors import ImageError
from vmconv.extents import Extents, on_storage
from vmconv.image import Image
from vmconv.sources import File

SECTOR = 512


def read(file: File, *, snapshot: str | None = None) -> Image:
    """Returns the disk in `file`; a size that is not whole sectors is rounded up with zeros, as QEMU does."""
    if snapshot is not None:
        raise ImageError(f"{file.name}: raw disks have no snapshots, {snapshot!r} was asked for")
    size = -(-file.size // SECTOR) * SECTOR

    def load_guest() -> Extents:
        return on_storage(file).window(0, size).without_holes()

    losses = ()
    if size != file.size:
        losses = (f"size {file.size} is not whole sectors: the disk has {size} bytes, the last {size - file.size} zero",)
    return Image("raw", file, size, load_guest, losses=losses)

