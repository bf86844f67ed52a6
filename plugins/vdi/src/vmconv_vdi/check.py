"""The structural check of a VDI image: the entries of its block map, and the data area."""

from __future__ import annotations

import numpy as np

from vmconv.plugin import CheckReport, Findings, Image, Usage
from vmconv_vdi import structs
from vmconv_vdi.reader import SLICE, Header, entries_of, head_of, read_header


def check(image: Image) -> CheckReport:
    """Returns the report on the structure of the image's file, without its parent.

    The format has no leaks: space behind the last block is used for the next one.
    """
    header = read_header(image.file)
    findings, usage = Findings(), Usage()
    allocated = sum(_count(header, first, findings, usage) for first in range(0, header.blocks, SLICE))
    if allocated != header.blocks_allocated:
        place = head_of(header.file).offset_of("cBlocksAllocated")
        findings.corrupt(f"cBlocksAllocated at {place:#x}: {header.blocks_allocated}, the block map has {allocated}")
    findings.overlaps(usage, header.stride)
    end = max(usage.end, header.data_offset)
    return findings.report(allocated=allocated, total=header.blocks, end=end)


def _count(header: Header, first: int, findings: Findings, usage: Usage) -> int:
    """Checks a slice of the block map; returns the number of allocated blocks."""
    file, raw = header.file, entries_of(header, first)
    number = np.flatnonzero(raw < structs.DISCARDED)
    place = header.data_offset + raw[number] * header.stride
    # Up to the end of the disk: the rest of its last block is not needed.
    left = np.minimum(header.size - (first + number) * header.block_size, header.block_size)
    bad = place + header.block_extra + left > file.size
    bad |= raw[number] >= header.entries

    def outside(index: int) -> str:
        at = first + int(number[index])
        return (
            f"block map entry {at} at {header.map_offset + at * 4:#x}: block {int(raw[number[index]])} at "
            f"{int(place[index]):#x} does not lie inside the file ({file.size:#x})"
        )

    findings.corrupt_where(bad, outside)
    usage.add("block map entry", place[~bad], header.stride, first + number[~bad])
    return len(number)
