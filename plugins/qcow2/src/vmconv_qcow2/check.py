"""The structural check of a qcow2 image: counts all references and compares them with the stored reference counts.

Both are step functions over the clusters of the file, kept as runs, so that memory follows fragmentation, not size.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vmconv.plugin import CheckReport, Column, Findings, Image, ImageError, Structure, table_slices
from vmconv_qcow2 import structs
from vmconv_qcow2.compression import locate
from vmconv_qcow2.header import Bitmap, Header, read_bitmaps, read_header, read_snapshots
from vmconv_qcow2.steps import NO_COUNTS, Steps, decode_counts, differences, repeated, settled, steps_of

_RESERVED = "has reserved bits set"
_PAST = "reaches past the end of the file"
_NO_CLUSTER = "is not the offset of a cluster of the file"


def check(image: Image) -> CheckReport:
    """Returns the report on the structure of the image's file, without its parents."""
    return Check(read_header(image.file)).report(image.size)


def is_preallocated(header: Header) -> bool:
    """True if storage has so many fewer clusters than are counted that payload must lie in holes of the file.

    As in QEMU, only then maps show which clusters are holes.
    """
    counts = Check(header).stored_counts()
    clusters = -(-header.file.size // header.cluster_size)
    start = np.minimum(counts.start, clusters)
    used = int(np.diff(start, append=clusters)[counts.value != 0].sum())
    on_storage = header.file.stored() // header.cluster_size
    return used >= max(on_storage * 10 // 9, on_storage + 2)


class Check:
    """A running check; `runs` are the references to clusters that were counted so far."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.file = header.file
        self.cluster = header.cluster_size
        self.clusters = -(-self.file.size // self.cluster)
        self.findings = Findings()
        self.runs: list[tuple[Column, Column]] = []
        self.allocated = 0
        # Offsets of the refcount blocks, 0 for missing and bad ones, and whether their table is in the file.
        self.blocks: Column = np.zeros(0, dtype=np.int64)
        self.has_table = False
        self.is_partial = False
        """True if a table is damaged so that what it refers to is not known, and looks like leaks."""
        self._l1_bytes = 0

    def report(self, size: int) -> CheckReport:
        header, findings = self.header, self.findings
        stored = self.stored_counts()
        self.count_references(size, stored)
        counted = steps_of(self.runs)
        low, high, references, counts = differences(counted, stored, self.clusters)
        missing = counts < references

        def difference(row: int) -> str:
            return f"{_clusters(low[row], high[row])} refcount={counts[row]} reference={references[row]}"

        findings.corrupt_where(missing, difference, high - low)
        findings.leak_where(~missing, difference, high - low)
        if header.incompatible & structs.CORRUPT:
            findings.doubt("is marked corrupt: QEMU found damage, and opens it read-only")
        if header.incompatible & structs.DIRTY:
            findings.doubt("is marked dirty: it was not closed cleanly, and its reference counts may be wrong")
        return findings.report(
            allocated=self.allocated, total=-(-size // self.cluster), end=self._end(counted, stored) * self.cluster
        )

    def count_references(self, size: int, stored: Steps) -> None:
        """Counts all references but those of the refcount structures, for a disk of `size` bytes."""
        header = self.header
        # Damage of the counts themselves hides no references.
        self.is_partial = False
        self._count(0, 1)
        if header.encryption:
            self._place("header of LUKS", *header.encryption)
        needed = -(-size // (self.cluster * header.l2_entries))
        if header.l1_size < needed:
            place = Structure(self.file, structs.HeaderV2).offset_of("l1_size")
            self._lose(f"l1_size at {place:#x}: {header.l1_size} entries, the disk needs {needed}")
        self._count_l1("", header.l1_offset, header.l1_size, stored, active=True)
        self._count_snapshots(stored)
        self._count_bitmaps()

    def _end(self, counted: Steps, stored: Steps) -> int:
        """Returns the number of the first cluster behind all referenced or counted ones."""
        end = 0
        for steps in (counted, stored):
            # Counts of clusters past the end of the file do not move its end.
            used = np.flatnonzero((steps.value != 0) & (steps.start < self.clusters))
            if len(used):
                end = max(end, int(np.append(steps.start, self.clusters)[used[-1] + 1]))
        return min(end, self.clusters)

    # -- findings

    def _corrupt_where(
        self,
        bad: npt.NDArray[np.bool_],
        what: str,
        values: npt.NDArray[np.uint64],
        problem: str,
        numbers: Column | None = None,
    ) -> None:
        """Reports the bad entries; `numbers` are those of the entries where some have been left out."""

        def finding(entry: int) -> str:
            number = entry if numbers is None else numbers[entry]
            return f"{what} {number}: {int(values[entry]):#x} {problem}"

        self.findings.corrupt_where(bad, finding)

    def _lose(self, problem: str) -> None:
        """Reports damage of a table whose references are unknown therefore."""
        self.findings.corrupt(problem)
        self.is_partial = True

    def _take(self, damage: ImageError) -> None:
        self._lose(str(damage).removeprefix(f"{self.file.name}: "))

    # -- references

    def _count(self, offset: int, length: int) -> None:
        """Counts a reference to each cluster that the byte range touches."""
        first, end = offset // self.cluster, -(-(offset + length) // self.cluster)
        self.runs.append((np.array([first]), np.array([end - first])))

    def _place(self, what: str, offset: int, length: int) -> bool:
        """Counts the clusters of a table; reports an invalid offset."""
        if offset % self.cluster or offset + length > -(-self.file.size // self.cluster) * self.cluster or not offset:
            self._lose(f"{what} at {offset:#x}: {length} bytes are not whole clusters of the file")
            return False
        if length:
            self._count(offset, length)
        return True

    def _count_clusters(
        self, what: str, raw: npt.NDArray[np.uint64], reserved: int, mask: int = structs.OFFSET_MASK
    ) -> Column:
        """Counts the clusters of table entries; returns their offsets, 0 for empty and bad entries."""
        used = np.flatnonzero(raw != 0)
        values = raw[used]
        self._corrupt_where((values & np.uint64(reserved)) != 0, what, values, _RESERVED, used)
        wide = values & np.uint64(mask)
        bad = (wide & np.uint64(self.cluster - 1) != 0) | (wide > np.uint64(max(0, self.file.size - self.cluster)))
        self._corrupt_where(bad, what, values, _NO_CLUSTER, used)
        self.is_partial |= bool(bad.any())
        offset = np.zeros(len(raw), dtype=np.int64)
        offset[used] = np.where(bad, np.uint64(0), wide)
        self._count_offsets(offset[offset != 0])
        return offset

    def _count_offsets(self, offset: Column) -> None:
        if not len(offset):
            return
        # Sorted, a disorderly table has few runs. A merge sort is fast for one in order.
        offset = np.sort(offset, kind="stable")
        first = np.ones(len(offset), dtype=bool)
        first[1:] = np.diff(offset) != self.cluster
        starts = np.flatnonzero(first)
        self.runs.append((offset[starts] // self.cluster, np.diff(starts, append=len(offset))))

    def _count_snapshots(self, stored: Steps) -> None:
        header = self.header
        if not header.snapshot_count:
            return
        end = header.snapshots_offset
        short: list[bool] = []
        try:
            for number, snapshot in enumerate(read_snapshots(header)):
                end = snapshot.end
                short.append(snapshot.l1_size < -(-snapshot.disk_size // (self.cluster * header.l2_entries)))
                self._count_l1(f"snapshot {number} ", snapshot.l1_offset, snapshot.l1_size, stored, active=False)
        except ImageError as exc:
            self._take(exc)
        problem = "its L1 table has too few entries for its disk"
        self.findings.corrupt_where(np.array(short, dtype=bool), lambda number: f"snapshot {number}: {problem}")
        self.is_partial |= any(short)
        self._place("snapshot table", header.snapshots_offset, end - header.snapshots_offset)

    def _count_l1(self, whose: str, offset: int, size: int, stored: Steps, *, active: bool) -> None:
        if size * 8 > structs.MAX_L1_BYTES:
            self._lose(f"{whose}L1 table: {size} entries, {structs.MAX_L1_BYTES // 8} at most")
            return
        self._l1_bytes += size * 8
        if self._l1_bytes > self.file.size:
            # They overlap. Thousands of them would be read for hours.
            self._lose(f"{whose}L1 table: all L1 tables have {self._l1_bytes} bytes, more than the file")
            return
        if not size or not self._place(f"{whose}L1 table", offset, size * 8):
            return
        if offset + size * 8 > self.file.size:
            self._lose(f"{whose}L1 table {_PAST}")
            return
        raw = np.frombuffer(self.file.read(offset, size * 8), dtype=">u8").astype(np.uint64)
        tables = self._count_clusters(f"{whose}L1 entry", raw, structs.L1_RESERVED)
        if active:
            self._check_copied("L1 entry", raw, tables, tables != 0, stored)
        self._drop_repeated(f"{whose}L1 entry", raw, tables)
        for first, _, data in table_slices(self.file, tables, self.cluster, 4 << 20):
            if data is not None:
                entries = np.frombuffer(data, dtype=">u8").astype(np.uint64)
                self._count_l2(whose, entries, first, stored, active=active)

    def _drop_repeated(self, what: str, raw: npt.NDArray[np.uint64], tables: Column) -> None:
        """Reports L2 tables that an L1 table has twice. They would be read as often, for hours if there are many."""
        again = repeated(tables)
        if again.any():
            self._corrupt_where(again, what, raw, "is used twice")
            self.is_partial = True
            tables[again] = 0

    def _count_l2(self, whose: str, raw: npt.NDArray[np.uint64], first: int, stored: Steps, *, active: bool) -> None:
        bitmap = raw[1::2] if self.header.extended_l2 else None
        raw = raw[0::2] if self.header.extended_l2 else raw
        # Most tables are nearly empty.
        used = np.flatnonzero((raw if bitmap is None else raw | bitmap) != 0)
        raw, numbers = raw[used], first * self.header.l2_entries + used
        bitmap = None if bitmap is None else bitmap[used]
        packed = (raw & np.uint64(structs.COMPRESSED)) != 0
        offset = (raw & np.uint64(structs.OFFSET_MASK)).astype(np.int64)
        external = bool(self.header.incompatible & structs.EXTERNAL_DATA)
        # The last cluster of the file may be incomplete. Clusters preallocated for zeros may lie past its end.
        zero = (raw & np.uint64(structs.ZERO)) != 0
        if bitmap is not None:
            zero = (bitmap & np.uint64(0xFFFFFFFF)) == 0
        past = (offset >= self.file.size) & ~zero
        what = f"{whose}L2 entry of guest cluster"
        knows_zero = bitmap is None and self.header.version > 2
        reserved = structs.L2_RESERVED | (0 if knows_zero else structs.ZERO)
        self._corrupt_where(~packed & ((raw & np.uint64(reserved)) != 0), what, raw, _RESERVED, numbers)
        bad = ~packed & ((offset % self.cluster != 0) | (past & (not external)))
        self._corrupt_where(bad, what, raw, _NO_CLUSTER, numbers)
        if bitmap is not None:
            wrong = self._wrong_bitmaps(bitmap, packed, offset != 0)
            self._corrupt_where(wrong, what, raw, "contradicts its subcluster bitmap", numbers)
        plain = ~packed & ~bad & (offset != 0)
        if external:
            plain |= (raw & np.uint64(structs.COPIED)) != 0
        if active:
            there = plain | packed
            self.allocated += int(there.sum())
            if not external:
                self._check_copied(what, raw, offset, plain, stored, numbers)
        if not external:
            self._count_offsets(offset[plain])
            for misplaced in offset[bad & (offset < self.file.size)].tolist():
                self._count(misplaced, min(self.cluster, self.file.size - misplaced))
        if packed.any():
            self._count_compressed(raw[packed])

    def _count_compressed(self, raw: npt.NDArray[np.uint64]) -> None:
        offset, length = locate(raw, 62 - (self.header.cluster_bits - 8))
        first, last = offset // self.cluster, (offset + length - 1) // self.cluster
        bad = offset >= self.file.size
        self._corrupt_where(bad, "compressed cluster", raw, "lies past the end of the file")
        last = np.minimum(last, self.clusters - 1)
        self.runs.append((first[~bad], (last - first + 1)[~bad]))

    def _wrong_bitmaps(
        self, bitmap: npt.NDArray[np.uint64], packed: npt.NDArray[np.bool_], there: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.bool_]:
        """Returns a mask of the subcluster bitmaps that contradict themselves or their entry."""
        allocated, zero = bitmap & np.uint64(0xFFFFFFFF), bitmap >> np.uint64(32)
        bad = np.where(packed, bitmap != 0, (allocated & zero) != 0)
        external = bool(self.header.incompatible & structs.EXTERNAL_DATA)
        wrong: npt.NDArray[np.bool_] = bad | (~packed & ~there & (allocated != 0) & (not external))
        return wrong

    def _check_copied(
        self,
        what: str,
        raw: npt.NDArray[np.uint64],
        offset: Column,
        chosen: npt.NDArray[np.bool_],
        stored: Steps,
        numbers: Column | None = None,
    ) -> None:
        """Reports entries with COPIED flags that contradict the number of references."""
        flag = (raw & np.uint64(structs.COPIED)) != 0
        once = np.zeros(len(raw), dtype=bool)
        once[chosen] = stored.at(offset[chosen] // self.cluster) == 1
        problem = "has a COPIED flag that contradicts the refcount"
        self._corrupt_where(chosen & (flag != once), what, raw, problem, numbers)

    def _count_bitmaps(self) -> None:
        bitmaps = self.header.bitmaps
        if bitmaps is None:
            return
        offset, size = bitmaps.directory_offset, bitmaps.directory_size
        if not self._place("bitmap directory", offset, size):
            return
        if offset + size > self.file.size:
            self._lose(f"bitmap directory {_PAST}")
            return
        try:
            for number, bitmap in enumerate(read_bitmaps(self.header)):
                self._count_bitmap(number, bitmap)
        except ImageError as exc:
            self._take(exc)

    def _count_bitmap(self, number: int, bitmap: Bitmap) -> None:
        if not bitmap.flags & structs.BITMAP_IN_USE and (problem := self._unusable(bitmap)):
            self.findings.corrupt(f"bitmap {number}: {problem}")
        length = bitmap.table_size * 8
        if not self._place(f"bitmap {number} table", bitmap.table_offset, length):
            return
        if bitmap.table_offset + length > self.file.size:
            self._lose(f"bitmap {number} table {_PAST}")
        else:
            raw = np.frombuffer(self.file.read(bitmap.table_offset, length), dtype=">u8").astype(np.uint64)
            self._count_clusters(f"bitmap {number} entry", raw, structs.BITMAP_RESERVED)

    def _unusable(self, bitmap: Bitmap) -> str | None:
        """Returns why QEMU does not open an image with this bitmap."""
        needed = -(-self.header.size // (self.cluster * 8 << bitmap.granularity_bits))
        if bitmap.table_size != needed:
            return f"its table has {bitmap.table_size} entries, {needed} expected"
        if bitmap.type != structs.DIRTY_BITMAP or bitmap.flags & ~structs.BITMAP_AUTO:
            return f"type {bitmap.type} or flags {bitmap.flags:#x} are not known"
        return None

    # -- stored counts

    def stored_counts(self) -> Steps:
        """Returns the stored reference counts, and counts the clusters of their structures."""
        header = self.header
        length = header.refcount_table_clusters * self.cluster
        if length > structs.MAX_REFCOUNT_TABLE_BYTES or header.refcount_table_offset + length > self.file.size:
            place = Structure(self.file, structs.HeaderV2).offset_of("refcount_table_clusters")
            self.findings.corrupt(
                f"refcount_table_clusters at {place:#x}: {length} bytes at "
                f"{header.refcount_table_offset:#x} are not a table inside the file"
            )
            return NO_COUNTS
        if not self._place("refcount table", header.refcount_table_offset, length):
            return NO_COUNTS
        self.has_table = True
        raw = np.frombuffer(self.file.read(header.refcount_table_offset, length), dtype=">u8")
        # A table is whole clusters, mostly empty ones at its end.
        raw = raw[: np.append(0, np.flatnonzero(raw) + 1)[-1]].astype(np.uint64)
        blocks = self._count_clusters(
            "refcount table entry", raw, structs.REFCOUNT_TABLE_RESERVED, structs.REFCOUNT_TABLE_MASK
        )
        twice = repeated(blocks)
        self._corrupt_where(twice, "refcount table entry", raw, "is used twice")
        blocks[twice] = 0
        self.blocks = blocks
        per_block = self.cluster * 8 >> header.refcount_order
        starts, values = [np.zeros(1, dtype=np.int64)], [np.zeros(1, dtype=np.int64)]
        for first, count, data in table_slices(self.file, blocks, self.cluster, 1 << 20):
            begin = first * per_block
            start, value = NO_COUNTS if data is None else decode_counts(data, header.refcount_order)
            starts += [begin + start, np.array([begin + count * per_block])]
            values += [value, np.zeros(1, dtype=np.int64)]
        return settled(np.concatenate(starts), np.concatenate(values))


def _clusters(first: int, end: int) -> str:
    return f"cluster {first}" if end == first + 1 else f"clusters {first} to {end - 1}"
