"""What no probe may claim: each format is asked about content that is not its own before its word counts.

A probe that says yes to everything, or to the images of other formats, would otherwise take all disks away from the
formats they are in.
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
    """Returns the content that `one` claims although it is not of its format; None when it claims none such."""
    for what, at, data in _samples(one.name):
        file = _file(what, at, data)
        try:
            if one.probe(file):
                return what
        finally:
            file.close()
    return None


def _samples(name: str) -> Iterator[tuple[str, int, bytes]]:
    """Yields what a file has, and the bytes at an offset (from the end if < 0) of a file of zeros that make it so."""
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
