"""An archive that is not compressed: its members are ranges of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vmconv.plugin import Extents, Kind, Member, damaged
from vmconv_vma import structs
from vmconv_vma.extents import Tables, block_count
from vmconv_vma.header import Blob, Header, parse, size_of

if TYPE_CHECKING:
    from vmconv.plugin import File

_AT_ONCE = 4096
"""Bytes to read for the header of an extent: archives that vmconv wrote have several headers in a row."""


def header_of(file: File) -> Header:
    """Returns the header of an archive; raises `ImageError` if it is damaged."""
    size = size_of(file, file.read(0, min(file.size, structs.HEADER_SIZE)))
    if size > file.size:
        raise damaged(file, "header_size", 56, f"{size} is more than the file has ({file.size})")
    return parse(file, file.read(0, size))


def members(file: File) -> tuple[Member, ...]:
    """Returns the configurations, `qemu-server.conf` first, and the disks as ranges of the archive.

    Reads the headers of all extents. Raises `ImageError` if one is damaged, or a cluster is missing.
    """
    header = header_of(file)
    tables = Tables(file, header)
    for data, at in _extents(file, header):
        tables.add(data, at)
    disks = tables.tables([file] * len(header.devices))
    found = [Member(device.name, table) for device, table in zip(header.devices, disks, strict=True)]
    return (*(_config(file, blob) for blob in in_order(header.configs)), *found)


def in_order(configs: tuple[Blob, ...]) -> list[Blob]:
    """Returns the configurations, the machine's first."""
    return sorted(configs, key=lambda blob: blob.name != "qemu-server.conf")


def _config(file: File, blob: Blob) -> Member:
    rows = [(0, Kind.DATA, file, blob.offset)] if blob.data else []
    return Member(blob.name, Extents.of(rows, len(blob.data)))


def _extents(file: File, header: Header) -> Iterator[tuple[bytes, int]]:
    """Yields the header of each extent, and its offset."""
    at = header.size
    chunk, begin = b"", at
    previous, count = b"", 0
    while at < file.size:
        if not begin <= at <= begin + len(chunk) - structs.EXTENT_HEADER_SIZE:
            chunk, begin = file.read(at, min(_AT_ONCE, file.size - at)), at
        data = chunk[at - begin : at - begin + structs.EXTENT_HEADER_SIZE]
        if data != previous:
            count = block_count(file, header.uuid, data, at)
            previous = data
        end = at + structs.EXTENT_HEADER_SIZE + count * structs.BLOCK
        if end > file.size:
            size = end - at
            raise damaged(file, "extent", at, f"{size} bytes reach past the end of the file ({file.size:#x})")
        yield data, at
        at = end
