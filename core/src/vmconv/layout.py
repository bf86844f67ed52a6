"""What a writer returns: for each output file, the table of its address space; and what a writer is told beforehand."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vmconv.extents import Extents


class Placement(NamedTuple):
    """What a writer is told of where its output goes.

    A payload row can be referenced when its offset in the output is congruent to its offset in the source modulo
    `modulus` bytes, a power of two; 1 means that any place will do. `target` is the name of the file that the user
    named, for formats whose further files are named after it.
    """

    modulus: int = 1
    target: str = "disk"


class OutFile(NamedTuple):
    """One output file: `table` says what each of its bytes is (DATA of a guest's file, of a `Blob`, ... or ZERO).

    `name` is None for the file that the user named, else the file's own name beside it.
    """

    table: Extents
    name: str | None = None


class Backing(NamedTuple):
    """The parent that an output keeps instead of being flattened: as it is written into the image."""

    reference: str
    format: str


class Layout(NamedTuple):
    """All files of one output image; the one that the user named comes last, so that it appears when all is there."""

    files: tuple[OutFile, ...]
    losses: tuple[str, ...] = ()
