"""Apple disk images, made as hdiutil makes them: chunks of each kind, block tables in a property list, a trailer."""

from __future__ import annotations

import bz2
import lzma
import plistlib
import struct
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

SECTOR = 512
ZERO, RAW, IGNORED, ADC, ZLIB, BZIP2, LZFSE, XZ = 0, 1, 2, *range(0x80000004, 0x80000009)
COMMENT, END = 0x7FFFFFFE, 0xFFFFFFFF


def adc(data: bytes) -> bytes:
    """Returns a stream of Apple Data Compression with its three kinds of pieces, not a short one."""
    found = bytearray()
    at = 0
    while at < len(data):
        run = next((n for n in range(1, 68) if data[at : at + 1] != data[at + n : at + n + 1]), 67)
        if run < 5:
            piece = data[at : at + min(run, 127)]
            found += bytes([0x80 | len(piece) - 1]) + piece
            at += len(piece)
            continue
        # The first byte, and copies of it: both kinds in turn.
        found += bytes([0x80, data[at]])
        rest = run - 1
        if rest <= 18 and at % 2:
            found += bytes([(rest - 3) << 2, 0])
        else:
            found += bytes([0x40 | rest - 4]) + (0).to_bytes(2)
        at += run
    return bytes(found)


def stored_lzfse(data: bytes) -> bytes:
    """Returns a stream of LZFSE whose only block is not compressed."""
    return b"bvx-" + struct.pack("<I", len(data)) + data + b"bvx$"


PACKERS: dict[int, Callable[[bytes], bytes]] = {
    RAW: bytes,
    ADC: adc,
    ZLIB: zlib.compress,
    BZIP2: bz2.compress,
    LZFSE: stored_lzfse,
    XZ: lzma.compress,
}


class Entry(NamedTuple):
    """An entry of a block table; sectors count from the table's first."""

    kind: int
    sector: int
    sectors: int
    offset: int = 0
    length: int = 0

    def pack(self) -> bytes:
        return struct.pack(">IIQQQQ", self.kind, 0, self.sector, self.sectors, self.offset, self.length)


def checksum(crc: int | None) -> bytes:
    """Returns the structure of a CRC-32, or of no checksum."""
    return struct.pack(">III124x", *((0, 0, 0) if crc is None else (2, 32, crc)))


def table(first: int, count: int, entries: Sequence[Entry], crc: int | None = None) -> bytes:
    """Returns a block table for `count` sectors from `first` on; `crc` is that of its sectors."""
    head = struct.pack(">4sIQQQII24x", b"mish", 1, first, count, 0, 0x208, 0) + checksum(crc)
    head += len(entries).to_bytes(4)
    return head + b"".join(one.pack() for one in entries)


def property_list(tables: Sequence[bytes]) -> bytes:
    listed = [{"Attributes": "0x0050", "Data": one, "ID": str(n), "Name": "disk"} for n, one in enumerate(tables)]
    return plistlib.dumps({"resource-fork": {"blkx": listed}})


def trailer(plist_offset: int, plist_length: int, sectors: int, data_length: int, master: int | None = None) -> bytes:
    return struct.pack(
        ">4sIIIQQQQQII16s136xQQ120x136sIQ12x",
        *(b"koly", 4, 512, 1, 0, 0, data_length, 0, 0, 1, 1, b"segment of image"),
        *(plist_offset, plist_length, checksum(master), 1, sectors),
    )


def closed(payload: bytes, tables: Sequence[bytes], sectors: int, master: int | None = None) -> bytes:
    """Returns the image of chunks and block tables; `master` is the CRC of the tables' CRCs."""
    plist = property_list(tables)
    return payload + plist + trailer(len(payload), len(plist), sectors, len(payload), master)


def udif(disk: bytes, kinds: Sequence[int], chunk: int = 64 << 10, tables: int = 1) -> bytes:
    """Returns a disk as an image: its chunks are of the given kinds in turn, and holes where there are only zeros."""
    payload, sums = bytearray(), bytearray()
    made: list[bytes] = []
    sectors = len(disk) // SECTOR
    edges = [sectors * number // tables for number in range(tables + 1)]
    turn = 0
    for begin, end in pairwise(edges):
        entries = [Entry(COMMENT, 0, 0)]
        crc = 0
        for at in range(begin, end, chunk // SECTOR):
            count = min(chunk // SECTOR, end - at)
            piece = disk[at * SECTOR : (at + count) * SECTOR]
            if not any(piece):
                entries.append(Entry((ZERO, IGNORED)[len(entries) % 2], at - begin, count))
                crc = zlib.crc32(piece, crc) if entries[-1].kind == ZERO else crc
                continue
            crc = zlib.crc32(piece, crc)
            kind = kinds[turn % len(kinds)]
            turn += 1
            packed = PACKERS[kind](piece)
            entries.append(Entry(kind, at - begin, count, len(payload), len(packed)))
            payload += packed
        made.append(table(begin, end - begin, [*entries, Entry(END, end - begin, 0, len(payload))], crc))
        sums += crc.to_bytes(4)
    return closed(bytes(payload), made, sectors, zlib.crc32(sums))
