"""The tables of an archive's disks, from the headers of its extents."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from vmconv.plugin import Columns, Extents, Kind, damaged
from vmconv_vma import structs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmconv.plugin import Column, File
    from vmconv_vma.header import Device, Header

_BATCH = 512
"""Extents whose entries are looked at together: their payload has up to 1.9 GB."""

_BITS = np.arange(16)


class Pieces(NamedTuple):
    """Payload in the order of the archive: device, guest address, bytes, and offset in the archive."""

    device: Column
    address: Column
    length: Column
    offset: Column

    def take(self, index: npt.NDArray[np.bool_] | Column) -> Pieces:
        return Pieces(*(column[index] for column in self))

    @staticmethod
    def join(parts: Sequence[Pieces]) -> Pieces:
        empty = np.zeros(0, dtype=np.int64)
        columns = zip(*parts, strict=True) if parts else ((empty,),) * 4
        return Pieces(*(np.concatenate(column) for column in columns))


def block_count(file: File, uuid: bytes, data: bytes, at: int) -> int:
    """Returns the blocks that follow the header of an extent at offset `at` in the archive.

    Checks all fields but the entries. Raises `ImageError` if the header is damaged.
    """
    if len(data) < structs.EXTENT_HEADER_SIZE:
        raise damaged(file, "extent", at, f"header is cut off after {len(data)} bytes")
    if data[:4] != structs.EXTENT_MAGIC:
        raise damaged(file, "extent magic", at, f"{data[:4]!r} is not {structs.EXTENT_MAGIC!r}")
    own = data[structs.UUID_IN_EXTENT]
    if own != uuid:
        raise damaged(file, "extent uuid", at + 8, f"{own.hex()} is not the archive's, {uuid.hex()}")
    stated = data[structs.MD5_IN_EXTENT]
    found = hashlib.md5(data[:24] + bytes(16) + data[40:], usedforsecurity=False).digest()
    if found != stated:
        raise damaged(file, "extent md5sum", at + 24, f"{stated.hex()} is not the MD5 of the header, {found.hex()}")
    return int.from_bytes(data[6:8], "big")


class Tables:
    """Collects the disks of an archive, extent by extent. Memory grows with runs of payload, not with the archive."""

    def __init__(self, file: File, header: Header) -> None:
        self._file = file
        self._header = header
        self._sizes = np.zeros(structs.MAX_DEVICES, dtype=np.int64)
        for device in header.devices:
            self._sizes[device.number] = device.size
        self._headers: list[bytes] = []
        self._places: list[int] = []
        self._pieces: list[Pieces] = []
        self._clusters: list[npt.NDArray[np.int64]] = []

    def add(self, data: bytes, at: int) -> None:
        """Adds an extent by its header, which was checked by itself."""
        self._headers.append(data)
        self._places.append(at)
        if len(self._headers) == _BATCH:
            self._flush()

    def _flush(self) -> None:
        if not self._headers:
            return
        pieces, clusters = self.parsed(self._headers, self._places)
        self._pieces.append(pieces)
        self._clusters.append(clusters)
        self._headers, self._places = [], []

    def parsed(self, headers: Sequence[bytes], places: Sequence[int]) -> tuple[Pieces, npt.NDArray[np.int64]]:
        """Returns payload of extents, and the clusters in them as rows: device, first cluster, count.

        Raises `ImageError` for an entry that cannot be.
        """
        table = np.frombuffer(b"".join(headers), structs.ExtentHeader)
        info = table["blockinfo"].astype(np.uint64)
        device = (info >> np.uint64(32) & np.uint64(0xFF)).astype(np.int64)
        cluster = (info & np.uint64(0xFFFFFFFF)).astype(np.int64)
        # Readers ignore entries of device 0.
        mask = np.where(device == 0, 0, info >> np.uint64(48)).astype(np.int64)
        blocks = _ones(mask)
        at = np.array(places, dtype=np.int64)
        self._check(table["block_count"].astype(np.int64), blocks, at, device, cluster, mask)
        before = np.cumsum(blocks, axis=1) - blocks
        offset = at[:, None] + structs.EXTENT_HEADER_SIZE + before * structs.BLOCK
        used = device != 0
        device, cluster, mask, offset = device[used], cluster[used], mask[used], offset[used]
        return self._runs(device, cluster, mask, offset), _cluster_runs(device, cluster)

    def _check(self, count: Column, blocks: Column, at: Column, device: Column, cluster: Column, mask: Column) -> None:
        wrong = blocks.sum(axis=1) != count
        if wrong.any():
            row = int(np.argmax(wrong))
            raise damaged(
                self._file,
                "extent block_count",
                int(at[row]) + 6,
                f"is {count[row]}, and the extent's entries have {blocks[row].sum()} blocks",
            )
        size = self._sizes[device]
        used = device != 0
        self._refuse(used & (size == 0), at, device, cluster, "is of a device that the header does not have")
        self._refuse(used & (cluster * structs.CLUSTER >= size), at, device, cluster, "is past the end of the device")
        last = structs.BLOCK * (np.frexp(mask.astype(np.float64))[1] - 1)
        end = cluster * structs.CLUSTER + last >= size
        self._refuse(used & (mask > 0) & end, at, device, cluster, "has blocks past the end of the device")

    def _refuse(self, wrong: npt.NDArray[np.bool_], at: Column, device: Column, cluster: Column, problem: str) -> None:
        if not wrong.any():
            return
        row, entry = (int(each) for each in np.argwhere(wrong)[0])
        where = int(at[row]) + structs.BLOCKINFO_IN_EXTENT + 8 * entry
        number = int(device[row, entry])
        what = f"entry {entry} of an extent"
        raise damaged(
            self._file,
            what,
            where,
            f"cluster {cluster[row, entry]} of device {number} {problem} ({self._sizes[number]} bytes)",
        )

    def _runs(self, device: Column, cluster: Column, mask: Column, offset: Column) -> Pieces:
        """Returns the payload of entries, with neighbours merged."""
        whole = mask == 0xFFFF
        address = cluster * structs.CLUSTER
        length = np.full(len(mask), structs.CLUSTER, dtype=np.int64)
        full = Pieces(device, address, length, offset).take(whole)
        some = ~whole & (mask != 0)
        bits = (mask[some, None] >> _BITS & 1).astype(bool)
        entry, bit = np.nonzero(bits)
        rank = (np.cumsum(bits, axis=1) - 1)[bits]
        parts = Pieces(
            device[some][entry],
            address[some][entry] + bit * structs.BLOCK,
            np.full(len(entry), structs.BLOCK, dtype=np.int64),
            offset[some][entry] + rank * structs.BLOCK,
        )
        return _merged(Pieces.join([full, parts]))

    def tables(self, sources: Sequence[File], *, in_archive: bool = True) -> list[Extents]:
        """Returns the table of each device, in the order of the header, over its file of `sources`.

        With `in_archive` offsets are those in the archive, else payload is at its guest address. Raises `ImageError`
        if a cluster is there twice, or missing.
        """
        self._flush()
        clusters = np.concatenate([np.zeros((0, 3), dtype=np.int64), *self._clusters])
        pieces = Pieces.join(self._pieces)
        found = []
        for device, source in zip(self._header.devices, sources, strict=True):
            self._check_complete(device, clusters[clusters[:, 0] == device.number])
            own = pieces.take(pieces.device == device.number)
            # The last block may be longer than the device.
            length = np.minimum(own.length, device.size - own.address)
            rows = Columns(
                own.address,
                np.full(len(length), Kind.DATA, dtype=np.uint8),
                np.zeros(len(length), dtype=np.int32),
                own.offset if in_archive else own.address,
            )
            found.append(Extents.placed(device.size, rows, length, [source]))
        return found

    def _check_complete(self, device: Device, runs: npt.NDArray[np.int64]) -> None:
        """Raises `ImageError` unless each cluster of the device is there once, as `vma` demands."""
        runs = runs[np.argsort(runs[:, 1], kind="stable")]
        begin, end = runs[:, 1], runs[:, 1] + runs[:, 2]
        count = -(-device.size // structs.CLUSTER)
        before = np.concatenate([[0], end])
        after = np.concatenate([begin, [count]])
        field = structs.DEV_INFO + device.number * structs.DeviceInfo.itemsize
        what = f"device {device.name!r}"
        if (after < before).any():
            twice = int(after[np.argmax(after < before)])
            raise damaged(self._file, what, field, f"cluster {twice} is in the archive twice")
        if (after > before).any():
            missing = int(before[np.argmax(after > before)])
            raise damaged(
                self._file,
                what,
                field,
                f"cluster {missing} of {count} is missing",
                hint="the archive is not complete: was its backup stopped, or its copy cut off?",
            )


def _ones(mask: Column) -> Column:
    """Returns the number of ones in each mask of 16 bits; numpy 1 has no function for it."""
    mask = mask - (mask >> 1 & 0x5555)
    mask = (mask & 0x3333) + (mask >> 2 & 0x3333)
    mask = mask + (mask >> 4) & 0x0F0F
    return mask + (mask >> 8) & 0x1F


def _merged(pieces: Pieces) -> Pieces:
    """Returns the pieces in the order of the archive, with those merged that continue each other."""
    pieces = pieces.take(np.argsort(pieces.offset, kind="stable"))
    if not len(pieces.offset):
        return pieces
    device, address, length, offset = pieces
    first = np.ones(len(offset), dtype=bool)
    first[1:] = (
        (device[1:] != device[:-1])
        | (address[1:] != address[:-1] + length[:-1])
        | (offset[1:] != offset[:-1] + length[:-1])
    )
    starts = np.flatnonzero(first)
    return pieces.take(starts)._replace(length=np.add.reduceat(length, starts))


def _cluster_runs(device: Column, cluster: Column) -> npt.NDArray[np.int64]:
    """Returns rows of device, first cluster and count, with consecutive clusters merged."""
    if not len(device):
        return np.zeros((0, 3), dtype=np.int64)
    first = np.ones(len(device), dtype=bool)
    first[1:] = (device[1:] != device[:-1]) | (cluster[1:] != cluster[:-1] + 1)
    starts = np.flatnonzero(first)
    return np.stack([device[starts], cluster[starts], np.diff(starts, append=len(device))], axis=1)
