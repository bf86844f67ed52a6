"""Reads Parallels expandable images: the BAT into the table of the guest's address space, in bounded slices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vmconv.plugin import (
    MAX_SIZE,
    Column,
    Extents,
    File,
    Image,
    ImageError,
    Kind,
    Kinds,
    PlanError,
    Structure,
    damaged,
    refuse_overlaps,
)
from vmconv_parallels import structs
from vmconv_parallels.options import Options

SLICE = 1 << 20
"""Entries of the BAT in one slice."""


@dataclass(frozen=True)
class Header:
    """A header, checked against the file and the format's limits; sizes are bytes."""

    file: File
    version: int
    cluster_size: int
    entry_unit: int
    """The unit of BAT entries, in bytes."""
    size: int
    in_use: bool
    empty: bool
    extension: int
    """Offset of the format extension in sectors; 0 if there is none."""
    data_offset: int
    """Offset of the data area; 0 if the image does not state it."""

    @property
    def clusters(self) -> int:
        """Clusters of the disk; the last one may reach past the disk's end."""
        return -(-self.size // self.cluster_size)


def read(file: File, *, snapshot: str | None = None) -> Image:
    """Returns the image in `file`. A disk with snapshots has one image for each, and a descriptor of all."""
    if snapshot is not None:
        raise ImageError(
            f"{file.name}: no snapshots inside, {snapshot!r} was asked for",
            hint="the disk's DiskDescriptor.xml names its snapshots",
        )
    header = read_header(file)
    return Image(
        "parallels",
        file,
        header.size,
        lambda: read_table(header),
        losses=tuple(losses(header)),
        warnings=tuple(warnings(header)),
        details=lambda: _details(header),
        shows_holes=lambda _: False,
    )


def options_of(image: Image) -> Options:
    """Returns the options with which the writer makes an image like this one."""
    header = read_header(image.file)
    if header.cluster_size & (header.cluster_size - 1):
        raise PlanError(f"{image.file.name}: clusters of {header.cluster_size} bytes, which vmconv does not write")
    return Options(cluster_size=header.cluster_size)


def read_header(file: File) -> Header:
    """Returns the header of the image in `file`. Raises `ImageError` with the invalid field."""
    head = Structure(file, structs.Header)
    if not head.is_inside:
        raise head.refused(f"{head.length} bytes, the file has {file.size}")
    raw = head.parse()
    if raw.magic not in (structs.MAGIC_V1, structs.MAGIC_V2):
        raise head.damaged("magic", "no Parallels signature")
    if raw.version != structs.VERSION:
        raise head.damaged("version", f"{raw.version} is not {structs.VERSION}")
    newer = raw.magic == structs.MAGIC_V2
    head.limit("tracks", raw.tracks, 1, structs.MAX_TRACKS)
    # The older version has a size of 32 bits; the next 32 may hold anything.
    sectors = raw.nb_sectors if newer else raw.nb_sectors & 0xFFFFFFFF
    head.limit("nb_sectors", sectors, 0, MAX_SIZE // structs.SECTOR)
    cluster = raw.tracks * structs.SECTOR
    header = Header(
        file=file,
        version=2 if newer else 1,
        cluster_size=cluster,
        entry_unit=cluster if newer else structs.SECTOR,
        size=sectors * structs.SECTOR,
        in_use=raw.in_use == structs.IN_USE,
        empty=bool(raw.flags & structs.EMPTY),
        extension=raw.ext_off,
        data_offset=raw.data_off * structs.SECTOR,
    )
    if raw.nb_bat_entries < header.clusters:
        raise head.damaged("nb_bat_entries", f"{raw.nb_bat_entries} entries, the disk needs {header.clusters}")
    end = structs.HEADER_LENGTH + header.clusters * 4
    if end > file.size:
        raise head.damaged("nb_bat_entries", f"the BAT reaches to {end:#x}, past the end of the file ({file.size:#x})")
    return header


def losses(header: Header) -> Iterator[str]:
    """Yields properties of the image that are not converted."""
    if header.extension:
        yield f"{header.file.name}: format extension (dirty bitmaps)"


def warnings(header: Header) -> Iterator[str]:
    """Yields warnings about the health of the image."""
    if header.in_use:
        yield f"{header.file.name}: is marked as open, so it was not closed cleanly; its present content is converted"


def _details(header: Header) -> Mapping[str, Any]:
    return {
        "cluster-size": header.cluster_size,
        "dirty-flag": header.in_use,
        "format-specific": {"type": "parallels", "data": {"version": header.version}},
    }


def read_table(header: Header) -> Extents:
    """Returns the table of the image, with a HOLE for each cluster that was never written."""
    table = Extents.from_units(header.cluster_size, header.size, _slices(header), [header.file])
    refuse_overlaps(table, header.file)
    return table


def _slices(header: Header) -> Iterator[tuple[Kinds, int, Column] | int]:
    file = header.file
    room = -(-file.size // header.cluster_size)
    allocated = 0
    for first in range(0, header.clusters, SLICE):
        count = min(SLICE, header.clusters - first)
        place = structs.HEADER_LENGTH + first * 4
        if not file.data_ranges(place, place + count * 4):
            yield count
            continue
        offset = np.frombuffer(file.read(place, count * 4), dtype="<u4").astype(np.int64) * header.entry_unit
        there = offset != 0
        _check(header, offset, first)
        allocated += int(there.sum())
        if allocated > room:
            raise damaged(
                file, "BAT", place, f"{allocated} clusters are allocated so far, the file has room for {room}"
            )
        yield np.where(there, Kind.DATA, Kind.HOLE).astype(np.uint8), 0, offset


def _check(header: Header, offset: Column, first: int) -> None:
    """Raises `ImageError` unless all allocated clusters begin after the BAT and inside the file."""
    size, least = header.file.size, structs.HEADER_LENGTH + header.clusters * 4
    bad = (offset != 0) & ((offset < least) | (offset >= size) | header.empty)
    if not bad.any():
        return
    entry = int(np.flatnonzero(bad)[0])
    where, number = int(offset[entry]), first + entry
    problem = "in an image with the flag `empty`"
    if where < least:
        problem = f"lies before the end of the BAT ({least:#x})"
    elif where >= size:
        problem = f"lies past the end of the file ({size:#x})"
    raise damaged(
        header.file,
        f"BAT entry {number}",
        structs.HEADER_LENGTH + number * 4,
        f"payload at {where:#x} {problem}",
        guest=number * header.cluster_size,
    )
