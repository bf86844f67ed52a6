"""Reads QED images: L1 and L2 tables into the table of the guest's address space, in bounded slices."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vmconv.plugin import (
    MAX_SIZE,
    Column,
    Extents,
    File,
    Image,
    ImageError,
    Kind,
    Kinds,
    Metadata,
    Opener,
    PlanError,
    Structure,
    damaged,
    refuse_overlaps,
)
from vmconv_qed import structs
from vmconv_qed.options import Options

SLICE = 1 << 19
"""Entries of an L2 table in one slice."""


@dataclass(frozen=True)
class Header:
    """A header, checked against the file and the format's limits; sizes are bytes."""

    file: File
    cluster_size: int
    table_size: int
    header_size: int
    features: int
    l1_offset: int
    size: int
    backing_file: str | None

    @property
    def entries(self) -> int:
        """Entries of one table."""
        return self.table_size // 8

    @property
    def clusters(self) -> int:
        """Clusters of the disk; the last one may reach past the disk's end."""
        return -(-self.size // self.cluster_size)


def read(file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
    """Returns the image in `file`."""
    if snapshot is not None:
        raise ImageError(f"{file.name}: QED images have no snapshots, {snapshot!r} was asked for")
    header = read_header(file)
    # A parent is raw, or its format is determined by its content.
    parent_format = "raw" if header.features & structs.BACKING_FORMAT_NO_PROBE else None

    def load_guest() -> Extents:
        table = Extents.from_units(header.cluster_size, header.size, _slices(header), [file])
        tables = _l1(header)
        refuse_overlaps(
            table,
            file,
            [
                Metadata("L1 table", [header.l1_offset], header.table_size),
                Metadata("L2 table", tables[tables != 0], header.table_size),
            ],
        )
        return table

    def load_parent() -> Image:
        return opener.parent(file, header.backing_file or "", parent_format)

    warnings: tuple[str, ...] = ()
    if header.features & structs.NEED_CHECK:
        warnings = (f"{file.name}: was not closed cleanly; clusters may have leaked, its content is not affected",)
    return Image(
        "qed",
        file,
        header.size,
        load_guest,
        load_parent=load_parent if header.backing_file else None,
        parent_reference=header.backing_file,
        parent_format=parent_format if header.backing_file else None,
        warnings=warnings,
        details=lambda: _details(header),
        shows_holes=lambda _: False,
    )


def options_of(image: Image) -> Options:
    """Returns the options with which the writer makes an image like this one."""
    header = read_header(image.file)
    tables = header.table_size // header.cluster_size
    if tables == 1:
        raise PlanError(f"{image.file.name}: tables of one cluster, which vmconv does not write")
    return Options(cluster_size=header.cluster_size, table_size=tables)


def read_header(file: File) -> Header:
    """Returns the header of the image in `file`. Raises `ImageError` with the invalid field."""
    head = Structure(file, structs.Header)
    if not head.is_inside:
        raise head.refused(f"{head.length} bytes, the file has {file.size}")
    raw = head.parse("no QED signature", "magic")
    head.limit_power("cluster_size", raw.cluster_size, structs.MIN_CLUSTER, structs.MAX_CLUSTER)
    head.limit_power("table_size", raw.table_size, structs.MIN_TABLE, structs.MAX_TABLE)
    cluster = raw.cluster_size
    head.limit("header_size", raw.header_size, 1, max(1, file.size // cluster))
    unknown = raw.features & ~structs.FEATURES
    if unknown:
        bits = ", ".join(f"bit {bit}" for bit in range(64) if unknown >> bit & 1)
        raise head.damaged("features", f"unknown {bits}")
    header = Header(
        file=file,
        cluster_size=cluster,
        table_size=raw.table_size * cluster,
        header_size=raw.header_size * cluster,
        features=raw.features,
        l1_offset=raw.l1_table_offset,
        size=raw.image_size,
        backing_file=_backing_name(head, raw),
    )
    # Full tables are the limit, and they may cover more than 64 bits of addresses.
    head.limit("image_size", raw.image_size, 0, min(MAX_SIZE, header.entries**2 * cluster))
    if raw.image_size % structs.SECTOR:
        raise head.damaged("image_size", f"{raw.image_size} is not whole sectors")
    offset, end = raw.l1_table_offset, raw.l1_table_offset + header.table_size
    if offset % cluster or offset < header.header_size or end > file.size:
        raise head.damaged(
            "l1_table_offset",
            f"{offset:#x} is not a valid offset of {header.table_size} bytes in a file of {file.size:#x}",
        )
    return header


def _backing_name(head: Structure, raw: Any) -> str | None:
    if not raw.features & structs.BACKING_FILE:
        return None
    offset, length = raw.backing_filename_offset, raw.backing_filename_size
    head.limit("backing_filename_size", length, 1, structs.MAX_BACKING_NAME)
    end = min(raw.header_size * raw.cluster_size, head.file.size)
    head.limit("backing_filename_offset", offset, structs.HEADER_LENGTH, end - length)
    return os.fsdecode(head.file.read(offset, length))


def _details(header: Header) -> Mapping[str, Any]:
    return {
        "cluster-size": header.cluster_size,
        "dirty-flag": bool(header.features & structs.NEED_CHECK),
        "format-specific": {"type": "qed", "data": {"table-size": header.table_size // header.cluster_size}},
    }


def _slices(header: Header) -> Iterator[tuple[Kinds, int, Column] | int]:
    """Yields the columns of the L2 tables, or the number of clusters of missing ones."""
    room = -(-header.file.size // header.cluster_size)
    allocated = at = 0
    for first, place, count in _pieces(header):
        if first > at:
            yield first - at
        kind, offset = _columns(header, first, place, count)
        allocated += int((kind == Kind.DATA).sum())
        if allocated > room:
            raise ImageError(
                f"{header.file.name}: L2 entries from {place:#x}: {allocated} clusters are allocated so far, the file "
                f"has room for {room}"
            )
        yield kind, 0, offset
        at = first + count
    if at < header.clusters:
        yield header.clusters - at


def _pieces(header: Header) -> Iterator[tuple[int, int, int]]:
    """Yields `(first cluster, offset of its entry, entries)` of L2 tables in bounded pieces, not in holes."""
    tables = _l1(header)
    for number in written(header, tables).tolist():
        begin, table = number * header.entries, int(tables[number])
        count = min(header.entries, header.clusters - begin)
        for first in range(0, count, SLICE):
            n = min(SLICE, count - first)
            place = table + first * 8
            if header.file.data_ranges(place, place + n * 8):
                yield begin + first, place, n


def written(header: Header, tables: Column) -> Column:
    """Returns the L1 entries whose L2 tables hold data.

    Asks for all data at once, because there may be millions of tables.
    """
    there = np.flatnonzero(tables)
    if not len(there):
        return there
    begin = tables[there]
    ranges = header.file.data_ranges(int(begin.min()), int(begin.max()) + header.table_size)
    edges = np.array(ranges, dtype=np.int64).reshape(-1, 2)
    # The first range that ends behind the table's start must begin before the table's end.
    following = np.append(edges[:, 0], MAX_SIZE)[np.searchsorted(edges[:, 1], begin, side="right")]
    return there[following < begin + header.table_size]


def _columns(header: Header, first: int, place: int, count: int) -> tuple[Kinds, Column]:
    """Returns kind and offset of the clusters from number `first` on; their entries are at `place`."""
    raw = np.frombuffer(header.file.read(place, count * 8), dtype="<u8")
    kind = np.where(raw > structs.ZERO, Kind.DATA, np.where(raw == structs.ZERO, Kind.ZERO, Kind.HOLE))
    data = kind == Kind.DATA
    _check(header, raw, data, first, place)
    return kind.astype(np.uint8), np.where(data, raw, 0).astype(np.int64)


def _l1(header: Header) -> Column:
    """Returns the offsets of the disk's L2 tables, 0 for missing ones.

    Raises `ImageError` if one is not inside the file.
    """
    file, cluster = header.file, header.cluster_size
    needed = -(-header.clusters // header.entries)
    raw = np.frombuffer(file.read(header.l1_offset, needed * 8), dtype="<u8")
    most = max(0, file.size - header.table_size)
    bad = (raw != 0) & ((raw % cluster != 0) | (raw < header.header_size) | (raw > most))
    if bad.any():
        entry = int(np.flatnonzero(bad)[0])
        problem = f"is not {header.table_size} bytes of clusters of the file ({file.size:#x})"
        raise _bad_table(header, entry, int(raw[entry]), problem)
    used = np.sort(raw[raw != 0])
    twice = used[1:][used[1:] - used[:-1] < header.table_size]
    if len(twice):
        entry = int(np.flatnonzero(raw == twice[0])[-1])
        raise _bad_table(header, entry, int(twice[0]), "overlaps another one")
    return raw.astype(np.int64)


def _bad_table(header: Header, entry: int, table: int, problem: str) -> ImageError:
    return damaged(header.file, f"L1 entry {entry}", header.l1_offset + entry * 8, f"L2 table at {table:#x} {problem}")


def _check(header: Header, raw: npt.NDArray[np.uint64], data: npt.NDArray[np.bool_], first: int, place: int) -> None:
    """Raises `ImageError` unless the entries that are `data` are clusters that begin inside the file."""
    size, cluster = header.file.size, header.cluster_size
    bad = data & ((raw % cluster != 0) | (raw < header.header_size) | (raw >= size))
    if not bad.any():
        return
    entry = int(np.flatnonzero(bad)[0])
    where = int(raw[entry])
    problem = f"lies past the end of the file ({size:#x})" if where >= size else f"is no cluster of {cluster:#x} bytes"
    raise damaged(
        header.file,
        "L2 entry",
        place + entry * 8,
        f"payload at {where:#x} {problem}",
        guest=(first + entry) * cluster,
    )
