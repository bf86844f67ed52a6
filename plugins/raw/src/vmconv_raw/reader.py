"""Reads a raw disk: its holes are those of the file."""

from __future__ import annotations

import numpy as np

from vmconv.plugin import Columns, Extents, File, Image, Kind, Reserved, UsageError, on_storage

SECTOR = 512


def read(file: File, *, snapshot: str | None = None) -> Image:
    """Returns the disk in `file`. A partial last sector is filled with zeros, as in QEMU."""
    if snapshot is not None:
        raise UsageError(f"{file.name}: raw disks have no snapshots, {snapshot!r} was requested")
    size = -(-file.size // SECTOR) * SECTOR

    def load_guest() -> Extents:
        return on_storage(file).window(0, size).without_holes()

    def load_places() -> Extents:
        # In a raw disk, holes have offsets like payload.
        table = load_guest()
        hole = table.kind == Kind.ZERO
        source = np.where(hole, 1, table.source).astype(np.int32)
        rows = Columns(table.start, np.full(len(table), Kind.DATA, dtype=np.uint8), source, table.start)
        return Extents(size, rows, [file, Reserved(file, hides=True)])

    losses: tuple[str, ...] = ()
    if size != file.size:
        losses = (
            f"size {file.size} is not whole sectors: the disk has {size} bytes, the last {size - file.size} zero",
        )
    return Image("raw", file, size, load_guest, load_places=load_places, losses=losses)
