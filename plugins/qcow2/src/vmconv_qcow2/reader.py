"""Reads qcow2 images: L1 and L2 tables into the table of the guest's address space, in bounded slices."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vmconv.plugin import (
    GUEST,
    Column,
    Dependency,
    Encryption,
    Extents,
    File,
    Image,
    ImageError,
    Kind,
    Kinds,
    Opener,
    PlanError,
    Reserved,
    Source,
    Structure,
    Usage,
    UsageError,
    counted,
    damaged,
    read_records,
    table_slices,
)
from vmconv_qcow2 import structs
from vmconv_qcow2.bitmaps import losses_of_bitmaps
from vmconv_qcow2.compression import CompressedClusters
from vmconv_qcow2.header import Header, Snapshot, read_bitmaps, read_header, read_snapshots
from vmconv_qcow2.options import Options

# L2 tables are read in slices of this many bytes. Parsing needs about ten times that, thirty for extended entries.
_SLICE = 1 << 20
_EXTENDED_SLICE = 128 << 10

_Slice = tuple[Kinds, "npt.NDArray[np.int32] | int", Column]


def read(file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
    """Returns the image in `file`, or its internal snapshot with this id or name."""
    header = read_header(file)
    size, l1_offset, l1_size = header.size, header.l1_offset, header.l1_size
    if snapshot is not None:
        chosen = _snapshot(header, snapshot)
        size, l1_offset, l1_size = chosen.disk_size, chosen.l1_offset, chosen.l1_size
        if l1_size * 8 > structs.MAX_L1_BYTES:
            most = structs.MAX_L1_BYTES // 8
            raise ImageError(f"{file.name}: snapshot {snapshot!r}: an L1 table of {l1_size} entries, {most} at most")
    payload = file
    encryption = _encryption(header, opener)
    if header.incompatible & structs.EXTERNAL_DATA:
        payload = opener.related(file, header.data_file or "", "data file")

    def load_guest() -> Extents:
        mapper = _Mapper(header, payload, size)
        table = mapper.table(l1_offset, l1_size)
        image.warnings += tuple(mapper.shared(table, l1_offset))
        return _decrypted(table, header, encryption) if encryption else table

    def load_places() -> Extents:
        return _Mapper(header, payload, size, places=True).table(l1_offset, l1_size)

    def load_parent() -> Image:
        return opener.parent(file, header.backing_file or "", header.backing_format)

    image = Image(
        "qcow2",
        file,
        size,
        load_guest,
        load_places=load_places,
        load_parent=load_parent if header.backing_file else None,
        parent_reference=header.backing_file,
        parent_format=header.backing_format,
        losses=tuple(_losses(header, snapshot)),
        warnings=tuple(_warnings(header)),
        details=lambda: _details(image, header, encryption),
        dependencies=tuple(_dependencies(header)),
        shows_holes=lambda shown: shown is file and _is_preallocated(header),
    )
    return image


def _encryption(header: Header, opener: Opener) -> Encryption | None:
    """Returns the encryption of the payload; None if there is none. Its header is that of another format."""
    if header.encryption is None:
        return None
    return opener.registry.format("luks").encryption(header.file, opener, *header.encryption)


def _decrypted(table: Extents, header: Header, encryption: Encryption) -> Extents:
    """Returns the table with windows onto decrypted payload; sectors are numbered by their place in the file."""
    # QEMU decrypts zeros where the file ends before a cluster does.
    file = header.file
    whole = -(-file.size // header.cluster_size) * header.cluster_size
    plain = encryption.decrypted(whole)
    return Extents(table.size, table.columns, [plain if source is file else source for source in table.sources])


def _is_preallocated(header: Header) -> bool:
    from vmconv_qcow2.check import is_preallocated

    return is_preallocated(header)


def _dependencies(header: Header) -> Iterator[Dependency]:
    """Yields the data file, and the recorded files below, valid as long as the parent is unchanged."""
    if header.data_file:
        yield Dependency("data file", header.data_file)
    known = read_records(header.records)
    for name, fingerprint in known.items() if header.backing_file in known else ():
        role = "backing file" if name == header.backing_file else "file of the chain below"
        yield Dependency(role, name, fingerprint.size, fingerprint)


def options_of(image: Image) -> Options:
    """Returns the options with which the writer makes an image like this one."""
    header = read_header(image.file)
    if header.data_file:
        raise PlanError(f"{image.file.name}: its payload lies in the data file {header.data_file!r}")
    if header.encryption:
        raise PlanError(f"{image.file.name}: is encrypted, and options do not tell its key")
    return Options(
        cluster_size=header.cluster_size,
        compat="1.1" if header.version == 3 else "0.10",
        refcount_bits=1 << header.refcount_order,
        extended_l2=header.extended_l2,
        lazy_refcounts=bool(header.compatible & structs.LAZY_REFCOUNTS),
        compression_type="zstd" if header.compression == "zstd" else "zlib",
    )


def qemu_incompatibility(image: Image) -> str | None:
    """Returns why QEMU cannot read this image, or reads another disk; None if it reads the same."""
    if image.details.get("encrypted"):
        return "QEMU needs the passphrase to read it"
    data_file = image.details["format-specific"]["data"].get("data-file")
    if data_file and not os.path.isabs(data_file):
        return f"QEMU looks for the data file {data_file!r} in its working directory"
    return None


def _snapshot(header: Header, wanted: str) -> Snapshot:
    """Returns the snapshot with this id, or else this name, as in qemu-img.

    "snapshot.id=ID", "snapshot.name=NAME", or both with a comma between them, are exact.
    """
    snapshots = list(read_snapshots(header))
    if wanted.startswith("snapshot."):
        given = _parameters(wanted)
        found = [s for s in snapshots if given == {key: getattr(s, key) for key in given}]
    else:
        found = [s for s in snapshots if s.id == wanted] + [s for s in snapshots if s.name == wanted]
    if found:
        return found[0]
    have = ", ".join(f"{s.id} ({s.name})" for s in snapshots) or "none"
    raise UsageError(f"{header.file.name}: no snapshot {wanted!r}", hint=f"its snapshots: {have}")


def _parameters(text: str) -> dict[str, str]:
    """Returns `id` and `name` of QEMU's notation, in which a comma of a value is written twice."""
    given = {}
    for part in text.replace(",,", "\0").split(","):
        key, equals, value = part.replace("\0", ",").partition("=")
        if key not in ("snapshot.id", "snapshot.name") or not equals:
            raise UsageError(f"--snapshot: {part!r} is neither snapshot.id=ID nor snapshot.name=NAME")
        given[key.removeprefix("snapshot.")] = value
    return given


def _losses(header: Header, snapshot: str | None) -> Iterator[str]:
    if header.encryption:
        yield "its encryption: passphrases, key and cipher"
    yield from losses_of_bitmaps(header)
    others = header.snapshot_count - (snapshot is not None)
    if others:
        yield f"{counted(others, 'internal snapshot')} (convert --snapshot converts one)"
    for kind in header.unknown_extensions:
        yield f"unknown header extension {kind:#010x}"


def _warnings(header: Header) -> Iterator[str]:
    name = header.file.name
    if header.incompatible & structs.CORRUPT:
        yield f"{name}: marked corrupt by QEMU; its readable content is converted"
    if header.incompatible & structs.DIRTY:
        yield f"{name}: was not closed cleanly; its reference counts may be wrong, its content is not affected"


def _details(image: Image, header: Header, encryption: Encryption | None) -> Mapping[str, Any]:
    """Returns qemu-img's format-specific facts, under its names.

    A damaged list of snapshots or bitmaps ends at the damage, with a warning, because reading does not need it.
    """
    facts: dict[str, Any] = {"compat": "1.1" if header.version == 3 else "0.10"}
    facts["compression-type"] = header.compression
    facts["refcount-bits"] = 1 << header.refcount_order
    if header.version == 3:
        facts["lazy-refcounts"] = bool(header.compatible & structs.LAZY_REFCOUNTS)
        facts["corrupt"] = bool(header.incompatible & structs.CORRUPT)
        facts["extended-l2"] = header.extended_l2
    if header.data_file:
        facts["data-file"] = header.data_file
        facts["data-file-raw"] = bool(header.autoclear & structs.RAW_EXTERNAL_DATA)
    if encryption:
        facts["encrypt"] = {"format": "luks", **encryption.facts}
    if header.bitmaps is not None:
        facts["bitmaps"] = list(_undamaged(image, (bitmap.facts() for bitmap in read_bitmaps(header))))
    return {
        "cluster-size": header.cluster_size,
        **({"encrypted": True} if encryption else {}),
        "dirty-flag": bool(header.incompatible & structs.DIRTY),
        "snapshots": list(_undamaged(image, (snapshot.facts() for snapshot in read_snapshots(header)))),
        "format-specific": {"type": "qcow2", "data": facts},
    }


def _undamaged(image: Image, facts: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yields the readable part of a list, and warns about the rest."""
    try:
        yield from facts
    except ImageError as damage:
        image.warnings = tuple(dict.fromkeys((*image.warnings, str(damage))))


def read_l1(header: Header, offset: int, size: int, needed: int) -> Column:
    """Returns the first `needed` offsets of L2 tables, 0 for missing ones.

    Raises `ImageError` if one is outside the file.
    """
    file, head = header.file, Structure(header.file, structs.HeaderV2)
    if needed * 8 > structs.MAX_L1_BYTES:
        raise head.damaged("size", f"needs an L1 table of {needed * 8} bytes, {structs.MAX_L1_BYTES} at most")
    if size < needed:
        raise head.damaged("l1_size", f"{size} entries, the disk needs {needed}")
    if not needed:
        return np.empty(0, dtype=np.int64)
    if offset % header.cluster_size or offset + needed * 8 > file.size:
        raise head.damaged(
            "l1_table_offset", f"{offset:#x} is not a valid offset of {needed * 8} bytes in a file of {file.size:#x}"
        )
    raw = np.frombuffer(file.read(offset, needed * 8), dtype=">u8")
    tables = (raw & np.uint64(structs.OFFSET_MASK)).astype(np.int64)
    _check_tables(header, tables, offset)
    return tables


def _check_tables(header: Header, tables: Column, l1_offset: int) -> None:
    file, cluster = header.file, header.cluster_size
    bad = (tables != 0) & ((tables & (cluster - 1) != 0) | (tables > file.size - cluster))
    if bad.any():
        entry = int(np.flatnonzero(bad)[0])
        raise damaged(
            file,
            f"L1 entry {entry}",
            l1_offset + entry * 8,
            f"L2 table at {tables[entry]:#x} is not a cluster of the file ({file.size:#x})",
        )
    inside = (tables + cluster > l1_offset) & (tables < l1_offset + len(tables) * 8) & (tables != 0)
    if inside.any():
        entry = int(np.flatnonzero(inside)[0])
        raise damaged(
            file, f"L1 entry {entry}", l1_offset + entry * 8, f"L2 table at {tables[entry]:#x} overlaps the L1 table"
        )
    # A merge sort is fast for tables in order, which most are.
    used = np.sort(tables[tables != 0], kind="stable")
    twice = used[1:][used[1:] == used[:-1]]
    if len(twice):
        entry = int(np.flatnonzero(tables == twice[0])[1])
        raise damaged(file, f"L1 entry {entry}", l1_offset + entry * 8, f"L2 table at {twice[0]:#x} is used twice")


_COMPRESSED, _ZEROED, _IDLE = 1, 2, 3
"""Sources of a table, after the file of the payload: compressed clusters, and reserved space, for maps."""


class _Mapper:
    """Turns the L2 tables of one L1 table into the table of the guest's address space.

    With `places`, allocated but unused clusters are windows onto `Reserved`.
    """

    def __init__(self, header: Header, payload: File, size: int, *, places: bool = False) -> None:
        self.header = header
        self.places = places
        self.payload = payload
        self.size = size
        self.compressed = CompressedClusters(header, size)
        self.in_data_file = payload is not header.file
        self.allocated = 0
        self.tables = np.empty(0, dtype=np.int64)

    def table(self, l1_offset: int, l1_size: int) -> Extents:
        cluster, entries = self.header.cluster_size, self.header.l2_entries
        needed = -(-self.size // (cluster * entries))
        self.tables = tables = read_l1(self.header, l1_offset, l1_size, needed)
        unit = cluster // structs.SUBCLUSTERS if self.header.extended_l2 else cluster
        sources: list[Source] = [self.payload, self.compressed.source]
        if self.places:
            sources += [Reserved(self.payload, hides=True), Reserved(self.payload, hides=False)]
        return Extents.from_units(unit, self.size, self._slices(tables, cluster // unit), sources)

    def shared(self, table: Extents, l1_offset: int) -> Iterator[str]:
        """Yields a warning if payload is used twice, which reference counts allow.

        Raises `ImageError` if it overlaps metadata.
        """
        header, usage = self.header, Usage()
        if not self.in_data_file:
            usage.add("header", [0], header.cluster_size)
            usage.add("L1 table", [l1_offset], len(self.tables) * 8)
            usage.add("L2 table", self.tables[self.tables != 0], header.cluster_size)
            length = header.refcount_table_clusters * header.cluster_size
            usage.add("refcount table", [header.refcount_table_offset], length)
            if header.encryption:
                usage.add("header of LUKS", [header.encryption[0]], header.encryption[1])
        usage.add_windows(table, self.payload)
        address, place = self.compressed.places()
        usage.add_each(GUEST, place, np.ones_like(place), address)
        found = usage.overlaps()
        if not found:
            return
        legal = found.between_payload()
        if not legal.all():
            raise ImageError(f"{self.payload.name}: {found.text(int(np.flatnonzero(~legal)[0]))}")
        yield f"{self.payload.name}: {found.text(0)}; vmconv check shows whether the reference counts allow it"

    def _slices(self, tables: Column, parts: int) -> Iterator[_Slice | int]:
        entries = self.header.l2_entries
        size = _EXTENDED_SLICE if self.header.extended_l2 else _SLICE
        for first, count, data in table_slices(self.header.file, tables, self.header.cluster_size, size):
            if data is None:
                yield count * entries * parts
                continue
            # Entries past the end of the disk do not count.
            wanted = min(count * entries, -(-self.size // self.header.cluster_size) - first * entries)
            raw = np.frombuffer(data, dtype=">u8").astype(np.uint64)
            if self.header.extended_l2:
                yield self._extended(raw[0::2][:wanted], raw[1::2][:wanted], first * entries)
            else:
                yield self._standard(raw[:wanted], first * entries)

    def _standard(self, raw: npt.NDArray[np.uint64], first: int) -> _Slice:
        """Returns the columns of entries without subclusters, from guest cluster `first` on."""
        offset = (raw & np.uint64(structs.OFFSET_MASK)).astype(np.int64)
        special = raw & np.uint64(structs.COMPRESSED | structs.ZERO)
        if not special.any() and offset.min() > 0:
            self._check(offset, None, first)
            return np.full(len(raw), Kind.DATA, dtype=np.uint8), 0, offset
        kind = np.where(self._is_there(raw, offset), Kind.DATA, Kind.HOLE).astype(np.uint8)
        kind[special == structs.ZERO] = Kind.ZERO
        if self.header.version == 2 and (special == structs.ZERO).any():
            self._refuse(int(np.flatnonzero(special == structs.ZERO)[0]), first, "zero flag in a version 2 image")
        source = np.zeros(len(raw), dtype=np.int32)
        packed = (raw & np.uint64(structs.COMPRESSED)) != 0
        self._check(offset, (kind == Kind.DATA) & ~packed, first)
        if packed.any():
            kind[packed], source[packed] = Kind.DATA, _COMPRESSED
            offset[packed] = self._add_compressed(raw, packed, first)
        if self.places:
            reserved = (kind == Kind.ZERO) & (offset != 0)
            kind[reserved], source[reserved] = Kind.DATA, _ZEROED
        return kind, source, offset

    def _extended(self, raw: npt.NDArray[np.uint64], bitmap: npt.NDArray[np.uint64], first: int) -> _Slice:
        """Returns the columns of extended entries, one row per subcluster."""
        offset = (raw & np.uint64(structs.OFFSET_MASK)).astype(np.int64)
        packed = (raw & np.uint64(structs.COMPRESSED)) != 0
        bits = np.unpackbits(bitmap.astype("<u8").view(np.uint8), bitorder="little").reshape(-1, 2, structs.SUBCLUSTERS)
        allocated, zero = bits[:, 0] != 0, bits[:, 1] != 0
        bad = (allocated & zero).any(axis=1) | (allocated.any(axis=1) & ~self._is_there(raw, offset) & ~packed)
        if bad.any():
            self._refuse(int(np.flatnonzero(bad)[0]), first, "subcluster bitmap contradicts itself")
        if (packed & (bitmap != 0)).any():
            self._refuse(int(np.flatnonzero(packed & (bitmap != 0))[0]), first, "compressed cluster with a bitmap")
        self._check(offset, allocated.any(axis=1) & ~packed, first)
        kind = np.where(allocated, Kind.DATA, np.where(zero, Kind.ZERO, Kind.HOLE)).astype(np.uint8)
        source = np.zeros(kind.shape, dtype=np.int32)
        unit = self.header.cluster_size // structs.SUBCLUSTERS
        if packed.any():
            kind[packed], source[packed] = Kind.DATA, _COMPRESSED
            offset[packed] = self._add_compressed(raw, packed, first)
        place = offset[:, np.newaxis] + np.arange(structs.SUBCLUSTERS, dtype=np.int64) * unit
        # The file may end before its last subclusters, if they were never written.
        limit = self.payload.size
        kind[(kind == Kind.DATA) & (source == 0) & (place >= limit)] = Kind.ZERO
        if self.places:
            there = (offset != 0)[:, np.newaxis]
            for what, index in ((Kind.ZERO, _ZEROED), (Kind.HOLE, _IDLE)):
                reserved = (kind == what) & there
                kind[reserved], source[reserved] = Kind.DATA, index
        return kind.reshape(-1), source.reshape(-1), place.reshape(-1)

    def _is_there(self, raw: npt.NDArray[np.uint64], offset: Column) -> npt.NDArray[np.bool_]:
        """Returns a mask of the allocated clusters; in a data file, offset 0 is valid."""
        there: npt.NDArray[np.bool_] = offset != 0
        if self.in_data_file:
            there |= (raw & np.uint64(structs.COPIED)) != 0
        return there

    def _check(self, offset: Column, chosen: npt.NDArray[np.bool_] | None, first: int) -> None:
        """Raises `ImageError` unless the chosen offsets are clusters that begin inside the file of the payload."""
        size, cluster = self.payload.size, self.header.cluster_size
        bad = (offset & (cluster - 1) != 0) | (offset >= size)
        if chosen is not None:
            bad &= chosen
        if bad.any():
            entry = int(np.flatnonzero(bad)[0])
            where = f"payload at {offset[entry]:#x}"
            if offset[entry] % cluster:
                self._refuse(entry, first, f"{where} is not aligned to the cluster size ({cluster:#x})")
            self._refuse(entry, first, f"{where} lies past the end of {self.payload.name} ({size:#x})")
        self.allocated += len(offset) if chosen is None else int(chosen.sum())
        if self.allocated > -(-size // cluster):
            raise ImageError(
                f"{self.header.file.name}: L2 tables: more than {self.allocated - 1} clusters are allocated, "
                f"the file has room for {-(-size // cluster)}"
            )

    def _add_compressed(self, raw: npt.NDArray[np.uint64], packed: npt.NDArray[np.bool_], first: int) -> Column:
        if self.in_data_file:
            self._refuse(int(np.flatnonzero(packed)[0]), first, "compressed cluster in an image with a data file")
        guest = np.flatnonzero(packed) + first
        bad = self.compressed.add(guest, raw[packed])
        if bad is not None:
            self._refuse(
                bad - first, first, f"compressed data lies past the end of the file ({self.header.file.size:#x})"
            )
        return guest * self.header.cluster_size

    def _refuse(self, entry: int, first: int, problem: str) -> None:
        cluster = first + entry
        address = cluster * self.header.cluster_size
        l1, l2 = divmod(cluster, self.header.l2_entries)
        raise ImageError(
            f"{self.header.file.name}: L2 entry {l2} of table {l1} (guest address {address:#x}): {problem}"
        )
