"""Reads the RAM in QEMU's migration streams, also with mapped RAM, and in libvirt's saved machines.

    QEVM, version
    configuration     name of the machine; subsections: capabilities, bits of a page, UUID
    section "ram"     start: the RAM blocks. Then parts with pages, each behind a word of address and flags
    other sections    state of devices, which is not looked at
    EOF; description of the devices, in JSON

With mapped RAM, each block has its pages at one place of the file, aligned to 1 MiB, and a bitmap of those that are not
zero. All numbers are big-endian (QEMU, docs/devel/migration). A stream has addresses in RAM blocks, not physical ones:
those follow from the kind of the machine.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from vmconv.plugin import Columns, Extents, File, Image, ImageError, Kind, Placeholder, UsageError, counted
from vmconv_memory.ending import ending
from vmconv_memory.mapped import mapped_table
from vmconv_memory.ranges import PAGE
from vmconv_memory.stream import Stream

MAGIC = b"QEVM"
_VERSION = 3
_EOF, _START, _PART, _END, _FULL, _SUBSECTION, _CONFIGURATION, _FOOTER = 0, 1, 2, 3, 4, 5, 7, 0x7E

_ZERO, _SIZES, _PAGE, _EOS, _SAME_BLOCK = 0x02, 0x04, 0x08, 0x10, 0x20
_OTHERS = {0x40: "XBZRLE", 0x80: "RDMA", 0x100: "compression", 0x200: "multifd"}
_FLAGS = PAGE - 1

_MAX_RAM = 1 << 44
_MAX_BLOCKS = 256
_MAX_PAGES = 1 << 25
"""Pages in a stream; twice 64 GiB."""
_FOUR_GIB = 1 << 32
_HIGHEST = 0xFD00000000
"""From here on QEMU may place RAM of PCs elsewhere."""


class Block(NamedTuple):
    """A RAM block: its length, and for mapped RAM the offsets of its bitmap and of its pages."""

    length: int
    bitmap: int = 0
    pages: int = 0


@dataclass
class Saved:
    """What a stream states: the machine, its blocks, and where the pages of the main one lie."""

    machine: str = ""
    mapped: bool = False
    blocks: dict[str, Block] = field(default_factory=dict)
    section: int = 0
    latest: str = ""
    """The block of the page before. It counts for the next one, also across parts."""
    address: array[int] = field(default_factory=lambda: array("q"))
    offset: array[int] = field(default_factory=lambda: array("q"))
    """Of each page in the order of the stream: address in the main block, offset in the file, -1 for zeros."""

    @property
    def main(self) -> str:
        """The name of the block with the RAM. Raises `StopIteration` if there is none."""
        return next(name for name in _MAIN if name in self.blocks)


_MAIN = ("pc.ram", "mach-virt.ram")


def read(file: File, *, snapshot: str | None = None, name: str = "qevm", at: int = 0) -> Image:
    """Returns the memory of the stream that begins at an offset of `file`."""
    if snapshot is not None:
        raise UsageError(f"{file.name}: a saved machine has no snapshots, {snapshot!r} was requested")
    stream = Stream(file, at)
    saved = _saved(stream)
    rows = _rows(file, saved)

    warnings = []
    if saved.mapped:
        block = saved.blocks[saved.main]
        inner = mapped_table(file, block.length, block.bitmap, block.pages)
    else:
        # The words in front of the pages are all over the file, and tell what is missing.
        inner, missing = _of_pages(file, stream, saved)
        if missing:
            warnings.append(f"{file.name}: {counted(missing, 'page')} of RAM not in the stream, read as zeros")
    warnings += ending(file, stream.at)
    table = _physical(rows, inner)
    others = [f"{each} ({block.length} bytes)" for each, block in saved.blocks.items() if each != saved.main]
    losses = ["state of the devices and processors"]
    losses += [f"RAM blocks that are not main memory, such as {others[0]}"] if others else []
    return Image(
        name,
        file,
        table.size,
        lambda: table,
        kind="memory",
        losses=tuple(losses),
        warnings=tuple(warnings),
        details=lambda: _details(saved, name),
    )


def _details(saved: Saved, name: str) -> Mapping[str, Any]:
    data = {
        "machine": saved.machine,
        "mapped-ram": saved.mapped,
        "ram-blocks": ", ".join(saved.blocks),
        "machine-state": "devices and processors, in QEMU's format",
    }
    return {"format-specific": {"type": name, "data": data}}


# -- the stream


def _saved(stream: Stream) -> Saved:
    """Returns what the stream says up to its list of RAM blocks; `stream` is behind it then."""
    if stream.take(4, "magic") != MAGIC:
        raise stream.error("magic", "no signature of a migration stream", back=4)
    version = stream.number(4, "version")
    if version != _VERSION:
        raise stream.error("version", f"{version} is not {_VERSION}", back=4)
    saved = Saved()
    kind = stream.number(1, "section type")
    if kind == _CONFIGURATION:
        kind = _configuration(stream, saved)
    if kind != _START:
        raise stream.error("section type", f"{kind} is not the start of a section", back=1)
    saved.section = stream.number(4, "section id")
    what = stream.text("section name")
    if what != "ram":
        raise stream.error("section name", f"{what!r} precedes the RAM, and is not read")
    stream.take(8, "instance and version")
    _blocks(stream, saved)
    return saved


def _configuration(stream: Stream, saved: Saved) -> int:
    """Reads the configuration; returns the type of the next section."""
    length = stream.number(4, "length of the machine's name")
    if length > 255:
        raise stream.error("length of the machine's name", f"{length} is more than 255", back=4)
    saved.machine = stream.take(length, "machine's name").decode("ascii", "replace")
    while (kind := stream.number(1, "section type")) == _SUBSECTION:
        name = stream.text("subsection name")
        stream.take(4, "subsection version")
        if name == "configuration/capabilities":
            count = stream.number(4, "number of capabilities")
            if count > 64:
                raise stream.error("number of capabilities", f"{count} is more than 64", back=4)
            found = [stream.text("capability") for _ in range(count)]
            saved.mapped = "mapped-ram" in found
            if "x-ignore-shared" in found:
                raise stream.error("capability", "x-ignore-shared: the RAM is not in the stream")
        elif name == "configuration/target-page-bits":
            bits = stream.number(4, "bits of a page")
            if 1 << bits != PAGE:
                raise stream.error("bits of a page", f"{bits} is not {PAGE.bit_length() - 1}", back=4)
        elif name == "configuration/uuid":
            stream.take(16, "UUID")
        else:
            raise stream.error("subsection", f"{name!r} is not known")
    return kind


def _blocks(stream: Stream, saved: Saved) -> None:
    """Reads the list of RAM blocks, and with mapped RAM the header of each."""
    word = stream.number(8, "size of all blocks")
    total = word & ~_FLAGS
    if word & _FLAGS != _SIZES or total > _MAX_RAM:
        raise stream.error("size of all blocks", f"{word:#x} is not a size up to {_MAX_RAM:#x}", back=8)
    left = total
    while left > 0:
        name = stream.text("block name")
        length = stream.number(8, "block length")
        if not 0 < length <= left or length % PAGE:
            raise stream.error(f"length of block {name!r}", f"{length:#x} is not whole pages up to {left:#x}", back=8)
        if name in saved.blocks or len(saved.blocks) >= _MAX_BLOCKS:
            raise stream.error("block name", f"{name!r} is there twice, or after {_MAX_BLOCKS} blocks")
        saved.blocks[name] = _mapped(stream, length) if saved.mapped else Block(length)
        left -= length


def _mapped(stream: Stream, length: int) -> Block:
    """Reads the header of a block of mapped RAM, and continues behind its pages."""
    version, page = stream.number(4, "version of mapped RAM"), stream.number(8, "page size")
    if version != 1 or page != PAGE:
        raise stream.error("mapped RAM", f"version {version} with pages of {page} bytes is not 1 with {PAGE}", back=12)
    bitmap, pages = stream.number(8, "offset of the bitmap"), stream.number(8, "offset of the pages")
    size = -(-length // PAGE // 64) * 8
    for what, at, count, back in (("bitmap", bitmap, size, 16), ("pages", pages, 0, 8)):
        if at < stream.at or at + count > stream.file.size:
            end = f"from {stream.at:#x} to the end of the file ({stream.file.size:#x})"
            raise stream.error(f"offset of the {what}", f"{count} bytes at {at:#x} are not {end}", back=back)
    if pages < bitmap + size:
        raise stream.error("offset of the pages", f"{pages:#x} lies in the bitmap, up to {bitmap + size:#x}", back=8)
    stream.at = pages + length
    return Block(length, bitmap, pages)


def _parts(stream: Stream, saved: Saved) -> None:
    """Reads the words in front of the pages, up to the end of the section."""
    at_end = False
    while True:
        _pages(stream, saved)
        if at_end:
            return
        kind = stream.number(1, "section type")
        if kind == _FOOTER:
            stream.number(4, "section id")
            kind = stream.number(1, "section type")
        if kind not in (_PART, _END) or stream.number(4, "section id") != saved.section:
            raise stream.error("section type", f"{kind} interrupts the RAM, and is not read")
        at_end = kind == _END


def _pages(stream: Stream, saved: Saved) -> None:
    """Reads words and pages up to the end of one part."""
    main = next((each for each in _MAIN if each in saved.blocks), "")
    while True:
        word = stream.number(8, "page")
        flags, address = word & _FLAGS, word & ~_FLAGS
        if flags == _EOS:
            return
        other = next((text for bit, text in _OTHERS.items() if flags & bit), None)
        if other or flags & ~_SAME_BLOCK not in (_ZERO, _PAGE):
            raise stream.error("page", f"flags {flags:#x}{f' ({other})' if other else ''} are not read", back=8)
        if not flags & _SAME_BLOCK:
            saved.latest = stream.text("block name")
        block = saved.blocks.get(saved.latest)
        if block is None or address >= block.length:
            raise stream.error("page", f"address {address:#x} of block {saved.latest!r} is in no block of the list")
        place = -1
        if flags & _ZERO:
            if stream.number(1, "fill byte"):
                raise stream.error("fill byte", "is not 0", back=1)
        else:
            place = stream.skip(PAGE, "page")
        if saved.latest == main:
            saved.address.append(address)
            saved.offset.append(place)
            if len(saved.address) > _MAX_PAGES:
                raise stream.error("page", f"more than {_MAX_PAGES} pages")


# -- the memory


def _physical(rows: list[tuple[int, int, int]], inner: Extents) -> Extents:
    """Returns the table of physical memory; `inner` is that of the main block."""
    ram = Placeholder("RAM", inner.size)
    found: list[tuple[int, Kind, Placeholder | None, int]] = []
    end = 0
    for start, offset, length in rows:
        if start > end:
            found.append((end, Kind.HOLE, None, 0))
        found.append((start, Kind.DATA, ram, offset))
        end = start + length
    return Extents.of(found, end).through(ram, inner)


def _rows(file: File, saved: Saved) -> list[tuple[int, int, int]]:
    """Returns address, offset in the main block, and length of each range of RAM, for QEMU's machines.

    Raises `ImageError` for a machine that is not known, or without such a block.
    """
    try:
        machine, size = saved.machine, saved.blocks[saved.main].length
    except StopIteration:
        have = ", ".join(map(repr, saved.blocks)) or "none"
        raise ImageError(f"{file.name}: no RAM block is {' or '.join(_MAIN)}; there is {have}") from None
    if machine.startswith("virt"):
        return [(1 << 30, 0, size)]
    if machine.startswith("pc-q35"):
        low = 0x80000000 if size >= 0xB0000000 else size
    elif machine.startswith("pc-"):
        low = 0xC0000000 if size >= 0xE0000000 else size
    else:
        raise ImageError(
            f"{file.name}: machine {machine!r}: where it has its RAM is not known",
            hint="pc-*, pc-q35-* and virt-* are; QEMU's dump-guest-memory makes a core of any",
        )
    if _FOUR_GIB + size - low > _HIGHEST:
        raise ImageError(f"{file.name}: machine {machine!r}: where it has {size} bytes of RAM is not known")
    return [(0, 0, low)] + ([(_FOUR_GIB, low, size - low)] if size > low else [])


def _of_pages(file: File, stream: Stream, saved: Saved) -> tuple[Extents, int]:
    """Returns the table of the main block, and the number of its pages that are not in the stream.

    Of a page that was sent again, the last one counts.
    """
    _parts(stream, saved)
    block = saved.blocks[saved.main]
    address = np.frombuffer(saved.address, dtype=np.int64)
    offset = np.frombuffer(saved.offset, dtype=np.int64)
    order = np.argsort(address, kind="stable")
    address, offset = address[order], offset[order]
    last = np.append(address[1:] != address[:-1], True)[: len(address)]
    address, offset = address[last], offset[last]
    data = offset >= 0
    rows = Columns(
        address[data],
        np.full(int(data.sum()), Kind.DATA, dtype=np.uint8),
        np.zeros(int(data.sum()), dtype=np.int32),
        offset[data],
    )
    table = Extents.placed(block.length, rows, np.full(len(rows.start), PAGE, dtype=np.int64), [file])
    return table, block.length // PAGE - len(address)
