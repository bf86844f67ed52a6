"""Writes VHDX images: a pure function from the guest's table to the table of the output file.

    file type, headers, region tables | log | metadata | BAT | sector bitmap blocks | payload blocks
    file type, headers, region tables | payload blocks, unmoved | log | metadata | BAT | ...             (in place)

All parts and payload blocks lie at whole MiB, so payload aligned in the source is aligned here. BAT and sector bitmaps
are computed on writing, a slice at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

import numpy as np
import numpy.typing as npt

from vmconv.plugin import (
    Backing,
    Blob,
    Column,
    Columns,
    Extents,
    File,
    Image,
    Kind,
    Layout,
    OutFile,
    Pinned,
    Placeholder,
    Placement,
    PlanError,
    blocks,
    cut,
    derived,
    distinct,
    gather,
    to_windows,
)
from vmconv_vhdx import structs
from vmconv_vhdx.options import Options

_CREATOR = "vmconv"
# Units of a bitmap in one slice; computing needs about 20 bytes for each.
_BITS = 1 << 19
# QEMU's block sizes, by the size of the disk in bytes.
_BLOCK_SIZES = ((32 << 40, 64 << 20), (100 << 30, 32 << 20), (1 << 30, 16 << 20))
_SMALL_BLOCK = 8 << 20


@dataclass(frozen=True)
class _Parts:
    """Offsets of the parts of the file, bytes."""

    log: int
    log_length: int
    metadata: int
    bat: int
    bat_length: int
    bitmaps: int
    end: int


def write(image: Image, options: Options, placement: Placement, *, backing: Backing | None = None) -> Layout:
    """Returns the layout of a VHDX image; raises `PlanError` if VHDX cannot hold the disk or its parent."""
    return _Writer(image, options, placement, backing).layout()


class _Writer:
    def __init__(self, image: Image, options: Options, placement: Placement, backing: Backing | None) -> None:
        self.image = image
        self.options = options
        self.backing = backing
        self.modulus = placement.modulus
        self.identity, self.content = placement.identity, placement.content_identity
        self.fixed = options.subformat == "fixed"
        if backing and self.fixed:
            raise PlanError("a fixed VHDX cannot have a parent", hint="use -o subformat=dynamic")
        self.linkage = _linkage(image, backing) if backing else None
        self.sector = options.logical_sector_size or image.facts.logical_sector_size or 512
        self.size = _whole_sectors(image.size, self.sector)
        self.block = self._blocks(options, placement.carrier)
        self.ratio = structs.chunk_ratio(self.block, self.sector)
        table = blocks.padded(blocks.grown(image, self.size, on_parent=backing is not None), self.block)
        if not backing:
            table = table.without_holes()
        elif image.parent:
            table = blocks.fill_partial_holes(table, image.parent.flat.window(0, table.size), self.sector)
        self.guest = table
        self.runs = blocks.whole_blocks(table, self.block)
        self.pinned: Pinned | None = None
        if placement.carrier:
            self._pin(placement.carrier)
        self.partial = self._partial()
        mixed_holes = _among(self.runs.first, self.partial)
        self.allocated = (self.runs.kind == Kind.DATA) | mixed_holes | self.fixed
        self.chunks = distinct(self.partial // self.ratio)

    def _blocks(self, options: Options, carrier: File | None) -> int:
        """Returns the bytes of a block; in place by default the smallest, because the first block may have to move."""
        if carrier is None:
            return options.block_size or next((b for limit, b in _BLOCK_SIZES if self.size > limit), _SMALL_BLOCK)
        if self.fixed:
            raise PlanError("in place, a VHDX cannot be fixed", hint="use -o subformat=dynamic")
        return options.block_size or structs.MIB

    def _pin(self, carrier: File) -> None:
        """Leaves payload in place, except for the part that must clear the headers."""
        from vmconv.plugin import pin

        found = pin(self.guest.window(0, self.size), carrier, [self.block], structs.MIB)
        self.pinned = found.cleared(structs.HEADER_SECTION)
        runs = self.runs.take(self.runs.kind != Kind.DATA).joined(self.pinned.runs)
        self.runs = runs.take(np.argsort(runs.first, kind="stable"))

    def layout(self) -> Layout:
        parts = self._parts()
        payload = self.runs.take(self.allocated)
        run, offset, end = self._stay(payload, parts.end) if self.pinned else self._place(payload, parts.end)
        places = np.zeros(len(self.runs.first), dtype=np.int64)
        places[np.flatnonzero(self.allocated)[run]] = offset
        moved = payload.take(run)
        rows, length = cut(self.guest, moved.first * self.block, moved.blocks * self.block, offset)
        metadata = [*self._headers(parts), (parts.metadata, Blob("metadata", self._metadata()))]
        metadata += [(parts.bat, self._bat(parts, self._host(places, end))), (parts.bitmaps, self._bitmaps())]
        table = blocks.output_table(metadata, self.guest, rows, length, end)
        return Layout((OutFile(table, slack=True),))

    # -- placement

    def _parts(self) -> _Parts:
        log = self.pinned.end if self.pinned else structs.HEADER_SECTION
        metadata = log + self.options.log_size
        bat = metadata + structs.MIB
        bat_length = -(-self._entries() * 8 // structs.MIB) * structs.MIB
        bitmaps = bat + bat_length
        end = bitmaps + len(self.chunks) * structs.BITMAP_BLOCK
        return _Parts(log, self.options.log_size, metadata, bat, bat_length, bitmaps, end)

    def _place(self, payload: blocks.Runs, base: int) -> tuple[Column, Column, int]:
        """Returns runs of blocks and their offsets; a fixed disk has them in guest order."""
        align = max(structs.MIB, self.modulus)
        base = -(-base // align) * align
        if self.fixed:
            return np.arange(len(payload.first)), base + payload.first * self.block, base + self.guest.size
        placed = blocks.place(self.guest, payload, self.block, base, self.modulus)
        return placed.run, placed.offset, placed.end

    def _stay(self, payload: blocks.Runs, end: int) -> tuple[Column, Column, int]:
        """Returns runs of blocks and their present offsets."""
        assert self.pinned
        offset = self.pinned.offset[np.argsort(self.pinned.runs.first, kind="stable")]
        return np.arange(len(payload.first)), offset, end

    def _partial(self) -> Column:
        """Returns the numbers of blocks that are partly the parent's."""
        mixed = self.runs.first[self.runs.mixed]
        if not self.backing or not len(mixed):
            return mixed[:0]
        rows = gather(self.guest, mixed * self.block, np.full(len(mixed), self.block), mixed * self.block)
        least = np.minimum.reduceat(rows.kind, np.searchsorted(rows.start, mixed * self.block))
        partial: Column = mixed[least == Kind.HOLE]
        return partial

    def _host(self, places: Column, end: int) -> Extents:
        """Returns the table from guest blocks to the output file."""
        kind = np.where(self.allocated, np.uint8(Kind.DATA), self.runs.kind)
        none = np.zeros(len(kind), dtype=np.int32)
        return Extents(
            self.guest.size, Columns(self.runs.first * self.block, kind, none, places), [Placeholder("output", end)]
        )

    # -- tables

    def _bat(self, parts: _Parts, host: Extents) -> Blob:
        total, ratio = self.guest.size // self.block, self.ratio

        def compute(offset: int, length: int) -> bytes:
            first, last = offset // 8, -(-(offset + length) // 8)
            entry = np.arange(first, last, dtype=np.int64)
            of_bitmap = entry % (ratio + 1) == ratio
            block = entry - entry // (ratio + 1)
            value = np.zeros(len(entry), dtype=np.int64)
            payload = ~of_bitmap & (block < total)
            value[payload] = self._payload_entries(host, int(block[0]), int(payload.sum()))
            value[of_bitmap] = self._bitmap_entries(parts, entry[of_bitmap] // (ratio + 1))
            skip = offset - first * 8
            return value.astype("<i8").tobytes()[skip : skip + length]

        return Blob("BAT", compute, self._entries() * 8)

    def _entries(self) -> int:
        """Returns the number of BAT entries: with one for a bitmap behind each chunk, or only between chunks."""
        total = self.guest.size // self.block
        return -(-total // self.ratio) * (self.ratio + 1) if self.backing else total + (total - 1) // self.ratio

    def _payload_entries(self, host: Extents, first: int, count: int) -> Column:
        kind, _, place = host.units(self.block, first, count)
        entry = np.where(kind == Kind.DATA, place | structs.FULLY_PRESENT, 0)
        entry[kind == Kind.ZERO] = structs.ZERO
        low, high = np.searchsorted(self.partial, [first, first + count])
        entry[self.partial[low:high] - first] |= structs.PARTIALLY_PRESENT
        return entry

    def _bitmap_entries(self, parts: _Parts, chunk: Column) -> Column:
        at = np.searchsorted(self.chunks, chunk)
        there = _among(chunk, self.chunks)
        return np.where(there, parts.bitmaps + at * structs.BITMAP_BLOCK | structs.BITMAP_PRESENT, 0)

    def _bitmaps(self) -> Blob:
        """Returns the concatenated sector bitmap blocks: one bit per sector, 0 for sectors of the parent."""
        allocated = blocks.allocated(self.guest)

        def compute(offset: int, length: int) -> bytes:
            out = []
            while length:
                chunk, inside = divmod(offset, structs.BITMAP_BLOCK)
                step = min(length, structs.BITMAP_BLOCK - inside, _BITS // 8)
                sector = int(self.chunks[chunk]) * structs.CHUNK_SECTORS + inside * 8
                kind, _, _ = allocated.units(self.sector, sector, step * 8)
                out.append(np.packbits(kind != Kind.HOLE, bitorder="little").tobytes())
                offset, length = offset + step, length - step
            return b"".join(out)

        return Blob("sector bitmaps", compute, len(self.chunks) * structs.BITMAP_BLOCK)

    # -- headers and metadata

    def _headers(self, parts: _Parts) -> list[tuple[int, Blob]]:
        creator = self._creator().encode("utf-16-le", "replace").ljust(512, b"\0")
        found = [(0, Blob("file type identifier", structs.FileTypeIdentifier.build({"creator": creator})))]
        for number, at in enumerate(structs.HEADER_OFFSETS):
            fields = {
                "checksum": 0,
                "sequence_number": number + 1,
                "file_write_guid": self._derived("file write").bytes_le,
                "data_write_guid": self._derived("data write").bytes_le,
                "log_guid": bytes(16),
                "log_version": 0,
                "version": 1,
                "log_length": parts.log_length,
                "log_offset": parts.log,
            }
            found.append((at, Blob(f"header {number + 1}", _sealed(structs.Header.build(fields)))))
        table = self._region_table(parts)
        return found + [(at, Blob("region table", table)) for at in structs.REGION_TABLE_OFFSETS]

    def _region_table(self, parts: _Parts) -> bytes:
        data = structs.RegionTableHeader.build({"checksum": 0, "entry_count": 2})
        for guid, at, length in (
            (structs.BAT, parts.bat, parts.bat_length),
            (structs.METADATA, parts.metadata, structs.MIB),
        ):
            entry = {"guid": guid.bytes_le, "file_offset": at, "length": length, "required": 1}
            data += structs.RegionTableEntry.build(entry)
        return _sealed(data.ljust(structs.REGION_TABLE_LENGTH, b"\0"))

    def _metadata(self) -> bytes:
        flags = structs.LEAVE_BLOCKS_ALLOCATED if self.fixed else structs.HAS_PARENT if self.backing else 0
        virtual = structs.IS_VIRTUAL_DISK
        physical = self.options.physical_sector_size or self.image.facts.physical_sector_size or self.sector
        parameters = structs.FileParameters.build({"block_size": self.block, "flags": flags})
        items = [
            (structs.FILE_PARAMETERS, parameters, 0),
            (structs.VIRTUAL_DISK_SIZE, self.size.to_bytes(8, "little"), virtual),
            (structs.VIRTUAL_DISK_ID, self._disk_id().bytes_le, virtual),
            (structs.LOGICAL_SECTOR_SIZE, self.sector.to_bytes(4, "little"), virtual),
            (structs.PHYSICAL_SECTOR_SIZE, physical.to_bytes(4, "little"), virtual),
        ]
        if self.backing:
            items.append((structs.PARENT_LOCATOR, parent_locator(self.backing.reference, self.linkage), 0))
        table, content = structs.MetadataTableHeader.build({"entry_count": len(items)}), b""
        for guid, data, flag in items:
            entry = {
                "item_id": guid.bytes_le,
                "offset": structs.METADATA_TABLE_LENGTH + len(content),
                "length": len(data),
                "flags": flag | structs.IS_REQUIRED,
            }
            table += structs.MetadataTableEntry.build(entry)
            content += data
        return bytes(table.ljust(structs.METADATA_TABLE_LENGTH, b"\0") + content)

    def _creator(self) -> str:
        creator = self.image.facts.creator or _CREATOR
        return creator if len(creator.encode("utf-16-le", "replace")) <= 510 else creator[:127]

    def _disk_id(self) -> UUID:
        """Returns the id that the guest sees, shared by all layers of a disk, as in Windows' own chains."""
        parent = self.image.parent if self.backing else None
        stated = parent.facts.identity if parent else None
        return UUID(bytes=self.identity) if stated is None else stated

    def _derived(self, what: str) -> UUID:
        return UUID(bytes=derived(self.content, f"vhdx {what}"))


def _among(values: Column, few: Column) -> npt.NDArray[np.bool_]:
    """Returns a mask of the values that are in `few`, which are sorted."""
    return np.searchsorted(few, values, side="right") > np.searchsorted(few, values, side="left")


def _sealed(data: bytes) -> bytes:
    """Returns a structure with its checksum."""
    return data[:4] + structs.checksum(data).to_bytes(4, "little") + data[8:]


def _whole_sectors(size: int, sector: int) -> int:
    """Returns the size of the disk, bytes.

    Raises `PlanError` with the nearest possible sizes if VHDX cannot hold it.
    """
    size = -(-size // 512) * 512
    if size > structs.MAX_SIZE:
        raise PlanError(f"VHDX cannot hold {size} bytes: {structs.MAX_SIZE} bytes (64 TiB) at most")
    if not size:
        raise PlanError(f"VHDX cannot hold 0 bytes, the nearest size it can hold is {sector}")
    if size % sector:
        raise PlanError(
            f"VHDX with sectors of {sector} bytes cannot hold {size} bytes",
            hint=f"the nearest sizes are {size // sector * sector} and {-(-size // sector) * sector}",
        )
    return size


def _linkage(image: Image, backing: Backing) -> UUID:
    """Returns the parent's data write GUID, which identifies it."""
    facts = image.parent.details.get("format-specific", {}) if image.parent else {}
    guid = facts.get("data", {}).get("data-write-guid") if facts.get("type") == "vhdx" else None
    if backing.format != "vhdx" or guid is None:
        raise PlanError(
            f"the parent of a VHDX must be a VHDX, {backing.reference} is not",
            hint="convert the parent to vhdx first, or flatten the chain",
        )
    return UUID(guid)


def parent_locator(reference: str, linkage: UUID | None) -> bytes:
    """Returns the parent locator: the parent's GUID, and its path as Windows writes it."""
    windows = to_windows(reference)
    absolute = reference.startswith("/")
    pairs = {
        "parent_linkage": f"{{{linkage}}}",
        "absolute_win32_path" if absolute else "relative_path": windows if absolute else f".\\{windows}",
    }
    at = structs.ParentLocatorHeader.sizeof() + len(pairs) * structs.ParentLocatorEntry.sizeof()
    header = {"locator_type": structs.VHDX_LOCATOR.bytes_le, "key_value_count": len(pairs)}
    table, content = structs.ParentLocatorHeader.build(header), b""
    for key, value in pairs.items():
        name, text = key.encode("utf-16-le"), value.encode("utf-16-le", "replace")
        if len(text) > 0xFFFF:
            raise PlanError(f"parent name of {len(text)} bytes: a VHDX has room for {0xFFFF}")
        place = at + len(content)
        entry: dict[str, Any] = {"key_offset": place, "value_offset": place + len(name)}
        table += structs.ParentLocatorEntry.build({**entry, "key_length": len(name), "value_length": len(text)})
        content += name + text
    return bytes(table + content)
