"""Images of one small disk in known formats, made by QEMU: a second opinion for readers where QEMU is not installed.

`samples.zip` beside this module has the images, 18 KiB. `python tests/support/sample_images.py` makes it.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vmconv.errors import UsageError

ARCHIVE = Path(__file__).with_name("samples.zip")
LARGEST = 16 << 20
"""Bytes of an image at most, decompressed."""
SIZE = 4 << 20
"""Bytes of the disk. Fixed geometries and all block sizes of the formats divide it."""
_SECTOR = 512
_WRITTEN = ((0, 65536), ((1 << 20) + _SECTOR, 3 * _SECTOR), (3 << 20, 4096), (SIZE - _SECTOR, _SECTOR))
"""`(start, length)` of what was written: a block, sectors in the middle of a block, a page, and the last sector."""


class SampleImage(NamedTuple):
    """One image: its file name, its format, the `qemu-img` options that made it, and its bytes."""

    name: str
    format: str
    options: str
    data: bytes


def sample_disk() -> bytes:
    """Returns the content of the disk in every sample: each written sector has its number in it, all else is zero."""
    disk = bytearray(SIZE)
    for start, length in _WRITTEN:
        for at in range(start, start + length, _SECTOR):
            disk[at : at + _SECTOR] = b"sector %08d;" % (at // _SECTOR) * 32
    return bytes(disk)


def sample_images(format_name: str | None = None) -> Iterator[SampleImage]:
    """Yields the samples of a format, or all. There are none of formats that QEMU does not write.

    Raises UsageError if an image in the archive is larger than LARGEST.
    """
    with zipfile.ZipFile(ARCHIVE) as archive:
        for name, made in json.loads(archive.read("index.json")).items():
            if format_name not in (None, made["format"]):
                continue
            if archive.getinfo(name).file_size > LARGEST:
                raise UsageError(f"{ARCHIVE.name}: {name}: more than {LARGEST} bytes")
            yield SampleImage(name, made["format"], made["options"], archive.read(name))
