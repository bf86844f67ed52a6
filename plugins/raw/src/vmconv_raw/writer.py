"""Writes a raw disk: the output file is the guest's address space itself."""

from __future__ import annotations

from vmconv.plugin import Image, Layout, OutFile


def write(image: Image) -> Layout:
    """Returns the layout whose only file is the disk; offsets are the guest's, so the placement has no effect."""
    return Layout((OutFile(image.flat),))
