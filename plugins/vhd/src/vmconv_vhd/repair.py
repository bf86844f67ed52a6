"""Repairs of a VHD file: the footer and its copy follow from each other."""

from __future__ import annotations

from vmconv.plugin import Draft, Image
from vmconv_vhd import structs
from vmconv_vhd.header import Header, read_header


def repair(image: Image) -> Draft:
    """Returns the file of a dynamic or differencing disk with two equal footers; of a fixed one, unchanged."""
    header, draft = read_header(image.file), Draft(image.file)
    if header.kind == structs.FIXED:
        return draft
    if header.end == header.file.size:
        draft.write(_place(header), draft.read(0, structs.FOOTER_LENGTH))
    else:
        length = min(structs.OLD_FOOTER_LENGTH, header.file.size - header.end)
        draft.write(0, draft.read(header.end, length))
    return draft


def _place(header: Header) -> int:
    """Returns the offset of a new footer: over the damaged one, else behind the end of a file that was cut off."""
    at = header.file.size - structs.FOOTER_LENGTH
    if at > structs.FOOTER_LENGTH and header.file.read(at, len(structs.COOKIE)) == structs.COOKIE:
        return at
    return -(-header.file.size // structs.SECTOR) * structs.SECTOR
