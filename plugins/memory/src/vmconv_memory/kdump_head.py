"""The header of a kdump file, which states neither its class nor its byte order."""

from __future__ import annotations

import struct
from typing import NamedTuple

from vmconv.plugin import Extents, File, ImageError, Kind
from vmconv.plugin import damaged as damaged_file

MAGIC = b"KDUMP   "
_MACHINE = 8 + 4 + 4 * 65
"""Of the six names of the system, 65 bytes each, the last but one is the processor's."""
LAYOUTS = {2: (424, struct.calcsize("=Q")), 1: (412, 4)}
"""By class of ELF: the offset of the numbers behind the timestamp, and bytes of a long number."""
_MAX_RAM = 1 << 44
_VERSIONS = range(1, 7)

_SMALLEST = 4096
"""Bytes of a block, of which the header has one to itself."""


class Head(NamedTuple):
    """The header: class and order of numbers, and the fields that are needed."""

    class_: int
    order: str
    version: int
    machine: str
    status: int
    block: int
    sub: int
    bitmaps: int
    pages: int


def read_head(file: File, content: Extents) -> Head:
    """Returns the header. Nothing in it states its layout: of the possible ones, one makes sense."""
    raw = content.read(0, min(content.size, 512)).ljust(512, b"\0")
    if raw[:8] != MAGIC:
        raise damaged(file, content, "magic", 0, "no signature of a kdump file")
    if content.size < _SMALLEST:
        raise damaged(file, content, "header", 0, f"is cut off after {content.size} of {_SMALLEST} bytes")
    found, problems = [], []
    for order in "<>":
        (version,) = struct.unpack_from(f"{order}I", raw, 8)
        if version not in _VERSIONS:
            continue
        machine = raw[_MACHINE : _MACHINE + 65].partition(b"\0")[0].decode("ascii", "replace")
        for class_, (at, _) in LAYOUTS.items():
            status, block, sub, bitmaps, pages = struct.unpack_from(f"{order}5I", raw, at)
            head = Head(class_, order, version, machine, status, block, sub, bitmaps, pages)
            problem = _problem(head, content.size)
            if problem:
                problems.append((at, problem))
            else:
                found.append(head)
    if len(found) == 1:
        return found[0]
    if found:
        raise damaged(file, content, "header", 0, "has a meaning in more than one layout")
    if not problems:
        raise damaged(file, content, "version", 8, f"{raw[8:12].hex()} is none of 1 to {_VERSIONS[-1]}")
    at, problem = problems[0]
    raise damaged(file, content, "header", at, problem)


def _problem(head: Head, size: int) -> str | None:
    """Returns why the numbers of a header make no sense together; None if they do."""
    if head.block & (head.block - 1) or not _SMALLEST <= head.block <= 65536:
        return f"block size {head.block} is not a power of two from {_SMALLEST} to 65536"
    if not 0 < head.pages < min(_MAX_RAM // head.block, 0xFFFFFFFF):
        return f"{head.pages} pages, from 1 to {min(_MAX_RAM // head.block, 0xFFFFFFFF) - 1} are read"
    need = 2 * -(-head.pages // (8 * head.block))
    if head.bitmaps < need or head.bitmaps % 2:
        return f"{head.bitmaps} blocks of bitmaps, {need} are needed for {head.pages} pages"
    if not head.sub or (1 + head.sub + head.bitmaps) * head.block > size:
        return f"sub-header of {head.sub} blocks and bitmaps of {head.bitmaps} are not in the {size} bytes"
    return None


def damaged(
    file: File, content: Extents, what: str, offset: int, problem: str, *, guest: int | None = None
) -> ImageError:
    """Returns the error for an offset of the dump, which is another one of the file if it is flattened."""
    return damaged_file(file, what, place(content, offset), problem, guest=guest)


def place(content: Extents, offset: int) -> int:
    """Returns the offset in the file of an offset of the dump."""
    rows = list(content.rows_of(offset, 1)) if offset < content.size else []
    return rows[0].offset if rows and rows[0].kind == Kind.DATA else offset
