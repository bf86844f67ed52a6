"""Builds the bytes of small VHDX images with logs and parents, sound or not."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from uuid import UUID

import google_crc32c

from support.disks import MIB
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry
from vmconv.model.extents import Extents, Kind
from vmconv.model.facts import DiskFacts
from vmconv.model.image import Image
from vmconv.model.layout import Backing, Placement
from vmconv.testing import disk_of, image_file, make_in_memory, patterned
from vmconv.testing.disks import raw_disk
from vmconv.testing.memory import MemoryFile
from vmconv_vhdx import Vhdx
from vmconv_vhdx.options import Options

KIB = 1 << 10

LOG, METADATA, BAT, PAYLOAD = MIB, 2 * MIB, 3 * MIB, 4 * MIB
"""Where our writer puts things in a small image."""

SMALL = Options(block_size=MIB)


def written(image: Image, options: Options = SMALL, backing: Backing | None = None) -> bytes:
    """Returns the bytes of an image that holds this disk."""
    layout = Vhdx().write(image, options, Placement(4096), backing=backing)
    _, files = make_in_memory(layout, image)
    return files[-1].read(0, files[-1].size)


def opened(data: bytes) -> Image:
    return Vhdx().read(image_file(data, "disk.vhdx"), Opener(Registry({"vhdx": Vhdx()})))


def put(data: bytes, offset: int, value: bytes) -> bytes:
    return data[:offset] + value + data[offset + len(value) :]


def sealed(data: bytes) -> bytes:
    """Returns a structure with the CRC-32C it asks for at offset 4."""
    blank = put(data, 4, bytes(4))
    return put(blank, 4, struct.pack("<I", google_crc32c.value(blank)))


def header(offset: int, value: bytes, which: Sequence[int] = (64 * KIB, 128 * KIB)) -> Callable[[bytes], bytes]:
    """Returns a change of a field in headers, their checksums right."""

    def change(data: bytes) -> bytes:
        for at in which:
            data = put(data, at, sealed(put(data[at : at + 4 * KIB], offset, value)))
        return data

    return change


def metadata(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda data: put(data, METADATA + offset, value)


def bat(entry: int, value: int) -> Callable[[bytes], bytes]:
    return lambda data: put(data, BAT + entry * 8, struct.pack("<Q", value))


SOURCE = patterned(5 * MIB, [(0, 4096), (3 * MIB, 70000)])


def sample(facts: DiskFacts | None = None) -> bytes:
    """Returns an image with blocks 0 and 3 of 5 allocated."""
    return written(raw_disk(SOURCE, facts))


def parent_disk(sector: int = 512) -> Image:
    base = raw_disk(patterned(8 * MIB, [(0, 3 * MIB), (5 * MIB, MIB)]), DiskFacts(logical_sector_size=sector))
    return opened(written(base))


GUID = b"this is the log!"


def entry(
    sequence: int, tail: int, patches: Sequence[tuple[int, bytes | int]], *, size: tuple[int, int] = (0, 0)
) -> bytes:
    """Returns a log entry that writes sectors of bytes, or that many zeros, to places of the file.

    `size` is what it says of the file: bytes that were flushed, and bytes that it has.
    """
    descriptors, sectors = b"", b""
    for at, what in patches:
        if isinstance(what, int):
            descriptors += struct.pack("<4sIQQQ", b"zero", 0, what, at, sequence)
            continue
        descriptors += struct.pack("<4s4s8sQQ", b"desc", what[-4:], what[:8], at, sequence)
        sectors += struct.pack("<4sI4084sI", b"data", sequence >> 32, what[8:-4], sequence & 0xFFFFFFFF)
    front = -(-(64 + len(descriptors)) // 4096) * 4096
    head = struct.pack("<4sIIIQII16sQQ", b"loge", 0, front + len(sectors), tail, sequence, len(patches), 0, GUID, *size)
    return sealed((head + descriptors).ljust(front, b"\0") + sectors)


def dirty(data: bytes, *entries: tuple[int, bytes]) -> bytes:
    """Returns an image with these entries at places of its log, a ring, and the log's GUID in its headers."""
    ring = bytearray(MIB)
    for at, one in entries:
        for number in range(0, len(one), 4096):
            place = (at + number) % MIB
            ring[place : place + 4096] = one[number : number + 4096]
    return header(48, GUID)(put(data, LOG, bytes(ring)))


def bat_sector(**entries: int) -> bytes:
    """Returns the first sector of the BAT: block 0 at the first place, others as said."""
    raw = bytearray(sample()[BAT : BAT + 4096])
    for name, value in entries.items():
        raw[int(name[1:]) * 8 : int(name[1:]) * 8 + 8] = struct.pack("<Q", value)
    return bytes(raw)


CLEAR_3 = bat_sector(b3=2)

CLEAR_BOTH = bat_sector(b0=2, b3=2)


def differencing(**locator: str) -> bytes:
    """Returns a differencing image whose parent locator says this."""
    layer = disk_of(Extents.filled(8 * MIB, Kind.HOLE), MemoryFile("top", 0), parent=parent_disk())
    data = written(layer, backing=Backing("base.vhdx", "vhdx"))
    at = 64 * KIB + 40
    table = UUID("b04aefb7-d19e-4a81-b789-25b8e9445913").bytes_le + struct.pack("<HH", 0, len(locator))
    strings, place = b"", 20 + 12 * len(locator)
    for key, value in locator.items():
        name, text = key.encode("utf-16-le"), value.encode("utf-16-le")
        table += struct.pack("<IIHH", place + len(strings), place + len(strings) + len(name), len(name), len(text))
        strings += name + text
    data = metadata(at, table + strings)(data)
    return metadata(32 + 5 * 32 + 20, struct.pack("<I", len(table + strings)))(data)
