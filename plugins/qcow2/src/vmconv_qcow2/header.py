"""The header of a qcow2 image, checked and bounded, for the reader and the check."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

from construct import Struct

from vmconv.plugin import MAX_SIZE, File, ImageError, Structure, damaged, read_part
from vmconv_qcow2 import structs


class Snapshot(NamedTuple):
    """One internal snapshot; sizes are bytes, `date` is seconds since the epoch and nanoseconds, `clock` is in ns."""

    id: str
    name: str
    l1_offset: int
    l1_size: int
    disk_size: int
    vm_state_size: int
    date: tuple[int, int]
    clock: int
    icount: int | None
    end: int
    """End of its entry in the snapshot table."""

    def facts(self) -> dict[str, Any]:
        """Returns the keys of QEMU's SnapshotInfo, and the size of the disk."""
        facts: dict[str, Any] = {
            "id": self.id,
            "name": self.name,
            "vm-state-size": self.vm_state_size,
            "date-sec": self.date[0],
            "date-nsec": self.date[1],
            "vm-clock-sec": self.clock // 10**9,
            "vm-clock-nsec": self.clock % 10**9,
        }
        if self.icount is not None:
            facts["icount"] = self.icount
        return {**facts, "disk-size": self.disk_size}


class Bitmap(NamedTuple):
    """One persistent bitmap; its table has `table_size` entries of 8 bytes."""

    name: str
    granularity_bits: int
    flags: int
    table_offset: int
    table_size: int
    type: int
    extra_size: int

    def facts(self) -> dict[str, Any]:
        """Returns the keys of QEMU's Qcow2BitmapInfo."""
        flags = [name for bit, name in structs.BITMAP_FLAGS.items() if self.flags & bit]
        return {"name": self.name, "granularity": 1 << self.granularity_bits, "flags": flags}


class Header(NamedTuple):
    """A header, checked against the file and the format's limits."""

    file: File
    version: int
    cluster_bits: int
    size: int
    l1_offset: int
    l1_size: int
    refcount_table_offset: int
    refcount_table_clusters: int
    refcount_order: int
    incompatible: int
    compatible: int
    autoclear: int
    compression: str
    snapshot_count: int
    snapshots_offset: int
    backing_file: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    records: tuple[str, ...] = ()
    bitmaps: Any = None
    unknown_extensions: tuple[int, ...] = ()
    encryption: tuple[int, int] | None = None
    """Offset and length of the header of LUKS."""

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible & structs.EXTENDED_L2)

    @property
    def l2_entries(self) -> int:
        """Entries of one L2 table."""
        return self.cluster_size // (16 if self.extended_l2 else 8)


def header_length(header: Header) -> int:
    """Returns the bytes of the header's fields; extensions follow."""
    if header.version == 2:
        return structs.V2_LENGTH
    return int(Structure(header.file, structs.HeaderV3, structs.V2_LENGTH).parse().header_length)


def read_header(file: File) -> Header:
    """Returns the header of the image in `file`. Raises `ImageError` with the invalid field."""
    head = Structure(file, structs.HeaderV2)
    newer_head = Structure(file, structs.HeaderV3, structs.V2_LENGTH)
    additional_head = Structure(file, structs.HeaderV3Additional, structs.V3_LENGTH)
    basic = head.parse("no qcow2 signature")
    head.limit("version", basic.version, 2, 3)
    head.limit("cluster_bits", basic.cluster_bits, 9, 21)
    head.limit("size", basic.size, 0, MAX_SIZE)
    head.limit("l1_size", basic.l1_size, 0, structs.MAX_L1_BYTES // 8)
    cluster_size = 1 << basic.cluster_bits
    fields: dict[str, Any] = {"incompatible": 0, "compatible": 0, "autoclear": 0, "refcount_order": 4}
    length, compression = structs.V2_LENGTH, 0
    if basic.version == 3:
        newer = newer_head.parse()
        newer_head.limit("header_length", newer.header_length, structs.V3_LENGTH, cluster_size)
        newer_head.limit("refcount_order", newer.refcount_order, 0, 6)
        length = newer.header_length
        fields = {
            "incompatible": newer.incompatible_features,
            "compatible": newer.compatible_features,
            "autoclear": newer.autoclear_features,
            "refcount_order": newer.refcount_order,
        }
        if length >= structs.V3_FULL_LENGTH:
            compression = additional_head.parse().compression_type
    name = _backing_name(head, basic, cluster_size)
    end = basic.backing_file_offset or cluster_size
    stored = dict(extensions(file, length, min(end, file.size)))
    _refuse_unknown_features(newer_head, fields["incompatible"], stored.get(structs.FEATURE_NAMES, b""))
    encryption = _encryption(head, basic.crypt_method, stored.get(structs.ENCRYPTION), cluster_size)
    if compression not in structs.COMPRESSION_TYPES:
        raise additional_head.damaged("compression_type", f"{compression} is neither 0 (zlib) nor 1 (zstd)")
    if bool(compression) != bool(fields["incompatible"] & structs.COMPRESSION):
        raise additional_head.damaged("compression_type", f"{compression} contradicts incompatible feature bit 3")
    header = Header(
        file=file,
        version=basic.version,
        cluster_bits=basic.cluster_bits,
        size=basic.size,
        l1_offset=basic.l1_table_offset,
        l1_size=basic.l1_size,
        refcount_table_offset=basic.refcount_table_offset,
        refcount_table_clusters=basic.refcount_table_clusters,
        compression=structs.COMPRESSION_TYPES[compression],
        snapshot_count=basic.nb_snapshots,
        snapshots_offset=basic.snapshots_offset,
        backing_file=name,
        backing_format=_text(stored.get(structs.BACKING_FORMAT)),
        data_file=_text(stored.get(structs.DATA_FILE_NAME)),
        records=tuple(_decode(stored.get(structs.RECORDS, b"")).split("\0")),
        bitmaps=_bitmaps(file, stored, fields["autoclear"]),
        encryption=encryption,
        unknown_extensions=tuple(sorted(stored.keys() - _KNOWN_EXTENSIONS)),
        **fields,
    )
    head.limit("nb_snapshots", header.snapshot_count, 0, structs.MAX_SNAPSHOTS)
    if header.incompatible & structs.EXTERNAL_DATA and not header.data_file:
        raise newer_head.damaged("incompatible_features", "an external data file that no header extension names")
    if header.encryption and header.incompatible & structs.EXTERNAL_DATA:
        raise head.damaged("crypt_method", "LUKS encryption of an external data file is not supported")
    if header.extended_l2 and cluster_size < 1 << 14:
        raise head.damaged("cluster_bits", f"{basic.cluster_bits} is too small for extended L2 entries")
    return header


_KNOWN_EXTENSIONS = {
    structs.BACKING_FORMAT,
    structs.FEATURE_NAMES,
    structs.BITMAPS,
    structs.ENCRYPTION,
    structs.DATA_FILE_NAME,
    structs.RECORDS,
}


@cache
def _unpacker(layout: Struct) -> Callable[[bytes], tuple[Any, ...]]:
    """Returns what reads a structure of numbers: for tables of up to 65536 entries, for which construct is slow."""
    return struct.Struct(">" + "".join(field.subcon.fmtstr[1:] for field in layout.subcons)).unpack


def read_snapshots(header: Header) -> Iterator[Snapshot]:
    """Yields the internal snapshots in the order of their table."""
    file, at = header.file, header.snapshots_offset
    if not header.snapshot_count:
        return
    unpack, extra_fields, read = _unpacker(structs.SnapshotHeader), _unpacker(structs.SnapshotExtra), _in_pieces(file)
    for number in range(header.snapshot_count):
        what = f"snapshot {number}"
        entry = unpack(read(what, at, structs.SNAPSHOT_LENGTH))
        l1_offset, l1_size, id_size, name_size, seconds, nanoseconds, clock, vm_state_size, extra_size = entry
        if extra_size > structs.MAX_SNAPSHOT_EXTRA:
            raise damaged(file, what, at, f"{extra_size} bytes of extra data, {structs.MAX_SNAPSHOT_EXTRA} at most")
        place = at + structs.SNAPSHOT_LENGTH
        disk_size, icount = header.size, None
        if extra_size >= structs.SNAPSHOT_EXTRA_LENGTH:
            vm_state_size, disk_size = extra_fields(read(what, place, structs.SNAPSHOT_EXTRA_LENGTH))
        if extra_size >= structs.SNAPSHOT_EXTRA_LENGTH + 8:
            count = int.from_bytes(read(what, place + structs.SNAPSHOT_EXTRA_LENGTH, 8), "big")
            icount = None if count == structs.NO_ICOUNT else count
        place += extra_size
        names = read(what, place, id_size + name_size)
        yield Snapshot(
            id=_decode(names[:id_size]),
            name=_decode(names[id_size:]),
            l1_offset=l1_offset,
            l1_size=l1_size,
            disk_size=disk_size,
            vm_state_size=vm_state_size,
            date=(seconds, nanoseconds),
            clock=clock,
            icount=icount,
            end=place + len(names),
        )
        at = -(-(place + len(names)) // 8) * 8
        if at - header.snapshots_offset > structs.MAX_SNAPSHOT_TABLE:
            problem = f"the snapshot table is longer than {structs.MAX_SNAPSHOT_TABLE} bytes"
            raise damaged(file, what, header.snapshots_offset, problem)


_PIECE = 64 << 10
"""Bytes that are read at once of a table of short entries."""


def _in_pieces(file: File) -> Callable[[str, int, int], bytes]:
    """Returns `read_part` of a file as `(what, offset, length)`, for short parts one after the other."""
    start, piece = 0, b""

    def read(what: str, offset: int, length: int) -> bytes:
        nonlocal start, piece
        if offset < start or offset + length > start + len(piece):
            most = max(length, min(_PIECE, file.size - offset))
            start, piece = offset, read_part(file, what, offset, most)
        return piece[offset - start : offset - start + length]

    return read


def read_bitmaps(header: Header) -> Iterator[Bitmap]:
    """Yields the persistent bitmaps in the order of their directory. Raises `ImageError` if that is damaged."""
    if header.bitmaps is None:
        return
    file, start, size = header.file, header.bitmaps.directory_offset, header.bitmaps.directory_size
    data = read_part(file, "bitmap directory", start, size)
    at, fixed, unpack = 0, structs.BitmapEntry.sizeof(), _unpacker(structs.BitmapEntry)
    for number in range(header.bitmaps.nb_bitmaps):
        if at + fixed > size:
            raise damaged(file, f"bitmap {number}", start + at, f"its entry reaches past the directory ({size} bytes)")
        table_offset, table_size, flags, kind, granularity_bits, name_size, extra_size = unpack(data[at : at + fixed])
        name = at + fixed + extra_size
        end = name + name_size
        if end > size:
            raise damaged(file, f"bitmap {number}", start + at, f"its name reaches past the directory ({size} bytes)")
        if granularity_bits > structs.MAX_GRANULARITY_BITS:
            problem = f"granularity_bits {granularity_bits}, {structs.MAX_GRANULARITY_BITS} at most"
            raise damaged(file, f"bitmap {number}", start + at, problem)
        yield Bitmap(_decode(data[name:end]), granularity_bits, flags, table_offset, table_size, kind, extra_size)
        at = -(-end // 8) * 8


def _decode(data: bytes) -> str:
    return os.fsdecode(data)


def _text(data: bytes | None) -> str | None:
    return _decode(data.rstrip(b"\0")) if data else None


def _backing_name(head: Structure, basic: Any, cluster_size: int) -> str | None:
    offset, length = basic.backing_file_offset, basic.backing_file_size
    if not offset:
        return None
    head.limit("backing_file_size", length, 1, structs.MAX_BACKING_NAME)
    head.limit("backing_file_offset", offset, structs.V2_LENGTH, cluster_size - length)
    return _decode(read_part(head.file, "backing file name", offset, length))


def extensions(file: File, at: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yields `(type, content)` of the header extensions between two offsets. Raises `ImageError` for a damaged one."""
    size = structs.Extension.sizeof()
    for _ in range(structs.MAX_EXTENSIONS):
        if at + size > end:
            return
        extension = Structure(file, structs.Extension, at, "header extension").parse()
        if extension.type == structs.END:
            return
        if extension.length > end - at - size:
            raise damaged(
                file,
                f"header extension {extension.type:#x}",
                at,
                f"{extension.length} bytes, {end - at - size} are left",
            )
        yield extension.type, file.read(at + size, extension.length)
        at += size + -(-extension.length // 8) * 8
    raise damaged(file, "header extensions", at, f"more than {structs.MAX_EXTENSIONS}")


def build_extension(kind: int, data: bytes) -> bytes:
    """Returns a header extension, padded."""
    return bytes(structs.Extension.build({"type": kind, "length": len(data)})) + data + bytes(-len(data) % 8)


def _encryption(head: Structure, method: int, stored: bytes | None, cluster_size: int) -> tuple[int, int] | None:
    """Returns offset and length of the header of LUKS, None for an image that is not encrypted."""
    if not method and stored is None:
        return None
    if method != structs.CRYPT_LUKS:
        name = structs.CRYPT_METHODS.get(method, f"method {method}")
        hint = "qemu-img convert of QEMU before 2.10 decrypts it" if method == 1 else None
        raise head.damaged("crypt_method", f"{name} encryption is not supported", hint=hint)
    if stored is None or len(stored) != structs.Encryption.sizeof():
        raise head.damaged("crypt_method", "LUKS without a valid extension that says where its header is")
    place = structs.Encryption.parse(stored)
    if place.offset % cluster_size or not place.offset or place.length > structs.MAX_ENCRYPTION_HEADER:
        raise head.damaged("crypt_method", f"a header of LUKS of {place.length} bytes at {place.offset:#x}")
    if place.offset + place.length > head.file.size:
        problem = f"the header of LUKS at {place.offset:#x} reaches past the end of the file ({head.file.size:#x})"
        raise head.damaged("crypt_method", problem)
    return place.offset, place.length


def _refuse_unknown_features(head: Structure, features: int, names: bytes) -> None:
    unknown = [bit for bit in range(64) if features >> bit & 1 and 1 << bit not in structs.INCOMPATIBLE]
    if not unknown:
        return
    size = structs.FeatureName.sizeof()
    known = {}
    for at in range(0, len(names) - size + 1, size):
        entry = structs.FeatureName.parse(names[at : at + size])
        if entry.type == 0:
            known[entry.bit] = _text(entry.name)
    said = ", ".join(f"bit {bit} ({known[bit]})" if known.get(bit) else f"bit {bit}" for bit in unknown)
    raise head.damaged("incompatible_features", f"unknown {said}")


def _bitmaps(file: File, extensions: dict[int, bytes], autoclear: int) -> Any:
    """Returns the bitmaps extension if it is valid: writers that do not know bitmaps clear its autoclear bit."""
    data = extensions.get(structs.BITMAPS)
    if data is None or not autoclear & structs.BITMAPS_CONSISTENT:
        return None
    if len(data) != structs.Bitmaps.sizeof():
        raise ImageError(f"{file.name}: bitmaps extension: {len(data)} bytes, {structs.Bitmaps.sizeof()} expected")
    bitmaps = structs.Bitmaps.parse(data)
    if bitmaps.nb_bitmaps > structs.MAX_BITMAPS or bitmaps.directory_size > structs.MAX_BITMAP_DIRECTORY:
        raise damaged(
            file,
            "bitmaps extension",
            bitmaps.directory_offset,
            f"{bitmaps.nb_bitmaps} bitmaps in {bitmaps.directory_size} bytes, {structs.MAX_BITMAPS} at most",
        )
    return bitmaps
