"""Reads the memory in Hyper-V's saved states, whose container is HyperVStorage.

    savedstate/VmVersion         version of the configuration, from 5.1 on
    savedstate/RamMemoryBlockN   a range of RAM: its first page, its pages, and its first page in the blocks
    savedstate/RamBlockN         1 MiB of RAM; what is shorter is compressed

Microsoft publishes the layout in openvmm, support/hvs_file/FORMAT.md, but not how a block is compressed. So a state
with compressed blocks is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vmconv.plugin import MAX_SIZE, Extents, File, Image, ImageError, Kind, UsageError, damaged, read_part
from vmconv_hyperv.storage import Limits, Node, Place
from vmconv_hyperv.storage import read as read_storage

_PAGE, _BLOCK = 4096, 1 << 20
_RANGE = struct.Struct("<IIQQQIIQ")
_VERSION, _HOT_ADDED = 3, 1
_OLDEST = 0x0501
_LIMITS = Limits(objects=1 << 19, keys=1 << 25, entries=1 << 19)
"""Of a machine with 256 GiB of RAM, which has a key and an object for each MiB."""


class _Range(NamedTuple):
    """RAM from an address on: its length, and where it begins in the blocks, bytes."""

    name: str
    address: int
    length: int
    begin: int


def read(file: File, *, snapshot: str | None = None) -> Image:
    """Returns the memory of a saved state. Raises `ImageError` if it has none, or if it is compressed."""
    if snapshot is not None:
        raise UsageError(f"{file.name}: a saved state has no snapshots, {snapshot!r} was requested")
    node = read_storage(file, limits=_LIMITS).child("savedstate")
    version = node.integer("VmVersion")
    places: dict[str, Place] = {}
    for name, place in node.arrays():
        if places.setdefault(name, place) != place:
            raise node.refused(name, "is there twice")
    if version is None or "RamMemoryBlock0" not in places:
        raise ImageError(f"{file.name}: has no memory: the machine was not saved while it ran")
    if version < _OLDEST:
        raise node.refused("VmVersion", f"{version:#x} is not read, only versions from {_OLDEST:#x} on")
    ranges = sorted(_ranges(file, node, places), key=lambda each: each.address)
    table = _table(file, node, ranges, places)
    data = {"version": f"{version >> 8}.{version & 0xFF}", "ranges": len(ranges), "machine-state": "of Hyper-V"}
    return Image(
        "vmrs",
        file,
        table.size,
        lambda: table,
        kind="memory",
        losses=("state of the devices and processors",),
        details=lambda: {"format-specific": {"type": "vmrs", "data": data}},
    )


def _ranges(file: File, node: Node, places: Mapping[str, Place]) -> Iterator[_Range]:
    number = 0
    while (name := f"RamMemoryBlock{number}") in places:
        offset, size = places[name]
        if size != _RANGE.size:
            raise node.refused(name, f"has {size} bytes, not {_RANGE.size}")
        version, flags, pages, begin, first, *_ = _RANGE.unpack(read_part(file, name, offset, size))
        if version != _VERSION or flags & ~_HOT_ADDED:
            raise damaged(file, name, offset, f"version {version} with flags {flags:#x} is not read, only {_VERSION}")
        if begin * _PAGE % _BLOCK:
            raise damaged(file, name, offset, f"page {begin:#x} is not the first one of a block")
        if not pages or max(pages, first, first + pages) * _PAGE >= MAX_SIZE:
            raise damaged(
                file, name, offset, f"{pages:#x} pages from {first:#x} on are none, or end past {MAX_SIZE:#x}"
            )
        yield _Range(name, first * _PAGE, pages * _PAGE, begin * _PAGE)
        number += 1


def _table(file: File, node: Node, ranges: list[_Range], places: Mapping[str, Place]) -> Extents:
    """Returns the table of sorted ranges."""
    rows: list[tuple[int, Kind, File | None, int]] = []
    used: set[int] = set()
    end = 0
    for each in ranges:
        if each.address < end:
            raise node.refused(each.name, f"begins at {each.address:#x}, before {end:#x}, the end of another one")
        if each.address > end:
            rows.append((end, Kind.HOLE, None, 0))
        for at in range(0, each.length, _BLOCK):
            offset = _block(file, node, (each.begin + at) // _BLOCK, places)
            if offset in used:
                raise node.refused(each.name, f"has its bytes at {offset:#x}, which are those of other RAM, too")
            used.add(offset)
            rows.append((each.address + at, Kind.DATA, file, offset))
        end = each.address + each.length
    _refuse_overlaps(file, used)
    return Extents.of(rows, end)


def _block(file: File, node: Node, number: int, places: Mapping[str, Place]) -> int:
    """Returns the offset of a block."""
    name = f"RamBlock{number}"
    if name not in places:
        raise node.refused(name, "is not there")
    offset, size = places[name]
    if size > _BLOCK:
        raise node.refused(name, f"has {size} bytes, {_BLOCK} at most")
    if size < _BLOCK:
        error = damaged(file, name, offset, f"{size} bytes: the memory is compressed, which vmconv does not read")
        error.hint = "on Windows, tools with Microsoft's vmsavedstatedumpprovider.dll read it, such as WinDbg"
        raise error
    if offset + size > file.size:
        raise damaged(file, name, offset, f"{size} bytes reach past the end of the file ({file.size:#x})")
    return offset


def _refuse_overlaps(file: File, offsets: set[int]) -> None:
    end = 0
    for offset in sorted(offsets):
        if offset < end:
            raise damaged(file, "block", offset, f"begins before {end:#x}, the end of another one")
        end = offset + _BLOCK
