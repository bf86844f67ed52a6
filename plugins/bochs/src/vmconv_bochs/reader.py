"""Reads and checks growing disks of Bochs: the sectors of an extent that its bitmap has are windows onto the file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from vmconv.plugin import (
    MAX_SIZE,
    CheckReport,
    Column,
    Extents,
    File,
    Findings,
    Image,
    ImageError,
    Kind,
    Kinds,
    Structure,
    UsageError,
    damaged,
    read_part,
    table_slices,
)
from vmconv_bochs import structs

_SLICE = 1 << 17
"""Bytes of bitmaps that are read at once, each bit a sector."""


class Header(NamedTuple):
    """A checked header; sizes are bytes."""

    file: File
    subtype: str
    size: int
    entries: int
    catalog: int
    bitmap: int
    extent: int

    @property
    def data(self) -> int:
        """The offset of the first extent."""
        return self.catalog + 4 * self.entries

    @property
    def room(self) -> int:
        """An extent with its bitmap."""
        return self.bitmap + self.extent


def read(file: File, *, snapshot: str | None = None) -> Image:
    """Returns the disk in the image."""
    if snapshot is not None:
        raise UsageError(f"{file.name}: a growing disk has no snapshots, {snapshot!r} was requested")
    header = read_header(file)
    return Image(
        "bochs",
        file,
        header.size,
        lambda: Extents.from_units(structs.SECTOR, header.size, _slices(header), [file]),
        details=lambda: {
            "cluster-size": header.extent,
            "format-specific": {"type": "bochs", "data": {"subtype": header.subtype, "bitmap-size": header.bitmap}},
        },
        shows_holes=lambda _: False,
    )


def check(image: Image) -> CheckReport:
    """Returns the report: what the reader refuses, and extents of the file that no entry of the catalog names."""
    findings, header = Findings(), read_header(image.file)
    places = np.empty(0, dtype=np.int64)
    try:
        places = _places(header)
        image.guest  # noqa: B018
    except ImageError as exc:
        findings.corrupt(str(exc))
    used = places[places > 0]
    there = max(0, header.file.size - header.data) // header.room
    if not findings.corruption_count and there > len(used):
        findings.leak(f"{there - len(used)} extents that the catalog does not name", there - len(used))
    end = int(used.max(initial=header.data - header.room)) + header.room
    return findings.report(allocated=len(used), total=header.entries, end=end)


def read_header(file: File) -> Header:
    """Returns the header. Raises `ImageError` with the invalid field."""
    head = Structure(file, structs.Header)
    raw = head.parse("no signature of Bochs", "magic")
    kind, subtype = (_text(head, name, raw[name]) for name in ("type", "subtype"))
    if kind != "Redolog":
        raise head.damaged("type", f"{kind!r} is not supported")
    if subtype != "Growing":
        problem = f"{subtype!r}: holds the changes of a disk in another file, which it does not name"
        raise head.damaged("subtype", problem, hint="bximage -func=commit brings them into that disk")
    if raw.version not in (structs.VERSION_1, structs.VERSION_2):
        raise head.damaged("version", f"{raw.version:#x} is not supported")
    head.limit("catalog", raw.catalog, 1, structs.MAX_CATALOG)
    head.limit_power("extent", raw.extent, structs.SECTOR, structs.MAX_EXTENT)
    needed = -(-raw.extent // structs.SECTOR // 8)
    head.limit("bitmap", raw.bitmap, needed, structs.MAX_EXTENT)
    end = head.length + structs.SIZE_2.sizeof()
    head.limit("header_size", raw.header_size, end, max(end, file.size - 4 * raw.catalog))
    size = _size(head, raw)
    if size % structs.SECTOR or size > min(MAX_SIZE, raw.catalog * raw.extent):
        problem = f"{size} is no number of sectors up to {raw.catalog} extents of {raw.extent} bytes"
        raise damaged(file, "size of the disk", head.length, problem)
    # Bitmap and sectors of an extent are whole sectors of the file.
    bitmap = -(-raw.bitmap // structs.SECTOR) * structs.SECTOR
    return Header(file, subtype, size, raw.catalog, raw.header_size, bitmap, raw.extent)


def _size(head: Structure, raw: Any) -> int:
    """Returns the size of the disk, which since version 2 has a date before it."""
    if raw.version == structs.VERSION_1:
        return int(structs.SIZE_1.parse(read_part(head.file, "size of the disk", head.length, 8)))
    data = read_part(head.file, "size of the disk", head.length, structs.SIZE_2.sizeof())
    return int(structs.SIZE_2.parse(data).disk)


def _text(head: Structure, field: str, data: bytes) -> str:
    text, _, _ = data.partition(b"\0")
    try:
        return text.decode("ascii")
    except UnicodeDecodeError:
        raise head.damaged(field, f"{text!r} is not ASCII") from None


def _places(header: Header) -> Column:
    """Returns the offset of each extent of the disk in the file, 0 where none is allocated."""
    count = -(-header.size // header.extent)
    data = read_part(header.file, "catalog", header.catalog, 4 * header.entries)
    catalog = np.frombuffer(data, dtype="<u4", count=count).astype(np.int64)
    there = catalog != structs.NOT_ALLOCATED
    places = np.where(there, header.data + catalog * header.room, 0)
    bad = there & (places + header.bitmap > header.file.size)
    used = np.sort(catalog[there])
    if bad.any():
        entry = int(np.flatnonzero(bad)[0])
        problem = f"extent {int(catalog[entry])} lies past the end of the file ({header.file.size:#x})"
        raise _wrong(header, entry, problem)
    twice = used[1:][used[1:] == used[:-1]]
    if len(twice):
        entry = int(np.flatnonzero(catalog == twice[0])[1])
        raise _wrong(header, entry, f"extent {int(twice[0])} is that of another entry too")
    return places


def _wrong(header: Header, entry: int, problem: str) -> ImageError:
    place = header.catalog + 4 * entry
    return damaged(header.file, f"catalog entry {entry}", place, problem, guest=entry * header.extent)


def _slices(header: Header) -> Iterator[tuple[Kinds, int, Column] | int]:
    """Yields the sectors of the extents, or the number of those that are not allocated."""
    places = _places(header)
    sectors = header.extent // structs.SECTOR
    step = np.arange(sectors, dtype=np.int64) * structs.SECTOR
    for first, count, data in table_slices(header.file, places, header.bitmap, _SLICE):
        if data is None:
            yield count * sectors
            continue
        bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8).reshape(count, -1), axis=1, bitorder="little")
        there = bits[:, :sectors].astype(bool)
        offset = (places[first : first + count] + header.bitmap)[:, None] + step
        bad = there & (offset + structs.SECTOR > header.file.size)
        if bad.any():
            row = int(np.flatnonzero(bad.any(axis=1))[0])
            raise _wrong(header, first + row, f"has sectors past the end of the file ({header.file.size:#x})")
        kind = np.where(there, Kind.DATA, Kind.HOLE).astype(np.uint8).reshape(-1)
        yield kind, 0, np.where(there, offset, 0).reshape(-1)
