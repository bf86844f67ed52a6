"""The structural check of a VHD image: its footers and its block allocation table."""

from __future__ import annotations

import numpy as np

from vmconv.plugin import CheckReport, Column, Findings, Image, Usage
from vmconv_vhd import structs
from vmconv_vhd.header import Header, read_header
from vmconv_vhd.reader import SLICE, add_blocks, add_metadata


def check(image: Image) -> CheckReport:
    """Returns the report on the structure of the image's file, without its parent."""
    header = read_header(image.file)
    findings, usage = Findings(), Usage()
    for warning in header.warnings:
        findings.corrupt(warning)
    if header.kind == structs.FIXED:
        if header.end > header.size:
            findings.doubt(f"{header.end - header.size} bytes lie between the end of the disk and the footer")
        return findings.report(allocated=0, total=0, end=header.file.size)
    _compare_footers(header, findings)
    add_metadata(usage, header)
    blocks = -(-header.size // header.block_size)
    allocated = 0
    for first in range(0, blocks, SLICE):
        allocated += _count(header, first, min(SLICE, blocks - first), findings, usage)
        if findings.enough:
            break
    stride = header.bitmap_size + header.block_size
    findings.overlaps(usage, stride)
    # There may be slack between blocks. A whole unreferenced block is a leak.
    findings.unused(usage, stride, 0, header.end)
    return findings.report(allocated=allocated, total=blocks, end=usage.end)


def _compare_footers(header: Header, findings: Findings) -> None:
    """Reports a copy of the footer, at the start of the file, that differs from the footer."""
    if header.end == header.file.size:
        return
    length = min(structs.OLD_FOOTER_LENGTH, header.file.size - header.end)
    if header.file.read(0, length) != header.file.read(header.end, length):
        findings.corrupt(f"footer copy at 0x0: differs from the footer at {header.end:#x}")


def _count(header: Header, first: int, count: int, findings: Findings, usage: Usage) -> int:
    """Checks a slice of the BAT; returns the number of allocated blocks."""
    raw = np.frombuffer(header.file.read(header.table_offset + first * 4, count * 4), dtype=">u4")
    number = np.flatnonzero(raw != structs.UNUSED)
    place: Column = raw[number].astype(np.int64) * structs.SECTOR
    length = header.needed(first + number)
    bad = (place < structs.FOOTER_LENGTH) | (place + length > header.end)

    def outside(index: int) -> str:
        at = first + int(number[index])
        return (
            f"BAT entry {at} at {header.table_offset + at * 4:#x}: block {int(place[index]):#x}.."
            f"{int(place[index] + length[index]):#x} does not lie between the headers and the footer ({header.end:#x})"
        )

    findings.corrupt_where(bad, outside)
    add_blocks(usage, header, first + number[~bad], place[~bad])
    return len(number)
