"""Writes VMware memory: a .vmem with all RAM, and a .vmss that maps its pages to addresses.

Debuggers and forensic tools read the pair. VMware cannot resume it: the state of the devices is not there.

`crash` asks for two things that no reader of memory needs (seen with 8.0.2): the number of processors, and a file of
at least 80 times the bytes of its groups' entries, which it multiplies by their size once more.
"""

from __future__ import annotations

import os
import struct

import numpy as np

from vmconv.plugin import Blob, Column, Extents, Image, Layout, OutFile, Placement, PlanError, blocks, cut
from vmconv_memory.ranges import PAGE, Segments, placed, segments
from vmconv_memory.vmware import CPU, GROUP, HEADER, MEMORY, PAYLOADS, PROCESSORS, STATES

_MAGIC = 0xBED2BED2
_MOST = 1 << 12
_NUMBER = 4
"""Bytes of a value."""
_LOSS = "no state of devices and processors: debuggers read the pair, VMware cannot resume it"


def write(image: Image, placement: Placement) -> Layout:
    """Returns the layout of the pair. The target is the one that has its suffix; the other is beside it.

    Raises `PlanError` if the RAM is not whole pages, or has too many ranges.
    """
    table = image.stored
    modulus = max(placement.modulus, PAGE)
    found = segments(image, table, modulus, _MOST, PAGE)
    partial = np.flatnonzero((found.start % PAGE != 0) | (found.length % PAGE != 0))
    if len(partial) and (len(found.start) > 1 or found.start[0]):
        at = int(found.start[partial[0]])
        raise PlanError(
            f"vmem: RAM at {at:#x} is not whole pages of {PAGE} bytes", hint="elfcore and lime can hold any range"
        )
    offset = placed(found, 0, modulus)
    size = int(offset[-1] + found.length[-1])
    rows, length = cut(table, found.start, found.length, offset)
    memory = blocks.output_table([], table, rows, length, size)
    # A single range that is not whole pages begins at 0, and needs no region.
    state = Blob("state", _state(found if not len(partial) else None, offset))
    whole = Extents.whole(state)
    beside, is_state = beside_of(placement.target)
    first, last = (memory, whole) if is_state else (whole, memory)
    return Layout((OutFile(first, beside), OutFile(last)), (_LOSS,))


def beside_of(name: str) -> tuple[str, bool]:
    """Returns the name of the other file of the pair, and whether `name` is that of the state."""
    stem, suffix = os.path.splitext(name)
    if suffix.lower() in PAYLOADS:
        return stem + STATES[0], False
    return (stem if suffix.lower() in STATES else name) + PAYLOADS[0], True


def _state(found: Segments | None, offset: Column) -> bytes:
    """Returns a state with the regions; without regions if `found` is None."""
    columns = [] if found is None else [found.start // PAGE, offset // PAGE, found.length // PAGE]
    regions = list(zip(*(column.tolist() for column in columns), strict=True))
    tags = [_tag(b"regionsCount", (), len(regions))]
    for number, values in enumerate(regions):
        names = (b"regionPPN", b"regionPageNum", b"regionSize")
        tags += [_tag(name, (number,), value) for name, value in zip(names, values, strict=True)]
    return _grouped([(CPU, PROCESSORS), (MEMORY, b"".join(tags) + b"\0\0")])


def _grouped(groups: list[tuple[bytes, bytes]]) -> bytes:
    """Returns a state with these groups, whose bodies end with an empty tag."""
    at = HEADER.size + len(groups) * GROUP.size
    head = HEADER.pack(_MAGIC, 8, len(groups))
    for name, body in groups:
        head += GROUP.pack(name, at, len(body))
        at += len(body)
    state = head + b"".join(body for _, body in groups)
    return state.ljust(HEADER.size + len(groups) * GROUP.size**2, b"\0")


def _tag(name: bytes, indices: tuple[int, ...], value: int) -> bytes:
    if value >> 8 * _NUMBER:
        raise PlanError(f"vmem: page {value:#x} has no place in {_NUMBER} bytes")
    flags = len(indices) << 6 | _NUMBER
    return bytes([flags, len(name)]) + name + struct.pack(f"<{len(indices)}I", *indices) + value.to_bytes(4, "little")
