"""Writes ELF cores: a pure function from the table of the memory to the table of the output file.

    header | program headers | notes | RAM

Each PT_LOAD begins at the phase of its payload, mostly a multiple of 4096, so that blocks can be shared. The first
program header is a PT_NOTE, also of no notes: `crash` takes no other file for a dump (seen with 8.0.2).
"""

from __future__ import annotations

import struct

import numpy as np

from vmconv.plugin import Blob, Image, Layout, OutFile, Placement, blocks, cut
from vmconv_memory import structs
from vmconv_memory.options import ElfOptions
from vmconv_memory.ranges import PAGE, placed, segments

_MOST = structs.PN_XNUM - 2
"""PT_LOADs, so that no reader needs to know PN_XNUM."""


def write(image: Image, options: ElfOptions, placement: Placement) -> Layout:
    """Returns the layout of a 64-bit little-endian core; raises `PlanError` if the RAM has too many ranges."""
    table = image.stored
    modulus = max(placement.modulus, PAGE)
    found = segments(image, table, modulus, _MOST)
    machine, notes = _state(image, options)
    kind = structs.program_headers(2, "<")
    count = len(found.start) + 1
    head = structs.IDENT + struct.calcsize("<" + structs.HEADER[2])
    end = head + count * kind.itemsize + len(notes)
    offset = placed(found, end, modulus)
    size = int(offset[-1] + found.length[-1])
    programs = np.zeros(count, dtype=kind)
    programs[0] = (structs.PT_NOTE, 0, end - len(notes), 0, 0, len(notes), len(notes), 0)
    loads = programs[1:]
    loads["type"] = structs.PT_LOAD
    loads["paddr"], loads["offset"] = found.start, offset
    loads["filesz"] = loads["memsz"] = found.length
    metadata = Blob("header", _header(machine, count) + programs.tobytes() + notes)
    rows, length = cut(table, found.start, found.length, offset)
    return Layout((OutFile(blocks.output_table([(0, metadata)], table, rows, length, size)),))


def _header(machine: int, count: int) -> bytes:
    # Class 2: 64 bits. Data 1: little-endian. Version 1.
    ident = (structs.ELF_MAGIC + bytes([2, 1, 1])).ljust(structs.IDENT, b"\0")
    size = structs.IDENT + struct.calcsize("<" + structs.HEADER[2])
    entry = structs.program_headers(2, "<").itemsize
    fields = structs.ElfHeader(structs.ET_CORE, machine, 1, 0, size, 0, 0, size, entry, count, 0, 0, 0)
    return ident + struct.pack("<" + structs.HEADER[2], *fields)


def _state(image: Image, options: ElfOptions) -> tuple[int, bytes]:
    """Returns the number of the processor, and the notes of a source that is a core of it."""
    kept = image.state.get("ELF notes", b"")
    own = struct.unpack_from("<H", kept)[0] if kept else structs.NUMBERS["x86_64"]
    machine = own if options.machine == "source" else structs.NUMBERS[options.machine]
    return machine, kept[2:] if machine == own else b""
