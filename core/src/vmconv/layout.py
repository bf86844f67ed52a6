"""What a writer returns: for each output file, the table of its address space; and what a writer is told beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmconv.extents import Extents


@dataclass(frozen=True)
class Placement:
    """How free a writer is to place payload.

    A payload row can be referenced when its offset in the output is congruent to its offset in the source modulo
    `modulus` bytes, a power of two; 1 means that any place will do.
    """

    modulus: int = 1


@dataclass(frozen=True)
class OutFile:
    """One output file: `table` says what each of its bytes is (DATA of a guest's file, of a `Blob`, ... or ZERO).

    `name` is None for the file that the user named, else the file's own name beside it.
    """

    table: Extents
    name: str | None = None


@dataclass(frozen=True)
class Backing:
    """The parent that an output keeps instead of being flattened: as it is written into the image."""

    reference: str
    format: str


@dataclass(frozen=True)
class Layout:
    """All files of one output image; the one that the user named comes last, so that it appears when all is there."""

    files: tuple[OutFile, ...]
    losses: tuple[str, ...] = ()
