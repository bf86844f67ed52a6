"""The digests beside the pieces, compared with the bytes of the pieces."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Container, Iterator
from typing import TYPE_CHECKING, NamedTuple

from vmconv.plugin import CheckReport, Findings
from vmconv_xva.archive import Entry, entries, first_of
from vmconv_xva.tar import Header, headers

if TYPE_CHECKING:
    from vmconv.plugin import File, Progress

SAMPLE = 64
"""Pieces of which a sample consists."""


class Checked(NamedTuple):
    """A piece with its bytes, and what is wrong with its digest; `problem` is None if it has none."""

    piece: Entry
    data: bytes
    problem: str | None


def compared(
    found: Iterator[Entry], read: Callable[[Header], bytes], chosen: Container[int] | None = None
) -> Iterator[Checked]:
    """Yields the pieces with those numbers, counted over all disks, by default all; `read` returns their bytes."""
    pending: tuple[Entry, bytes] | None = None
    count = -1
    for entry in found:
        if entry.kind is None:
            if pending:
                yield Checked(*pending, None)
            count += 1
            pending = (entry, read(entry.header)) if chosen is None or count in chosen else None
        elif pending:
            yield Checked(*pending, _problem(*pending, entry.header.name, entry.kind, read(entry.header)))
            pending = None
    if pending:
        yield Checked(*pending, None)


def _problem(piece: Entry, data: bytes, name: str, kind: str, stated: bytes) -> str:
    """Returns how a digest differs from that of the bytes; empty if it does not."""
    title, digest = _digest(kind, data)
    if not re.fullmatch(rb"[0-9a-fA-F]{%d}" % len(digest), stated):
        return f"{name} is {stated[:48]!r}, where {title} has {len(digest)} hexadecimal digits"
    if stated.decode().lower() == digest:
        return ""
    return f"{title} of {piece.header.name} at {piece.header.start:#x} is {digest}, {name} says {stated.decode()}"


def _digest(kind: str, data: bytes) -> tuple[str, str]:
    """Returns the digest that a suffix stands for: its name, and lower-case hexadecimal."""
    if kind == "checksum":
        return "SHA-1", hashlib.sha1(data, usedforsecurity=False).hexdigest()
    from xxhash import xxh64

    return "XXH64", xxh64(data).hexdigest()


class Tally:
    """Counts pieces, and those with a right digest. Old exports have none; if some pieces have one, all must."""

    def __init__(self) -> None:
        self.count = 0
        self.right = 0
        self._missing = 0
        self._first: Entry | None = None

    def add(self, checked: Checked) -> None:
        self.count += 1
        self.right += checked.problem == ""
        if checked.problem is None:
            self._missing += 1
            self._first = self._first or checked.piece

    def problem(self) -> str:
        """Returns which digests are missing; empty if none is, or all are."""
        if not self._first or self._missing == self.count:
            return ""
        more = f", and {self._missing - 1} more" if self._missing > 1 else ""
        return f"{self._first.header.name} at {self._first.header.start:#x} has no digest{more}"


def check(file: File, progress: Progress | None, *, sample: bool) -> CheckReport:
    """Returns the report on all pieces of an archive that is not compressed, or on some of them.

    Raises `ImageError` if a header is damaged.
    """
    chosen = _sample(file) if sample else None
    found = compared(_entries(file), lambda header: file.read(header.start, header.size), chosen)
    return report(found, lambda header: progress(header.start + header.size, file.size) if progress else None)


def report(found: Iterator[Checked], advance: Callable[[Header], None]) -> CheckReport:
    """Returns the report on checked pieces; `advance` is called with the header of each."""
    findings, tally = Findings(), Tally()
    end = 0
    for checked in found:
        tally.add(checked)
        end = checked.piece.header.end
        if checked.problem:
            findings.corrupt(checked.problem)
        advance(checked.piece.header)
    if problem := tally.problem():
        findings.corrupt(problem)
    return findings.report(allocated=tally.right, total=tally.count, end=end)


def _entries(file: File) -> Iterator[Entry]:
    found = headers(file)
    first_of(file, found)
    return entries(file, found)


def _sample(file: File) -> frozenset[int]:
    """Returns the numbers of random pieces: each run compares others."""
    from random import sample

    count = sum(entry.kind is None for entry in _entries(file))
    return frozenset(sample(range(count), min(SAMPLE, count)))
