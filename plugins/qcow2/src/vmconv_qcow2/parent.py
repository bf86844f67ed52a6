"""The stored name and format of the backing file, changed in the header's cluster."""

from __future__ import annotations

import os

from vmconv.plugin import Backing, Draft, Image, PlanError, qemu_name
from vmconv_qcow2 import structs
from vmconv_qcow2.area import rewrite, stored_extensions
from vmconv_qcow2.header import read_header

_OF_THE_PARENT = (structs.BACKING_FORMAT, structs.RECORDS)
"""Extensions that are not kept: what they say of the old parent is wrong for the new one."""


def set_parent(image: Image, parent: Backing | None) -> Draft:
    """Returns the file with another backing file, or none; other header extensions stay as they are."""
    header, draft = read_header(image.file), Draft(image.file)
    if parent and header.autoclear & structs.RAW_EXTERNAL_DATA:
        raise PlanError(f"{image.file.name}: its raw data file holds the whole disk, which no backing file can change")
    kept = {kind: data for kind, data in stored_extensions(header).items() if kind not in _OF_THE_PARENT}
    if parent:
        kept = {structs.BACKING_FORMAT: qemu_name(parent.format).encode(), **kept}
    rewrite(draft, header, kept, os.fsencode(parent.reference) if parent else b"")
    return draft
