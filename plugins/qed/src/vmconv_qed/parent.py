"""The stored name of the backing file, changed in the header's clusters."""

from __future__ import annotations

import os
import struct

from vmconv.plugin import Backing, Draft, Image, PlanError, Structure
from vmconv_qed import structs
from vmconv_qed.reader import read_header


def set_parent(image: Image, parent: Backing | None) -> Draft:
    """Returns the file with another backing file, or none."""
    header, head = read_header(image.file), Structure(image.file, structs.Header)
    name = os.fsencode(parent.reference) if parent else b""
    room = min(structs.MAX_BACKING_NAME, header.header_size - structs.HEADER_LENGTH)
    if len(name) > room:
        raise PlanError(f"{image.file.name}: a backing file name of {len(name)} bytes, its header has room for {room}")
    features = header.features & ~(structs.BACKING_FILE | structs.BACKING_FORMAT_NO_PROBE)
    if parent:
        features |= structs.BACKING_FILE | (structs.BACKING_FORMAT_NO_PROBE if parent.format == "raw" else 0)
    raw, draft = head.parse(), Draft(image.file)
    if header.backing_file is not None:
        draft.write(raw.backing_filename_offset, bytes(raw.backing_filename_size))
    draft.write(structs.HEADER_LENGTH, name)
    draft.write(head.offset_of("features"), features.to_bytes(8, "little"))
    place = structs.HEADER_LENGTH if name else 0
    draft.write(head.offset_of("backing_filename_offset"), struct.pack("<II", place, len(name)))
    return draft
