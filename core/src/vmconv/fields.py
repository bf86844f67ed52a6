"""Bounded reading of structures and tables of images, for readers and checks.

Errors name the file, the field, its offset and its value. `damaged` makes them; `Structure` does so for the fields of a
structure that `construct` parses.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vmconv.errors import ImageError
from vmconv.model.extents import Column, Kind, on_storage
from vmconv.model.sources import File

if TYPE_CHECKING:
    from construct import Construct, Struct


def damaged(
    file: File, what: str, offset: int, problem: str, *, guest: int | None = None, hint: str | None = None
) -> ImageError:
    """Returns the error for a part of a file: its name, its offset, and what is wrong with its value.

    `guest` is the guest address that the part is about, for entries of tables.
    """
    address = "" if guest is None else f" (guest address {guest:#x})"
    return ImageError(f"{file.name}: {what} at {offset:#x}{address}: {problem}", hint=hint)


def read_part(file: File, what: str, offset: int, length: int) -> bytes:
    """Returns bytes of the file; raises `ImageError`, which names them as `what`, if the file ends before they do."""
    if offset + length > file.size:
        raise damaged(file, what, offset, f"{length} bytes reach past the end of the file ({file.size:#x})")
    return file.read(offset, length)


def field_offset(layout: Struct, field: str) -> int:
    """Returns the offset of a field in its structure; raises `KeyError` if the structure has no such field."""
    at = 0
    for part in layout.subcons:
        if part.name == field:
            return at
        at += int(part.sizeof())
    raise KeyError(field)


class Structure(NamedTuple):
    """A structure of fixed length in a file: `layout` is construct's, `name` is what errors call it.

    It reads nothing itself. `parse` returns the values, which the caller checks, field by field, before it uses them:

        head = Structure(file, structs.Header)
        header = head.parse("no toy signature", "magic")
        head.limit("cluster_bits", header.cluster_bits, 9, 21)
    """

    file: File
    layout: Construct
    offset: int = 0
    name: str = "header"

    @property
    def length(self) -> int:
        return _length(self.layout)

    @property
    def is_inside(self) -> bool:
        """True when the file is long enough for all of it."""
        return self.offset + self.length <= self.file.size

    def read(self) -> bytes:
        """Returns its bytes; raises `ImageError` if the file ends before they do."""
        return read_part(self.file, self.name, self.offset, self.length)

    def parse(
        self, refusal: str = "has not the signature of one", signature: str | None = None, *, data: bytes | None = None
    ) -> Any:
        """Returns its fields as attributes; `data` are its bytes, read if not given.

        Raises `ImageError` with the text `refusal` if construct refuses the bytes, mostly for a wrong constant. The
        error names the field `signature`, or else the structure.
        """
        from construct import ConstructError

        data = self.read() if data is None else data
        try:
            return self.layout.parse(data)
        except ConstructError as exc:
            raise (self.damaged(signature, refusal) if signature else self.refused(refusal)) from exc

    def offset_of(self, field: str) -> int:
        """Returns the offset of a field in the file."""
        return self.offset + field_offset(self.layout, field)

    def damaged(self, field: str, problem: str, *, hint: str | None = None) -> ImageError:
        """Returns the error for a field."""
        return damaged(self.file, field, self.offset_of(field), problem, hint=hint)

    def refused(self, problem: str) -> ImageError:
        """Returns the error for the structure as a whole."""
        return damaged(self.file, self.name, self.offset, problem)

    def limit(self, field: str, value: int, least: int, most: int) -> None:
        """Raises `ImageError` for the field unless its value, or what was computed from it, is in `least..most`."""
        if not least <= value <= most:
            raise self.damaged(field, f"{value} is not in {least}..{most}")

    def limit_power(self, field: str, value: int, least: int, most: int) -> None:
        """Raises `ImageError` for the field unless its value is a power of two in `least..most`."""
        self.limit(field, value, least, most)
        if value & (value - 1):
            raise self.damaged(field, f"{value} is not a power of two")


@cache
def _length(layout: Construct) -> int:
    # Layouts are constants of modules, and construct adds up their fields each time.
    return int(layout.sizeof())


def table_slices(file: File, tables: Column, length: int, most: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Yields `(index of the first table, count, bytes)` for tables of `length` bytes at the offsets `tables`.

    The bytes are None for tables that are not allocated (offset 0) or lie in a hole of the file. Contiguous tables are
    read at once, up to `most` bytes (at least one table).
    """
    hole = _in_hole(file, tables, length)
    tables = np.where(hole, 0, tables) if hole.any() else tables
    at_once = max(1, most // length)
    # A run ends where allocation changes, or where the next table is not contiguous.
    there = tables != 0
    runs = _runs(tables, there, length, at_once)
    if not file.is_remote:
        for first, count in runs:
            yield first, count, file.read(int(tables[first]), count * length) if there[first] else None
        return
    from vmconv.system.parallel import in_order

    # A server answers after milliseconds, and reads of storage after less.
    yield from in_order(
        lambda run: (*run, file.read(int(tables[run[0]]), run[1] * length) if there[run[0]] else None), runs
    )


def _runs(tables: Column, there: npt.NDArray[np.bool_], length: int, at_once: int) -> Iterator[tuple[int, int]]:
    """Yields `(index of the first table, count)` of runs that are read, or skipped, at once."""
    apart = there[1:] & (tables[1:] - tables[:-1] != length)
    breaks = np.flatnonzero(apart | (there[1:] != there[:-1])) + 1
    edges = [0, *breaks.tolist(), len(tables)] if len(tables) else []
    for begin, end in itertools.pairwise(edges):
        if not there[begin]:
            yield begin, end - begin
            continue
        for first in range(begin, end, at_once):
            yield first, min(at_once, end - first)


def _in_hole(file: File, tables: Column, length: int) -> npt.NDArray[np.bool_]:
    """Returns a mask of the allocated tables in holes of the file; vectorised, because there may be millions."""
    storage = on_storage(file)
    hole = np.zeros(len(tables), dtype=bool)
    if (storage.kind == Kind.DATA).all():
        return hole
    there = np.flatnonzero(tables != 0)
    row = storage.row_at(tables[there])
    hole[there] = (storage.kind[row] != Kind.DATA) & (tables[there] + length <= storage.end[row])
    return hole
