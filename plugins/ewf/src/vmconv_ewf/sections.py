"""Segment files and the sections in them, checked before anything believes their numbers."""

from __future__ import annotations

import zlib
from typing import NamedTuple

from vmconv.plugin import File, ImageError, Opener, Structure, damaged, read_part
from vmconv_ewf import structs


class Section(NamedTuple):
    """One section: `start` is its descriptor, `body` its content, `end` the next section; offsets in `file`."""

    file: File
    kind: str
    start: int
    end: int

    @property
    def body(self) -> int:
        return self.start + structs.SECTION.size

    @property
    def length(self) -> int:
        """Bytes of the content."""
        return self.end - self.body

    def read(self, length: int, what: str | None = None, at: int = 0) -> bytes:
        """Returns bytes of the content; raises `ImageError` if it is shorter."""
        if at + length > self.length:
            raise self.damaged(f"{what or self.kind} of {length} bytes at {at} reaches past its end ({self.length})")
        return self.file.read(self.body + at, length)

    def damaged(self, problem: str, at: int = 0) -> ImageError:
        return damaged(self.file, f"section {self.kind}", self.start + at, problem)


def segments(first: File, opener: Opener) -> list[list[Section]]:
    """Returns the sections of each segment file; the others are beside the first and have the next names."""
    found = [_sections(first, 1)]
    while found[-1][-1].kind == "next":
        number = len(found) + 1
        file = opener.related(first, segment_name(first, number), "segment")
        found.append(_sections(file, number))
    return found


def segment_name(first: File, number: int) -> str:
    """Returns the name of a segment: E01 to E99, then EAA, EAB to ZZZ, with the case of the first one's suffix."""
    stem, dot, suffix = first.name.rpartition(".")
    if not dot or suffix.lower() != "e01":
        raise ImageError(
            f"{first.name}: more segments follow, and only a name that ends with .E01 tells theirs",
            hint="give the segments their names: x.E01, x.E02, ...",
        )
    if number > structs.MAX_SEGMENTS:
        raise ImageError(f"{first.name}: more than {structs.MAX_SEGMENTS} segments")
    if number < 100:
        return f"{stem}.{suffix[0]}{number:02}"
    high, low = divmod(number - 100, 26 * 26)
    letters = (ord("E") + high, ord("A") + low // 26, ord("A") + low % 26)
    name = "".join(map(chr, letters))
    return f"{stem}.{name if suffix[0].isupper() else name.lower()}"


def _sections(file: File, number: int) -> list[Section]:
    """Returns the sections of a segment file, up to `next` or `done`."""
    _refuse_version_2(file)
    head = Structure(file, structs.FileHeader, name="file header")
    header = head.parse("no signature of an E01", "signature")
    if header.segment != number:
        problem = f"segment {header.segment} where segment {number} is expected"
        raise head.damaged("segment", problem, hint="name the first segment, x.E01" if number == 1 else None)
    found: list[Section] = []
    at = structs.FILE_HEADER_LENGTH
    while len(found) < structs.MAX_SECTIONS:
        section = _section(file, at)
        found.append(section)
        if section.kind in ("next", "done"):
            return found
        at = section.end
    raise damaged(file, "section", at, f"more than {structs.MAX_SECTIONS} sections")


def _refuse_version_2(file: File) -> None:
    if file.size >= 8 and file.read(0, 8) == structs.SIGNATURE_2:
        problem = "an Ex01 (EWF version 2), which is not supported"
        raise damaged(file, "signature", 0, problem, hint="ewfexport -f encase6")


def _section(file: File, at: int) -> Section:
    data = read_part(file, "section descriptor", at, structs.SECTION.size)
    kind, following, _, checksum = structs.SECTION.unpack(data)
    if zlib.adler32(data[:-4]) != checksum:
        raise damaged(file, "section descriptor", at, "its checksum does not match")
    name = kind.rstrip(b"\0").decode("latin-1")
    if name in ("next", "done"):
        return Section(file, name, at, at + structs.SECTION.size)
    if not at + structs.SECTION.size <= following <= file.size:
        raise damaged(file, f"section {name}", at, f"the next section at {following:#x} is not behind it in the file")
    return Section(file, name, at, following)
