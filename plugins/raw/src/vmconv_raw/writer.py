"""Writes a raw disk: the output file is the guest's address space itself."""

from __future__ import annotations

from vmconv.plugin import Allocation, Image, Layout, OutFile
from vmconv_raw.options import Options

_ALLOCATIONS: dict[str, Allocation] = {"off": "holes", "falloc": "space", "full": "zeros"}


def write(image: Image, options: Options) -> Layout:
    """Returns the layout whose only file is the disk; offsets are the guest's, so the placement has no effect."""
    return Layout((OutFile(image.flat, allocation=_ALLOCATIONS[options.preallocation]),))
