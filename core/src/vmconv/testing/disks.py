"""Disks in memory: sources, images, and layouts that are written to memory."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from vmconv.conversion.execute import make
from vmconv.conversion.planner import plan_layout
from vmconv.io.directory import Directory
from vmconv.model.extents import Extents, Kind, on_storage
from vmconv.model.facts import DiskFacts
from vmconv.model.image import Image
from vmconv.model.layout import Layout, OutFile
from vmconv.model.plan import Plan
from vmconv.testing.memory import MemoryBackend, MemoryFile

SECTOR = 512


def random_bytes(count: int, seed: int = 0) -> bytes:
    """Returns incompressible bytes, the same for the same seed."""
    return random.Random(seed).randbytes(count)


def patterned(size: int, pieces: Iterable[tuple[int, int]], seed: int = 0) -> MemoryFile:
    """Returns a file in memory with random bytes in the given `(start, length)` pieces and holes elsewhere."""
    file = MemoryFile("source.raw", size)
    for number, (start, length) in enumerate(pieces):
        file.write(start, random_bytes(length, seed + number))
    return file


def image_file(content: bytes, name: str = "image") -> MemoryFile:
    """Returns a file in memory with the given content."""
    file = MemoryFile(name, len(content))
    file.write(0, content)
    return file


def disk_of(table: Extents, file: MemoryFile, *, parent: Image | None = None, facts: DiskFacts | None = None) -> Image:
    """Returns an image with this table, as input of writers."""
    load_parent = (lambda: parent) if parent else None
    return Image("test", file, table.size, lambda: table, load_parent=load_parent, facts=facts)


def raw_disk(file: MemoryFile, facts: DiskFacts | None = None) -> Image:
    """Returns a file as a raw disk."""
    return disk_of(on_storage(file), file, facts=facts)


def make_in_memory(layout: Layout, image: Image, name: str = "image") -> tuple[Plan, list[MemoryFile]]:
    """Returns the plan of a layout and its files in memory; congruent payload is shared."""
    backend = MemoryBackend()
    sources = [source for source in image.flat.sources if isinstance(source, MemoryFile)]
    plan = plan_layout(layout, name, "", backend.name, backend.survey("", sources))
    files = make(plan, backend.begin(Directory("", -1)), None)
    return plan, [file for file in files if isinstance(file, MemoryFile)]


def changed_in_place(out: OutFile, carrier: MemoryFile) -> MemoryFile:
    """Returns the result of converting `carrier` in place; fails if payload inside it moves.

    Ranges of slack keep their old bytes.
    """
    file = MemoryFile("image", out.table.size)
    moved = 0
    for row in out.table:
        if row.source is not None:
            file.write(row.start, row.source.read(row.offset, row.length))
        elif out.slack and row.start < carrier.size:
            file.write(row.start, carrier.read(row.start, min(row.length, carrier.size - row.start)))
        if row.source is carrier and row.start != row.offset:
            assert row.start >= carrier.size, row
            moved += row.length
    assert moved <= 2 << 20
    return file


def content(table: Extents) -> bytes:
    """Returns the bytes that a guest reads."""
    return table.without_holes().read(0, table.size)


def kinds(table: Extents) -> Sequence[Kind]:
    """Returns the kind of each row."""
    return [row.kind for row in table]
