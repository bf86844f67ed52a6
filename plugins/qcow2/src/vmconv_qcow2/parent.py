"""The stored name and format of the backing file, changed in the header's cluster."""

from __future__ import annotations

import os
import struct

from vmconv.plugin import Backing, Draft, Image, PlanError, Structure, qemu_name
from vmconv_qcow2 import structs
from vmconv_qcow2.header import Header, build_extension, extensions, header_length, read_header

_DERIVED = (structs.END, structs.BACKING_FORMAT, structs.RECORDS)
"""Extensions that are not kept: what they say of the old parent is wrong for the new one."""


def set_parent(image: Image, parent: Backing | None) -> Draft:
    """Returns the file with another backing file, or none; other header extensions stay as they are."""
    header = read_header(image.file)
    if parent and header.autoclear & structs.RAW_EXTERNAL_DATA:
        raise PlanError(f"{image.file.name}: its raw data file holds the whole disk, which no backing file can change")
    begin, end = header_length(header), _end(header)
    name = os.fsencode(parent.reference) if parent else b""
    area = b"".join(build_extension(kind, data) for kind, data in _kept(header, parent, begin, end)) + bytes(8)
    room = min(structs.MAX_BACKING_NAME, header.cluster_size - begin - len(area))
    if len(name) > room:
        raise PlanError(
            f"{image.file.name}: a backing file name of {len(name)} bytes, its header has room for {max(0, room)}"
        )
    draft = Draft(image.file)
    draft.write(begin, (area + name).ljust(end - begin, b"\0"))
    place = Structure(image.file, structs.HeaderV2).offset_of("backing_file_offset")
    draft.write(place, struct.pack(">QI", begin + len(area) if name else 0, len(name)))
    return draft


def _kept(header: Header, parent: Backing | None, begin: int, end: int) -> list[tuple[int, bytes]]:
    kept = [(kind, data) for kind, data in extensions(header.file, begin, end) if kind not in _DERIVED]
    if parent:
        kept.insert(0, (structs.BACKING_FORMAT, qemu_name(parent.format).encode()))
    return kept


def _end(header: Header) -> int:
    """Returns the end of the extensions, and of the backing file name, in the header's cluster."""
    basic = Structure(header.file, structs.HeaderV2).parse()
    if basic.backing_file_offset:
        return int(basic.backing_file_offset + basic.backing_file_size)
    at, fixed = header_length(header), int(structs.Extension.sizeof())
    limit = min(header.cluster_size, header.file.size)
    for _, data in extensions(header.file, at, limit):
        at += fixed + len(data) + -len(data) % 8
    return min(limit, at + fixed)
