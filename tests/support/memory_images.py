"""Memory images made from the documented layouts, by code of the tests that shares nothing with the plugin."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from support.hyperv_storage import storage

PAGE = 4096

Region = tuple[int, int, int]
"""First page of RAM, first page of the file, pages."""


# -- VMware


def tag(name: str, value: int, *indices: int, width: int = 4) -> bytes:
    """Returns a tag with a number."""
    head = struct.pack("<BB", len(indices) << 6 | width, len(name)) + name.encode()
    return head + struct.pack(f"<{len(indices)}I", *indices) + value.to_bytes(width, "little")


def block(name: str, data: bytes, *indices: int, padding: int = 0, version: int = 2) -> bytes:
    """Returns a tag with a block of any length."""
    head = struct.pack("<BB", len(indices) << 6 | 63, len(name)) + name.encode()
    head += struct.pack(f"<{len(indices)}I", *indices)
    sizes = "<IIH" if version == 0 else "<QQH"
    return head + struct.pack(sizes, len(data), len(data), padding) + bytes(padding) + data


def groups(members: Sequence[tuple[str, bytes]], magic: int = 0xBED2BED2) -> bytes:
    """Returns a saved state with these groups; each body is followed by its end."""
    at = 12 + 80 * len(members)
    head, bodies = struct.pack("<III", magic, 8, len(members)), b""
    for name, tags in members:
        body = tags + b"\0\0"
        head += struct.pack("<64sQQ", name.encode(), at + len(bodies), len(body))
        bodies += body
    return head + bodies


def regions(found: Iterable[Region]) -> bytes:
    """Returns the tags of regions."""
    found = list(found)
    tags = tag("regionsCount", len(found))
    for number, values in enumerate(found):
        for name, value in zip(("regionPPN", "regionPageNum", "regionSize"), values, strict=True):
            tags += tag(name, value, number)
    return tags


def saved_state(
    found: Iterable[Region], memory: bytes | None = None, magic: int = 0xBED2BED2, others: Sequence[str] = ("cpu",)
) -> tuple[bytes, int]:
    """Returns a .vmss, with the memory inside if given, and the offset at which that begins, or the end."""
    body = tag("align_mask", 0xFFFF) + regions(found)
    members = [(name, tag("value", 7)) for name in others]
    version = {0xBED2BED0: 0}.get(magic, 2)
    if memory is None:
        state = groups([*members, ("memory", body)], magic)
        return state, len(state)
    # The padding brings the payload to a whole page.
    bare = groups([*members, ("memory", body + block("Memory", b"", 0, 0, version=version))], magic)
    start = len(bare) - 2
    padding = -start % PAGE
    whole = groups(
        [*members, ("memory", body + block("Memory", memory, 0, 0, padding=padding, version=version))], magic
    )
    return whole, start + padding


# -- ELF


def elf_core(
    loads: Sequence[tuple[int, bytes]], *, bits: int = 64, order: str = "<", notes: bytes = b"", at: int = 0
) -> bytes:
    """Returns a core as QEMU makes it: the ranges of RAM one after the other, at any offset (at least `at`)."""
    wide = bits == 64
    head, entry = (64, 56) if wide else (52, 32)
    count = len(loads) + bool(notes)
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2, 1]) + bytes(9)
    header = struct.pack(
        order + ("HHIQQQIHHHHHH" if wide else "HHIIIIIHHHHHH"), 4, 62, 1, 0, head, 0, 0, head, entry, count, 0, 0, 0
    )
    where = head + entry * count
    programs = b""
    if notes:
        programs += _program(order, wide, 4, where, 0, len(notes))
    where = max(where + len(notes), at)
    body = bytes(where - head - entry * count - len(notes))
    for address, data in loads:
        programs += _program(order, wide, 1, where, address, len(data))
        where += len(data)
        body += data
    return ident + header + programs + notes + body


def _program(order: str, wide: bool, kind: int, offset: int, address: int, length: int) -> bytes:
    if wide:
        return struct.pack(order + "IIQQQQQQ", kind, 0, offset, 0, address, length, length, 0)
    return struct.pack(order + "8I", kind, offset, 0, address, length, length, 0, 0)


# -- LiME


def lime(ranges: Iterable[tuple[int, bytes]], version: int = 1) -> bytes:
    """Returns an ordinary LiME image."""
    return b"".join(
        struct.pack("<IIQQQ", 0x4C694D45, version, first, first + len(data) - 1, 0) + data for first, data in ranges
    )


# -- AVML


def snappy(data: bytes) -> bytes:
    """Returns data in Snappy's format: runs of one byte as copies, all else as it is."""
    out = bytearray(_varint(len(data)))
    at = 0
    while at < len(data):
        run = 1
        while at + run < len(data) and data[at + run] == data[at]:
            run += 1
        end = at + 1
        if run < 8:
            run = 1
            while end < len(data) and end - at < 60 and data[end : end + 8] != data[end - 1 : end] * 8:
                end += 1
        out += bytes([(end - at - 1) << 2]) + data[at:end]
        left = run - 1
        while left:
            # A copy of up to 64 bytes from one byte before.
            step = min(left, 64)
            out += bytes([(step - 1) << 2 | 2, 1, 0])
            left -= step
        at = end + run - 1
    return bytes(out)


def _varint(value: int) -> bytes:
    found = b""
    while value > 0x7F:
        found, value = found + bytes([value & 0x7F | 0x80]), value >> 7
    return found + bytes([value])


def snappy_chunk(data: bytes, *, packed: bool = True) -> bytes:
    """Returns a chunk of framed Snappy, with its checksum."""
    import google_crc32c

    checksum = int(google_crc32c.value(data))
    masked = ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
    body = struct.pack("<I", masked) + (snappy(data) if packed else data)
    return bytes([0 if packed else 1]) + len(body).to_bytes(3, "little") + body


def avml(ranges: Iterable[tuple[int, bytes]], *, chunk: int = 65536, version: int = 2) -> bytes:
    """Returns an AVML image; every second chunk is not compressed."""
    out = b""
    for first, data in ranges:
        pieces = [data[at : at + chunk] for at in range(0, len(data), chunk)]
        chunks = [snappy_chunk(piece, packed=not number % 2) for number, piece in enumerate(pieces)]
        stream = b"\xff\x06\0\0sNaPpY" + b"".join(chunks)
        out += struct.pack("<IIQQQ", 0x4C4D5641, version, first, first + len(data) - 1, 0)
        out += stream + struct.pack("<Q", len(stream))
    return out


# -- kdump


def flattened(pieces: Iterable[tuple[int, bytes]], version: int = 1) -> bytes:
    """Returns a file in makedumpfile's flattened format."""
    out = struct.pack(">16sqq", b"makedumpfile", 1, version).ljust(4096, b"\0")
    out += b"".join(struct.pack(">qq", at, len(data)) + data for at, data in pieces)
    return out + struct.pack(">qq", -1, -1)


@dataclass
class Kdump:
    """Makes kdump files from makedumpfile's description. `without` are pages of RAM that the dump leaves out."""

    bits: int = 64
    order: str = "<"
    flat: bool = False
    block: int = PAGE
    compression: str = "zlib"
    machine: str = "x86_64"
    level: int = 0
    status: int = 0
    notes: bytes = b""
    without: AbstractSet[int] = frozenset()
    unwritten: AbstractSet[int] = frozenset()
    descriptors: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def flag(self) -> int:
        return {"zlib": 1, "lzo": 2, "snappy": 4, "zstd": 0x20, "none": 0}[self.compression]

    @property
    def first_descriptor(self) -> int:
        return 4 * self.block

    def data(self, ranges: Sequence[tuple[int, bytes]]) -> bytes:
        block = self.block
        pages = {}
        for start, data in ranges:
            for at in range(0, len(data), block):
                pages[(start + at) // block] = data[at : at + block]
        count = max(pages) + 1
        inside = {page: data for page, data in pages.items() if page not in self.without}
        first = block * 4
        # Behind the descriptors the page of zeros, which all share.
        at = first + 24 * len(inside)
        zero, body = at, bytes(block)
        self.descriptors = []
        for page, data in sorted(inside.items()):
            packed = self._packed(data)
            if page in self.unwritten:
                self.descriptors.append((0, 0, 0))
            elif not any(data):
                self.descriptors.append((zero, block, 0))
            elif self.flag and len(packed) < block:
                self.descriptors.append((at + len(body), len(packed), self.flag))
                body += packed
            else:
                self.descriptors.append((at + len(body), block, 0))
                body += data
        table = b"".join(struct.pack(f"{self.order}QIIQ", *each, 0) for each in self.descriptors)
        maps = b"".join(self._bitmap(set(each), count).ljust(block, b"\0") for each in (pages, inside))
        head, sub = self._head(count).ljust(block, b"\0"), self._sub(count)
        whole = head + (sub + self.notes).ljust(block, b"\0") + maps + table + body
        if not self.flat:
            return whole
        return flattened((at, whole[at : at + 5000]) for at in range(0, len(whole), 5000))

    def _packed(self, data: bytes) -> bytes:
        import zlib

        import lzallright
        import zstandard

        packers: dict[str, Callable[[bytes], bytes]] = {
            "zlib": zlib.compress,
            "lzo": lzallright.LZOCompressor().compress,
            "snappy": snappy,
            "zstd": zstandard.compress,
            "none": bytes,
        }
        return packers[self.compression](data)

    def _head(self, count: int) -> bytes:
        names = b"".join(
            text.encode().ljust(65, b"\0") for text in ("Linux", "web", "6.1.0", "#1", self.machine, "(none)")
        )
        head = b"KDUMP   " + struct.pack(f"{self.order}I", 6) + names
        head = head.ljust(424 if self.bits == 64 else 412, b"\0")
        return head + struct.pack(f"{self.order}10I", self.status | self.flag, self.block, 1, 2, count, 0, 0, 0, 0, 1)

    def _sub(self, count: int) -> bytes:
        if self.bits == 32:
            return struct.pack(f"{self.order}IIIII", 0, self.level, 0, 0, 0).ljust(80, b"\0")
        place = self.block + 104 if self.notes else 0
        fields = (0, self.level, 0, 0, 0, 0, 0, place, len(self.notes), 0, 0, 0, 0, count)
        return struct.pack(f"{self.order}QII11Q", *fields)

    @staticmethod
    def _bitmap(pages: AbstractSet[int], count: int) -> bytes:
        bits = bytearray(-(-count // 8))
        for page in pages:
            bits[page // 8] |= 1 << page % 8
        return bytes(bits)


# -- Hyper-V

MIB = 1 << 20


def saved_by_hyperv(
    ranges: Iterable[tuple[int, bytes]], *, version: int = 0xA00, more: Mapping[str, Any] = MappingProxyType({})
) -> bytes:
    """Returns a .vmrs whose memory is not compressed; `more` are further values beside the memory, or other ones."""
    tree: dict[str, Any] = {"VmVersion": version, "savedVM": {"partition_state": b"state"}}
    blocks = 0
    for number, (start, data) in enumerate(ranges):
        tree[f"RamMemoryBlock{number}"] = ram_range(len(data) // PAGE, blocks * 256, start // PAGE)
        for at in range(0, len(data), MIB):
            tree[f"RamBlock{blocks}"] = data[at : at + MIB].ljust(MIB, b"\0")
            blocks += 1
    return storage({"configuration": {"properties": {"version": version}}, "savedstate": tree | dict(more)})


def ram_range(pages: int, begin: int, first: int, *, version: int = 3, flags: int = 0) -> bytes:
    """Returns the value that states a range: its pages, its first page in the blocks, its first page of RAM."""
    return struct.pack("<IIQQQIIQ", version, flags, pages, begin, first, 0, 0, 0)


# -- a machine


LOW, GAP, HIGH = 3 << 20, 5 << 20, 6 << 20
"""RAM of a small machine: from 0 to `LOW` and from `GAP` to `HIGH`, bytes."""


def ram(seed: int = 1) -> bytes:
    """Returns the RAM of that machine without the gap: random pages, and some of zeros."""
    rng = random.Random(seed)
    pages = (LOW + HIGH - GAP) // PAGE
    return b"".join(bytes(PAGE) if 96 <= number < 160 else rng.randbytes(PAGE) for number in range(pages))


def ranges(memory: bytes) -> list[tuple[int, bytes]]:
    """Returns address and bytes of each range of RAM."""
    return [(0, memory[:LOW]), (GAP, memory[LOW:])]


def physical(memory: bytes) -> bytes:
    """Returns the bytes at all addresses of that machine; zeros where it has no RAM."""
    return memory[:LOW] + bytes(GAP - LOW) + memory[LOW:]


def make_vmware(folder: Path, memory: bytes, name: str = "web") -> Path:
    """Writes a saved state and the memory beside it, with holes for pages of zeros; returns the state."""
    pages = LOW // PAGE
    state, _ = saved_state([(0, 0, pages), (GAP // PAGE, pages, len(memory) // PAGE - pages)])
    (folder / f"{name}.vmss").write_bytes(state)
    sparse(folder / f"{name}.vmem", memory)
    return folder / f"{name}.vmss"


def sparse(path: Path, content: bytes) -> Path:
    """Writes a file with holes for its pages of zeros."""
    with path.open("wb") as file:
        file.truncate(len(content))
        for at in range(0, len(content), PAGE):
            if any(content[at : at + PAGE]):
                file.seek(at)
                file.write(content[at : at + PAGE])
    return path


MAKERS: dict[str, Callable[[Path, bytes], Path]] = {}
"""Makers of the formats that vmconv only reads: called with a folder and the RAM of that machine."""

GAPLESS = frozenset({"libvirtsave", "qevm"})
"""Those of them that have no addresses: where a machine of that size has its gap follows from its kind."""

DECODED = frozenset({"avml", "kdump", "libvirtsave"})
"""Those of them whose payload lies at any offset, and is copied."""


# -- QEMU and libvirt


def _text(name: str) -> bytes:
    return bytes([len(name)]) + name.encode()


def _configuration(machine: str, capabilities: Sequence[str] = ()) -> bytes:
    found = b"QEVM" + struct.pack(">IBI", 3, 7, len(machine)) + machine.encode()
    if capabilities:
        found += b"\5" + _text("configuration/capabilities") + struct.pack(">II", 1, len(capabilities))
        found += b"".join(map(_text, capabilities))
    return found


def _ram_start(total: int) -> bytes:
    return b"\1" + struct.pack(">I", 2) + _text("ram") + struct.pack(">IIQ", 0, 4, total | 4)


def migration(memory: bytes, machine: str = "pc-i440fx-7.2", block: str = "pc.ram", again: Sequence[int] = ()) -> bytes:
    """Returns a stream with all pages of one block, and a ROM; pages `again` are sent with other bytes before."""
    rom = bytes(2 * PAGE)
    out = _configuration(machine) + _ram_start(len(memory) + len(rom))
    out += _text(block) + struct.pack(">Q", len(memory)) + _text("pc.rom") + struct.pack(">Q", len(rom))
    out += struct.pack(">QBI", 0x10, 0x7E, 2)
    pages = [(at, b"\xee" * PAGE) for at in again]
    pages += [(at, memory[at : at + PAGE]) for at in range(0, len(memory), PAGE)]
    out += b"\2" + struct.pack(">I", 2)
    for number, (at, page) in enumerate(pages):
        flags = (8 if any(page) else 2) | (0x20 if number else 0)
        out += struct.pack(">Q", at | flags) + (b"" if number else _text(block))
        out += page if any(page) else b"\0"
    out += struct.pack(">QBI", 0x10, 0x7E, 2) + b"\3" + struct.pack(">I", 2)
    out += struct.pack(">Q", 0 | 2) + _text("pc.rom") + b"\0" + struct.pack(">Q", PAGE | 2 | 0x20) + b"\0"
    out += struct.pack(">QBI", 0x10, 0x7E, 2)
    return out + _ending()


def _ending() -> bytes:
    """Returns the state of a device, which nobody has to understand, EOF, and the description of the devices."""
    device = b"\4" + struct.pack(">I", 3) + _text("timer") + struct.pack(">II", 0, 2) + bytes(24)
    described = b'{"page_size": 4096, "devices": [{"name": "timer", "instance_id": 0}]}'
    return device + struct.pack(">BIBBI", 0x7E, 3, 0, 6, len(described)) + described


def mapped_ram(
    path: Path, memory: bytes, machine: str = "pc-i440fx-9.0", front: bytes = b"", block: str = "pc.ram"
) -> Path:
    """Writes a stream with mapped RAM, as QEMU's documentation describes it; holes for pages of zeros."""
    rom = random.Random(9).randbytes(2 * PAGE)
    head = front + _configuration(machine, ("mapped-ram",)) + _ram_start(len(memory) + len(rom))
    with path.open("wb") as file:
        file.write(head)
        for name, data in ((block, memory), ("pc.rom", rom)):
            file.write(_text(name) + struct.pack(">Q", len(data)))
            count = len(data) // PAGE
            bitmap = file.tell() + 28
            size = -(-count // 64) * 8
            pages = -(-(bitmap + size) // (1 << 20)) * (1 << 20)
            file.write(struct.pack(">IQQQ", 1, PAGE, bitmap, pages))
            bits = bytearray(size)
            for number in range(count):
                page = data[number * PAGE : (number + 1) * PAGE]
                if any(page):
                    bits[number // 8] |= 1 << number % 8
                    file.seek(pages + number * PAGE)
                    file.write(page)
            file.seek(bitmap)
            file.write(bits)
            file.seek(pages + len(data))
        file.write(struct.pack(">QBI", 0x10, 0x7E, 2) + b"\3" + struct.pack(">IQBI", 2, 0x10, 0x7E, 2) + _ending())
    return path


def libvirt_header(compression: int = 0, version: int = 2) -> bytes:
    xml = b"<domain type='qemu'><name>web</name></domain>\0".ljust(1000, b"\0")
    return b"LibvirtQemudSave" + struct.pack("<5I", version, len(xml), 1, compression, 0) + bytes(56) + xml


def _make_qevm(folder: Path, memory: bytes) -> Path:
    return mapped_ram(folder / "made.mig", memory)


def _make_libvirt(folder: Path, memory: bytes) -> Path:
    path = folder / "made.save"
    path.write_bytes(libvirt_header() + migration(memory))
    return path


def _make_avml(folder: Path, memory: bytes) -> Path:
    path = folder / "made.avml"
    path.write_bytes(avml(ranges(memory)))
    return path


def _make_kdump(folder: Path, memory: bytes) -> Path:
    path = folder / "made.kdump"
    path.write_bytes(Kdump(flat=True).data(ranges(memory)))
    return path


def _make_vmrs(folder: Path, memory: bytes) -> Path:
    path = folder / "made.vmrs"
    path.write_bytes(saved_by_hyperv(ranges(memory)))
    return path


MAKERS |= {
    "vmrs": _make_vmrs,
    "avml": _make_avml,
    "kdump": _make_kdump,
    "qevm": _make_qevm,
    "libvirtsave": _make_libvirt,
}
