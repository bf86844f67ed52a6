"""The structural check of a Parallels image: the offsets in its BAT, and unused space behind the last cluster."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vmconv.plugin import CheckReport, Findings, Structure, Usage
from vmconv_parallels import structs
from vmconv_parallels.reader import SLICE, Header


def check(headers: Sequence[Header]) -> CheckReport:
    """Returns the report on the images of one layer of the disk."""
    findings = Findings()
    # A single image needs no name in its findings.
    checks = [_Check(header, findings, f"{header.file.name}: " if len(headers) > 1 else "") for header in headers]
    ends = [one.run() for one in checks]
    allocated, total = sum(one.allocated for one in checks), sum(header.clusters for header in headers)
    return findings.report(allocated=allocated, total=total, end=ends[0] if len(ends) == 1 else 0)


class _Check:
    def __init__(self, header: Header, findings: Findings, name: str) -> None:
        self.header = header
        self.findings = findings
        self.name = name
        self.usage = Usage()
        self.allocated = 0

    def run(self) -> int:
        """Checks one image; returns the end of its last cluster in use."""
        header = self.header
        if header.in_use:
            place = Structure(header.file, structs.Header).offset_of("in_use")
            self.findings.corrupt(f"{self.name}in_use at {place:#x}: {structs.IN_USE:#x}, the image was not closed")
        bat_end = structs.HEADER_LENGTH + header.clusters * 4
        self.usage.add(f"{self.name}header and BAT", [0], bat_end)
        for first in range(0, header.clusters, SLICE):
            self._entries(first, min(SLICE, header.clusters - first), bat_end)
        self.findings.overlaps(self.usage, header.cluster_size)
        end = max(self.usage.end, header.data_offset)
        extension = header.extension * structs.SECTOR
        if extension and end <= extension < header.file.size:
            end = extension + header.cluster_size
        left = -(-(header.file.size - end) // header.cluster_size)
        if left > 0:
            text = f"{self.name}{header.file.size - end} bytes from {end:#x} to the end of the file are not used"
            self.findings.leak(text, left)
        return end

    def _entries(self, first: int, count: int, least: int) -> None:
        header, file = self.header, self.header.file
        place = structs.HEADER_LENGTH + first * 4
        if not file.data_ranges(place, place + count * 4):
            return
        offset = np.frombuffer(file.read(place, count * 4), dtype="<u4").astype(np.int64) * header.entry_unit
        there = offset != 0
        self.allocated += int(np.count_nonzero(there))
        bad = there & ((offset < least) | (offset + header.cluster_size > file.size) | header.empty)

        def problem(entry: int) -> str:
            where = (
                f"{self.name}BAT entry {first + entry} at {place + entry * 4:#x}: cluster at {int(offset[entry]):#x}"
            )
            if header.empty:
                return f"{where} in an image with the flag `empty`"
            return f"{where} does not lie between the BAT and the end of the file ({file.size:#x})"

        self.findings.corrupt_where(bad, problem)
        good = np.flatnonzero(there & ~bad)
        self.usage.add(f"{self.name}BAT entry", offset[good], header.cluster_size, first + good)
