"""The names of the parent in a differencing VHD, changed in its header and in the sectors of a locator."""

from __future__ import annotations

from typing import Any

from vmconv.plugin import Backing, Draft, Image, PlanError, Structure
from vmconv_vhd import structs
from vmconv_vhd.header import Header, read_header
from vmconv_vhd.writer import locate_parent


def set_parent(image: Image, parent: Backing | None) -> Draft:
    """Returns the file with other names of the parent, which must have the unique id of the old one."""
    name, header = image.file.name, read_header(image.file)
    if header.kind != structs.DIFFERENCING:
        raise PlanError(f"{name}: is no differencing VHD, and the unique id of a parent is not known")
    if parent is None:
        raise PlanError(f"{name}: a differencing VHD cannot lose its parent", hint="vmconv convert flattens it")
    if parent.format != "vhd":
        raise PlanError(f"{name}: the parent of a VHD must be a VHD, not {parent.format}")
    if header.warnings:
        raise PlanError(header.warnings[0], hint="vmconv check -r all repairs it first")
    head = Structure(image.file, structs.DynamicHeader, header.header_offset, "dynamic header")
    raw, draft = head.parse(), Draft(image.file)
    data, _, _ = locate_parent(parent.reference, 0)
    at = _room(draft, header, raw, len(data))
    data, title, locator = locate_parent(parent.reference, at)
    nothing = structs.ParentLocator.parse(bytes(24))
    fields: dict[str, Any] = {
        **raw,
        "checksum": 0,
        "parent_unicode_name": title.ljust(512, b"\0"),
        "parent_locators": [locator, *[nothing] * (structs.LOCATORS - 1)],
    }
    fields["checksum"] = structs.checksum(structs.DynamicHeader.build(fields), structs.HEADER_CHECKSUM_OFFSET)
    draft.write(header.header_offset, structs.DynamicHeader.build(fields))
    draft.write(at, data + bytes(-len(data) % structs.SECTOR))
    return draft


def _room(draft: Draft, header: Header, raw: Any, length: int) -> int:
    """Returns where a name of `length` bytes lies: in the sectors of the old one, or at the end, before the footer."""
    for locator in raw.parent_locators:
        sectors = -(-locator.platform_data_length // structs.SECTOR)
        if any(locator.platform_code) and length <= sectors * structs.SECTOR:
            return int(locator.platform_data_offset)
    footer = draft.read(header.end, header.file.size - header.end)
    at = -(-header.end // structs.SECTOR) * structs.SECTOR
    draft.write(at + -(-length // structs.SECTOR) * structs.SECTOR, footer)
    return at
