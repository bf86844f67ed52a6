"""A file that is read from front to back, in pieces, with bounds and errors that name the field."""

from __future__ import annotations

from vmconv.plugin import File, ImageError, damaged

_PIECE = 256 << 10

_SHOWN = 24


class Stream:
    """Reads big-endian numbers and names; `at` is the offset of the next byte."""

    def __init__(self, file: File, at: int = 0) -> None:
        self.file = file
        self.at = at
        self._begin, self._piece = 0, b""

    def take(self, length: int, what: str) -> bytes:
        """Returns the next bytes. Raises `ImageError` if the file ends before they do."""
        start = self.at - self._begin
        if not 0 <= start <= len(self._piece) - length:
            if self.at + length > self.file.size:
                raise self.error(what, f"{length} bytes reach past the end of the file ({self.file.size:#x})")
            self._begin = self.at
            self._piece = self.file.read(self.at, max(length, min(_PIECE, self.file.size - self.at)))
            start = 0
        self.at += length
        return self._piece[start : start + length]

    def skip(self, length: int, what: str) -> int:
        """Skips bytes that the file must have; returns their offset."""
        place = self.at
        if place + length > self.file.size:
            raise self.error(what, f"{length} bytes reach past the end of the file ({self.file.size:#x})")
        self.at += length
        return place

    def number(self, width: int, what: str) -> int:
        return int.from_bytes(self.take(width, what), "big")

    def text(self, what: str) -> str:
        """Returns a name behind a byte with its length. Raises `ImageError` if it is no printable ASCII."""
        found = self.take(self.number(1, what), what)
        name = found.decode("ascii", "replace")
        if not (name.isascii() and name.isprintable()):
            raise self.error(what, f"{found[:_SHOWN]!r} is no name of QEMU's", back=len(found))
        return name

    def error(self, what: str, problem: str, *, back: int = 0) -> ImageError:
        """Returns the error for a field that began `back` bytes before."""
        return damaged(self.file, what, self.at - back, problem)
