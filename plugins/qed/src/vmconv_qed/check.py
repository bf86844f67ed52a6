"""The structural check of a QED image: clusters used by its tables, once or more often, and unused ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vmconv.plugin import CheckReport, Column, Findings, Image, Usage
from vmconv_qed import structs
from vmconv_qed.reader import SLICE, Header, read_header, written

_Raw = npt.NDArray[np.uint64]


def check(image: Image) -> CheckReport:
    """Returns the report on the structure of the image's file, without its backing file.

    The flag that requests a check is no error.
    """
    return _Check(read_header(image.file)).report()


class _Check:
    def __init__(self, header: Header) -> None:
        self.header = header
        self.findings = Findings()
        self.usage = Usage()
        self.allocated = 0

    def report(self) -> CheckReport:
        header, cluster = self.header, self.header.cluster_size
        self.usage.add("header", [0], header.header_size)
        self.usage.add("L1 table", [header.l1_offset], header.table_size)
        tables = self._tables()
        for number in written(header, tables).tolist():
            begin = number * header.entries
            for first in range(0, min(header.entries, header.clusters - begin), SLICE):
                self._entries(begin + first, int(tables[number]) + first * 8)
            if self.findings.enough:
                break
        self.findings.overlaps(self.usage, cluster)
        self.findings.unused(self.usage, cluster, 0, header.file.size // cluster * cluster)
        if header.features & structs.NEED_CHECK:
            self.findings.doubt("was not closed cleanly: the header requests this check")
        return self.findings.report(allocated=self.allocated, total=header.clusters, end=self.usage.end)

    def _tables(self) -> Column:
        """Returns the offsets of the L2 tables, 0 for missing and invalid ones."""
        header = self.header
        # A table may have a gigabyte. Entries past the end of the disk do not count.
        needed = -(-header.clusters // header.entries)
        raw = np.frombuffer(header.file.read(header.l1_offset, needed * 8), dtype="<u8")
        bad = self._outside(raw, header.table_size)
        self.findings.corrupt_where(
            bad,
            lambda entry: (
                f"L1 entry {entry} at {header.l1_offset + entry * 8:#x}: L2 table at {int(raw[entry]):#x} "
                f"is not {header.table_size} bytes of clusters of the file ({header.file.size:#x})"
            ),
        )
        there = np.flatnonzero((raw != structs.UNALLOCATED) & ~bad)
        tables = np.zeros(len(raw), dtype=np.int64)
        tables[there] = raw[there].astype(np.int64)
        # A table with two entries is an overlap, and is checked once.
        self.usage.add("L2 table", tables[there], header.table_size, there)
        order = there[np.argsort(tables[there], kind="stable")]
        again = order[1:][np.diff(tables[order]) == 0]
        tables[again] = 0
        return tables

    def _entries(self, first: int, place: int) -> None:
        """Checks a slice of an L2 table; the entry of guest cluster `first` is at `place`."""
        header, cluster = self.header, self.header.cluster_size
        count = min(SLICE, header.entries)
        if not header.file.data_ranges(place, place + count * 8):
            return
        raw = np.frombuffer(header.file.read(place, count * 8), dtype="<u8")
        data = raw > structs.ZERO
        bad = data & self._outside(raw, cluster)
        self.findings.corrupt_where(
            bad,
            lambda entry: (
                f"L2 entry at {place + entry * 8:#x} (guest cluster {first + entry}): payload at "
                f"{int(raw[entry]):#x} is no cluster of the file ({header.file.size:#x})"
            ),
        )
        self.allocated += int(np.count_nonzero(data))
        good = np.flatnonzero(data & ~bad)
        self.usage.add("guest cluster", raw[good].astype(np.int64), cluster, first + good)

    def _outside(self, raw: _Raw, length: int) -> npt.NDArray[np.bool_]:
        """Returns a mask of the nonzero offsets without a whole cluster of the file."""
        header = self.header
        most = header.file.size - length
        outside: npt.NDArray[np.bool_] = raw % np.uint64(header.cluster_size) != 0
        outside |= (raw < np.uint64(header.header_size)) | (raw > np.uint64(max(0, most)))
        outside &= raw != structs.UNALLOCATED
        return outside
