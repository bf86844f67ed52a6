"""Disks of a compressed archive: decoded once, each block to its guest address in a new file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from vmconv.plugin import Beginning, Extents, Member, damaged
from vmconv_vma import structs
from vmconv_vma.archive import in_order
from vmconv_vma.compression import compression_of, stream_of
from vmconv_vma.extents import Tables, block_count
from vmconv_vma.header import Header, parse, size_of

if TYPE_CHECKING:
    from vmconv.plugin import Decompressed, File, NewFile, Progress

_MAX_EMPTY = 1024
"""Extents without a cluster in a row. vmconv writes 7 for alignment."""


def open_stream(file: File) -> tuple[Decompressed, Header]:
    """Returns the archive behind its header; raises `ImageError` if that is damaged."""
    stream = stream_of(file)
    head = stream.read(structs.HEADER_SIZE)
    size = size_of(file, head)
    head += stream.read(size - len(head))
    if len(head) < size:
        raise damaged(file, "header_size", 56, f"{size} is more than the archive has ({len(head)})")
    return stream, parse(file, head)


def header_of(file: File) -> Header:
    """Returns the header of a compressed archive."""
    return open_stream(file)[1]


def _extents(file: File, stream: Decompressed, header: Header) -> Iterator[tuple[bytes, int, bytes]]:
    """Yields each extent: its header, its offset in the archive, and its blocks."""
    at, empty = header.size, 0
    left = sum(-(-device.size // structs.CLUSTER) for device in header.devices)
    while data := stream.read(structs.EXTENT_HEADER_SIZE):
        count = block_count(file, header.uuid, data, at)
        used = sum(map(bool, data[structs.BLOCKINFO_IN_EXTENT + 3 :: 8]))
        # Otherwise a small file could be decoded without end.
        left, empty = left - used, 0 if used else empty + 1
        if left < 0 or empty > _MAX_EMPTY:
            problem = "more clusters than the devices have" if left < 0 else f"more than {_MAX_EMPTY} extents are empty"
            raise damaged(file, "extent", at, problem)
        blocks = stream.read(count * structs.BLOCK)
        if len(blocks) < count * structs.BLOCK:
            raise damaged(file, "extent", at, f"is cut off after {len(blocks)} of {count * structs.BLOCK} bytes")
        yield data, at, blocks
        at += len(data) + len(blocks)


def decode(file: File, create: Callable[[str, int], NewFile], progress: Progress | None) -> tuple[Member, ...]:
    """Returns the members of an archive after decoding it once; disks are files from `create`.

    Raises `ImageError` if an extent is damaged, or a cluster is missing.
    """
    stream, header = open_stream(file)
    tables = Tables(file, header)
    files = [create(device.name, device.size) for device in header.devices]
    by_number = {device.number: (new, device.size) for device, new in zip(header.devices, files, strict=True)}
    for data, at, blocks in _extents(file, stream, header):
        pieces, _ = tables.parsed([data], [at])
        tables.add(data, at)
        for number, address, length, offset in zip(*(column.tolist() for column in pieces), strict=True):
            new, size = by_number[number]
            begin = offset - at - structs.EXTENT_HEADER_SIZE
            new.write(address, memoryview(blocks)[begin : begin + min(length, size - address)])
        if progress:
            progress(stream.taken, file.size)
    disks = tables.tables(files, in_archive=False)
    found = [Member(device.name, table) for device, table in zip(header.devices, disks, strict=True)]
    return (*_configs(header), *found)


def _configs(header: Header) -> list[Member]:
    from vmconv.plugin import Blob

    return [Member(one.name, Extents.whole(Blob(one.name, one.data))) for one in in_order(header.configs)]


def members(file: File) -> tuple[Member, ...]:
    """Returns the members of a compressed archive before it is decoded."""
    header = header_of(file)
    beginning = Beginning(file, str(compression_of(file)), lambda found: _fill(found, file))
    disks = [Member(device.name, beginning.table(device.name, device.size)) for device in header.devices]
    return (*_configs(header), *disks)


def _fill(beginning: Beginning, file: File) -> None:
    stream, header = open_stream(file)
    names = {device.number: device.name for device in header.devices}
    tables = Tables(file, header)
    for data, at, blocks in _extents(file, stream, header):
        pieces, clusters = tables.parsed([data], [at])
        for number, first, count in clusters.tolist():
            beginning.cover(names[number], first * structs.CLUSTER, count * structs.CLUSTER)
        for number, address, length, offset in zip(*(column.tolist() for column in pieces), strict=True):
            begin = offset - at - structs.EXTENT_HEADER_SIZE
            beginning.put(names[number], address, blocks[begin : begin + length])
        if at + len(data) + len(blocks) > Beginning.limit:
            return
