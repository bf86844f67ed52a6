"""Repairs of a VDI file: the number of allocated blocks follows from the block map."""

from __future__ import annotations

from vmconv.plugin import Draft, Image
from vmconv_vdi.check import check
from vmconv_vdi.reader import head_of


def repair(image: Image) -> Draft:
    """Returns the file with the number of blocks that its map has."""
    draft = Draft(image.file)
    place = head_of(image.file).offset_of("cBlocksAllocated")
    draft.write(place, check(image).allocated_clusters.to_bytes(4, "little"))
    return draft
