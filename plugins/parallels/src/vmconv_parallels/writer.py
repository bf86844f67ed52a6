"""Writes Parallels images of version 2: a pure function from the guest's table to the table of the output file.

    header | BAT | slack | clusters
    header | BAT | clusters, unmoved | the cluster moved to clear the BAT      (in place)

Payload is placed so that it can be shared: in the order of its sources, each run congruent to its source. The BAT is
computed on writing. The last cluster is whole even if the disk ends inside it: QEMU (8.1 and later) reports a cluster
past the end of the file as damage, and drops it in a repair.
"""

from __future__ import annotations

import numpy as np

from vmconv.plugin import (
    Blob,
    Column,
    Columns,
    Extents,
    Image,
    Kind,
    Layout,
    OutFile,
    Placeholder,
    Placement,
    PlanError,
    blocks,
    cut,
)
from vmconv_parallels import structs
from vmconv_parallels.options import Options

_HEADS, _SECTORS = 16, 32
"""The geometry of new disks of QEMU and Parallels."""


def write(image: Image, options: Options, placement: Placement) -> Layout:
    """Returns the layout of a Parallels image; raises `PlanError` if the disk is too large for its clusters."""
    cluster = options.cluster_size
    size = -(-image.size // structs.SECTOR) * structs.SECTOR
    _refuse_too_large(size, cluster)
    guest = blocks.padded(image.flat, cluster)
    head = structs.HEADER_LENGTH + guest.size // cluster * 4
    # Clusters stay unused only if the storage's blocks are larger than clusters.
    align = max(cluster, placement.modulus)
    base = -(-head // align) * align
    data, offset = _placed(image.flat, guest, cluster, base, placement)
    end = int((offset + data.blocks * cluster).max(initial=base))
    if end // cluster > 1 << 32:
        raise PlanError(
            f"parallels with clusters of {cluster} bytes cannot name clusters past {cluster << 32:#x}",
            hint="use larger clusters",
        )
    rows, length = cut(guest, data.first * cluster, data.blocks * cluster, offset)
    metadata = [
        (0, Blob("header", _header(size, cluster, base))),
        (structs.HEADER_LENGTH, _bat(guest.size, cluster, data, offset, end)),
    ]
    return Layout((OutFile(blocks.output_table(metadata, guest, rows, length, end), slack=True),))


def _placed(disk: Extents, guest: Extents, cluster: int, base: int, placement: Placement) -> tuple[blocks.Runs, Column]:
    """Returns the runs of clusters with payload, and their offsets; in place, those they have already."""
    if placement.carrier:
        from vmconv.plugin import pin

        found = pin(disk, placement.carrier, [cluster]).cleared(base)
        return found.runs, found.offset
    runs = blocks.whole_blocks(guest, cluster)
    data = runs.take(runs.kind == Kind.DATA)
    placed = blocks.place(guest, data, cluster, base, placement.modulus)
    return data.take(placed.run), placed.offset


def _refuse_too_large(size: int, cluster: int) -> None:
    most = structs.MAX_BAT_ENTRIES * cluster
    if size <= most:
        return
    needed = -(-size // structs.MAX_BAT_ENTRIES)
    larger = min(1 << (needed - 1).bit_length(), 1 << 30)
    raise PlanError(
        f"parallels with clusters of {cluster} bytes cannot hold {size} bytes, {most} at most",
        hint=f"use larger clusters, such as -o cluster_size={larger}",
    )


def _header(size: int, cluster: int, base: int) -> bytes:
    header: bytes = structs.Header.build(
        {
            "magic": structs.MAGIC_V2,
            "version": structs.VERSION,
            "heads": _HEADS,
            "cylinders": min(size // (structs.SECTOR * _HEADS * _SECTORS), 0xFFFFFFFF),
            "tracks": cluster // structs.SECTOR,
            "nb_bat_entries": -(-size // cluster),
            "nb_sectors": size // structs.SECTOR,
            "in_use": structs.CLOSED,
            "data_off": base // structs.SECTOR,
            "flags": 0,
            "ext_off": 0,
        }
    )
    return header


def _bat(size: int, cluster: int, data: blocks.Runs, offset: Column, end: int) -> Blob:
    """Returns the BAT of a disk of `size` bytes, computed on reading."""
    order = np.argsort(data.first, kind="stable")
    n = len(order)
    rows = Columns(
        (data.first * cluster)[order],
        np.full(n, Kind.DATA, dtype=np.uint8),
        np.zeros(n, dtype=np.int32),
        offset[order],
    )
    host = Extents.placed(size, rows, (data.blocks * cluster)[order], [Placeholder("output", end)])

    def compute(offset: int, length: int) -> bytes:
        first, last = offset // 4, -(-(offset + length) // 4)
        # All other rows have offset 0, which means "not allocated" in a BAT.
        _, _, where = host.units(cluster, first, last - first)
        return (where // cluster).astype("<u4").tobytes()[offset - first * 4 :][:length]

    return Blob("BAT", compute, size // cluster * 4)
