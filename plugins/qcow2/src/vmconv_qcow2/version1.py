"""Reads qcow images of version 1: L1 and L2 tables, compressed clusters, a backing file. QEMU still makes them.

    0                Header, backing file name
    l1_table_offset  L1 table: offsets of L2 tables
    anywhere         L2 tables, data clusters

All numbers are big-endian. An L2 entry is the offset of a cluster, 0 for none; with its highest bit, length and offset
of deflated data. The layout is that of QEMU's driver, block/qcow.c: there is no specification.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from construct import Const, Int8ub, Int32ub, Int64ub, Padding, Struct

from vmconv.plugin import (
    MAX_SIZE,
    CheckReport,
    Column,
    Decoded,
    Extents,
    File,
    Findings,
    Image,
    ImageError,
    Kind,
    Kinds,
    Metadata,
    Opener,
    Structure,
    Usage,
    UsageError,
    damaged,
    read_part,
    refuse_overlaps,
    table_slices,
)
from vmconv_qcow2 import structs
from vmconv_qcow2.compression import inflate_zlib

Header1 = Struct(
    "magic" / Const(structs.MAGIC),
    "version" / Const(1, Int32ub),
    "backing_file_offset" / Int64ub,
    "backing_file_size" / Int32ub,
    "mtime" / Int32ub,
    "size" / Int64ub,
    "cluster_bits" / Int8ub,
    "l2_bits" / Int8ub,
    Padding(2),
    "crypt_method" / Int32ub,
    "l1_table_offset" / Int64ub,
)

_COMPRESSED = 1 << 63
_SLICE = 1 << 20
_SECTOR = 512


class Header(NamedTuple):
    """A header, checked against the file and the limits of QEMU."""

    file: File
    size: int
    cluster_bits: int
    l2_bits: int
    l1_offset: int
    backing_file: str | None

    @property
    def cluster(self) -> int:
        return 1 << self.cluster_bits

    @property
    def table_size(self) -> int:
        """Bytes of an L2 table."""
        return 8 << self.l2_bits

    @property
    def l1_size(self) -> int:
        """Entries of the L1 table."""
        return -(-self.size // (self.cluster << self.l2_bits))


class Image1(Image):
    """An image with its header, for the check."""

    header: Header
    compressed: Compressed


def read(file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
    """Returns the image in `file`."""
    if snapshot is not None:
        raise UsageError(f"{file.name}: qcow images of version 1 have no snapshots, {snapshot!r} was requested")
    header = read_header(file)
    compressed = Compressed(header)

    def load_guest() -> Extents:
        tables = _l1(header)
        table = Extents.from_units(header.cluster, header.size, _slices(header, tables, compressed), [file, compressed])
        metadata = [
            Metadata("L1 table", [header.l1_offset], header.l1_size * 8),
            Metadata("L2 table", tables[tables != 0], header.table_size),
        ]
        refuse_overlaps(table, file, metadata)
        return table

    image = Image1(
        "qcow",
        file,
        header.size,
        load_guest,
        load_parent=(lambda: opener.parent(file, header.backing_file or "", None)) if header.backing_file else None,
        parent_reference=header.backing_file,
        details=lambda: {"cluster-size": header.cluster},
    )
    image.header, image.compressed = header, compressed
    return image


def read_header(file: File) -> Header:
    """Returns the header of the image in `file`. Raises `ImageError` with the invalid field."""
    head = Structure(file, Header1)
    raw = head.parse("no signature of qcow version 1", "magic")
    head.limit("size", raw.size, 1, MAX_SIZE)
    if raw.size % _SECTOR:
        raise head.damaged("size", f"{raw.size} bytes are no whole sectors")
    head.limit("cluster_bits", raw.cluster_bits, 9, 16)
    head.limit("l2_bits", raw.l2_bits, 6, 13)
    if raw.crypt_method:
        method = structs.CRYPT_METHODS.get(raw.crypt_method, f"method {raw.crypt_method}")
        raise head.damaged("crypt_method", f"{method} encryption is not supported")
    name = None
    if raw.backing_file_offset:
        head.limit("backing_file_size", raw.backing_file_size, 1, structs.MAX_BACKING_NAME)
        head.limit("backing_file_offset", raw.backing_file_offset, head.length, file.size)
        data = read_part(file, "backing file name", raw.backing_file_offset, raw.backing_file_size)
        name = os.fsdecode(data)
    header = Header(file, raw.size, raw.cluster_bits, raw.l2_bits, raw.l1_table_offset, name)
    needed = header.l1_size * 8
    if needed > structs.MAX_L1_BYTES:
        raise head.damaged("size", f"needs an L1 table of {needed} bytes, {structs.MAX_L1_BYTES} at most")
    if not head.length <= header.l1_offset <= file.size - needed:
        raise head.damaged(
            "l1_table_offset", f"{needed} bytes at {header.l1_offset:#x} are not inside the file ({file.size:#x})"
        )
    return header


def _l1(header: Header) -> Column:
    """Returns the offsets of the L2 tables, 0 for missing ones. Raises `ImageError` if one is not inside the file."""
    raw = np.frombuffer(header.file.read(header.l1_offset, header.l1_size * 8), dtype=">u8").astype(np.uint64)
    bad = (raw != 0) & ((raw % _SECTOR != 0) | (raw > max(0, header.file.size - header.table_size)))
    problem = f"is not {header.table_size} bytes of sectors of the file ({header.file.size:#x})"
    if not bad.any():
        # Many entries for one table would be read for hours.
        used = np.sort(raw[raw != 0])
        near = used[1:][np.diff(used) < header.table_size]
        bad, problem = (np.isin(raw, near), "overlaps another one") if len(near) else (bad, problem)
    if bad.any():
        entry = int(np.flatnonzero(bad)[-1])
        place = header.l1_offset + entry * 8
        raise damaged(header.file, f"L1 entry {entry}", place, f"L2 table at {int(raw[entry]):#x} {problem}")
    return raw.astype(np.int64)


def _slices(
    header: Header, tables: Column, compressed: Compressed
) -> Iterator[tuple[Kinds, npt.NDArray[np.int32], Column] | int]:
    entries, clusters = 1 << header.l2_bits, -(-header.size // header.cluster)
    compressed.clear()
    for first, count, data in table_slices(header.file, tables, header.table_size, _SLICE):
        if data is None:
            yield count * entries
            continue
        # Entries past the end of the disk do not count.
        begin = first * entries
        raw = np.frombuffer(data, dtype=">u8").astype(np.uint64)[: clusters - begin]
        packed = (raw & np.uint64(_COMPRESSED)) != 0
        plain = (raw != 0) & ~packed
        bad = plain & ((raw % _SECTOR != 0) | (raw >= np.uint64(header.file.size)))
        if bad.any():
            entry = int(np.flatnonzero(bad)[0])
            place = int(tables[first + entry // entries]) + entry % entries * 8
            problem = f"payload at {int(raw[entry]):#x} is no sector of the file ({header.file.size:#x})"
            raise damaged(header.file, "L2 entry", place, problem, guest=(begin + entry) * header.cluster)
        offset = np.where(plain, raw, np.uint64(0)).astype(np.int64)
        guest = np.flatnonzero(packed)
        if len(guest):
            compressed.add(guest + begin, raw[guest])
            offset[guest] = (guest + begin) * header.cluster
        kind = np.where(raw != 0, Kind.DATA, Kind.HOLE).astype(np.uint8)
        yield kind, np.where(packed, 1, np.where(plain, 0, -1)).astype(np.int32), offset


class Compressed(Decoded):
    """The compressed clusters of a disk, at guest addresses."""

    def __init__(self, header: Header) -> None:
        super().__init__(
            f"{header.file.name} (deflate)",
            header.file,
            unit=header.cluster,
            count=-(-header.size // header.cluster),
            reason="compressed clusters have to be decompressed (zlib)",
            decode=self._clusters,
        )
        self._bits = header.cluster_bits
        self.clear()

    def clear(self) -> None:
        self._parts: list[tuple[Column, Column, Column]] = []

    def add(self, guest: Column, raw: npt.NDArray[np.uint64]) -> None:
        """Adds entries of guest clusters, in order. Raises `ImageError` for data that is not inside the file."""
        at = np.uint64(63 - self._bits)
        length = ((raw >> at) & np.uint64(self.unit - 1)).astype(np.int64)
        offset = (raw & np.uint64((1 << int(at)) - 1)).astype(np.int64)
        bad = (length == 0) | (offset + length > self.file.size)
        if bad.any():
            one = int(np.flatnonzero(bad)[0])
            problem = f"{length[one]} bytes are not inside the file ({self.file.size:#x})"
            guest_address = int(guest[one]) * self.unit
            raise damaged(self.file, "compressed cluster", int(offset[one]), problem, guest=guest_address)
        self._parts.append((guest, offset, length))

    def places(self) -> tuple[Column, Column, Column]:
        """Returns number, offset and length of all compressed clusters."""
        if not self._parts:
            nothing = np.empty(0, dtype=np.int64)
            return nothing, nothing, nothing
        if len(self._parts) > 1:
            guest, offset, length = (np.concatenate(column) for column in zip(*self._parts, strict=True))
            self._parts = [(guest, offset, length)]
        return self._parts[0]

    def _clusters(self, first: int, count: int) -> list[bytes]:
        guest, offset, length = self.places()
        row = int(np.searchsorted(guest, first))
        pairs = zip(offset[row : row + count].tolist(), length[row : row + count].tolist(), strict=True)
        return [self._inflated(at, size) for at, size in pairs]

    def _inflated(self, at: int, size: int) -> bytes:
        try:
            data = inflate_zlib(self.file.read(at, size), self.unit)
        except ImageError:
            raise
        except Exception as exc:
            # Any error of the library means that the data is damaged.
            raise damaged(self.file, "compressed cluster", at, str(exc)) from exc
        if len(data) != self.unit:
            raise damaged(self.file, "compressed cluster", at, f"yields {len(data)} bytes, not {self.unit}")
        return data


def check(image: Image) -> CheckReport:
    """Returns the report on the structure of the image's file, without its backing file."""
    assert isinstance(image, Image1)
    header, findings, usage = image.header, Findings(), Usage()
    total = -(-header.size // header.cluster)
    try:
        table = image.guest
    except ImageError as exc:
        findings.corrupt(str(exc).removeprefix(f"{image.file.name}: "))
        return findings.report(allocated=0, total=total, end=image.file.size)
    tables = _l1(header)
    usage.add("header", [0], Header1.sizeof())
    usage.add("L1 table", [header.l1_offset], header.l1_size * 8)
    usage.add("L2 table", tables[tables != 0], header.table_size, np.flatnonzero(tables))
    usage.add_windows(table, image.file)
    guest, offset, length = image.compressed.places()
    usage.add_each("compressed cluster", offset, length, guest)
    findings.overlaps(usage, header.cluster)
    findings.unused(usage, header.cluster, 0, image.file.size)
    allocated = int((table.length[table.kind == Kind.DATA] // header.cluster).sum())
    return findings.report(allocated=allocated, total=total, end=usage.end)
