"""Tests probes with content of other formats.

A probe that accepts any content, or images of other formats, would otherwise take over the disks of those formats.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from vmconv.interface.format import Format
from vmconv.io.known import KNOWN
from vmconv.model.sources import File

_SIZE = 1 << 20
_BOOT_SECTOR = b"\x33\xc0\x8e\xd0\xbc\x00\x7c".ljust(510, b"\x90") + b"\x55\xaa"


def overclaimed(one: Format) -> str | None:
    """Returns the name of foreign content that the probe of `one` accepts; None if it accepts none."""
    for what, at, data in _samples(one.name):
        file = _file(what, at, data)
        try:
            if one.probe(file):
                return what
        finally:
            file.close()
    return None


def _samples(name: str) -> Iterator[tuple[str, int, bytes]]:
    """Yields `(name, offset, bytes)` of samples: bytes in a file of zeros, at an offset from the end if < 0."""
    yield "zeros", 0, b""
    yield "noise", 0, os.urandom(4096)
    yield "a boot sector", 0, _BOOT_SECTOR
    for known in KNOWN:
        if known.name != name:
            for at, magic in known.magic:
                yield f"the signature of {known.name}", at, magic


def _file(what: str, at: int, data: bytes) -> File:
    descriptor = os.memfd_create("vmconv-trial", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, _SIZE)
    os.pwrite(descriptor, data, at if at >= 0 else _SIZE + at)
    return File(what, descriptor)
