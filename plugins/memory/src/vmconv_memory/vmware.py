"""Reads VMware's saved states (.vmss, .vmsn) with the memory beside them (.vmem) or inside.

    0       magic number, unknown, number of groups: u32 each
    12      groups: name (64 bytes), offset, size
    offset  tags of a group: flags, length of the name, name, indices (u32), value
    block   a value of any length: two sizes, length of the padding (u16), padding, data

All numbers are little-endian. The group "memory" maps pages of RAM to pages of the .vmem: regionPPN, regionPageNum and
regionSize of each region; without regions, offsets are addresses.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from vmconv.plugin import (
    RAM_NAME,
    AccessError,
    Dependency,
    Extents,
    File,
    Image,
    ImageError,
    Kind,
    Opener,
    UsageError,
    counted,
    damaged,
    read_part,
)
from vmconv_memory.ranges import PAGE, Entries

MAGICS = {0xBED2BED0: 0, 0xBAD1BAD1: 1, 0xBED2BED2: 2, 0xBED3BED3: 3}
"""Magic numbers and the versions they stand for; version 0 has blocks with 32-bit sizes."""
HEADER = struct.Struct("<III")
GROUP = struct.Struct("<64sQQ")
MEMORY, CPU = b"memory", b"cpu"
PROCESSORS = b"\4\x0ccpu:numVCPUs\1\0\0\0\0\0"
"""The group of the processors that vmconv writes: their number, 1, which debuggers ask for, and no state."""

STATES, PAYLOADS = (".vmss", ".vmsn"), (".vmem",)

_MAX_GROUPS = 1 << 12
_MAX_TAGS = 1 << 16
_FLAT = 3 << 30
"""Memory up to here has no gap, bytes: PCs of VMware have their gap from 3 to 4 GiB."""
_BLOCKS = (62, 63)
_REGIONS = (b"regionPPN", b"regionPageNum", b"regionSize")


class Block(NamedTuple):
    """A value of any length: `size` bytes of the file from `offset` on."""

    offset: int
    size: int


class Tag(NamedTuple):
    """A tag at an offset: name, indices, and the value, a number or a block."""

    offset: int
    name: bytes
    indices: tuple[int, ...]
    value: int | Block


@dataclass(frozen=True)
class State:
    """A saved state: its version, its groups by name, and the tags of the group "memory"."""

    file: File
    version: int
    groups: Mapping[bytes, tuple[int, int]]
    tags: Mapping[tuple[bytes, tuple[int, ...]], Tag]

    def number(self, name: bytes, *indices: int) -> int | None:
        """Returns the number of a tag, None without it; raises `ImageError` if it is a block."""
        tag = self.tags.get((name, indices))
        if tag and isinstance(tag.value, Block):
            raise damaged(self.file, f"tag {name.decode()}", tag.offset, "is a block, a number is expected")
        return tag.value if tag and isinstance(tag.value, int) else None

    @property
    def inside(self) -> Tag | None:
        """The block with the memory, if it is not in a file of its own."""
        blocks = [tag for tag in self.tags.values() if tag.name == b"Memory" and isinstance(tag.value, Block)]
        return max(blocks, key=_size_of) if blocks else None


def _size_of(tag: Tag) -> int:
    return tag.value.size if isinstance(tag.value, Block) else 0


def read(file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
    """Returns the memory of a saved state; `file` is the state, or the memory with the state beside it."""
    if snapshot is not None:
        raise UsageError(f"{file.name}: a saved state has no snapshots, {snapshot!r} was requested")
    other: str | None
    if file.path.lower().endswith(PAYLOADS):
        found = opener.companion(file, STATES, "state")
        if found is None:
            return _alone(file)
        state, memory, other = read_state(found[1]), file, found[0]
        if state.inside:
            raise ImageError(
                f"{file.name}: is not the memory of {other}, which has its own inside",
                hint=f"name {other} as the source, or read this file as raw memory (-f ram)",
            )
    else:
        state = read_state(file)
        memory, other = _memory_of(state, opener)
    table = _table(state, memory)
    dependencies = (Dependency("image", other),) if other else ()
    return Image(
        "vmem",
        file,
        table.size,
        lambda: table,
        kind="memory",
        losses=_losses(state),
        warnings=_behind(table, state, memory),
        details=lambda: _details(state),
        dependencies=dependencies,
    )


def _alone(file: File) -> Image:
    """Returns a .vmem without a state. Raises `ImageError` if that state must have had regions."""
    if file.size > _FLAT:
        raise ImageError(
            f"{file.name}: has neither a .vmss nor a .vmsn beside it, and {file.size} bytes of memory have a gap",
            hint="put the .vmss or .vmsn of the same name beside it",
        )
    if not file.size or file.size % PAGE:
        raise ImageError(
            f"{file.name}: has neither a .vmss nor a .vmsn beside it, and its {file.size} bytes are not whole pages of "
            f"{PAGE} bytes: it is cut, or not VMware's",
            hint=f"if it is raw memory, use -f {RAM_NAME}",
        )
    warning = f"{file.name}: neither a .vmss nor a .vmsn is beside it: offsets are taken for addresses"
    table = Extents.whole(file)
    details = {"format-specific": {"type": "vmem", "data": {"machine-state": "none"}}}
    return Image("vmem", file, file.size, lambda: table, kind="memory", warnings=(warning,), details=lambda: details)


def _memory_of(state: State, opener: Opener) -> tuple[File, str | None]:
    """Returns the file with the memory of a state, and its name if it is another file."""
    # A .vmem beside it may be that of the machine, which has run on since.
    if state.inside:
        return state.file, None
    found = opener.companion(state.file, PAYLOADS, "memory")
    if found:
        return found[1], found[0]
    raise AccessError(
        f"{state.file.name}: its memory is not inside, and no .vmem of that name is beside it",
        hint="put the .vmem beside it",
    ) from FileNotFoundError(state.file.path)


# -- the state


def read_state(file: File) -> State:
    """Returns the groups of a saved state and the tags of its memory; raises `ImageError` with the invalid field."""
    magic, _, count = HEADER.unpack(read_part(file, "header", 0, HEADER.size))
    if magic not in MAGICS:
        raise damaged(file, "magic", 0, f"{magic:#x} is not the magic number of a saved state")
    if count > _MAX_GROUPS:
        raise damaged(file, "group count", 8, f"{count} is more than {_MAX_GROUPS}")
    groups = {}
    raw = read_part(file, "groups", HEADER.size, count * GROUP.size)
    for number, (name, offset, size) in enumerate(GROUP.iter_unpack(raw)):
        place = HEADER.size + number * GROUP.size
        if offset > file.size:
            raise damaged(
                file, f"offset of group {number}", place + 64, f"{offset:#x} is past the end ({file.size:#x})"
            )
        groups[name.partition(b"\0")[0]] = offset, size
    if MEMORY not in groups:
        raise damaged(file, "groups", HEADER.size, f"none of {count} is the memory")
    version = MAGICS[magic]
    tags = {(tag.name, tag.indices): tag for tag in _tags(file, groups[MEMORY][0], version)}
    return State(file, version, groups, tags)


def _tags(file: File, at: int, version: int) -> Iterator[Tag]:
    """Yields the tags of a group that begins at an offset."""
    for _ in range(_MAX_TAGS):
        flags, length = read_part(file, "tag", at, 2)
        if not (flags or length):
            return
        count, size = flags >> 6, flags & 0x3F
        head = read_part(file, "tag", at + 2, length + 4 * count)
        name, indices = head[:length], struct.unpack(f"<{count}I", head[length:])
        value = at + 2 + len(head)
        if size in _BLOCKS:
            block = _block(file, value, version)
            yield Tag(at, name, indices, block)
            at = block.offset + block.size
        else:
            yield Tag(at, name, indices, int.from_bytes(read_part(file, "tag", value, size), "little"))
            at = value + size
    raise damaged(file, "tag", at, f"more than {_MAX_TAGS} tags in the group")


def _block(file: File, at: int, version: int) -> Block:
    layout = struct.Struct("<IIH" if version == 0 else "<QQH")
    size, _, padding = layout.unpack(read_part(file, "block", at, layout.size))
    offset = at + layout.size + padding
    if offset + size > file.size:
        raise damaged(file, "size of a block", at, f"{size:#x} bytes at {offset:#x} end past the file ({file.size:#x})")
    return Block(offset, size)


# -- the memory


def _table(state: State, memory: File) -> Extents:
    """Returns the table of the memory, whose bytes are `memory`, or a block of the state itself."""
    tag = state.inside if memory is state.file else None
    base, size = (tag.value.offset, tag.value.size) if tag and isinstance(tag.value, Block) else (0, memory.size)
    entries = Entries(state.file, "region", memory)
    count = state.number(b"regionsCount") or 0
    for number in range(count):
        address, page, pages = (_region(state, name, number) for name in _REGIONS)
        place = state.tags[_REGIONS[0], (number,)].offset
        if (page + pages) * PAGE > size:
            raise entries.error(
                place, f"pages {page:#x} to {page + pages:#x} end past the memory, which has {size // PAGE:#x}"
            )
        entries.add(place, address * PAGE, pages * PAGE, pages * PAGE, base + page * PAGE)
    if not count:
        if tag is None and size > _FLAT:
            where = state.groups[MEMORY][0]
            raise damaged(state.file, "regionsCount", where, f"no regions, for {size} bytes of memory")
        entries.add(state.groups[MEMORY][0], 0, size, size, base)
    return entries.table()


def _behind(table: Extents, state: State, memory: File) -> tuple[str, ...]:
    """Returns a warning if a file with memory is longer than the regions of its state: it may be that of another."""
    if memory is state.file:
        return ()
    stored = table.kind == Kind.DATA
    end = int((table.offset + table.length)[stored].max(initial=0))
    left = memory.size - end
    return (f"not carried over: {left} bytes of {memory.name} behind the last region",) if left else ()


def _region(state: State, name: bytes, number: int) -> int:
    value = state.number(name, number)
    if value is None:
        where = state.groups[MEMORY][0]
        raise damaged(state.file, f"region {number}", where, f"has no tag {name.decode()}")
    return value


def _others(state: State) -> list[str]:
    """Returns the names of the groups with the state of devices and processors."""
    at, size = state.groups.get(CPU, (0, 0))
    known = state.file.read(at, min(size, len(PROCESSORS), state.file.size - at))
    without = {MEMORY, CPU} if known == PROCESSORS else {MEMORY}
    return sorted(name.decode("ascii", "replace") for name in state.groups.keys() - without)


def _losses(state: State) -> tuple[str, ...]:
    others = _others(state)
    named = ", ".join(others[:3])
    return (f"state of the machine in {counted(len(others), 'group')}, such as {named}",) if others else ()


def _details(state: State) -> Mapping[str, Any]:
    data = {
        "version": state.version,
        "regions": state.number(b"regionsCount") or 0,
        "memory-inside": state.inside is not None,
        "machine-state": ", ".join(_others(state)) or "none",
    }
    return {"format-specific": {"type": "vmem", "data": data}}
