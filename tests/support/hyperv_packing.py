"""Memory as Hyper-V compresses it: XPRESS by the rules of [MS-XCA] 2.3, in records as others found them."""

from __future__ import annotations

import struct

PAGE, BLOCK = 4096, 1 << 20
END = struct.pack("<I", 0xFFFFFFFF)


def xpress(data: bytes) -> bytes:
    """Returns the bytes in plain LZ77: each match is the nearest one of at least 3 bytes."""
    out, flags, count, place, half = bytearray(4), 0, 0, 0, -1
    seen: dict[bytes, int] = {}
    at = 0
    while at < len(data):
        key = data[at : at + 3]
        before = seen.get(key, -1) if len(key) == 3 else -1
        if before < 0 or at - before > 8192:
            length, bit = 1, 0
            out.append(data[at])
        else:
            length, bit = 3, 1
            while at + length < len(data) and data[before + length] == data[at + length]:
                length += 1
            half = _put_match(out, at - before, length, half)
        for step in range(at, at + length):
            seen[data[step : step + 3]] = step
        at += length
        flags, count = flags << 1 | bit, count + 1
        if count == 32:
            struct.pack_into("<I", out, place, flags)
            flags, count, place = 0, 0, len(out)
            out += bytes(4)
    struct.pack_into("<I", out, place, (flags << (32 - count) | (1 << (32 - count)) - 1) & 0xFFFFFFFF)
    return bytes(out)


def _put_match(out: bytearray, distance: int, length: int, half: int) -> int:
    """Appends a match; returns where half of a byte is free."""
    rest = length - 3
    out += struct.pack("<H", (distance - 1) << 3 | min(rest, 7))
    if rest < 7:
        return half
    rest -= 7
    if half < 0:
        half = len(out)
        out.append(min(rest, 15))
    else:
        out[half] |= min(rest, 15) << 4
        half = -1
    if rest >= 15:
        rest -= 15
        out.append(min(rest, 255))
        if rest >= 255:
            rest += 15 + 7
            out += struct.pack("<H", rest) if rest < 1 << 16 else struct.pack("<HI", 0, rest)
    return half


def packed(data: bytes, *, end: bool = True) -> bytes:
    """Returns a block of 1 MiB as records."""
    assert len(data) == BLOCK
    records, at = bytearray(), 0
    while at < BLOCK:
        page = data[at : at + PAGE]
        pattern = page[:8]
        if page != pattern * (PAGE // 8):
            records += record(page)
            at += PAGE
            continue
        count = 1
        while data[at + count * PAGE : at + (count + 1) * PAGE] == page:
            count += 1
        kind = 0xFFFFFFFE if count == 1 else 0xFFFFFFFD
        records += struct.pack("<I", kind) + pattern + (struct.pack("<I", count) if count > 1 else b"")
        at += count * PAGE
    return bytes(records) + (END if end else b"")


def record(page: bytes) -> bytes:
    """Returns a page as a record; as it is if compressing it gains nothing."""
    small = xpress(page)
    if len(small) >= len(page):
        small = page
    return struct.pack("<I", len(small)) + small


def piece(data: bytes) -> bytes:
    """Returns fewer bytes than a page as a record."""
    small = xpress(data)
    if len(small) >= len(data):
        small = data
    return struct.pack("<III", 0xFFFFFFFC, len(data), len(small)) + small
