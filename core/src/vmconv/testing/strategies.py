"""Hypothesis strategies: tables of extents, and disks with known content."""

from __future__ import annotations

from hypothesis import strategies as st

from vmconv.model.extents import Extents, Kind
from vmconv.model.sources import Source
from vmconv.testing.disks import SECTOR, disk_of, random_bytes
from vmconv.testing.memory import MemoryFile

_SECTORS = 64


@st.composite
def tables(
    draw: st.DrawFn, sources: tuple[Source, ...], *, size: int | None = None, unit: int = 1, holes: bool = True
) -> Extents:
    """Draws a table of `size` bytes (default: drawn) with windows onto `sources`, in multiples of `unit` bytes."""
    length = draw(st.integers(0, _SECTORS)) * unit if size is None else size
    rows = []
    at = 0
    while at < length:
        step = min(draw(st.integers(1, 16)) * unit, length - at)
        kind = draw(st.sampled_from([*([Kind.HOLE] if holes else []), Kind.ZERO, *([Kind.DATA] * bool(sources))]))
        source, offset = None, 0
        if kind == Kind.DATA:
            source = draw(st.sampled_from(sources))
            step = min(step, source.size)
            offset = draw(st.integers(0, (source.size - step) // unit)) * unit
        rows.append((at, kind, source, offset))
        at += step
    return Extents.of(rows, length)


@st.composite
def disks(draw: st.DrawFn, *, unit: int = SECTOR, holes: bool = False, parent: bool = False) -> object:
    """Draws a disk (`Image`) of random bytes; with `parent`, one layer on top of another.

    Its rows lie in a larger source, in any order and in multiples of `unit` bytes.
    """
    file = MemoryFile("source.raw", 2 * _SECTORS * unit)
    file.write(0, random_bytes(file.size, draw(st.integers(0, 3))))
    size = draw(st.integers(1, _SECTORS)) * unit
    below = None
    if parent:
        base = MemoryFile("base.raw", 2 * _SECTORS * unit)
        base.write(0, random_bytes(base.size, 7))
        below_size = draw(st.integers(1, _SECTORS)) * unit
        below = disk_of(draw(tables((base,), size=below_size, unit=unit, holes=False)), base)
    table = draw(tables((file,), size=size, unit=unit, holes=holes or parent))
    return disk_of(table, file, parent=below)
