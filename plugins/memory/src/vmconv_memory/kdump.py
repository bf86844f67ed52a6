"""Reads kdump-compressed files: of makedumpfile, and of QEMU's `dump-guest-memory -z`, `-l` and `-s`.

    block 0   header: signature, version, names of the system, size of a block, sizes of what follows in blocks
    block 1   sub-header: level of the dump, offset of the ELF notes
    then      two bitmaps of pages: those of RAM, and those in the file
    then      a descriptor of each page in the file: offset, length, flags
    then      the pages, each compressed or not

Numbers have the width and the order of the machine's processor. QEMU, and makedumpfile if asked, write the file
flattened (makedumpfile, IMPLEMENTATION and diskdump_mod.h; QEMU, include/sysemu/dump.h).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from vmconv.plugin import (
    Column,
    Decoded,
    Extents,
    File,
    Image,
    ImageError,
    Kind,
    Kinds,
    Placeholder,
    UsageError,
    counted,
)
from vmconv_memory import structs
from vmconv_memory.elf import MAX_NOTES, machine_state, notes_in
from vmconv_memory.flattened import MAGIC as FLATTENED
from vmconv_memory.flattened import flattened
from vmconv_memory.kdump_head import LAYOUTS, Head, damaged, place, read_head
from vmconv_memory.pages import COMPRESSIONS, unpack

_SPLIT, _NOTES, _ERASED = 2, 4, 5
"""Versions from which the sub-header says that a dump is split, where its notes are, and the list of erased data."""
_INCOMPLETE = 8
_SLICE = 1 << 17
"""Bytes of a bitmap that are read at once: 2^20 pages."""
_CHUNK = 1 << 12
"""Bytes of a bitmap whose bits are counted together."""
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1).astype(np.int64)


@dataclass(frozen=True)
class Dump:
    """A file, the table of what it holds if it is flattened, and its structures, checked."""

    file: File
    content: Extents
    head: Head
    level: int
    notes: bytes
    erased: int = 0
    """The end of the list of what makedumpfile erased."""

    def read(self, what: str, offset: int, length: int) -> bytes:
        """Returns bytes of the dump. Raises `ImageError` if it ends before they do."""
        if offset + length > self.content.size:
            raise self.damaged(what, offset, f"{length} bytes reach past the end ({self.content.size:#x})")
        return self.content.read(offset, length)

    def damaged(self, what: str, offset: int, problem: str, *, guest: int | None = None) -> ImageError:
        return damaged(self.file, self.content, what, offset, problem, guest=guest)

    @property
    def flattened(self) -> bool:
        return self.file.read(0, len(FLATTENED)) == FLATTENED

    @property
    def first(self) -> int:
        """The offset of the bitmaps."""
        return (1 + self.head.sub) * self.head.block

    @property
    def descriptors(self) -> int:
        return self.first + self.head.bitmaps * self.head.block

    @property
    def descriptor(self) -> np.dtype[np.void]:
        order = self.head.order
        names = (("offset", "u8"), ("size", "u4"), ("flags", "u4"), ("page_flags", "u8"))
        return np.dtype([(name, order + kind) for name, kind in names])

    def bitmap(self, number: int, first: int, count: int) -> npt.NDArray[np.uint8]:
        """Returns bytes of the first or second bitmap."""
        at = self.first + number * self.head.bitmaps * self.head.block // 2 + first
        # Bitmaps of large machines are mostly holes.
        if not self.flattened and not self.file.data_ranges(at, at + count):
            return np.zeros(count, dtype=np.uint8)
        return np.frombuffer(self.read("bitmap", at, count), dtype=np.uint8)

    def parts(self) -> Iterator[tuple[int, int]]:
        """Yields first byte and length of the parts in which bitmaps are read."""
        size = -(-self.head.pages // 8)
        for first in range(0, size, _SLICE):
            yield first, min(_SLICE, size - first)


class KdumpImage(Image):
    """An image whose check knows what is behind its last page."""

    pages: Pages
    end: int
    """Where the dump ends in the file, if it is flattened; else the end of the file."""

    @property
    def behind(self) -> tuple[str, ...]:
        """A remark on bytes behind the last page, if there are any; reads all descriptors."""
        self.guest  # noqa: B018 finds the end
        end, content = self.pages.end, self.pages.dump.content
        found = [(place(content, end), content.size - end, "page")] if content.size > end else []
        found += [(self.end, self.file.size - self.end, "piece")] if self.file.size > self.end else []
        return tuple(
            f"{self.file.name}: {length} bytes at {at:#x} are behind the last {what}, and are not memory"
            for at, length, what in found
        )


def read(file: File, *, snapshot: str | None = None) -> Image:
    """Returns the memory in `file`; the descriptors of its pages are read when they are needed."""
    if snapshot is not None:
        raise UsageError(f"{file.name}: kdump files have no snapshots, {snapshot!r} was requested")
    is_flat = file.read(0, min(16, file.size)) == FLATTENED
    content, end = flattened(file) if is_flat else (Extents.whole(file), file.size)
    dump = _dump(file, content)
    pages = Pages(dump)
    warnings = []
    if pages.excluded:
        warnings.append(
            f"{file.name}: left out (level {dump.level}): {counted(pages.excluded, 'page')} of RAM, taken for "
            "addresses without RAM"
        )
    if dump.head.status & _INCOMPLETE:
        warnings.append(f"{file.name}: the dump is not complete; missing pages count as addresses without RAM")
    losses, state = machine_state(dump.notes, dump.head.class_, dump.head.order, structs.NUMBERS.get(dump.head.machine))
    size = dump.head.pages * dump.head.block
    image = KdumpImage(
        "kdump",
        file,
        size,
        pages.table,
        kind="memory",
        losses=losses,
        warnings=tuple(warnings),
        details=lambda: _details(dump, pages),
        state=lambda: state,
    )
    image.pages, image.end = pages, end
    return image


def _details(dump: Dump, pages: Pages) -> Mapping[str, Any]:
    head = dump.head
    cpus = sum(name == "CORE" and kind == structs.NT_PRSTATUS for name, kind in notes_in(dump.notes, head.order))
    data = {
        "version": head.version,
        "machine": head.machine,
        "flattened": dump.flattened,
        "compression": ", ".join(name for bit, name in COMPRESSIONS.items() if head.status & bit) or "none stated",
        "level": dump.level,
        "pages": pages.there,
        "excluded-pages": pages.excluded,
        "processors-with-registers": cpus,
        "machine-state": "registers of processors" if cpus else "none",
    }
    return {"format-specific": {"type": "kdump", "data": data}}


# -- headers


def _dump(file: File, content: Extents) -> Dump:
    head = read_head(file, content)
    dump = Dump(file, content, head, 0, b"")
    width = LAYOUTS[head.class_][1]
    size = 64 if width == 4 else 112
    sub = dump.read("sub-header", head.block, size)
    level, split = struct.unpack_from(f"{head.order}ii", sub, width)
    if head.version >= _SPLIT and split:
        raise ImageError(f"{file.name}: is a part of a split dump", hint="makedumpfile --reassemble joins the parts")
    # The place of the notes differs among processors of 32 bits.
    offset, length = struct.unpack_from(f"{head.order}QQ", sub, 48) if width == 8 else (0, 0)
    notes = b""
    if head.version >= _NOTES and length:
        if length > MAX_NOTES:
            raise dump.damaged("length of the notes", head.block + 56, f"{length} is more than {MAX_NOTES}")
        notes = dump.read("notes", offset, length)
    erased = sum(struct.unpack_from(f"{head.order}QQ", sub, 64)) if width == 8 and head.version >= _ERASED else 0
    return Dump(file, content, head, level, notes, erased)


# -- pages


class Pages(Decoded):
    """The pages in the file that are compressed, at their physical addresses."""

    def __init__(self, dump: Dump) -> None:
        self.dump = dump
        block = dump.head.block
        super().__init__(
            f"{dump.file.name} (kdump)",
            dump.file,
            unit=block,
            count=dump.head.pages,
            reason="pages of a kdump file have to be decompressed",
            decode=self._decode_pages,
        )
        self.end = 0
        """The end of the last page, or of what makedumpfile erased, once the table was read."""
        self._before: list[Column] = []
        self.there, self.excluded = 0, 0
        for first, length in dump.parts():
            ram, inside = self._bits(first, length)
            counts = np.add.reduceat(_BITS[inside], np.arange(0, length, _CHUNK))
            self._before.append(self.there + np.cumsum(counts) - counts)
            self.there += int(counts.sum())
            self.excluded += int(_BITS[ram & ~inside].sum())
        self._ranks = np.concatenate(self._before)
        self.begin = dump.descriptors + self.there * dump.descriptor.itemsize
        if self.begin > dump.content.size:
            problem = f"{self.there} descriptors reach past the end ({dump.content.size:#x})"
            raise dump.damaged("descriptors", dump.descriptors, problem)

    def _bits(self, first: int, length: int) -> tuple[npt.NDArray[np.uint8], ...]:
        """Returns bytes of both bitmaps, without the bits behind the last page."""
        parts = []
        for number in (0, 1):
            part = self.dump.bitmap(number, first, length)
            spare = (first + length) * 8 - self.dump.head.pages
            if spare > 0:
                part = part.copy()
                part[-1] &= 0xFF >> spare
            parts.append(part)
        return tuple(parts)

    def _rank(self, page: int) -> int:
        """Returns the number of pages in the file before a page."""
        chunk, rest = divmod(page, _CHUNK * 8)
        if not rest:
            return int(self._ranks[chunk])
        part = self.dump.bitmap(1, chunk * _CHUNK, -(-rest // 8))
        return int(self._ranks[chunk]) + int(np.unpackbits(part, bitorder="little")[:rest].sum())

    def _descriptors(self, rank: int, count: int) -> npt.NDArray[np.void]:
        kind = self.dump.descriptor
        at = self.dump.descriptors + rank * kind.itemsize
        return np.frombuffer(self.dump.read("descriptors", at, count * kind.itemsize), dtype=kind)

    def table(self) -> Extents:
        """Returns the table of the memory. Raises `ImageError` with the first descriptor that is not valid."""
        dump, block = self.dump, self.dump.head.block
        plain = Placeholder("pages", dump.content.size)

        def slices() -> Iterator[tuple[Kinds, npt.NDArray[np.int32], Column]]:
            rank, end, last = 0, self.begin, dump.erased
            for first, length in dump.parts():
                count = min(length * 8, dump.head.pages - first * 8)
                inside = np.unpackbits(self._bits(first, length)[1], bitorder="little")[:count]
                kind = np.full(count, Kind.HOLE, dtype=np.uint8)
                source = np.full(count, -1, dtype=np.int32)
                where = np.zeros(count, dtype=np.int64)
                pages = np.flatnonzero(inside)
                offset, size, flags = self._checked(rank, first * 8 + pages)
                written, packed = offset > 0, flags != 0
                # Writers put a page of zeros before all others, and all descriptors of such pages share it.
                empty = written & ~packed & (offset == self.begin) & self._begins_with_zeros
                end = self._in_order(rank, offset, np.where(written & ~empty, size, 0), end)
                last = max(last, self.begin + block * bool(empty.any()))
                rank += len(pages)
                kind[pages] = np.where(empty, Kind.ZERO, np.where(written, Kind.DATA, Kind.HOLE))
                data = written & ~empty
                source[pages] = np.where(data, np.where(packed, 0, 1), -1)
                where[pages] = np.where(data, np.where(packed, (first * 8 + pages) * block, offset), 0)
                yield kind, source, where
            self.end = min(max(end, last), dump.content.size)

        found = Extents.from_units(block, dump.head.pages * block, slices(), [self, plain])
        return found.through(plain, dump.content)

    def _in_order(self, rank: int, offset: Column, size: Column, end: int) -> int:
        """Returns the end of the last page. Raises `ImageError` if one begins before the end of the one before."""
        there = np.flatnonzero(size)
        begins = offset[there]
        ends = np.concatenate([[end], begins + size[there]])
        wrong = np.flatnonzero(begins < ends[:-1])
        if len(wrong):
            one = int(wrong[0])
            at = self.dump.descriptors + (rank + int(there[one])) * self.dump.descriptor.itemsize
            problem = f"page at {int(begins[one]):#x} begins before {int(ends[one]):#x}, the end of the page before"
            raise self.dump.damaged("descriptor", at, problem)
        return int(ends[-1])

    @cached_property
    def _begins_with_zeros(self) -> bool:
        """True if the first page in the file is all zeros."""
        block = self.unit
        return self.begin + block <= self.dump.content.size and not any(self.dump.read("page", self.begin, block))

    def _checked(self, rank: int, pages: Column) -> tuple[Column, Column, Column]:
        """Returns offset, length and compression of pages that are consecutive in the file; offset 0 if missing."""
        dump, block = self.dump, self.dump.head.block
        found = self._descriptors(rank, len(pages))
        offset, size, flags = found["offset"], found["size"].astype(np.int64), found["flags"].astype(np.int64)
        missing = (offset == 0) & bool(dump.head.status & _INCOMPLETE)
        bad = (offset < self.begin) | (offset > dump.content.size)
        place = np.where(bad, 0, offset).astype(np.int64)
        bad |= place + size > dump.content.size
        bad |= ~np.isin(flags, [0, *COMPRESSIONS]) | (size <= 0) | (size > block) | ((flags == 0) & (size != block))
        wrong = np.flatnonzero(bad & ~missing)
        if len(wrong):
            number = int(wrong[0])
            one = {name: int(found[name][number]) for name in ("offset", "size", "flags")}
            at = dump.descriptors + (rank + number) * dump.descriptor.itemsize
            problem = (
                f"{one['size']} bytes at {one['offset']:#x} with flags {one['flags']:#x} are no page between "
                f"{self.begin:#x} and {dump.content.size:#x}"
            )
            raise dump.damaged("descriptor", at, problem, guest=int(pages[number]) * block)
        return place, size, flags

    def _decode_pages(self, first: int, count: int) -> list[bytes]:
        """Returns neighbouring pages, all of which are compressed."""
        rank = self._rank(first)
        pages = first + np.arange(count, dtype=np.int64)
        self._checked(rank, pages)
        found = self._descriptors(rank, count)
        columns = (found[name].tolist() for name in ("offset", "size", "flags"))
        return [self._page(first + number, *one) for number, one in enumerate(zip(*columns, strict=True))]

    def _page(self, page: int, offset: int, size: int, flags: int) -> bytes:
        data = self.dump.read("page", offset, size)
        try:
            found = unpack(flags, data, self.unit) if flags else data
        except ValueError as exc:
            raise self.dump.damaged("page", offset, str(exc), guest=page * self.unit) from exc
        return found
