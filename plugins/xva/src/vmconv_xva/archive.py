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
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vmconv.plugin import Columns, Extents, ImageError, Kind, Member

if TYPE_CHECKING:
    from vmconv.plugin import File

BLOCK = 512
PIECE = 1 << 20
CONFIG = "ova.xml"
MAX_DIGEST = 128
_AT_ONCE = 4096
_NAME = re.compile(r"(?:\./)?(Ref:\d{1,10})/(\d{8,10})(\.checksum|\.xxhash)?")
_FILES = (b"0", b"\0")
_DIRECTORY = b"5"


class Header(NamedTuple):
    """A file in the archive: `offset` is that of its header, `start` that of its content."""

    name: str
    offset: int
    start: int
    size: int


class Pieces:
    """The pieces of one disk, in the order of the archive."""

    def __init__(self) -> None:
        self.numbers, self.starts, self.sizes = array("q"), array("q"), array("q")

    def add(self, number: int, header: Header) -> None:
        self.numbers.append(number)
        self.starts.append(header.start)
        self.sizes.append(header.size)


def config_of(file: File) -> bytes:
    """Returns the records of the machine; raises `ImageError` if they are not the first file."""
    from vmconv.machine import MAX_CONFIG

    first = next(headers(file), None)
    if first is None or first.name.removeprefix("./") != CONFIG:
        raise ImageError(f"{file.name}: tar header at 0x0: an export begins with {CONFIG}")
    if first.size > MAX_CONFIG:
        raise ImageError(f"{file.name}: {CONFIG} at {first.start:#x} has {first.size} bytes, the limit is {MAX_CONFIG}")
    return file.read(first.start, first.size)


def members(file: File) -> tuple[Member, ...]:
    """Returns `ova.xml` and the disks, as ranges of the archive; each is named by the reference of its VDI.

    Reads the headers of all files. Raises `ImageError` if one is damaged, or a piece is missing.
    """
    from vmconv_xva.records import sizes

    config = config_of(file)
    disks, complete, first = _pieces(file)
    wanted = sizes(file, config)
    found = [Member(CONFIG, Extents.of([(0, Kind.DATA, file, first.start)] if first.size else [], first.size))]
    for name, pieces in disks.items():
        if name in wanted:
            found.append(Member(name, _table(file, name, pieces, wanted[name], complete=complete)))
    return tuple(found)


def _pieces(file: File) -> tuple[dict[str, Pieces], bool, Header]:
    """Returns the pieces of each disk, whether the archive has its end, and the header of `ova.xml`."""
    disks: dict[str, Pieces] = {}
    found = headers(file)
    first = next(found)
    end = first.start + _padded(first.size)
    for header in found:
        end = header.start + _padded(header.size)
        match = _NAME.fullmatch(header.name)
        if match is None:
            raise _refused(file, header.offset, f"{header.name[:60]!r} is no piece of a disk, such as Ref:12/00000000")
        if match[3]:
            if header.size > MAX_DIGEST:
                raise _refused(file, header.offset, f"digest has {header.size} bytes, the limit is {MAX_DIGEST}")
            continue
        pieces, number = disks.setdefault(match[1], Pieces()), int(match[2])
        if number <= (pieces.numbers[-1] if pieces.numbers else -1):
            raise _refused(file, header.offset, f"piece {number} of {match[1]} comes behind {pieces.numbers[-1]}")
        if header.size > PIECE:
            raise _refused(file, header.offset, f"piece has {header.size} bytes, the limit is {PIECE}")
        pieces.add(number, header)
    return disks, end + BLOCK <= file.size, first


def _table(file: File, name: str, pieces: Pieces, size: int, *, complete: bool) -> Extents:
    """Returns the table of a disk of `size` bytes; raises `ImageError` if its pieces do not make one."""
    number, start, length = (
        np.frombuffer(each, dtype=np.int64) for each in (pieces.numbers, pieces.starts, pieces.sizes)
    )
    if number[0]:
        raise _refused(file, int(start[0]) - BLOCK, f"{name} begins with piece {number[0]}")
    skipped = np.diff(number, prepend=-1) - 1
    address = np.cumsum(length) - length + PIECE * np.cumsum(skipped)
    end = address + length
    wrong = (end > size) | ((length != 0) & (length != PIECE) & (end != size))
    if wrong.any():
        at = int(np.argmax(wrong))
        raise _refused(
            file,
            int(start[at]) - BLOCK,
            f"piece {number[at]} of {name} has {length[at]} bytes at {int(address[at]):#x} of a disk of {size:#x}",
        )
    if int(end[-1]) < size and not complete:
        raise ImageError(
            f"{file.name}: {name} ends at {int(end[-1]):#x} of {size:#x}, and the archive has no end",
            hint="the archive is not complete: was the export stopped, or its copy cut off?",
        )
    there = length != 0
    count = int(there.sum())
    rows = Columns(
        address[there], np.full(count, Kind.DATA, dtype=np.uint8), np.zeros(count, dtype=np.int32), start[there]
    )
    return Extents.placed(size, rows, length[there], [file])


def headers(file: File) -> Iterator[Header]:
    """Yields the files in an archive up to its end, which is a block of zeros or the end of the file."""
    at, chunk, begin = 0, b"", 0
    while at < file.size:
        if not begin <= at <= begin + len(chunk) - BLOCK:
            chunk, begin = file.read(at, min(_AT_ONCE, file.size - at)), at
        block = chunk[at - begin : at - begin + BLOCK]
        if len(block) < BLOCK:
            raise _refused(file, at, f"is cut off after {len(block)} bytes")
        if not any(block):
            return
        size = _checked(file, at, block)
        start = at + BLOCK
        if start + size > file.size:
            raise _refused(file, at, f"{size} bytes from {start:#x} reach past the end of the file ({file.size:#x})")
        if block[156:157] != _DIRECTORY:
            yield Header(_name(file, at, block), at, start, size)
        at = start + _padded(size)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _checked(file: File, at: int, block: bytes) -> int:
    """Returns the size in a header; raises `ImageError` if it is damaged, or not that of a file or directory."""
    stated = _octal(block[148:156])
    found = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if stated != found:
        raise _refused(file, at, f"checksum is {block[148:156]!r}, and the header's is {found:o}")
    if block[156:157] not in (*_FILES, _DIRECTORY):
        raise _refused(file, at, f"type {block[156:157]!r} is neither a file nor a directory")
    size = _octal(block[124:136])
    if size is None:
        raise _refused(file, at, f"size {block[124:136]!r} is no number")
    return 0 if block[156:157] == _DIRECTORY else size


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    return int(digits, 8) if re.fullmatch(rb"[0-7]+", digits) else None


def _name(file: File, at: int, block: bytes) -> str:
    name = block[:100].split(b"\0")[0]
    if any(block[345:500]):
        raise _refused(file, at, "has a prefix for a long name, which no file of an export has")
    return name.decode("ascii", "replace")


def _refused(file: File, at: int, problem: str) -> ImageError:
    return ImageError(f"{file.name}: tar header at {at:#x}: {problem}")
