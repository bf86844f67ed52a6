"""Footer and dynamic header of a VHD image, checked and bounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vmconv.plugin import Column, File, Structure, damaged, from_url, from_windows, named_by, read_part
from vmconv_vhd import structs


@dataclass(frozen=True)
class Header:
    """The values of footer and dynamic header; sizes are bytes. `end` is the offset of the footer, the limit of
    payload.

    The fields of the dynamic header are 0 in a fixed disk. `parents` are the file names of the parent, the most
    reliable first.
    """

    file: File
    kind: int
    size: int
    end: int
    original_size: int
    creator: str
    geometry: tuple[int, int, int]
    unique_id: bytes
    saved_state: bool
    time_stamp: int
    header_offset: int = 0
    table_offset: int = 0
    entries: int = 0
    block_size: int = 0
    parent_id: bytes = bytes(16)
    parents: tuple[str, ...] = ()
    locators: tuple[tuple[int, int], ...] = ()
    """Offset and length of the parent's names in the file."""
    warnings: tuple[str, ...] = field(default=(), repr=False)

    @property
    def bitmap_size(self) -> int:
        """Bytes of a block's bitmap: one bit for each sector, padded to whole sectors."""
        return bitmap_size(self.block_size)

    def needed(self, block: Column) -> Column:
        """Returns the bytes of these blocks with their bitmaps; the last block only up to the end of the disk."""
        left: Column = np.minimum(self.size - block * self.block_size, self.block_size)
        return self.bitmap_size + left


def bitmap_size(block_size: int) -> int:
    """Returns the bytes of a block's bitmap."""
    return -(-block_size // structs.SECTOR // 8 // structs.SECTOR) * structs.SECTOR


def read_header(file: File) -> Header:
    """Returns the header of the image in `file`. Raises `ImageError` with the invalid field."""
    footer, where, end, warnings = _footer(file)
    if footer.file_format_version >> 16 != structs.VERSION >> 16:
        raise where.damaged("file_format_version", f"{footer.file_format_version:#x}, version 1 is expected")
    if footer.disk_type not in structs.DISK_TYPES:
        raise where.damaged("disk_type", f"{footer.disk_type} is neither fixed (2), dynamic (3) nor differencing (4)")
    geometry = (footer.cylinders, footer.heads, footer.sectors)
    basics = {
        "file": file,
        "kind": footer.disk_type,
        "end": end,
        "original_size": footer.original_size,
        "creator": footer.creator_application.rstrip(b"\0 ").decode("ascii", "replace"),
        "geometry": geometry,
        "unique_id": footer.unique_id,
        "saved_state": bool(footer.saved_state),
        "time_stamp": footer.time_stamp,
    }
    size = footer.current_size
    if size % structs.SECTOR:
        raise where.damaged("current_size", f"{size} bytes are not whole sectors")
    if footer.disk_type == structs.FIXED:
        if size > end:
            raise where.damaged("current_size", f"{size} bytes, the file has room for {end}")
        return Header(size=_size(footer, end), warnings=warnings, **basics)
    dynamic_head = Structure(file, structs.DynamicHeader, footer.data_offset, "dynamic header")
    if not dynamic_head.is_inside:
        raise where.damaged(
            "data_offset", f"{footer.data_offset:#x} is not a valid offset of a header in {file.size:#x} bytes"
        )
    dynamic = _dynamic_header(dynamic_head, differencing=footer.disk_type == structs.DIFFERENCING)
    room = dynamic["entries"] * dynamic["block_size"]
    if size > room:
        raise dynamic_head.damaged(
            "max_table_entries",
            f"{dynamic['entries']} blocks of {dynamic['block_size']} bytes for a disk of {size} bytes",
        )
    return Header(size=_size(footer, room), warnings=warnings, **basics, **dynamic)


def _size(footer: Any, room: int) -> int:
    """Returns the size of the disk, bytes: the footer's current size, not that of its geometry.

    The exception are images made by QEMU with the creator "qemu" (not "qem2"): QEMU takes their size from the geometry,
    unless it is the largest geometry.
    """
    geometry = (footer.cylinders, footer.heads, footer.sectors)
    by_geometry = int(footer.cylinders * footer.heads * footer.sectors) * structs.SECTOR
    if footer.creator_application == b"qemu" and geometry != structs.MAX_GEOMETRY and 0 < by_geometry <= room:
        return by_geometry
    return int(footer.current_size)


def _footer(file: File) -> tuple[Any, Structure, int, tuple[str, ...]]:
    """Returns the footer (the last sector, or else its copy), its offset, the limit of payload, and warnings."""
    if file.size < structs.OLD_FOOTER_LENGTH:
        raise damaged(file, "footer", 0, f"the file has {file.size} bytes, a footer has 512")
    problem = "no footer"
    for length in (structs.FOOTER_LENGTH, structs.OLD_FOOTER_LENGTH):
        at = file.size - length
        if at < 0 or file.read(at, len(structs.COOKIE)) != structs.COOKIE:
            continue
        where = Structure(file, structs.Footer, at, "footer")
        footer, problem = _parse_footer(where)
        if footer is not None:
            return footer, where, at, ()
    at = max(0, file.size - structs.FOOTER_LENGTH)
    if file.read(0, len(structs.COOKIE)) == structs.COOKIE:
        where = Structure(file, structs.Footer, 0, "footer")
        footer, copy_problem = _parse_footer(where)
        # A fixed disk has no copy: the guest controls its first sector.
        if footer is not None and footer.disk_type != structs.FIXED:
            return footer, where, file.size, (f"{file.name}: footer at {at:#x}: {problem}; its copy at 0x0 was used",)
        problem = f"{problem}, nor is there a copy of one at 0x0 ({copy_problem or 'it is a fixed disk'})"
    raise damaged(file, "footer", at, problem)


def _parse_footer(where: Structure) -> tuple[Any, str]:
    data = where.read()
    footer = where.parse("no VHD signature", data=data)
    expected = structs.checksum(data, structs.CHECKSUM_OFFSET)
    if footer.checksum != expected:
        return None, f"checksum {footer.checksum:#010x}, its bytes sum up to {expected:#010x}"
    return footer, ""


def _dynamic_header(head: Structure, *, differencing: bool) -> dict[str, Any]:
    """Returns the fields of `Header` from the dynamic header; those of the parent only for a differencing disk."""
    file, data = head.file, head.read()
    header = head.parse("no VHD signature", data=data)
    expected = structs.checksum(data, structs.HEADER_CHECKSUM_OFFSET)
    if header.checksum != expected:
        raise head.damaged("checksum", f"{header.checksum:#010x}, the bytes of the header sum up to {expected:#010x}")
    if header.header_version >> 16 != structs.VERSION >> 16:
        raise head.damaged("header_version", f"{header.header_version:#x}, version 1 is expected")
    block = header.block_size
    if not structs.SECTOR <= block <= structs.MAX_BLOCK_SIZE or block & (block - 1):
        raise head.damaged(
            "block_size", f"{block} is not a power of two from {structs.SECTOR} to {structs.MAX_BLOCK_SIZE}"
        )
    if header.table_offset + header.max_table_entries * 4 > file.size:
        raise head.damaged(
            "table_offset",
            f"{header.max_table_entries} entries from {header.table_offset:#x} reach past the end of the file "
            f"({file.size:#x})",
        )
    fields = {
        "header_offset": head.offset,
        "table_offset": header.table_offset,
        "entries": header.max_table_entries,
        "block_size": block,
    }
    if not differencing:
        return fields
    return {
        **fields,
        "parent_id": header.parent_unique_id,
        "parents": tuple(dict.fromkeys(_parents(file, header))),
        "locators": tuple(
            (locator.platform_data_offset, locator.platform_data_length)
            for locator in header.parent_locators
            if any(locator.platform_code)
        ),
    }


def _parents(file: File, header: Any) -> Iterator[str]:
    """Yields the parent's names: relative, absolute, and the one in the header, as paths of this system."""
    found = {locator.platform_code: locator for locator in header.parent_locators}
    for code, encoding in ((structs.RELATIVE, "utf-16-le"), (structs.MAC, "utf-8"), (structs.ABSOLUTE, "utf-16-le")):
        if code in found:
            yield from _local(_locator(file, found[code]).decode(encoding, "replace"))
    yield from _local(header.parent_unicode_name.decode("utf-16-be", "replace"))


def _locator(file: File, locator: Any) -> bytes:
    at, length = locator.platform_data_offset, locator.platform_data_length
    what = f"parent locator {locator.platform_code.decode('ascii', 'replace')}"
    if length > structs.MAX_LOCATOR_LENGTH:
        raise damaged(file, what, at, f"{length} bytes, {structs.MAX_LOCATOR_LENGTH} at most")
    return read_part(file, what, at, length)


def _local(name: str) -> Iterator[str]:
    """Yields a name as a path of this system. The caller verifies the parent's identity."""
    path = named_by(from_windows(from_url(name.split("\0", maxsplit=1)[0])))
    if path:
        yield path
