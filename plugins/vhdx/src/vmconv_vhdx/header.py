"""Headers, regions and metadata of a VHDX image, checked and bounded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import numpy as np

from vmconv.plugin import Column, Extents, File, ImageError, Structure, damaged
from vmconv_vhdx import structs
from vmconv_vhdx.log import Log, replay

_NO_SIGNATURE = "no VHDX signature, or the file is too short"


@dataclass(frozen=True)
class Region:
    """A range of the region table; bytes."""

    offset: int
    length: int


@dataclass(frozen=True)
class Header:
    """The checked values of headers and metadata. `view` is the file after the replay of its log."""

    file: File
    view: Extents
    replayed: bool
    creator: str
    data_write_guid: UUID
    file_write_guid: UUID
    bat: Region
    metadata: Region
    log: Region
    size: int
    block_size: int
    fixed: bool
    has_parent: bool
    logical_sector_size: int
    physical_sector_size: int | None
    identity: UUID | None
    locator: Mapping[str, str] = field(default_factory=dict)

    @property
    def chunk_ratio(self) -> int:
        return structs.chunk_ratio(self.block_size, self.logical_sector_size)

    @property
    def blocks(self) -> int:
        """Blocks of the disk; the last one may reach past the disk's end."""
        return -(-self.size // self.block_size)

    def needed(self, block: Column) -> Column:
        """Returns the bytes of these blocks up to the end of the disk."""
        left: Column = np.minimum(self.size - block * self.block_size, self.block_size)
        return left


def read_header(file: File) -> Header:
    """Returns the header of the image in `file`. Raises `ImageError` with the invalid field."""
    end = structs.REGION_TABLE_OFFSETS[1] + structs.REGION_TABLE_LENGTH
    if file.size < end:
        raise damaged(file, "headers", 0, f"the file has {file.size:#x} bytes, they take {end:#x}")
    identifier = Structure(file, structs.FileTypeIdentifier, 0, "file").parse(_NO_SIGNATURE)
    header, head = current_header(file)
    if header.version != 1:
        raise head.damaged("version", f"{header.version}, 1 is expected")
    log = Log(header.log_offset, header.log_length, header.log_guid)
    view = Extents.whole(file)
    if any(header.log_guid):
        if header.log_version != 0:
            raise head.damaged("log_version", f"{header.log_version}, 0 is expected")
        view = replay(file, log)
    regions = _regions(file, view, log)
    items = _items(file, view, regions[structs.METADATA])
    return Header(
        file=file,
        view=view,
        replayed=any(header.log_guid),
        creator=_text(identifier.creator),
        data_write_guid=UUID(bytes_le=header.data_write_guid),
        file_write_guid=UUID(bytes_le=header.file_write_guid),
        bat=regions[structs.BAT],
        metadata=regions[structs.METADATA],
        log=Region(log.offset, log.length),
        **_metadata(file, items),
    )


def _text(data: bytes) -> str:
    return data[: len(data) // 2 * 2].decode("utf-16-le", "replace").split("\0", maxsplit=1)[0]


def current_header(file: File) -> tuple[Any, Structure]:
    """Returns the valid header with the greater sequence number, and its offset."""
    found, problems = [], []
    for at in structs.HEADER_OFFSETS:
        data = file.read(at, structs.HEADER_LENGTH)
        if data[:4] != b"head":
            problems.append(f"{at:#x} has no signature")
            continue
        header = structs.Header.parse(data)
        if header.checksum != structs.checksum(data):
            problems.append(f"{at:#x} has checksum {header.checksum:#010x}, not {structs.checksum(data):#010x}")
            continue
        found.append((header.sequence_number, at, header, data))
    if not found:
        raise damaged(file, "headers", structs.HEADER_OFFSETS[0], f"none is valid: {', '.join(problems)}")
    if len(found) == 2 and found[0][0] == found[1][0] and found[0][3] != found[1][3]:
        # Some tools write two headers with one number. That is harmless if both are equal.
        second = Structure(file, structs.Header, found[1][1])
        raise second.damaged("sequence_number", f"both headers have {found[1][0]}, but differ")
    _, at, header, _ = max(found, key=lambda one: (one[0], -one[1]))
    return header, Structure(file, structs.Header, at)


def doubtful_copies(file: File) -> Iterator[str]:
    """Yields the damaged one of each pair of structures; the other one is used."""
    for name, places, length, signature in (
        ("header", structs.HEADER_OFFSETS, structs.HEADER_LENGTH, b"head"),
        ("region table", structs.REGION_TABLE_OFFSETS, structs.REGION_TABLE_LENGTH, b"regi"),
    ):
        for at in places:
            data = file.read(at, length)
            if data[:4] != signature or int.from_bytes(data[4:8], "little") != structs.checksum(data):
                yield f"{name} at {at:#x}: wrong signature or checksum, the other one is used"


# -- regions


def _regions(file: File, view: Extents, log: Log) -> dict[UUID, Region]:
    """Returns BAT and metadata. Raises `ImageError` for overlapping regions, and unknown required ones."""
    at, data = _region_table(file, view)
    count = structs.RegionTableHeader.parse(data).entry_count
    if count > structs.MAX_ENTRIES:
        place = Structure(file, structs.RegionTableHeader, at).offset_of("entry_count")
        raise damaged(file, "region table entry_count", place, f"{count}, {structs.MAX_ENTRIES} at most")
    head, size = structs.RegionTableHeader.sizeof(), structs.RegionTableEntry.sizeof()
    regions: dict[UUID, Region] = {}
    for number in range(count):
        place = head + number * size
        entry = structs.RegionTableEntry.parse(data[place : place + size])
        guid = UUID(bytes_le=entry.guid)
        if guid not in (structs.BAT, structs.METADATA):
            if entry.required & 1:
                raise damaged(file, f"region {number}", at + place, f"required region {guid} is not known")
            continue
        if guid in regions:
            raise damaged(file, f"region {number}", at + place, f"{guid} is listed twice")
        begin, end = entry.file_offset, entry.file_offset + entry.length
        if begin < structs.HEADER_SECTION or begin % structs.MIB or entry.length % structs.MIB or end > view.size:
            raise damaged(
                file, f"region {number}", at + place, f"{begin:#x}..{end:#x} is not whole MiB behind the headers"
            )
        regions[guid] = Region(begin, entry.length)
    for guid, name in ((structs.BAT, "BAT"), (structs.METADATA, "metadata")):
        if guid not in regions:
            raise damaged(file, "region table", at, f"no {name} region")
    _refuse_overlap(file, at, {**regions, "log": Region(log.offset, log.length)})
    return regions


def _region_table(file: File, view: Extents) -> tuple[int, bytes]:
    for at in structs.REGION_TABLE_OFFSETS:
        data = view.read(at, structs.REGION_TABLE_LENGTH)
        if data[:4] == b"regi" and int.from_bytes(data[4:8], "little") == structs.checksum(data):
            return at, data
    raise damaged(file, "region tables", structs.REGION_TABLE_OFFSETS[0], "neither has a valid signature and checksum")


def _refuse_overlap(file: File, at: int, regions: Mapping[Any, Region]) -> None:
    ordered = sorted((region for region in regions.values() if region.length), key=lambda region: region.offset)
    for one, other in itertools.pairwise(ordered):
        if one.offset + one.length > other.offset:
            raise damaged(
                file,
                "region table",
                at,
                f"{one.length} bytes from {one.offset:#x} overlap those at {other.offset:#x}",
            )


# -- metadata


def _items(file: File, view: Extents, region: Region) -> dict[UUID, tuple[int, bytes]]:
    """Returns the offsets and bytes of the known metadata items, all of them system items."""
    length = structs.METADATA_TABLE_LENGTH
    if region.length < length:
        raise damaged(file, "metadata region", region.offset, f"{region.length} bytes, its table alone has {length}")
    table = view.read(region.offset, length)
    table_head = Structure(file, structs.MetadataTableHeader, region.offset, "metadata table")
    header = table_head.parse(_NO_SIGNATURE, data=table)
    if header.entry_count > structs.MAX_ENTRIES:
        raise damaged(
            file,
            "metadata entry_count",
            table_head.offset_of("entry_count"),
            f"{header.entry_count}, {structs.MAX_ENTRIES} at most",
        )
    head, size = structs.MetadataTableHeader.sizeof(), structs.MetadataTableEntry.sizeof()
    items: dict[UUID, tuple[int, bytes]] = {}
    for number in range(header.entry_count):
        place = head + number * size
        entry = structs.MetadataTableEntry.parse(table[place : place + size])
        guid = UUID(bytes_le=entry.item_id)
        what, at = f"metadata item {number}", region.offset + place
        if entry.flags & structs.IS_USER or guid not in _KNOWN_ITEMS:
            if entry.flags & structs.IS_REQUIRED:
                raise damaged(file, what, at, f"required item {guid} is not known")
            continue
        if guid in items:
            raise damaged(file, what, at, f"{guid} is listed twice")
        end = entry.offset + entry.length
        if entry.offset < length or end > region.length or entry.length > structs.MAX_ITEM_LENGTH:
            raise damaged(file, what, at, f"{entry.offset:#x}..{end:#x} is not inside the region ({region.length:#x})")
        items[guid] = (region.offset + entry.offset, view.read(region.offset + entry.offset, entry.length))
    return items


_KNOWN_ITEMS = {
    structs.FILE_PARAMETERS: 8,
    structs.VIRTUAL_DISK_SIZE: 8,
    structs.VIRTUAL_DISK_ID: 16,
    structs.LOGICAL_SECTOR_SIZE: 4,
    structs.PHYSICAL_SECTOR_SIZE: 4,
    structs.PARENT_LOCATOR: 20,
}
"""Minimum length of each in bytes."""


def _metadata(file: File, items: Mapping[UUID, tuple[int, bytes]]) -> dict[str, Any]:
    def item(guid: UUID, name: str) -> tuple[int, bytes]:
        if guid not in items:
            raise ImageError(f"{file.name}: metadata: no item {name}")
        at, data = items[guid]
        if len(data) < _KNOWN_ITEMS[guid]:
            raise damaged(file, name, at, f"{len(data)} bytes, {_KNOWN_ITEMS[guid]} are expected")
        return at, data

    def sector(guid: UUID, name: str) -> int:
        at, data = item(guid, name)
        value = int.from_bytes(data[:4], "little")
        if value not in (512, 4096):
            raise damaged(file, name, at, f"{value} is neither 512 nor 4096")
        return value

    at, data = item(structs.FILE_PARAMETERS, "file parameters")
    parameters = structs.FileParameters.parse(data)
    block = parameters.block_size
    if not structs.MIN_BLOCK_SIZE <= block <= structs.MAX_BLOCK_SIZE or block & (block - 1):
        raise Structure(file, structs.FileParameters, at).damaged(
            "block_size", f"{block} is not a power of two from 1 MiB to 256 MiB"
        )
    logical = sector(structs.LOGICAL_SECTOR_SIZE, "logical sector size")
    at, data = item(structs.VIRTUAL_DISK_SIZE, "virtual disk size")
    size = int.from_bytes(data[:8], "little")
    if not 0 < size <= structs.MAX_SIZE or size % logical:
        raise damaged(
            file, "virtual disk size", at, f"{size} is not whole sectors of {logical}, {structs.MAX_SIZE} at most"
        )
    has_parent = bool(parameters.flags & structs.HAS_PARENT)
    locator = _locator(file, *item(structs.PARENT_LOCATOR, "parent locator")) if has_parent else {}
    physical = structs.PHYSICAL_SECTOR_SIZE
    return {
        "size": size,
        "block_size": block,
        "fixed": bool(parameters.flags & structs.LEAVE_BLOCKS_ALLOCATED),
        "has_parent": has_parent,
        "logical_sector_size": logical,
        "physical_sector_size": sector(physical, "physical sector size") if physical in items else None,
        "identity": _identity(items),
        "locator": locator,
    }


def _identity(items: Mapping[UUID, tuple[int, bytes]]) -> UUID | None:
    data = items.get(structs.VIRTUAL_DISK_ID, (0, b""))[1][:16]
    return UUID(bytes_le=data) if len(data) == 16 and any(data) else None


def _locator(file: File, at: int, data: bytes) -> dict[str, str]:
    """Returns the keys and values of the parent locator."""
    header = structs.ParentLocatorHeader.parse(data)
    kind = UUID(bytes_le=header.locator_type)
    if kind != structs.VHDX_LOCATOR:
        raise damaged(file, "parent locator", at, f"type {kind} is not known")
    if header.key_value_count > structs.MAX_LOCATOR_ENTRIES:
        place = Structure(file, structs.ParentLocatorHeader, at).offset_of("key_value_count")
        raise damaged(
            file, "parent locator", place, f"{header.key_value_count} keys, {structs.MAX_LOCATOR_ENTRIES} at most"
        )
    return dict(_locator_entries(file, at, data, header.key_value_count))


def _locator_entries(file: File, at: int, data: bytes, count: int) -> Iterator[tuple[str, str]]:
    head, size = structs.ParentLocatorHeader.sizeof(), structs.ParentLocatorEntry.sizeof()
    for number in range(count):
        place = head + number * size
        where = Structure(file, structs.ParentLocatorEntry, at + place, "parent locator")
        entry = where.parse(_NO_SIGNATURE, data=data[place : place + size])
        texts = []
        for begin, length in ((entry.key_offset, entry.key_length), (entry.value_offset, entry.value_length)):
            if begin + length > len(data):
                raise damaged(
                    file,
                    f"parent locator entry {number}",
                    at + place,
                    f"{length} bytes from {begin:#x} reach past its end ({len(data):#x})",
                )
            texts.append(_text(data[begin : begin + length]))
        yield texts[0], texts[1]


def is_hole(header: Header, offset: int, length: int) -> bool:
    """True if the range is a hole of the file without log entries, so that it need not be read."""
    row = header.view.row_at(np.array([offset, offset + length - 1]))
    whole = row[0] == row[1] and header.view.source[row[0]] >= 0
    if not whole or header.view.sources[header.view.source[row[0]]] is not header.file:
        return False
    return not header.file.data_ranges(offset, offset + length)
