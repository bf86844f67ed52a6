"""A disk whose payload stays in the files of its source: the descriptor names ranges of them as flat extents.

    name.vmdk        the descriptor: RW sectors FLAT "file of the source" sector
    name-rest.vmdk   zeros, and parts that are not whole sectors, at guest addresses

QEMU 7.2 reads extents of kind ZERO as the extent before them, so zeros are a hole of a file. Every address has its own
offset there, so a write never changes two addresses.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from vmconv.plugin import (
    Column,
    Extents,
    File,
    Kind,
    OutFile,
    Placement,
    PlanError,
    Ranges,
    Record,
    Reference,
    joined_over_holes,
    ranges_in_files,
    refer,
    text_of,
)
from vmconv_vmdk.descriptor import Part
from vmconv_vmdk.structs import SECTOR

MAX_PARTS = 512
"""Limit of extents: QEMU opens a file for each, and the default limit of a process is 1024."""

MAX_NAME = 511
"""Limit of a file name in a descriptor, in QEMU, bytes."""

_REASON = "an extent of a VMDK is whole sectors of 512 bytes, in its file as in the disk"


class Referring(NamedTuple):
    """The extents for the descriptor, their references, and the file of the rest, if there is any."""

    parts: list[Part]
    references: tuple[Reference, ...]
    records: tuple[Record, ...]
    rest: tuple[OutFile, ...]


def refer_to_source(guest: Extents, rest_name: str, placement: Placement) -> Referring:
    """Returns the parts of a disk of whole sectors in its source's files. Raises `PlanError` if there are too many."""
    ranges = ranges_in_files(joined_over_holes(guest), SECTOR)
    gap, gap_length = _gaps(ranges, guest.size)
    _refuse_scattered(len(ranges.start) + len(gap))
    used = {index: source for index, source in enumerate(guest.sources) if (ranges.source == index).any()}
    files = {index: source for index, source in used.items() if isinstance(source, File)}
    records = {index: refer(file, placement.directory) for index, file in files.items()}
    left = guest.replaced(Extents.filled(guest.size), ranges.start, ranges.length)
    whole, some = _payload(guest), _payload(left)
    references = tuple(
        Reference(records[index].name, file, whole[id(file)] - some.get(id(file), 0)) for index, file in files.items()
    )
    rest = tuple(OutFile(left.window(0, end), rest_name, _REASON) for end in (gap + gap_length)[-1:].tolist())
    names = {index: record.name for index, record in records.items()}
    parts = _parts(ranges, names, gap, gap_length, rest_name)
    return Referring(_guarded(parts), references, tuple(records.values()), rest)


def _gaps(ranges: Ranges, size: int) -> tuple[Column, Column]:
    """Returns `(start, length)` of the parts of the disk outside all ranges."""
    start = np.append(0, ranges.start + ranges.length)
    length = np.append(ranges.start, size) - start
    return start[length > 0], length[length > 0]


def _refuse_scattered(count: int) -> None:
    if count > MAX_PARTS:
        raise PlanError(
            f"the disk lies in {count} ranges of its files, QEMU opens {MAX_PARTS} extents at most",
            hint="a qcow2 image with subformat=reference names the source as a whole, if QEMU reads it",
        )


def _payload(table: Extents) -> Mapping[int, int]:
    """Returns the bytes of payload in each source, by `id`."""
    data = table.kind == Kind.DATA
    lengths = np.bincount(table.source[data], table.length[data], len(table.sources))
    return {id(source): int(length) for source, length in zip(table.sources, lengths, strict=True)}


def _parts(ranges: Ranges, names: Mapping[int, str], gap: Column, gap_length: Column, rest_name: str) -> list[Part]:
    """Returns the extents in the disk's order. Parts outside all ranges are in the rest, at guest addresses."""
    rows = [
        (int(start), int(length), names[int(source)], int(offset))
        for start, length, source, offset in zip(*ranges, strict=True)
    ]
    rows += [(start, length, rest_name, start) for start, length in zip(gap.tolist(), gap_length.tolist(), strict=True)]
    for name in {name for _, _, name, _ in rows}:
        _refuse_name(name)
    return [Part("RW", length // SECTOR, "FLAT", name, offset // SECTOR) for _, length, name, offset in sorted(rows)]


def _refuse_name(name: str) -> None:
    if '"' in name or "\0" in name or text_of(name).splitlines() != [text_of(name)]:
        raise PlanError(f"VMDK descriptor cannot hold the file name {name!r}")
    length = len(os.fsencode(name))
    if length > MAX_NAME:
        raise PlanError(f"file name of {length} bytes in a VMDK descriptor, {MAX_NAME} at most: {name}")


def _guarded(parts: list[Part]) -> list[Part]:
    """Returns the extents with at least one file named twice: then QEMU's locks prevent writes to all of them.

    A disk that is one file from its first byte stays as it is, for readers that ignore the offset of an extent.
    """
    names = [part.name for part in parts]
    first = parts[0]
    if len(set(names)) < len(names) or (len(parts) == 1 and not first.offset):
        return parts
    longest = max(parts, key=lambda part: part.sectors)
    if longest.sectors < 2:
        return parts
    at, one = parts.index(longest), longest.sectors - 1
    halves = [
        Part(longest.access, one, longest.kind, longest.name, longest.offset),
        Part(longest.access, 1, longest.kind, longest.name, longest.offset + one),
    ]
    return [*parts[:at], *halves, *parts[at + 1 :]]
