"""The parent locator of a differencing VHDX, changed in the metadata region."""

from __future__ import annotations

from uuid import UUID

from vmconv.plugin import Backing, Draft, Image, PlanError, fresh
from vmconv_vhdx import structs
from vmconv_vhdx.header import Header, read_header
from vmconv_vhdx.headers import next_header
from vmconv_vhdx.writer import parent_locator

_HEAD, _ENTRY = structs.MetadataTableHeader.sizeof(), structs.MetadataTableEntry.sizeof()


def set_parent(image: Image, parent: Backing | None) -> Draft:
    """Returns the file with another path of the parent, which must have the data write GUID of the old one."""
    name, header = image.file.name, read_header(image.file)
    if not header.has_parent:
        raise PlanError(f"{name}: is no differencing VHDX, and the GUID of a parent is not known")
    if parent is None:
        raise PlanError(f"{name}: a differencing VHDX cannot lose its parent", hint="vmconv convert flattens it")
    if parent.format != "vhdx":
        raise PlanError(f"{name}: the parent of a VHDX must be a VHDX, not {parent.format}")
    if header.replayed:
        raise PlanError(f"{name}: its log is to be replayed first", hint=f"vmconv check -r all {image.file.path}")
    draft = Draft(image.file)
    _place(draft, header, parent_locator(parent.reference, _linkage(header)))
    # Whoever has the file open in a cache learns by this GUID that it has changed ([MS-VHDX] 2.2.2.1).
    next_header(draft, file_write_guid=fresh())
    return draft


def _linkage(header: Header) -> UUID:
    stored = header.locator.get("parent_linkage", "")
    try:
        return UUID(stored.strip("{}"))
    except ValueError as exc:
        raise PlanError(f"{header.file.name}: parent locator: parent_linkage {stored[:40]!r} is not a GUID") from exc


def _place(draft: Draft, header: Header, data: bytes) -> None:
    """Writes the item over the old one, or behind all items."""
    region = header.metadata
    table = draft.read(region.offset, structs.METADATA_TABLE_LENGTH)
    count = structs.MetadataTableHeader.parse(table).entry_count
    places = [_HEAD + number * _ENTRY for number in range(count)]
    entries = {place: structs.MetadataTableEntry.parse(table[place : place + _ENTRY]) for place in places}
    place, old = next((place, one) for place, one in entries.items() if one.item_id == structs.PARENT_LOCATOR.bytes_le)
    at = old.offset
    if len(data) > old.length:
        at = max([structs.METADATA_TABLE_LENGTH, *(one.offset + one.length for one in entries.values())])
        at = -(-at // 8) * 8
        if at + len(data) > region.length:
            room = max(0, region.length - at)
            raise PlanError(f"{draft.name}: a parent locator of {len(data)} bytes, the metadata have room for {room}")
    draft.write(region.offset + at, data)
    entry = structs.MetadataTableEntry.build({**old, "offset": at, "length": len(data)})
    draft.write(region.offset + place, entry)
