"""What writers lay out, for tests that parse it themselves: disks of rows, and outputs as maps.

Payload is never read here: a table says where each byte of an output comes from.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vmconv.model.extents import Extents, Kind
from vmconv.model.facts import DiskFacts
from vmconv.model.image import Image
from vmconv.model.layout import Layout
from vmconv.model.sources import File
from vmconv.testing import disk_of
from vmconv.testing.memory import MemoryFile

Piece = tuple[int, int, int]
"""Payload: address in the guest, offset in the source, bytes."""


class Payload(MemoryFile):
    """A source of any size, full of payload of which nobody reads a byte."""

    def data_ranges(self, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
        return [(start, self.size if end is None else end)]


def disk(pieces: Iterable[Piece], size: int, *, source_size: int = 1 << 40, facts: DiskFacts | None = None) -> Image:
    """Returns a disk of zeros with these pieces of payload."""
    source = Payload("source.raw", source_size)
    rows: list[tuple[int, Kind, File | None, int]] = []
    at = 0
    for address, offset, length in sorted(pieces):
        if address > at:
            rows.append((at, Kind.ZERO, None, 0))
        rows.append((address, Kind.DATA, source, offset))
        at = address + length
    if at < size:
        rows.append((at, Kind.ZERO, None, 0))
    return disk_of(Extents.of(rows, size), source, facts=facts)


def scattered(
    seed: int,
    size: int,
    unit: int,
    *,
    shift: int = 0,
    kinds: Sequence[Kind] = tuple(Kind),
    longest: int = 4,
    parent: Image | None = None,
) -> Image:
    """Returns a disk of random rows of whole units; payload lies in any order, `shift` bytes after a unit."""
    rng = random.Random(seed)
    rows = []
    at = 0
    count = -(-size // unit)
    places = rng.sample(range(count * longest), count)
    source = Payload("source.raw", (count * longest**2 + 1) * unit)
    while at < size:
        kind = rng.choice(kinds)
        rows.append((at, kind, source if kind == Kind.DATA else None, places.pop() * longest * unit + shift))
        at += rng.randint(1, longest) * unit
    rows = [(at, kind, file, offset if file else 0) for at, kind, file, offset in rows]
    return disk_of(Extents.of(rows, size), source, parent=parent)


def laid_out(layout: Layout) -> list[str]:
    """Returns what the last file of a layout has where: its metadata by name, payload by its offset in the source."""
    table = layout.files[-1].table
    found = []
    for row in table:
        if isinstance(row.source, File):
            found.append(f"{row.start:#x} payload {row.offset:#x}+{row.length:#x}")
        elif row.source is not None:
            found.append(f"{row.start:#x} {row.source.name}" + (f" {row.offset:#x}" if row.offset else ""))
    return [*found, f"{table.size:#x} end"]


def same_in_pieces(layout: Layout) -> None:
    """Checks that metadata which is read in pieces is the metadata that is read at once."""
    for blob in layout.files[-1].table.sources:
        if isinstance(blob, File):
            continue
        whole = blob.read(0, blob.size)
        for start in {0, 1, 8, 511, 512, 515, blob.size // 2 + 3, blob.size - 9}:
            for length in (1, 7, 8, 512, 1000):
                if 0 <= start <= blob.size - length:
                    assert blob.read(start, length) == whole[start : start + length], blob.name


def unpacked(table: Extents, at: int, form: str) -> tuple[Any, ...]:
    """Returns numbers and strings of bytes that lie at an offset of a file, in the words of `struct`."""
    return struct.unpack(form, table.read(at, struct.calcsize(form)))


class Said:
    """What an image has to hold of each block that it allocates."""

    def __init__(self, image: Image, *, on_parent: bool) -> None:
        self.size = image.size
        self.on_parent = on_parent
        self.guest = image.guest if on_parent else image.flat
        self.below = image.parent.flat if on_parent and image.parent else Extents.filled(0)

    def block(self, address: int, length: int) -> Extents:
        """Returns what a block says; all of it is a HOLE where it can be left to the parent."""
        inside = max(0, min(length, self.size - address))
        block = self.guest.window(address, length, Kind.ZERO)
        if not self.on_parent:
            return block
        if block.window(0, inside).total(Kind.HOLE) == inside:
            return Extents.filled(length, Kind.HOLE)
        return block.over(self.below.window(address, length)).without_holes()


def of_format(name: str, image: Image, data: Mapping[str, Any], facts: DiskFacts | None = None) -> Image:
    """Returns a disk as a reader of that format would, for layers that look at what their parent is."""
    details = {"format-specific": {"type": name, "data": data}}
    return Image(name, image.file, image.size, lambda: image.guest, facts=facts, details=lambda: details)
