"""Reads the memory in Hyper-V's saved states, whose container is HyperVStorage.

    savedstate/VmVersion         version of the configuration, from 5.1 on
    savedstate/RamMemoryBlockN   a range of RAM: its first page, its pages, and its first page in the blocks
    savedstate/RamBlockN         1 MiB of RAM; what is shorter is compressed

Microsoft publishes the layout in openvmm, support/hvs_file/FORMAT.md; compressed blocks are those of `packed.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vmconv.plugin import (
    MAX_SIZE,
    Decoded,
    Extents,
    File,
    Image,
    ImageError,
    Kind,
    Source,
    UsageError,
    damaged,
    read_part,
)
from vmconv_hyperv.storage import Limits, Node, Place
from vmconv_hyperv.storage import read as read_storage
from vmconv_vmrs.packed import BLOCK as _BLOCK
from vmconv_vmrs.packed import PAGE as _PAGE
from vmconv_vmrs.packed import PackedError, unpack

_RANGE = struct.Struct("<IIQQQIIQ")
_VERSION, _HOT_ADDED = 3, 1
_OLDEST = 0x0501
_SMALL = 64
"""Bytes of compressed blocks that are looked into for zeros: 1 MiB of zeros has 16, or 20 with a record of the end."""
_LIMITS = Limits(objects=1 << 19, keys=1 << 25, entries=1 << 19)
"""Of a machine with 256 GiB of RAM, which has a key and an object for each MiB."""


class _Range(NamedTuple):
    """RAM from an address on: its length, and where it begins in the blocks, bytes."""

    name: str
    address: int
    length: int
    begin: int


def read(file: File, *, snapshot: str | None = None) -> Image:
    """Returns the memory of a saved state. Raises `ImageError` if it has none."""
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
    packed = next((each.count for each in table.sources if isinstance(each, Packed)), 0)
    data = {"version": f"{version >> 8}.{version & 0xFF}", "ranges": len(ranges), "machine-state": "of Hyper-V"}
    if packed:
        data["compressed-blocks"] = packed
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
    rows: list[tuple[int, Kind, Source | None, int]] = []
    used: dict[int, int] = {}
    packed = Packed(file)
    end = 0
    for each in ranges:
        if each.address < end:
            raise node.refused(each.name, f"begins at {each.address:#x}, before {end:#x}, the end of another one")
        if each.address > end:
            rows.append((end, Kind.HOLE, None, 0))
        for at in range(0, each.length, _BLOCK):
            offset, size = _block(file, node, (each.begin + at) // _BLOCK, places)
            if offset in used:
                raise node.refused(each.name, f"has its bytes at {offset:#x}, which are those of other RAM, too")
            used[offset] = size
            if size == _BLOCK:
                rows.append((each.address + at, Kind.DATA, file, offset))
            elif packed.is_zero(offset, size):
                rows.append((each.address + at, Kind.ZERO, None, 0))
            else:
                rows.append((each.address + at, Kind.DATA, packed, packed.add(offset, size)))
        end = each.address + each.length
    _refuse_overlaps(file, used)
    return Extents.of(rows, end)


class Packed(Decoded):
    """The compressed blocks of a state, one behind the other."""

    def __init__(self, file: File) -> None:
        super().__init__(
            f"{file.name} (compressed memory)",
            file,
            unit=_BLOCK,
            count=0,
            reason="Hyper-V compresses memory",
            decode=lambda first, count: [self._block(*place) for place in self._places[first : first + count]],
        )
        self._places: list[tuple[int, int]] = []

    @property
    def count(self) -> int:
        return len(self._places)

    def add(self, offset: int, size: int) -> int:
        """Adds a block by its place in the file, and returns its offset among the decompressed ones."""
        self._places.append((offset, size))
        self.size += _BLOCK
        return self.size - _BLOCK

    def is_zero(self, offset: int, size: int) -> bool:
        """True for a small block that is all zeros; decompresses no large one."""
        return size <= _SMALL and not any(self._block(offset, size))

    def _block(self, offset: int, size: int) -> bytes:
        try:
            return unpack(self.file.read(offset, size))
        except PackedError as exc:
            error = damaged(self.file, "compressed block", offset, str(exc))
            error.hint = "if it is not damaged, WinDbg on Windows reads it, by vmsavedstatedumpprovider.dll"
            raise error from exc


def _block(file: File, node: Node, number: int, places: Mapping[str, Place]) -> Place:
    """Returns the offset and the size of a block."""
    name = f"RamBlock{number}"
    if name not in places:
        raise node.refused(name, "is not there")
    offset, size = places[name]
    if not 0 < size <= _BLOCK:
        raise node.refused(name, f"has {size} bytes, {_BLOCK} at most and not 0")
    if offset + size > file.size:
        raise damaged(file, name, offset, f"{size} bytes reach past the end of the file ({file.size:#x})")
    return places[name]


def _refuse_overlaps(file: File, sizes: Mapping[int, int]) -> None:
    end = 0
    for offset in sorted(sizes):
        if offset < end:
            raise damaged(file, "block", offset, f"begins before {end:#x}, the end of another one")
        end = offset + sizes[offset]
