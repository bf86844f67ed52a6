"""The structural check of a VHDX image: headers, region tables, log, and the offsets in its BAT."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vmconv.plugin import CheckReport, Column, Findings, Image, Usage
from vmconv_vhdx import structs
from vmconv_vhdx.header import Header, doubtful_copies, read_header
from vmconv_vhdx.reader import KINDS, UNKNOWN, add_blocks, add_metadata, chunks, missing_room


def check(image: Image) -> CheckReport:
    """Returns the report on the structure of the image's file, without its parent.

    The format has no leaks: unused space is available for later blocks.
    """
    return _Check(read_header(image.file)).report()


class _Check:
    def __init__(self, header: Header) -> None:
        self.header = header
        self.findings = Findings()
        self.usage = Usage()
        self.allocated = 0

    def report(self) -> CheckReport:
        header, findings = self.header, self.findings
        for text in doubtful_copies(header.file):
            findings.doubt(text)
        if header.replayed:
            findings.corrupt(f"log at {header.log.offset:#x}: was not replayed, the image was not closed cleanly")
        if short := missing_room(header):
            findings.corrupt(f"BAT at {header.bat.offset:#x}: {short}")
        add_metadata(self.usage, header)
        for first, raw, bitmaps in chunks(header):
            self._payload(raw, first)
            if header.has_parent:
                self._bitmaps(bitmaps, first // header.chunk_ratio)
            if findings.enough:
                break
        findings.overlaps(self.usage, header.block_size)
        return findings.report(allocated=self.allocated, total=header.blocks, end=self.usage.end)

    def _payload(self, raw: npt.NDArray[np.uint64], first: int) -> None:
        header, findings = self.header, self.findings
        state = (raw & np.uint64(structs.STATE_MASK)).astype(np.uint8)
        number = np.arange(first, first + len(raw), dtype=np.int64)
        unknown = KINDS[state] == UNKNOWN
        findings.corrupt_where(unknown, lambda index: f"{self._entry(first + index)}: unknown state {state[index]}")
        there = (state == structs.FULLY_PRESENT) | (state == structs.PARTIALLY_PRESENT)
        self.allocated += int(np.count_nonzero(there))
        place = _places(raw)
        bad = there & ((place < structs.HEADER_SECTION) | (place + header.needed(number) > header.view.size))
        findings.corrupt_where(
            bad,
            lambda index: (
                f"{self._entry(first + index)}: payload at {int(place[index]):#x} does not lie between the "
                f"headers and the end of the file ({header.view.size:#x})"
            ),
        )
        good = there & ~bad
        add_blocks(self.usage, header, number[good], place[good])

    def _bitmaps(self, raw: npt.NDArray[np.uint64], first: int) -> None:
        header = self.header
        there = (raw & np.uint64(structs.STATE_MASK)) == structs.BITMAP_PRESENT
        place = _places(raw)
        bad = there & ((place < structs.HEADER_SECTION) | (place + structs.BITMAP_BLOCK > header.view.size))
        self.findings.corrupt_where(
            bad,
            lambda index: (
                f"sector bitmap {first + index}: {int(place[index]):#x} does not lie between the headers and "
                f"the end of the file ({header.view.size:#x})"
            ),
        )
        good = np.flatnonzero(there & ~bad)
        self.usage.add("sector bitmap", place[good], structs.BITMAP_BLOCK, first + good)

    def _entry(self, block: int) -> str:
        entry = block + block // self.header.chunk_ratio
        return f"BAT entry {entry} at {self.header.bat.offset + entry * 8:#x}"


def _places(raw: npt.NDArray[np.uint64]) -> Column:
    # Offsets of more than 62 bits are past the end of any file.
    place: Column = np.minimum(raw & np.uint64(structs.OFFSET_MASK), np.uint64(1 << 61)).astype(np.int64)
    return place
