"""A new current header of a VHDX, as [MS-VHDX] 2.2.2 has it written: over the header that is not current."""

from __future__ import annotations

from typing import Any

from vmconv.plugin import Draft
from vmconv_vhdx import structs
from vmconv_vhdx.header import current_header


def next_header(draft: Draft, **fields: Any) -> None:
    """Writes a header with other fields, and the next sequence number, in the place of the older one."""
    header, head = current_header(draft)
    values = {**header, "checksum": 0, "sequence_number": header.sequence_number + 1, **fields}
    values["checksum"] = structs.checksum(structs.Header.build(values))
    place = next(at for at in structs.HEADER_OFFSETS if at != head.offset)
    draft.write(place, structs.Header.build(values))
