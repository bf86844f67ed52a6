"""Blocks of memory that are compressed: records in a row that make 1 MiB.

    page, compressed    size (4 bytes, below 4096), then that many bytes of XPRESS (plain LZ77, [MS-XCA] 2.4)
    page, as it is      4096, then 4096 bytes
    piece, compressed   0xFFFFFFFC, its size when decompressed, size (4 bytes each), then that many bytes
    page of a pattern   0xFFFFFFFE, 8 bytes that fill it
    pages of a pattern  0xFFFFFFFD, 8 bytes that fill them, their number (4 bytes)
    end                 0xFFFFFFFF

Numbers are little endian. Microsoft does not publish the records; see decision 0084 for where they are known from. So
a block is refused unless its records make exactly 1 MiB, and each page all of its bytes.
"""

from __future__ import annotations

import struct
from typing import Final

PAGE: Final = 4096
BLOCK: Final = 1 << 20

_PIECE, _PAGES, _PAGE, _END = 0xFFFFFFFC, 0xFFFFFFFD, 0xFFFFFFFE, 0xFFFFFFFF
_NUMBER = struct.Struct("<I")
_SHORT = struct.Struct("<H")


class PackedError(Exception):
    """A block that cannot be decompressed: what is wrong, and at which byte of the block."""


def unpack(data: bytes) -> bytes:
    """Returns the 1 MiB of a block; raises `PackedError` if the records do not make it."""
    parts: list[bytes] = []
    size = at = 0
    while size < BLOCK:
        try:
            part, end = _record(data, at, BLOCK - size)
        except (struct.error, IndexError) as exc:
            raise PackedError(f"ends at {len(data)} in a record, after {size} of {BLOCK} bytes of memory") from exc
        if not part:
            raise PackedError(f"record at {at} ends it after {size} of {BLOCK} bytes of memory")
        parts.append(part)
        size, at = size + len(part), end
    if data[at:] not in (b"", _NUMBER.pack(_END)):
        raise PackedError(f"has {len(data) - at} bytes behind its last record, at {at}")
    return b"".join(parts)


def _record(data: bytes, at: int, room: int) -> tuple[bytes, int]:
    """Returns the memory that the record at an offset makes, at most `room` bytes, and the end of the record.

    No memory stands for the end of the block.
    """
    (tag,) = _NUMBER.unpack_from(data, at)
    if tag == _END:
        return b"", at + 4
    if tag in (_PAGE, _PAGES):
        count, end = (1, at + 12) if tag == _PAGE else (_NUMBER.unpack_from(data, at + 12)[0], at + 16)
        if not 0 < count * PAGE <= room:
            raise PackedError(f"record at {at} is of {count} pages, there is room for {room // PAGE}")
        return _taken(data, at + 4, 8) * (count * PAGE // 8), end
    size, length, begin = PAGE, tag, at + 4
    if tag == _PIECE:
        size, length, begin = *struct.unpack_from("<II", data, at + 4), at + 12
    if not 0 < size <= min(PAGE, room) or not 0 < length <= size:
        raise PackedError(f"record at {at} makes {size} bytes of {length}, there is room for {min(PAGE, room)}")
    packed = _taken(data, begin, length)
    if length == size:
        return packed, begin + length
    try:
        return xpress(packed, size), begin + length
    except (PackedError, struct.error, IndexError) as exc:
        raise PackedError(f"record at {at} is no page that XPRESS compressed") from exc


def _taken(data: bytes, at: int, length: int) -> bytes:
    found = data[at : at + length]
    if len(found) < length:
        raise IndexError
    return found


def xpress(data: bytes, size: int) -> bytes:
    """Returns the `size` bytes that were compressed by plain LZ77 ([MS-XCA] 2.4).

    Raises `PackedError`, `IndexError` or `struct.error` if there are other than these.
    """
    out = bytearray()
    # The length of a match may be in a half of a byte; the next such length is in the other half.
    at, half = 0, -1
    flags = left = 0
    while len(out) < size:
        if not left:
            (flags,), left, at = _NUMBER.unpack_from(data, at), 32, at + 4
        # Each leading 0 is a byte as it is.
        plain = min(left - flags.bit_length(), size - len(out))
        if plain:
            out += _taken(data, at, plain)
            at, left = at + plain, left - plain
            continue
        left -= 1
        flags &= (1 << left) - 1
        (match,), at = _SHORT.unpack_from(data, at), at + 2
        length, distance = match & 7, (match >> 3) + 1
        if length == 7:
            length, at, half = _length(data, at, half)
        length += 3
        if distance > len(out) or len(out) + length > size:
            raise PackedError
        _repeat(out, distance, length)
    return bytes(out)


def _length(data: bytes, at: int, half: int) -> tuple[int, int, int]:
    """Returns the length of a match that 3 bits cannot hold, and the places of the next byte and of a free half."""
    if half < 0:
        length, half, at = data[at] & 15, at, at + 1
    else:
        length, half = data[half] >> 4, -1
    if length < 15:
        return length + 7, at, half
    length, at = data[at], at + 1
    if length < 255:
        return length + 15 + 7, at, half
    (length,), at = _SHORT.unpack_from(data, at), at + 2
    if not length:
        (length,), at = _NUMBER.unpack_from(data, at), at + 4
    if length < 15 + 7:
        raise PackedError
    return length, at, half


def _repeat(out: bytearray, distance: int, length: int) -> None:
    """Appends `length` bytes from `distance` before the end, which may reach into what is appended."""
    begin = len(out) - distance
    if distance >= length:
        out += out[begin : begin + length]
    else:
        out += (out[begin:] * (length // distance + 1))[:length]
