"""Persistent bitmaps of a qcow2 image: added, removed, cleared, enabled, disabled, merged.

Each step writes a new bitmap directory. The reference counts follow from the tables (`vmconv_qcow2.refcounts`).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vmconv.plugin import BitmapChange, Draft, Image, PlanError, UsageError
from vmconv_qcow2 import structs
from vmconv_qcow2.area import rewrite, stored_extensions
from vmconv_qcow2.bitmaps import bitmap_named, ranges_of
from vmconv_qcow2.header import Bitmap, Header, read_bitmaps, read_header
from vmconv_qcow2.refcounts import Space, opened, settle

_ENTRY = struct.Struct(">QIIBBHI")
_AUTOCLEAR = 88
_MOST_NAME = 1023
_LEAST_GRANULARITY = 512
_DEFAULT_GRANULARITY = (4096, 65536)
_MOST_MERGED = 64 << 20
"""Bytes of a bitmap that is merged into."""


def change_bitmaps(image: Image, name: str, changes: Sequence[BitmapChange]) -> Draft:
    """Returns the file after changes of the bitmap `name`, in their order."""
    header, draft = read_header(image.file), Draft(image.file)
    if header.version < 3:
        raise PlanError(f"{image.file.name}: version 2 of qcow2 has no bitmaps")
    if header.incompatible & structs.CORRUPT:
        raise PlanError(f"{image.file.name}: is marked corrupt", hint=f"vmconv check -r all {image.file.path}")
    space = opened(draft, header.size)
    for change in changes:
        _change(draft, space, name, change)
    settle(draft, space, header.size)
    return draft


def _change(draft: Draft, space: Space, name: str, change: BitmapChange) -> None:
    header = read_header(draft)
    if change.verb == "add":
        entries = [*_entries(header).values(), _new_entry(draft, header, space, name, change)]
        _write_directory(draft, header, space, entries)
        return
    chosen = bitmap_named(header, name)
    if change.verb != "remove":
        _refuse_unusable(header, chosen)
    if change.verb == "remove":
        _write_directory(draft, header, space, [raw for one, raw in _entries(header).items() if one != chosen])
    elif change.verb == "clear":
        draft.write(chosen.table_offset, bytes(chosen.table_size * 8))
    elif change.verb == "merge":
        _merge(draft, header, space, chosen, change)
    else:
        flags = chosen.flags & ~structs.BITMAP_AUTO | (structs.BITMAP_AUTO if change.verb == "enable" else 0)
        entries = [_flagged(raw, flags) if one == chosen else raw for one, raw in _entries(header).items()]
        _write_directory(draft, header, space, entries)


def _refuse_unusable(header: Header, bitmap: Bitmap) -> None:
    what = f"{header.file.name}: bitmap {bitmap.name!r}"
    if bitmap.flags & structs.BITMAP_IN_USE:
        raise PlanError(f"{what} is in use, or its last user did not save it", hint="it can only be removed")
    if bitmap.flags & ~structs.BITMAP_AUTO or bitmap.extra_size or bitmap.type != structs.DIRTY_BITMAP:
        raise PlanError(f"{what} has unknown flags ({bitmap.flags:#x}), data or type ({bitmap.type})")


# -- the directory


def _entries(header: Header) -> dict[Bitmap, bytes]:
    """Returns the bitmaps and their entries in the directory, as they are."""
    found, at = {}, header.bitmaps.directory_offset if header.bitmaps else 0
    for bitmap in read_bitmaps(header):
        length = _ENTRY.size + bitmap.extra_size + len(os.fsencode(bitmap.name))
        found[bitmap] = header.file.read(at, length)
        at += length + -length % 8
    return found


def _flagged(entry: bytes, flags: int) -> bytes:
    return entry[:12] + flags.to_bytes(4, "big") + entry[16:]


def _write_directory(draft: Draft, header: Header, space: Space, entries: Sequence[bytes]) -> None:
    """Writes a directory to another place, and the header extension that leads to it; none without bitmaps."""
    directory = b"".join(entry + bytes(-len(entry) % 8) for entry in entries)
    for count, most, what in (
        (len(entries), structs.MAX_BITMAPS, "bitmaps"),
        (len(directory), structs.MAX_BITMAP_DIRECTORY, "bytes of bitmap directory"),
    ):
        if count > most:
            raise PlanError(f"{draft.name}: {count} {what}, {most} at most")
    kept = stored_extensions(header)
    kept.pop(structs.BITMAPS, None)
    autoclear = header.autoclear & ~structs.BITMAPS_CONSISTENT
    if entries:
        clusters = -(-len(directory) // header.cluster_size)
        place = space.take(clusters)
        draft.write(place, directory.ljust(clusters * header.cluster_size, b"\0"))
        fields = {"nb_bitmaps": len(entries), "directory_size": len(directory), "directory_offset": place}
        kept[structs.BITMAPS] = structs.Bitmaps.build(fields)
        autoclear |= structs.BITMAPS_CONSISTENT
    rewrite(draft, header, kept, os.fsencode(header.backing_file or ""))
    draft.write(_AUTOCLEAR, autoclear.to_bytes(8, "big"))


# -- one bitmap


def _new_entry(draft: Draft, header: Header, space: Space, name: str, change: BitmapChange) -> bytes:
    text, least, most = os.fsencode(name), *_DEFAULT_GRANULARITY
    if not 0 < len(text) <= _MOST_NAME:
        raise UsageError(f"a bitmap name of {len(text)} bytes, 1 to {_MOST_NAME} are possible")
    if any(one.name == name for one in read_bitmaps(header)):
        raise UsageError(f"{draft.name}: has a bitmap {name!r}")
    granularity = change.granularity or min(max(header.cluster_size, least), most)
    if not _LEAST_GRANULARITY <= granularity <= 1 << structs.MAX_GRANULARITY_BITS or granularity & (granularity - 1):
        raise UsageError(f"granularity {granularity}: is not a power of two from {_LEAST_GRANULARITY} to 2 GiB")
    clusters = -(-header.size // (granularity * 8 * header.cluster_size))
    if not clusters or clusters * header.cluster_size > structs.MAX_BITMAP_BYTES:
        size = clusters * header.cluster_size
        raise PlanError(f"{draft.name}: a bitmap of {size} bytes, 1 to {structs.MAX_BITMAP_BYTES} are possible")
    table = -(-clusters * 8 // header.cluster_size)
    place = space.take(table)
    draft.write(place, bytes(table * header.cluster_size))
    bits = granularity.bit_length() - 1
    return _ENTRY.pack(place, clusters, structs.BITMAP_AUTO, structs.DIRTY_BITMAP, bits, len(text), 0) + text


def _merge(draft: Draft, header: Header, space: Space, chosen: Bitmap, change: BitmapChange) -> None:
    """Sets the bits of all that another bitmap has as written."""
    origin = header if change.source_image is None else read_header(change.source_image.file)
    source = bitmap_named(origin, change.source)
    _refuse_unusable(origin, source)
    if origin.size != header.size:
        raise PlanError(
            f"{draft.name}: has {header.size} bytes, and {origin.file.name} with bitmap {source.name!r} has "
            f"{origin.size}",
            hint="only bitmaps of disks of one size can be merged",
        )
    unit, cluster = 1 << chosen.granularity_bits, header.cluster_size
    if chosen.table_size * cluster > _MOST_MERGED:
        raise PlanError(
            f"{draft.name}: bitmap {chosen.name!r} has {chosen.table_size * cluster} bytes, {_MOST_MERGED} at most"
        )
    edges = np.zeros(chosen.table_size * cluster * 8 + 1, dtype=np.int32)
    for start, length in (ranges_of(header, chosen), ranges_of(origin, source)):
        np.add.at(edges, start // unit, 1)
        np.add.at(edges, -(-(start + length) // unit), -1)
    bits = np.packbits(np.cumsum(edges[:-1]) > 0, bitorder="little").reshape(-1, cluster)
    _write_bits(draft, space, chosen, bits)


def _write_bits(draft: Draft, space: Space, chosen: Bitmap, bits: npt.NDArray[np.uint8]) -> None:
    raw = np.frombuffer(draft.read(chosen.table_offset, len(bits) * 8), dtype=">u8").astype(np.uint64)
    offset = (raw & np.uint64(structs.OFFSET_MASK)).astype(np.int64)
    for number in range(len(bits)):
        if not bits[number].any():
            offset[number] = 0
            continue
        offset[number] = offset[number] or space.take(1)
        draft.write(int(offset[number]), bits[number].tobytes())
    draft.write(chosen.table_offset, offset.astype(">u8").tobytes())
