"""Writes qcow2 images: a pure function from the guest's table to the table of the output file.

    header | refcount table | refcount blocks | L1 table | L2 tables | payload
    header | refcount table | refcount blocks | L1 table | L2 tables | payload | compressed ones      (compress)
    header | refcount table | refcount blocks | L1 table | L2 tables | header of LUKS | payload            (encrypted)
    header | payload, unmoved | payload moved to clear the header | refcount table | ... | L2 tables     (in place)

Payload is placed so that it can be shared: in the order of its sources, each run congruent to its source. In place it
stays where it is, in clusters small enough for that. The large tables (L2, refcounts) are computed on writing, a slice
at a time. Encrypted payload is whole clusters, because what is not there decrypts to noise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vmconv.plugin import (
    Backing,
    Blob,
    Column,
    Columns,
    Encrypted,
    Extents,
    File,
    Image,
    Kind,
    Layout,
    OutFile,
    Placeholder,
    Placement,
    PlanError,
    Reference,
    Scratch,
    Source,
    blocks,
    cut,
    qemu_name,
)
from vmconv_qcow2 import clusters, structs
from vmconv_qcow2 import tables as columns
from vmconv_qcow2.header import build_extension
from vmconv_qcow2.options import Options

if TYPE_CHECKING:
    from vmconv_qcow2.bitmap_writer import BitmapArea
    from vmconv_qcow2.packing import Packing

_PAGE = 4096
"""Limit of metadata for small clusters in place."""
_NO_MATTER = 1 << 20
"""Bytes of metadata that are never refused, even for little payload."""


class _Tables(NamedTuple):
    """Sizes and offsets of the metadata, bytes; each begins at a cluster.

    `l2_tables` and `refcount_blocks` are the numbers of those with entries.
    """

    l1_entries: int
    l2_tables: Column
    refcount_blocks: Column
    refcount_table: int
    first_block: int
    l1: int
    l2: int
    bitmaps: int
    encryption: int
    end: int


def write(image: Image, options: Options, placement: Placement, *, backing: Backing | None = None) -> Layout:
    """Returns the layout of a qcow2 image; raises `PlanError` if the disk is too large for its cluster size."""
    return _Writer(image, options, placement, backing).layout()


def _references(image: Image, options: Options, backing: Backing | None) -> Iterator[Reference]:
    """Yields the image's references to other files."""
    if options.data_file:
        if backing:
            raise PlanError(
                "a qcow2 image with a data file has no backing file here: the data file holds the whole disk"
            )
        from vmconv_qcow2.data_file import disk_itself

        file = disk_itself(image)
        yield Reference(options.data_file, file, image.flat.total(Kind.DATA))
    if options.subformat == "reference":
        if not backing or not image.parent:
            raise PlanError("a qcow2 image with subformat=reference needs its source as backing file")
        yield Reference(backing.reference, image.parent.file, image.parent.flat.total(Kind.DATA))


class _Writer:
    def __init__(self, image: Image, options: Options, placement: Placement, backing: Backing | None) -> None:
        self.options = options
        self.references = tuple(_references(image, options, backing))
        self.backing = backing
        self.carrier = placement.carrier
        self.encryptor = placement.encryptor
        self.file = image.file
        if self.encryptor:
            self._refuse_unencrypted()
        self.modulus = 1 if self.encryptor else placement.modulus
        # A disk is whole sectors.
        self.size = -(-image.size // 512) * 512
        table = blocks.grown(image, self.size, on_parent=backing is not None)
        if self.carrier:
            self._pin(table, self.carrier)
        else:
            self.cluster = options.cluster_size or self._default_cluster(table)
        self.entry_size = 16 if options.extended_l2 else 8
        self.entries = self.cluster // self.entry_size
        # A compressed cluster has no subclusters.
        parts = structs.SUBCLUSTERS if options.extended_l2 and not options.compress else 1
        self.unit = self.cluster // parts
        table = blocks.padded(table, self.cluster)
        if backing and image.parent:
            table = blocks.fill_partial_holes(table, image.parent.flat.window(0, table.size), self.unit)
        # Before tables are counted, whose number a stated size alone decides.
        self.l1_entries = self._l1_entries(table.size)
        self.bitmaps = self._bitmaps(image)
        self.packing = self._pack(table, image, placement.scratch) if options.compress else None
        if self.packing:
            table = self._without_zeros(table, self.packing.zero)
        self.guest = table
        self.runs = blocks.whole_blocks(self._unpacked(table), self.cluster)
        self.allocated = self.runs.kind == Kind.DATA
        # Version 2 has no zero clusters: hiding the parent takes allocated ones, which are holes in the file.
        if backing and options.version == 2:
            self.allocated |= self.runs.kind == Kind.ZERO
        if options.preallocation != "off":
            self._refuse_preallocation()
            self.allocated[:] = True
        mapped = self.allocated | (self.runs.kind == Kind.ZERO if backing else False)
        first, count = self.runs.first[mapped], self.runs.blocks[mapped]
        if self.packing:
            first = np.append(first, self.packing.number)
            count = np.append(count, np.ones_like(self.packing.number))
        self.l2_tables = columns.touched(first, count, self.entries)

    def _refuse_unencrypted(self) -> None:
        """Raises `PlanError` where payload would not be written, or not by whole clusters of its own."""
        for given, what in (
            (self.carrier, "in place, payload keeps its bytes"),
            (self.options.data_file, "data_file keeps payload in SOURCE"),
            (self.options.subformat == "reference", "subformat=reference keeps payload in SOURCE"),
            (self.options.compress, "compressed clusters are no whole sectors"),
            (self.options.preallocation != "off", "preallocated clusters would decrypt to noise"),
            (self.backing, "a layer on a backing file needs parts of its clusters"),
        ):
            if given:
                raise PlanError(f"an encrypted qcow2 image holds the whole disk: {what}")

    def _refuse_preallocation(self) -> None:
        if self.backing:
            raise PlanError(
                "preallocation and a backing file exclude each other: every cluster would hide it",
                hint="use preallocation=off",
            )
        if self.carrier:
            raise PlanError("in place, nothing can be preallocated", hint="use preallocation=off")

    def _pin(self, table: Extents, carrier: File) -> None:
        """Leaves payload in place, in clusters of the requested size, or else the largest possible."""
        from vmconv.plugin import pin

        if self.references:
            raise PlanError("in place, an image cannot refer to its source, which no longer exists afterwards")
        smallest = 1 << 14 if self.options.extended_l2 else clusters.SMALLEST
        units = [1 << bits for bits in range(smallest.bit_length() - 1, clusters.DEFAULT.bit_length())]
        self.pinned = pin(table, carrier, [self.options.cluster_size] if self.options.cluster_size else units)
        self.cluster = self.pinned.unit
        self.pinned = self.pinned.cleared(self.cluster)

    def _bitmaps(self, image: Image) -> BitmapArea | None:
        if not image.bitmaps:
            return None
        if self.options.version == 2:
            raise PlanError("version 2 of qcow2 has no bitmaps", hint="use -o compat=1.1, or omit --bitmaps")
        from vmconv_qcow2.bitmap_writer import BitmapArea

        return BitmapArea(image.bitmaps, self.size, self.cluster)

    def _pack(self, table: Extents, image: Image, scratch: Scratch | None) -> Packing:
        from vmconv_qcow2.packing import Compression, pack

        if self.carrier:
            raise PlanError("in place, payload keeps its bytes: it cannot be compressed", hint="omit --in-place")
        how = Compression(self.cluster, self.options.compression_type, self.options.compression_level)
        # Version 2 has no zero clusters to hide the parent.
        zeros = not (self.backing and self.options.version == 2)
        return pack(table, how, self.modulus, image.file, scratch, zeros=zeros)

    def _without_zeros(self, table: Extents, zero: Column) -> Extents:
        """Returns the table with ZERO for clusters of zeros that were found by reading."""
        from vmconv_qcow2.packing import ranges_of

        return table.replaced(Extents.filled(table.size), *ranges_of(zero, self.cluster)) if len(zero) else table

    def _unpacked(self, table: Extents) -> Extents:
        """Returns the table with a HOLE for each compressed cluster."""
        if not self.packing or not len(self.packing.number):
            return table
        from vmconv_qcow2.packing import ranges_of

        holes = Extents.filled(table.size, Kind.HOLE)
        return table.replaced(holes, *ranges_of(self.packing.number, self.cluster))

    def _default_cluster(self, table: Extents) -> int:
        if self.options.compress:
            from vmconv_qcow2.packing import source_cluster

            return source_cluster(table, self.options.compression_type) or clusters.DEFAULT
        # Extended entries need large clusters, and encrypted payload is not shared.
        if self.options.extended_l2 or self.encryptor:
            return clusters.DEFAULT
        return clusters.cluster_size(table, self.modulus, self.options.refcount_bits)

    def layout(self) -> Layout:
        tables, runs, offset = self._arrange_in_place() if self.carrier else self._arrange()
        length = runs.blocks * self.cluster
        payload_end = 0 if self.options.data_file else int((offset + length).max(initial=0))
        end = max(tables.end, payload_end)
        packed_at = self._packed_at(end)
        if self.packing and self.packing.end:
            end = packed_at + -(-self.packing.end // self.cluster) * self.cluster
        rows, row_length = cut(self.guest, runs.first * self.cluster, length, offset)
        owners = self.guest.sources
        if self.encryptor:
            plain = Extents.placed(end, rows, row_length, owners)
            owners = (Encrypted(f"{self.file.name} (encrypted)", self.file, plain, self.encryptor),)
            nothing = np.zeros(len(offset), dtype=np.int32)
            rows = Columns(offset, np.full(len(offset), Kind.DATA, dtype=np.uint8), nothing, offset)
            row_length = length
        if self.options.data_file:
            # Payload stays there, and the entries of its clusters are the same.
            rows, row_length = rows.take(row_length < 0), row_length[:0]
        file = self._file(tables, runs, offset, end, packed_at)
        metadata = [(offset, blob) for offset, blob in file if blob.size]
        sources = (*owners, *(blob for _, blob in metadata))
        first = len(owners)
        blobs = Columns(
            np.array([offset for offset, _ in metadata], dtype=np.int64),
            np.full(len(metadata), Kind.DATA, dtype=np.uint8),
            np.arange(first, first + len(metadata), dtype=np.int32),
            np.zeros(len(metadata), dtype=np.int64),
        )
        blob_length = np.array([blob.size for _, blob in metadata], dtype=np.int64)
        both, both_length = Columns.join([blobs, rows]), np.concatenate([blob_length, row_length])
        if self.packing:
            packed = self.packing.rows
            packed = packed._replace(start=packed.start + packed_at, source=packed.source + np.int32(len(sources)))
            both, both_length = Columns.join([both, packed]), np.append(both_length, self.packing.row_length)
            sources = (*sources, *self.packing.sources)
        # The last cluster is whole even if it ends in zeros: only QEMU reads a partial one.
        table = Extents.placed(end, both, both_length, sources)
        return Layout(
            (OutFile(table, slack=True, allocation=self.options.allocation),),
            (),
            self.references,
        )

    # -- placement

    def _arrange(self) -> tuple[_Tables, blocks.Runs, Column]:
        """Returns the offsets of metadata and payload, which depend on the number of refcounts, and that on them."""
        payload = self.runs.take(self.allocated)
        align = max(self.cluster, self.modulus)
        needed = np.empty(0, dtype=np.int64)
        while True:
            tables = self._tables(self.cluster, needed)
            base = -(-tables.end // align) * align
            placed = self._place(payload, base)
            end = max(tables.end, placed.end)
            total = -(-(self._packed_at(end) + self.packing.end if self.packing else end) // self.cluster)
            count = -(-total // self._counts_in_a_block())
            if count <= len(needed):
                return tables, payload.take(placed.run), placed.offset
            needed = np.arange(count, dtype=np.int64)

    def _packed_at(self, end: int) -> int:
        """Returns the offset of the compressed clusters, which begin behind `end`."""
        align = max(self.cluster, self.modulus)
        return -(-end // align) * align

    def _place(self, payload: blocks.Runs, base: int) -> blocks.Placed:
        if self.options.data_file:
            return blocks.Placed(np.arange(len(payload.first)), payload.first * self.cluster, 0)
        return blocks.place(self.guest, payload, self.cluster, base, self.modulus)

    def _arrange_in_place(self) -> tuple[_Tables, blocks.Runs, Column]:
        """Returns the offsets of metadata behind pinned payload. Clusters in holes of the file have no refcounts."""
        if (self.allocated != (self.runs.kind == Kind.DATA)).any():
            raise PlanError("in place, qcow2 of version 2 cannot hide its parent's content", hint="use -o compat=1.1")
        # A disk of 0 bytes leaves no room for the header.
        runs, offset, start = self.pinned.runs, self.pinned.offset, max(self.pinned.end, self.cluster)
        needed = np.empty(0, dtype=np.int64)
        while True:
            tables = self._tables(start, needed)
            first = np.append(offset, [0, start]) // self.cluster
            count = np.append(runs.blocks, [1, (tables.end - start) // self.cluster])
            touched = columns.touched(first, count, self._counts_in_a_block())
            if len(touched) <= len(needed):
                break
            needed = touched
        if self.cluster < _PAGE:
            self._refuse_heavy(tables.end - start, int(runs.blocks.sum()) * self.cluster)
        return tables, runs, offset

    def _refuse_heavy(self, metadata: int, payload: int) -> None:
        if metadata > max(clusters.LARGEST_TABLES * payload, _NO_MATTER):
            raise PlanError(
                f"in place, payload can stay only in clusters of {self.cluster} bytes, "
                f"which need {metadata} bytes of tables for {payload} bytes"
            )

    def _counts_in_a_block(self) -> int:
        return self.cluster * 8 // self.options.refcount_bits

    def _tables(self, start: int, refcount_blocks: Column) -> _Tables:
        """Returns the offsets of all tables from `start` on."""
        cluster, l1_entries = self.cluster, self.l1_entries
        table_bytes = (int(refcount_blocks[-1]) + 1) * 8 if len(refcount_blocks) else 0
        if table_bytes > structs.MAX_REFCOUNT_TABLE_BYTES:
            self._refuse_size(f"a refcount table of {table_bytes} bytes, {structs.MAX_REFCOUNT_TABLE_BYTES} at most")
        first_block = start + -(-table_bytes // cluster) * cluster
        l1 = first_block + len(refcount_blocks) * cluster
        l2 = l1 + -(-l1_entries * 8 // cluster) * cluster
        bitmaps = l2 + len(self.l2_tables) * cluster
        encryption = bitmaps + (self.bitmaps.length if self.bitmaps else 0)
        end = encryption + (-(-self.encryptor.length // cluster) * cluster if self.encryptor else 0)
        return _Tables(
            l1_entries, self.l2_tables, refcount_blocks, start, first_block, l1, l2, bitmaps, encryption, end
        )

    def _l1_entries(self, size: int) -> int:
        # One entry even for a disk of 0 bytes: libqcow refuses an empty L1 table.
        count = max(1, -(-size // (self.cluster * self.entries)))
        if count * 8 > structs.MAX_L1_BYTES:
            most = structs.MAX_L1_BYTES // 8 * self.cluster * self.entries
            self._refuse_size(f"an L1 table of {count * 8} bytes; {most} bytes are the largest disk")
        return count

    def _refuse_size(self, problem: str) -> None:
        raise PlanError(
            f"qcow2 with clusters of {self.cluster} bytes cannot hold {self.size} bytes: needs {problem}",
            hint=f"use larger clusters, such as -o cluster_size={min(self.cluster * 16, 2 << 20)}"
            if not self.carrier
            else "in place, payload can stay only in clusters of this size",
        )

    # -- metadata

    def _file(
        self, tables: _Tables, runs: blocks.Runs, offset: Column, end: int, packed_at: int
    ) -> list[tuple[int, Blob]]:
        """Returns the metadata of the file and its offsets."""
        cluster = self.cluster
        used_to = -(-end // cluster) * cluster
        output = Placeholder("output", used_to)
        places = np.concatenate([[0, tables.refcount_table], offset])
        length = np.concatenate([[cluster, tables.end - tables.refcount_table], runs.blocks * cluster])
        if self.options.data_file:
            # Clusters of a data file have no refcounts.
            places, length, output = places[:2], length[:2], Placeholder("output", max(used_to, self.guest.size))
        used = columns.windows(places, length, places, output, used_to)
        host = self._host(runs, offset, output)
        l1 = np.zeros(tables.l1_entries, dtype=">u8")
        l2_places = tables.l2 + np.arange(len(tables.l2_tables), dtype=np.int64) * cluster
        l1[tables.l2_tables] = l2_places | np.int64(-structs.COPIED)
        counting = np.zeros(int(tables.refcount_blocks[-1]) + 1, dtype=">u8")
        counting[tables.refcount_blocks] = tables.first_block + np.arange(len(tables.refcount_blocks)) * cluster
        return [
            (0, Blob("header", self._header(tables))),
            (tables.refcount_table, Blob("refcount table", counting.tobytes())),
            (tables.first_block, self._refcounts(used, tables.refcount_blocks, packed_at // cluster)),
            # An empty table is a hole.
            (tables.l1, Blob("L1 table", l1.tobytes() if len(tables.l2_tables) else b"")),
            (tables.l2, self._l2(host, tables.l2_tables, packed_at)),
            *(self.bitmaps.blobs(tables.bitmaps) if self.bitmaps else []),
            *([(tables.encryption, Blob("header of LUKS", self.encryptor.header))] if self.encryptor else []),
        ]

    def _host(self, runs: blocks.Runs, offset: Column, output: Source) -> Extents:
        """Returns the table from guest clusters to the output file."""
        length = runs.blocks * self.cluster
        host = columns.windows(runs.first * self.cluster, length, offset, output, self.guest.size, Kind.HOLE)
        if not self.backing:
            return host
        zero = self.runs.take((self.runs.kind == Kind.ZERO) & ~self.allocated)
        zeros = Extents.filled(self.guest.size)
        return host.replaced(zeros, zero.first * self.cluster, zero.blocks * self.cluster) if len(zero.first) else host

    def _header(self, tables: _Tables) -> bytes:
        options, backing = self.options, self.backing
        extensions = b""
        name = b""
        if backing:
            name = os.fsencode(backing.reference)
            extensions += build_extension(structs.BACKING_FORMAT, qemu_name(backing.format).encode())
            if backing.records:
                records = "\0".join(str(record) for record in backing.records)
                extensions += build_extension(structs.RECORDS, os.fsencode(records))
        if options.data_file:
            extensions += build_extension(structs.DATA_FILE_NAME, os.fsencode(options.data_file))
        if self.bitmaps:
            extensions += build_extension(structs.BITMAPS, self.bitmaps.extension(tables.bitmaps))
        if self.encryptor:
            place = {"offset": tables.encryption, "length": self.encryptor.length}
            extensions += build_extension(structs.ENCRYPTION, structs.Encryption.build(place))
        extensions += build_extension(structs.END, b"")
        length = structs.V2_LENGTH if options.version == 2 else structs.V3_FULL_LENGTH
        name_offset = length + len(extensions)
        if len(name) > structs.MAX_BACKING_NAME or name_offset + len(name) > self.cluster:
            raise PlanError(
                f"names of other files need {len(extensions) + len(name)} bytes of the header cluster, it has "
                f"{self.cluster - length}, and {structs.MAX_BACKING_NAME} for that of a backing file",
                hint="use larger clusters, or shorter names",
            )
        fields: dict[str, Any] = {
            "version": options.version,
            "backing_file_offset": name_offset if name else 0,
            "backing_file_size": len(name),
            "cluster_bits": self.cluster.bit_length() - 1,
            "size": self.size,
            "crypt_method": structs.CRYPT_LUKS if self.encryptor else 0,
            "l1_size": tables.l1_entries,
            "l1_table_offset": tables.l1,
            "refcount_table_offset": tables.refcount_table,
            "refcount_table_clusters": (tables.first_block - tables.refcount_table) // self.cluster,
            "nb_snapshots": 0,
            "snapshots_offset": 0,
        }
        header = structs.HeaderV2.build(fields)
        if options.version == 3:
            header += structs.HeaderV3.build(
                {
                    "incompatible_features": self._incompatible(),
                    "compatible_features": structs.LAZY_REFCOUNTS if options.lazy_refcounts else 0,
                    "autoclear_features": (structs.RAW_EXTERNAL_DATA if options.data_file_raw else 0)
                    | (structs.BITMAPS_CONSISTENT if self.bitmaps else 0),
                    "refcount_order": options.refcount_bits.bit_length() - 1,
                    "header_length": length,
                }
            )
            header += structs.HeaderV3Additional.build({"compression_type": int(options.compression_type == "zstd")})
        return b"".join([header, extensions, name])

    def _incompatible(self) -> int:
        features = structs.EXTENDED_L2 if self.options.extended_l2 else 0
        features |= structs.EXTERNAL_DATA if self.options.data_file else 0
        return features | (structs.COMPRESSION if self.options.compression_type == "zstd" else 0)

    def _refcounts(self, used: Extents, numbers: Column, packed_from: int) -> Blob:
        """Returns the concatenated refcount blocks of these numbers: 1 for each used cluster of the file.

        From cluster `packed_from` on it is the number of compressed clusters in each.
        """
        bits, cluster, each = self.options.refcount_bits, self.cluster, self._counts_in_a_block()
        packed = self._packed_counts()

        def compute(first: int, count: int) -> bytes:
            kind, _, _ = used.units(cluster, first, count)
            found = (kind == Kind.DATA).astype(np.int64)
            if len(packed):
                low = min(max(first, packed_from), first + count)
                some = packed[max(first - packed_from, 0) : max(first + count - packed_from, 0)]
                found[low - first : low - first + len(some)] = some
            return columns.counts(found, bits)

        # Counts of clusters past the end of the file are zero, and so are unwritten bytes.
        last = -(-used.size // cluster) - int(numbers[-1]) * each
        size = (len(numbers) - 1) * cluster + -(-last * bits // 64) * 8
        read = columns.by_words(columns.concatenated(numbers, cluster, each, compute))
        return Blob("refcount blocks", read, min(size, len(numbers) * cluster))

    def _packed_counts(self) -> Column:
        """Returns the references to each cluster with compressed ones. Raises `PlanError` if they cannot be counted."""
        if not self.packing:
            return np.empty(0, dtype=np.int64)
        counts = self.packing.counts(self.cluster)
        bits, most = self.options.refcount_bits, int(counts.max(initial=0))
        if most >> bits:
            raise PlanError(
                f"{most} compressed clusters share a cluster of the file, and refcount_bits={bits} counts to "
                f"{(1 << bits) - 1}",
                hint=f"use -o refcount_bits={min(bits * 2, 64)}",
            )
        return counts

    def _l2(self, host: Extents, indices: Column, packed_at: int) -> Blob:
        """Returns the concatenated L2 tables of the given L1 entries."""
        shape = self._shape() if self.options.extended_l2 else None
        number, packed = self._packed_entries(packed_at)

        def compute(first: int, count: int) -> bytes:
            low, high = np.searchsorted(number, (first, first + count))
            entry = self._entries(host, first, count)
            entry[number[low:high] - first] = packed[low:high]
            return entry.astype(">i8").tobytes() if shape is None else self._with_bitmaps(entry, shape, first)

        read = columns.by_words(columns.concatenated(indices, self.cluster, self.entries, compute), self.entry_size)
        return Blob("L2 tables", read, len(indices) * self.cluster)

    def _packed_entries(self, packed_at: int) -> tuple[Column, Column]:
        """Returns numbers and entries of the compressed clusters, sorted."""
        if not self.packing:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        at = packed_at + self.packing.at
        sectors = (packed_at + self.packing.sectors_end) // 512 - at // 512
        bits = 62 - (self.cluster.bit_length() - 9)
        return self.packing.number, at | (sectors - 1) << bits | np.int64(structs.COMPRESSED)

    def _entries(self, host: Extents, first: int, count: int) -> Column:
        kind, _, offset = host.units(self.cluster, first, count)
        data = kind == Kind.DATA
        if data.all():
            return offset | np.int64(-structs.COPIED)
        entry = np.where(data, offset | np.int64(-structs.COPIED), 0)
        if not self.options.extended_l2:
            entry[kind == Kind.ZERO] = structs.ZERO
        return entry

    def _with_bitmaps(self, entry: Column, shape: Extents, first: int) -> bytes:
        """Returns extended entries: with the bitmap of the subclusters of each."""
        n, count = structs.SUBCLUSTERS, len(entry)
        kinds, _, _ = shape.units(self.cluster // n, first * n, count * n)
        if self.options.preallocation != "off":
            kinds = np.repeat(np.where(entry != 0, np.uint8(Kind.DATA), np.uint8(Kind.HOLE)), n)
        bits = np.stack([kinds.reshape(-1, n) == Kind.DATA, kinds.reshape(-1, n) == Kind.ZERO], axis=1)
        if not self.backing:
            # No parent has to be hidden.
            bits[:, 1] = False
        bitmap = np.packbits(bits.reshape(count, -1), axis=1, bitorder="little").view("<u8").reshape(-1)
        both = np.empty((count, 2), dtype=">u8")
        both[:, 0], both[:, 1] = entry.view(np.uint64), bitmap
        return both.tobytes()

    def _shape(self) -> Extents:
        """Returns the table of subclusters: DATA, ZERO or HOLE. Compressed clusters have none."""
        unit = self.cluster // structs.SUBCLUSTERS
        runs = blocks.whole_blocks(self._unpacked(self.guest), unit)
        rows = Columns(
            runs.first * unit,
            runs.kind,
            np.zeros(len(runs.first), dtype=np.int32),
            runs.first * unit,
        )
        return Extents(self.guest.size, rows, [Placeholder("output", self.guest.size)])
