"""The rest of the header's cluster: header extensions and the name of the backing file, written as a whole."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from vmconv.plugin import Draft, PlanError, Structure
from vmconv_qcow2 import structs
from vmconv_qcow2.header import Header, build_extension, extensions, header_length


def stored_extensions(header: Header) -> dict[int, bytes]:
    """Returns the header extensions in their order."""
    begin, end = header_length(header), _end(header)
    return {kind: data for kind, data in extensions(header.file, begin, end) if kind != structs.END}


def rewrite(draft: Draft, header: Header, wanted: Mapping[int, bytes], name: bytes) -> None:
    """Writes extensions and the name of the backing file, empty for none. Raises `PlanError` if there is no room."""
    begin, end = header_length(header), _end(header)
    area = b"".join(build_extension(kind, data) for kind, data in wanted.items()) + bytes(8)
    room = min(structs.MAX_BACKING_NAME, header.cluster_size - begin - len(area))
    if len(name) > room:
        raise PlanError(
            f"{draft.name}: a backing file name of {len(name)} bytes, its header has room for {max(0, room)}"
        )
    if begin + len(area) > header.cluster_size:
        raise PlanError(f"{draft.name}: header extensions of {len(area)} bytes do not fit into its first cluster")
    draft.write(begin, (area + name).ljust(end - begin, b"\0"))
    place = Structure(draft, structs.HeaderV2).offset_of("backing_file_offset")
    draft.write(place, struct.pack(">QI", begin + len(area) if name else 0, len(name)))


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
