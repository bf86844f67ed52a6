"""Disks of a compressed archive: decoded once, each block to its guest address in a new file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from vmconv.plugin import Decoded, Extents, ImageError, Kind, Member, damaged
from vmconv_vma import structs
from vmconv_vma.archive import in_order
from vmconv_vma.compression import compression_of, stream_of
from vmconv_vma.extents import Tables, block_count
from vmconv_vma.header import Device, Header, parse, size_of

if TYPE_CHECKING:
    from vmconv.plugin import Decompressed, File, NewFile, Progress

_LOOKED_AT = 64 << 20
"""Decoded bytes in which the variables of the firmware, and the beginnings of disks, are looked for."""

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
    """Returns the members of a compressed archive before it is decoded.

    What of a disk is zero is not known, so all of it counts as payload. Reading it decodes the beginning of the
    archive, and raises `ImageError` for what lies behind.
    """
    header = header_of(file)
    beginning = _Beginning(file)
    disks = [Member(device.name, _undecoded(file, device, beginning)) for device in header.devices]
    return (*_configs(header), *disks)


def _undecoded(file: File, device: Device, beginning: _Beginning) -> Extents:
    source = Decoded(
        f"{file.name}: {device.name}",
        file,
        unit=structs.BLOCK,
        count=-(-device.size // structs.BLOCK),
        reason=f"the archive is compressed ({compression_of(file)})",
        decode=lambda first, count: beginning.blocks(device, first, count),
    )
    return Extents.of([(0, Kind.DATA, source, 0)], device.size)


class _Beginning:
    """The first `_LOOKED_AT` bytes of an archive, decoded when they are first needed."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._blocks: dict[tuple[int, int], bytes] | None = None
        self._clusters: set[tuple[int, int]] = set()

    def blocks(self, device: Device, first: int, count: int) -> list[bytes]:
        """Returns blocks of a device; raises `ImageError` for one that is not in the beginning."""
        if self._blocks is None:
            self._blocks = dict(self._found())
        found = []
        for number in range(first, first + count):
            if (device.number, number // 16) not in self._clusters:
                most = f"{_LOOKED_AT >> 20} MiB of the archive, which is compressed"
                raise ImageError(
                    f"{self._file.name}: {device.name} at {number * structs.BLOCK:#x}: is not in the first {most}",
                    hint="decompress the archive first, or convert the machine",
                )
            found.append(self._blocks.get((device.number, number), bytes(structs.BLOCK)))
        return found

    def _found(self) -> Iterator[tuple[tuple[int, int], bytes]]:
        stream, header = open_stream(self._file)
        tables = Tables(self._file, header)
        for data, at, blocks in _extents(self._file, stream, header):
            pieces, clusters = tables.parsed([data], [at])
            for number, first, count in clusters.tolist():
                self._clusters.update((number, cluster) for cluster in range(first, first + count))
            for number, address, length, offset in zip(*(column.tolist() for column in pieces), strict=True):
                begin = offset - at - structs.EXTENT_HEADER_SIZE
                for step in range(0, length, structs.BLOCK):
                    block = blocks[begin + step : begin + step + structs.BLOCK]
                    yield (number, (address + step) // structs.BLOCK), block
            if at + len(data) + len(blocks) > _LOOKED_AT:
                return
