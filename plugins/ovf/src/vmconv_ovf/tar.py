"""Reads the headers of a tar archive: USTAR (POSIX.1-1988), pax (POSIX.1-2001) and GNU names and sizes.

    +--------+---------------+--------+------ ... -----+--------+--------+
    | header | content       | header | content        | zeros  | zeros  |
    +--------+---------------+--------+------ ... -----+--------+--------+
    512      multiples of 512                           end of the archive

Only regular files are taken. A package comes from strangers, so anything else than a file of it is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from vmconv.plugin import ImageError, VmconvError

if TYPE_CHECKING:
    from vmconv.plugin import File, Member

BLOCK = 512
MAX_MEMBERS = 4096
MAX_EXTENDED = 65536
"""Bytes of a pax header or a long name."""

_CONTROL = re.compile(r"[\0-\x1f\x7f]")
_REGULAR = (b"0", b"\0", b"7")
_DIRECTORY, _PAX, _GLOBAL, _LONG_NAME = b"5", b"x", b"g", b"L"
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"K": "a link with a long name",
    b"S": "a sparse file",
}


class Header(NamedTuple):
    """A regular member or a directory: `offset` is that of its header, `start` that of its content."""

    name: str
    offset: int
    start: int
    size: int
    is_directory: bool


def members(file: File) -> tuple[Member, ...]:
    """Returns the files in an archive, as ranges of it.

    Raises `ImageError` with the offset for damaged headers, links, devices, names outside the package, names that occur
    twice, and sizes past the end of the file.
    """
    from vmconv.plugin import Extents, Kind, Member

    found: dict[str, Member] = {}
    for header in headers(file):
        if header.is_directory:
            continue
        if header.name in found:
            raise _refused(file, header.offset, f"two members are called {header.name!r}")
        rows = [(0, Kind.DATA, file, header.start)] if header.size else []
        found[header.name] = Member(header.name, Extents.of(rows, header.size))
    return tuple(found.values())


def first_name(file: File) -> str:
    """Returns the name of the first file in an archive; an empty string if it is no archive. Never raises."""
    try:
        return next((header.name for header in headers(file) if not header.is_directory), "")
    except VmconvError:
        return ""


def headers(file: File) -> Iterator[Header]:
    """Yields the members of an archive up to its end, which is a block of zeros or the end of the file."""
    at, count = 0, 0
    extended: dict[str, str] = {}
    while at < file.size:
        block = _block(file, at)
        if not any(block):
            return
        count += 1
        if count > MAX_MEMBERS:
            raise _refused(file, at, f"has more than {MAX_MEMBERS} members")
        _check(file, at, block)
        kind, size = block[156:157], _size(file, at, block, extended)
        start = at + BLOCK
        if start + size > file.size:
            raise _refused(
                file, at, f"member of {size} bytes from {start:#x} is past the end of the file ({file.size:#x})"
            )
        if kind in (_PAX, _GLOBAL, _LONG_NAME):
            extended |= _extension(file, at, kind, start, size)
        else:
            name = extended.get("path") or _name(file, at, block)
            yield _header(file, at, kind, name, size)
            extended = {}
        at = start + -(-size // BLOCK) * BLOCK


def _refused(file: File, at: int, problem: str) -> ImageError:
    return ImageError(f"{file.name}: tar header at {at:#x}: {problem}")


def _block(file: File, at: int) -> bytes:
    if at + BLOCK > file.size:
        raise _refused(file, at, f"is cut off at {file.size:#x}")
    return file.read(at, BLOCK)


def _check(file: File, at: int, block: bytes) -> None:
    """Raises `ImageError` if the checksum is wrong: the sum of the header's bytes with its own field as blanks."""
    stated = _octal(block[148:156])
    found = sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
    if stated != found:
        raise _refused(file, at, f"checksum is {block[148:156]!r}, and the header's is {found:o}")


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    return int(digits, 8) if re.fullmatch(rb"[0-7]+", digits) else None


def _size(file: File, at: int, block: bytes, extended: dict[str, str]) -> int:
    """Returns the size of a member: from its pax header, octal, or GNU's base-256."""
    field = block[124:136]
    if "size" in extended:
        stated = extended["size"]
        if not re.fullmatch(r"\d{1,19}", stated):
            raise _refused(file, at, f"pax size {stated!r} is no number")
        return int(stated)
    size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field)
    if size is None:
        raise _refused(file, at, f"size {field!r} is no number")
    return size


def _name(file: File, at: int, block: bytes) -> str:
    """Returns the name in a header; POSIX headers have a prefix for long ones."""
    name, prefix = block[:100].split(b"\0")[0], block[345:500].split(b"\0")[0]
    if prefix and block[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return _text(file, at, name)


def _text(file: File, at: int, name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise _refused(file, at, f"name {name!r} is not UTF-8") from None


def _extension(file: File, at: int, kind: bytes, start: int, size: int) -> dict[str, str]:
    """Returns what a pax header or a long name says about the next member."""
    if size > MAX_EXTENDED:
        raise _refused(file, at, f"extended header has {size} bytes, the limit is {MAX_EXTENDED}")
    data = file.read(start, size)
    if kind == _LONG_NAME:
        return {"path": _text(file, at, data.split(b"\0")[0])}
    found = dict(_records(file, at, data))
    if any(key.startswith("GNU.sparse.") for key in found):
        raise _refused(file, at, "member is a sparse file, which packages cannot contain")
    told = {key: value for key, value in found.items() if key in ("path", "size")}
    if kind == _GLOBAL and told:
        raise _refused(file, at, f"global pax header has {', '.join(told)} for all members")
    return told


def _records(file: File, at: int, data: bytes) -> Iterator[tuple[str, str]]:
    """Yields the `length key=value` records of a pax header."""
    place = 0
    while place < len(data):
        found = re.compile(rb"(\d{1,6}) ([^=]{1,256})=").match(data, place)
        end = place + int(found[1]) if found else 0
        if found is None or not found.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise _refused(file, at, f"pax record at {place:#x} of the header is damaged")
        key = found[2].decode("ascii", "replace")
        # Other keys may have values that are not UTF-8.
        if key in ("path", "size") or key.startswith("GNU.sparse."):
            yield key, _text(file, at, data[found.end() : end - 1])
        place = end


def _header(file: File, at: int, kind: bytes, name: str, size: int) -> Header:
    if kind not in (*_REGULAR, _DIRECTORY):
        raise _refused(file, at, f"member {name!r} is {_KINDS.get(kind, f'of type {kind!r}')}")
    directory = kind == _DIRECTORY
    plain = re.sub(r"^(\./)+", "", name.rstrip("/") + "/" if directory else name)
    plain = plain.rstrip("/") if directory else plain
    if not (plain or directory) or plain.startswith("/") or ".." in plain.split("/") or _CONTROL.search(plain):
        raise _refused(file, at, f"member {name!r} is not a file name inside the package")
    return Header(plain, at, at + BLOCK, 0 if directory else size, directory)
