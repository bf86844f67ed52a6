"""Headers of the tar archive (USTAR), checked field by field."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from vmconv.plugin import ImageError

if TYPE_CHECKING:
    from vmconv.plugin import File

BLOCK = 512
_AT_ONCE = 4096
_FILES = (b"0", b"\0")
_DIRECTORY = b"5"


class Header(NamedTuple):
    """A file in the archive: `offset` is that of its header, `start` that of its content."""

    name: str
    offset: int
    start: int
    size: int

    @property
    def end(self) -> int:
        """The offset behind the content and its padding."""
        return self.start + -(-self.size // BLOCK) * BLOCK


def headers(file: File) -> Iterator[Header]:
    """Yields the files in an archive that is not compressed."""
    chunk, begin = b"", 0

    def block(at: int) -> bytes:
        nonlocal chunk, begin
        if not begin <= at <= begin + len(chunk) - BLOCK:
            chunk, begin = file.read(at, max(0, min(_AT_ONCE, file.size - at))), at
        return chunk[at - begin : at - begin + BLOCK]

    for header in headers_of(file, block):
        if header.start + header.size > file.size:
            size = f"{header.size} bytes from {header.start:#x}"
            raise refused(file, header.offset, f"{size} reach past the end of the file ({file.size:#x})")
        yield header


def headers_of(file: File, block: Callable[[int], bytes]) -> Iterator[Header]:
    """Yields the files in an archive up to its end: a block of zeros, or the last byte.

    `block(at)` returns 512 bytes, fewer at the end; `at` grows from call to call. Raises `ImageError` if a header is
    damaged.
    """
    at = 0
    while data := block(at):
        if len(data) < BLOCK:
            raise refused(file, at, f"is cut off after {len(data)} bytes")
        if not any(data):
            return
        size = _checked(file, at, data)
        header = Header(_name(file, at, data), at, at + BLOCK, size)
        if data[156:157] != _DIRECTORY:
            yield header
        at = header.end


def refused(file: File, at: int, problem: str) -> ImageError:
    return ImageError(f"{file.name}: tar header at {at:#x}: {problem}")


def _checked(file: File, at: int, block: bytes) -> int:
    """Returns the size in a header; raises `ImageError` if it is damaged, or not that of a file or directory."""
    stated = _octal(block[148:156])
    found = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if stated != found:
        raise refused(file, at, f"checksum is {block[148:156]!r}, and the header's is {found:o}")
    if block[156:157] not in (*_FILES, _DIRECTORY):
        raise refused(file, at, f"type {block[156:157]!r} is neither a file nor a directory")
    size = _octal(block[124:136])
    if size is None:
        raise refused(file, at, f"size {block[124:136]!r} is no number")
    return 0 if block[156:157] == _DIRECTORY else size


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    return int(digits, 8) if re.fullmatch(rb"[0-7]+", digits) else None


def _name(file: File, at: int, block: bytes) -> str:
    name = block[:100].split(b"\0")[0]
    if any(block[345:500]):
        raise refused(file, at, "has a prefix for a long name, which no file of an export has")
    return name.decode("ascii", "replace")
