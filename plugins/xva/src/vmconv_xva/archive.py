"""The archive: USTAR with records of the machine, then the pieces of its disks.

    +--------+---------+--------+-------------+--------+------------+--------+-------------+- -
    | header | ova.xml | header | piece 0 of  | header | digest of  | header | piece 1 of  |
    |        |         |        | Ref:12      |        | piece 0    |        | Ref:12      |
    +--------+---------+--------+-------------+--------+------------+--------+-------------+- -
    0        512

A piece has 1 MiB, the last one of a disk what is left. A number that is left out stands for 1 MiB of zeros. A piece
without bytes, sent to keep a slow connection open, has a number and stands for nothing. Exporters always write the
first and the last piece (xapi, `stream_vdi.ml`).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vmconv.plugin import Columns, Extents, ImageError, Kind, Member
from vmconv_xva.tar import BLOCK, Header, headers, refused

if TYPE_CHECKING:
    from vmconv.plugin import File

PIECE = 1 << 20
CONFIG = "ova.xml"
MAX_DIGEST = 128
_NAME = re.compile(r"(?:\./)?(Ref:\d{1,10})/(\d{8,10})(?:\.(checksum|xxhash))?")


class Entry(NamedTuple):
    """A piece of a disk, or the digest of the piece before it, whose `kind` is the suffix of its name."""

    disk: str
    number: int
    kind: str | None
    header: Header


class Disk:
    """The pieces of one disk, in the order of the archive."""

    def __init__(self, file: File, name: str, size: int) -> None:
        self._file, self._name, self._size = file, name, size
        self._number = -1
        self.end = 0
        """The guest address behind the last piece."""

    def place(self, piece: Entry) -> int:
        """Returns the guest address of the next piece; raises `ImageError` if it cannot follow the last one."""
        at, number, size = piece.header.offset, piece.number, piece.header.size
        if number <= self._number:
            raise refused(self._file, at, f"piece {number} of {self._name} comes behind {self._number}")
        if number and self._number < 0:
            raise refused(self._file, at, f"{self._name} begins with piece {number}")
        address = self.end + PIECE * (number - self._number - 1)
        end = address + size
        if end > self._size or (size not in (0, PIECE) and end != self._size):
            where = f"at {address:#x} of a disk of {self._size:#x}"
            raise refused(self._file, at, f"piece {number} of {self._name} has {size} bytes {where}")
        self._number, self.end = number, end
        return address

    def refuse_cut(self) -> None:
        """Raises `ImageError` if the last piece is missing. To be called if the archive has no end."""
        if self.end < self._size:
            raise ImageError(
                f"{self._file.name}: {self._name} ends at {self.end:#x} of {self._size:#x}, and the archive has no end",
                hint="the archive is not complete: was the export stopped, or its copy cut off?",
            )


class Rows:
    """Payload of one disk: guest address, offset in its source, bytes."""

    def __init__(self) -> None:
        self._columns = array("q"), array("q"), array("q")

    def add(self, *row: int) -> None:
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)

    def table(self, source: File, size: int) -> Extents:
        address, offset, length = (np.frombuffer(column, dtype=np.int64) for column in self._columns)
        kind, index = np.full(len(address), Kind.DATA, dtype=np.uint8), np.zeros(len(address), dtype=np.int32)
        return Extents.placed(size, Columns(address, kind, index, offset), length, [source])


def config_of(file: File) -> bytes:
    """Returns the records of the machine; raises `ImageError` if they are not the first file."""
    first = first_of(file, headers(file))
    return file.read(first.start, first.size)


def first_of(file: File, found: Iterator[Header]) -> Header:
    """Returns the header of `ova.xml`; raises `ImageError` if it is not the first file, or too large."""
    from vmconv.machine import MAX_CONFIG

    first = next(found, None)
    if first is None or first.name.removeprefix("./") != CONFIG:
        raise ImageError(f"{file.name}: tar header at 0x0: an export begins with {CONFIG}")
    if first.size > MAX_CONFIG:
        raise ImageError(f"{file.name}: {CONFIG} at {first.start:#x} has {first.size} bytes, the limit is {MAX_CONFIG}")
    return first


def entries(file: File, found: Iterable[Header]) -> Iterator[Entry]:
    """Yields the pieces and digests behind `ova.xml`; raises `ImageError` for anything else."""
    before: Entry | None = None
    for header in found:
        match = _NAME.fullmatch(header.name)
        if match is None:
            raise refused(file, header.offset, f"{header.name[:60]!r} is no piece of a disk, such as Ref:12/00000000")
        entry = Entry(match[1], int(match[2]), match[3], header)
        limit, what = (MAX_DIGEST, "digest") if entry.kind else (PIECE, "piece")
        if header.size > limit:
            raise refused(file, header.offset, f"{what} has {header.size} bytes, the limit is {limit}")
        if entry.kind and (before is None or before[:3] != (entry.disk, entry.number, None)):
            raise refused(file, header.offset, f"{header.name} does not follow the piece that it is the digest of")
        before = entry
        yield entry


def members(file: File) -> tuple[Member, ...]:
    """Returns `ova.xml` and the disks, as ranges of the archive; each is named by the reference of its VDI.

    Reads the headers of all files. Raises `ImageError` if one is damaged, or a piece is missing.
    """
    from vmconv_xva.records import sizes

    found = headers(file)
    first = first_of(file, found)
    wanted = sizes(file, file.read(first.start, first.size))
    disks: dict[str, tuple[Disk, Rows]] = {}
    end = first.end
    for entry in entries(file, found):
        end = entry.header.end
        if entry.kind is None and entry.disk in wanted:
            new = disks.get(entry.disk) or (Disk(file, entry.disk, wanted[entry.disk]), Rows())
            disk, rows = disks.setdefault(entry.disk, new)
            address = disk.place(entry)
            if entry.header.size:
                rows.add(address, entry.header.start, entry.header.size)
    if end + BLOCK > file.size:
        for disk, _ in disks.values():
            disk.refuse_cut()
    config = Extents.of([(0, Kind.DATA, file, first.start)] if first.size else [], first.size)
    tables = (Member(name, rows.table(file, wanted[name])) for name, (_, rows) in disks.items())
    return (Member(CONFIG, config), *tables)
