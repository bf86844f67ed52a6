"""Writes VHD images: a pure function from the guest's table to the table of the output file.

    fixed                   payload | footer
    dynamic, differencing   footer copy | dynamic header | parent locator | BAT | {slack, bitmap, block} ... | footer

Without slack, a block's data would begin 512 bytes, its bitmap, behind the previous block. Slack before the bitmap
makes the data congruent to its source, block by block, so that it can be shared.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from vmconv.plugin import (
    Backing,
    Blob,
    Column,
    Columns,
    Extents,
    Image,
    Kind,
    Layout,
    OutFile,
    Placement,
    PlanError,
    blocks,
    cut,
    to_windows,
)
from vmconv_vhd import structs
from vmconv_vhd.header import bitmap_size
from vmconv_vhd.options import Options

_MIB = 1 << 20
_PAGE = 4096
_BITMAP = bitmap_size(structs.BLOCK_SIZE)
_WINDOWS = b"win "
_CREATOR_VERSION = 0x000A0000


def write(image: Image, options: Options, placement: Placement, *, backing: Backing | None = None) -> Layout:
    """Returns the layout of a VHD image; raises `PlanError` if the disk is too large or the parent is no VHD."""
    return _Writer(image, options, placement, backing).layout()


class _Writer:
    def __init__(self, image: Image, options: Options, placement: Placement, backing: Backing | None) -> None:
        self.image = image
        self.fixed = options.subformat == "fixed"
        self.modulus = placement.modulus
        self.backing = backing
        self.losses: list[str] = []
        if placement.carrier and not self.fixed:
            raise PlanError(
                "a dynamic VHD needs space for a bitmap before each block; in place, "
                "a raw disk can become a VHD of subformat=fixed"
            )
        if backing and self.fixed:
            raise PlanError("a fixed VHD cannot have a parent", hint="use -o subformat=dynamic")
        self.parent_id = _parent_id(image, backing)
        self.size = self._rounded(options)
        if not self.size:
            raise PlanError(f"VHD cannot hold 0 bytes, the nearest size it can hold is {structs.SECTOR}")
        if self.size > structs.MAX_SIZE:
            raise PlanError(
                f"VHD cannot hold {image.size} bytes: {structs.MAX_SIZE} bytes (2040 GiB) at most",
                hint="use another format, such as vhdx",
            )
        if backing and image.parent:
            backing.refuse_other_size("VHD", self.size, image.parent)
        self.guest = blocks.grown(image, self.size, on_parent=backing is not None)
        self.geometry = self._geometry()
        self.unique_id = placement.identity

    def layout(self) -> Layout:
        return self._fixed() if self.fixed else self._dynamic()

    def _rounded(self, options: Options) -> int:
        """Returns the size of the disk, bytes, rounded up as the options demand."""
        # A disk is whole sectors.
        size = -(-self.image.size // structs.SECTOR) * structs.SECTOR
        rounded = size
        if options.azure:
            rounded = -(-size // _MIB) * _MIB
        elif not options.force_size:
            rounded = _whole_cylinders(size // structs.SECTOR) * structs.SECTOR
        if rounded != size:
            unit = "MiB" if options.azure else "cylinders"
            self.losses.append(f"size {size}: rounded up to whole {unit}, {rounded} bytes")
        return rounded

    # -- fixed

    def _fixed(self) -> Layout:
        footer = Blob("footer", self._footer(structs.FIXED))
        length = np.append(self.guest.length, footer.size)
        rows = Columns.join([self.guest.columns, _blob_row(self.size, len(self.guest.sources))])
        table = Extents.placed(self.size + footer.size, rows, length, (*self.guest.sources, footer))
        return Layout((OutFile(table),), tuple(self.losses))

    # -- dynamic and differencing

    def _dynamic(self) -> Layout:
        unit, differencing = structs.BLOCK_SIZE, self.backing is not None
        table = blocks.padded(self.guest, unit)
        if differencing and self.image.parent:
            table = blocks.fill_partial_holes(table, self.image.parent.flat.window(0, table.size), structs.SECTOR)
        block, total = _allocated(table, differencing=differencing)
        head, table_offset = self._head(total)
        block, place = _places(table, block, table_offset + total * 4, self.modulus)
        bat = _table(total, block, place)
        end = int(place[-1]) + unit if len(place) else table_offset + len(bat)
        if end // structs.SECTOR >= structs.UNUSED:
            raise PlanError(
                f"VHD cannot hold {self.size} bytes in blocks aligned to {self.modulus}: its file ends at 2T"
            )
        footer = self._footer(structs.DIFFERENCING if differencing else structs.DYNAMIC)
        metadata = {
            0: Blob("footer copy", footer),
            structs.FOOTER_LENGTH: Blob("dynamic header", head),
            table_offset: Blob("BAT", bat),
            end: Blob("footer", footer),
        }
        bitmaps = _bitmaps(table, block, differencing=differencing)
        first = len(table.sources)
        rows, length = cut(table, block * unit, np.full(len(block), unit), place)
        named = [_blob_row(offset, first + 1 + index) for index, offset in enumerate(metadata)]
        before = Columns(
            place - _BITMAP,
            np.full(len(place), Kind.DATA, dtype=np.uint8),
            np.full(len(place), first, dtype=np.int32),
            np.arange(len(place), dtype=np.int64) * _BITMAP,
        )
        sizes = [np.array([blob.size for blob in metadata.values()]), np.full(len(place), _BITMAP), length]
        sources = (*table.sources, bitmaps, *metadata.values())
        both, both_length = Columns.join([*named, before, rows]), np.concatenate(sizes).astype(np.int64)
        return Layout((OutFile(Extents.placed(end + len(footer), both, both_length, sources)),), tuple(self.losses))

    def _head(self, entries: int) -> tuple[bytes, int]:
        """Returns dynamic header and parent locator, to follow the footer's copy, and the offset of the BAT."""
        at = structs.FOOTER_LENGTH + structs.DYNAMIC_HEADER_LENGTH
        name, title, locator = b"", b"", structs.ParentLocator.parse(bytes(24))
        if self.backing:
            name, title, locator = locate_parent(self.backing.reference, at)
        name += bytes(-len(name) % structs.SECTOR)
        fields: dict[str, Any] = {
            "data_offset": structs.NOWHERE,
            "table_offset": at + len(name),
            "header_version": structs.VERSION,
            "max_table_entries": entries,
            "block_size": structs.BLOCK_SIZE,
            "checksum": 0,
            "parent_unique_id": self.parent_id,
            "parent_time_stamp": 0,
            "parent_unicode_name": title.ljust(512, b"\0"),
            "parent_locators": [locator, *[structs.ParentLocator.parse(bytes(24))] * (structs.LOCATORS - 1)],
        }
        fields["checksum"] = structs.checksum(structs.DynamicHeader.build(fields), structs.HEADER_CHECKSUM_OFFSET)
        return structs.DynamicHeader.build(fields) + name, at + len(name)

    # -- footer

    def _footer(self, kind: int) -> bytes:
        cylinders, heads, sectors = self.geometry
        fields: dict[str, Any] = {
            "features": structs.FEATURE_RESERVED,
            "file_format_version": structs.VERSION,
            "data_offset": structs.NOWHERE if kind == structs.FIXED else structs.FOOTER_LENGTH,
            # No clock: the same disk and identity give the same image.
            "time_stamp": 0,
            "creator_application": self._creator(),
            "creator_version": _CREATOR_VERSION,
            "creator_host_os": b"Wi2k",
            "original_size": self.size,
            "current_size": self.size,
            "cylinders": cylinders,
            "heads": heads,
            "sectors": sectors,
            "disk_type": kind,
            "checksum": 0,
            "unique_id": self.unique_id,
            "saved_state": 0,
        }
        footer = structs.Footer.build(fields)
        fields["checksum"] = structs.checksum(footer, structs.CHECKSUM_OFFSET)
        return bytes(structs.Footer.build(fields)).ljust(structs.FOOTER_LENGTH, b"\0")

    def _creator(self) -> bytes:
        """Returns the source's creator, or Windows' if that does not fit or would change the size.

        QEMU takes the size from the geometry for creators that it does not know.
        """
        said = self.image.facts.creator
        if said is None:
            return _WINDOWS
        creator = structs.creator_code(said)
        cylinders, heads, sectors = self.geometry
        by_geometry = cylinders * heads * sectors * structs.SECTOR
        if len(creator) == 4 and (creator in structs.SIZED_BY_FOOTER or by_geometry == self.size):
            return creator
        why = "has 4 characters" if len(creator) > 4 else "would make readers take the geometry for the size"
        self.losses.append(f"creator {said}: its VHD code {why}")
        return _WINDOWS

    def _geometry(self) -> tuple[int, int, int]:
        """Returns the source's geometry, or the specification's for the size."""
        if self.image.facts.geometry is not None:
            cylinders, heads, sectors = self.image.facts.geometry
            if cylinders < 1 << 16 and heads < 1 << 8 and sectors < 1 << 8:
                return cylinders, heads, sectors
            self.losses.append(f"geometry {cylinders}/{heads}/{sectors}: VHD has 16, 8 and 8 bits for it")
        return structs.geometry_of(self.size // structs.SECTOR)


def _parent_id(image: Image, backing: Backing | None) -> bytes:
    if backing is None:
        return bytes(16)
    identity = image.parent.facts.identity if image.parent else None
    if backing.format != "vhd" or identity is None:
        what = f"one of format {backing.format}" if backing.format != "vhd" else "one without a unique id"
        raise PlanError(
            f"the parent of a VHD must be a VHD with a unique id, {backing.reference} is {what}",
            hint="convert the parent to vhd first, or flatten the chain",
        )
    return identity.bytes


def locate_parent(reference: str, at: int) -> tuple[bytes, bytes, dict[str, Any]]:
    """Returns the parent's path as Windows writes it, its name for the header, and the locator that points to `at`."""
    windows = to_windows(reference)
    absolute = reference.startswith("/")
    data = (windows if absolute else f".\\{windows}").encode("utf-16-le", "replace")
    if len(data) > structs.MAX_LOCATOR_LENGTH:
        raise PlanError(f"parent name of {len(data)} bytes: a VHD has room for {structs.MAX_LOCATOR_LENGTH}")
    space = -(-len(data) // structs.SECTOR) * structs.SECTOR
    locator = {
        "platform_code": structs.ABSOLUTE if absolute else structs.RELATIVE,
        "platform_data_space": space,
        "platform_data_length": len(data),
        "platform_data_offset": at,
    }
    return data, windows.encode("utf-16-be", "replace")[-510:], locator


def _whole_cylinders(sectors: int) -> int:
    """Returns the sectors of the smallest geometry that holds this many, or `sectors` if none does."""
    # As QEMU. At most one cylinder of numbers is tried.
    for wanted in itertools.count(sectors):
        geometry = structs.geometry_of(wanted)
        if geometry == structs.MAX_GEOMETRY:
            break
        if math.prod(geometry) >= sectors:
            return math.prod(geometry)
    return sectors


def _blob_row(offset: int, source: int) -> Columns:
    return Columns(
        np.array([offset], dtype=np.int64),
        np.array([Kind.DATA], dtype=np.uint8),
        np.array([source], dtype=np.int32),
        np.zeros(1, dtype=np.int64),
    )


def _allocated(table: Extents, *, differencing: bool) -> tuple[Column, int]:
    """Returns the numbers of the blocks to allocate, and the total number of blocks."""
    runs = blocks.whole_blocks(table, structs.BLOCK_SIZE)
    kind = np.repeat(runs.kind, runs.blocks)
    # VHD has no zero blocks: hiding the parent takes an allocated one, which is a hole in the file.
    least = Kind.ZERO if differencing else Kind.DATA
    return np.flatnonzero(kind >= least).astype(np.int64), len(kind)


def _places(table: Extents, block: Column, base: int, modulus: int) -> tuple[Column, Column]:
    """Returns the blocks in the order of their sources, and the offset of each one's data, congruent to its source.

    Blocks are apart by the modulus, at least 4 KiB, so the bitmap fits between two neighbours of any phases. Data
    without a phase in the source is aligned to 4 KiB, with its bitmap at 3584, as in Windows.
    """
    if not len(block):
        return block, block
    unit = structs.BLOCK_SIZE
    source, wanted = blocks.preferred(table, block * unit)
    order = np.lexsort((wanted, source))
    phase = wanted[order] % modulus
    phase[phase % structs.SECTOR != 0] = 0
    align = max(modulus, _PAGE)
    stride = -(-(unit + align) // align) * align
    # The BAT is whole sectors.
    first = -(-(base + structs.SECTOR + _BITMAP) // align) * align
    return block[order], first + np.arange(len(block), dtype=np.int64) * stride + phase


def _table(entries: int, block: Column, place: Column) -> bytes:
    bat = np.full(entries, structs.UNUSED, dtype=">u4")
    bat[block] = (place - _BITMAP) // structs.SECTOR
    data = bat.tobytes()
    return data + b"\xff" * (-len(data) % structs.SECTOR)


def _bitmaps(table: Extents, block: Column, *, differencing: bool) -> Blob:
    """Returns the concatenated bitmaps of these blocks: ones, and zeros for sectors of the parent."""
    if not differencing:
        return Blob("bitmaps", lambda _, length: b"\xff" * length, len(block) * _BITMAP)
    sectors = structs.BLOCK_SIZE // structs.SECTOR
    allocated = blocks.allocated(table)

    def compute(offset: int, length: int) -> bytes:
        first, last = offset // _BITMAP, (offset + length - 1) // _BITMAP
        parts = []
        for number in block[first : last + 1].tolist():
            kind, _, _ = allocated.units(structs.SECTOR, number * sectors, sectors)
            parts.append(np.packbits(kind != Kind.HOLE).tobytes())
        skip = offset - first * _BITMAP
        return b"".join(parts)[skip : skip + length]

    return Blob("bitmaps", compute, len(block) * _BITMAP)
