"""Apple Data Compression: literals, and copies of earlier bytes, of which the first bits tell the kind.

1nnnnnnn                     n + 1 literal bytes follow
01nnnnnn dddddddd dddddddd   copy n + 4 bytes from d + 1 bytes before
00nnnndd dddddddd            copy n + 3 bytes from d + 1 bytes before
"""

from __future__ import annotations


class AdcError(Exception):
    """The bytes are no such stream."""


def decompress(data: bytes, limit: int) -> bytes:
    """Returns the decompressed bytes. Raises `AdcError` for more than `limit` bytes, and for other damage."""
    found = bytearray()
    at, end = 0, len(data)
    while at < end:
        first = data[at]
        if first & 0x80:
            length = (first & 0x7F) + 1
            piece = data[at + 1 : at + 1 + length]
            if len(piece) < length:
                raise AdcError("ends inside of a literal")
            found += piece
            at += 1 + length
        else:
            size = 3 if first & 0x40 else 2
            if at + size > end:
                raise AdcError("ends inside of a copy")
            if first & 0x40:
                length, distance = (first & 0x3F) + 4, int.from_bytes(data[at + 1 : at + 3]) + 1
            else:
                length, distance = (first >> 2) + 3, ((first & 3) << 8 | data[at + 1]) + 1
            if distance > len(found):
                raise AdcError(f"copies from {distance} bytes before, there are {len(found)}")
            _copy(found, distance, length)
            at += size
        if len(found) > limit:
            raise AdcError(f"more than {limit} bytes")
    return bytes(found)


def _copy(found: bytearray, distance: int, length: int) -> None:
    """Appends `length` bytes from `distance` bytes before the end; a copy may overlap what it makes."""
    begin = len(found) - distance
    piece = found[begin : begin + length]
    found += (piece * (-(-length // len(piece))))[:length]
