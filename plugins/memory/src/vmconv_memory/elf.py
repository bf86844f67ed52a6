"""Reads ELF cores of machines: QEMU's `dump-guest-memory`, libvirt's `dump --memory-only`, VirtualBox, kdump.

0        e_ident, header
e_phoff  program headers: PT_NOTE (processors' registers), a PT_LOAD for each range of RAM
p_offset the bytes of each
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vmconv.plugin import Extents, File, Image, ImageError, UsageError, counted, damaged, read_part
from vmconv_memory import structs
from vmconv_memory.ranges import MAX_RANGES, Entries

MAX_NOTES = 16 << 20
"""Bytes of notes."""
_MOST_NOTES = 1 << 16
_OWNER, _OWNERS = 32, 8
"""Bytes of the name of a note's owner, and owners, that are shown. Names are such as CORE, QEMU and VMCOREINFO."""


@dataclass(frozen=True)
class Core:
    """A header, checked, and the program headers."""

    file: File
    class_: int
    order: str
    machine: int
    programs: npt.NDArray[np.void]
    phoff: int

    @property
    def loads(self) -> npt.NDArray[np.int64]:
        """Indexes of the program headers of memory that is in the file."""
        return np.flatnonzero((self.programs["type"] == structs.PT_LOAD) & (self.programs["filesz"] > 0))


def read(file: File, *, snapshot: str | None = None) -> Image:
    """Returns the memory in `file`; the notes are machine state."""
    if snapshot is not None:
        raise UsageError(f"{file.name}: ELF cores have no snapshots, {snapshot!r} was requested")
    core = read_core(file)
    table = _table(core)
    found = _note_bytes(core)
    notes = list(notes_in(found, core.order))
    losses, state = machine_state(found, core.class_, core.order, core.machine)
    return Image(
        "elfcore",
        file,
        table.size,
        lambda: table,
        kind="memory",
        losses=losses,
        warnings=tuple(_warnings(core)),
        details=lambda: _details(core, notes),
        state=lambda: state,
    )


def read_core(file: File) -> Core:
    """Returns header and program headers. Raises `ImageError` with the invalid field."""
    ident = read_part(file, "ELF header", 0, structs.IDENT)
    class_, data = ident[4], ident[5]
    if ident[:4] != structs.ELF_MAGIC:
        raise damaged(file, "magic", 0, "no ELF signature")
    if class_ not in structs.HEADER:
        raise damaged(file, "EI_CLASS", 4, f"{class_} is not 1 (32 bits) or 2 (64 bits)")
    if data not in (1, 2):
        raise damaged(file, "EI_DATA", 5, f"{data} is not 1 (little-endian) or 2 (big-endian)")
    order = "<" if data == 1 else ">"
    layout = struct.Struct(order + structs.HEADER[class_])
    head = structs.ElfHeader(*layout.unpack(read_part(file, "ELF header", structs.IDENT, layout.size)))
    if head.type != structs.ET_CORE:
        raise damaged(file, "e_type", structs.IDENT, f"{head.type} is not {structs.ET_CORE}, a core")
    kind = structs.program_headers(class_, order)
    if head.phentsize != kind.itemsize:
        raise damaged(
            file, "e_phentsize", structs.FIELD["phentsize"][class_], f"{head.phentsize} is not {kind.itemsize}"
        )
    count = _count(file, class_, order, head)
    raw = read_part(file, "program headers", head.phoff, count * kind.itemsize)
    return Core(file, class_, order, head.machine, np.frombuffer(raw, dtype=kind), head.phoff)


def _count(file: File, class_: int, order: str, head: structs.ElfHeader) -> int:
    """Returns the number of program headers."""
    count, where, field = head.phnum, structs.FIELD["phnum"][class_], "e_phnum"
    if count == structs.PN_XNUM:
        where, field = head.shoff + structs.SH_INFO[class_], "sh_info"
        count = struct.unpack(f"{order}I", read_part(file, field, where, 4))[0]
    if not 0 < count <= MAX_RANGES:
        raise damaged(file, field, where, f"{count} program headers, from 1 to {MAX_RANGES} are read")
    return count


def _table(core: Core) -> Extents:
    entries = Entries(core.file, "program header")
    programs = core.programs[core.loads]
    size = core.programs.dtype.itemsize
    columns = [programs[name].tolist() for name in ("paddr", "memsz", "filesz", "offset")]
    for number, address, length, stored, offset in zip(core.loads.tolist(), *columns, strict=True):
        entries.add(core.phoff + number * size, address, length, stored, offset)
    if not len(entries):
        raise ImageError(f"{core.file.name}: program headers at {core.phoff:#x}: none has memory in the file")
    try:
        return entries.table()
    except ImageError as exc:
        if len(programs) > 1 and not programs["paddr"].any():
            exc.hint = "all its physical addresses are 0: it is a core of a process, not of a machine"
        raise


def _warnings(core: Core) -> Iterator[str]:
    loads = core.programs[core.programs["type"] == structs.PT_LOAD]
    absent = int((loads["filesz"] == 0).sum())
    part = int(((loads["filesz"] < loads["memsz"]) & (loads["filesz"] > 0)).sum())
    if absent:
        yield f"{core.file.name}: {counted(absent, 'range')} without bytes in the file, taken for addresses without RAM"
    if part:
        said = "with less bytes in the file than in memory; the rest reads as zero"
        yield f"{core.file.name}: {counted(part, 'range')} {said}"


def _note_bytes(core: Core) -> bytes:
    """Returns the bytes of all PT_NOTE segments. Raises `ImageError` if they are more than `MAX_NOTES`."""
    parts, total = [], 0
    size = core.programs.dtype.itemsize
    for number in np.flatnonzero(core.programs["type"] == structs.PT_NOTE).tolist():
        one = core.programs[number]
        offset, length = int(one["offset"]), int(one["filesz"])
        total += length
        if total > MAX_NOTES:
            what, where = f"program header {number}", core.phoff + number * size
            raise damaged(core.file, what, where, f"{total} bytes of notes, {MAX_NOTES} at most")
        parts.append(read_part(core.file, "notes", offset, length))
    return b"".join(parts)


def notes_in(data: bytes, order: str) -> Iterator[tuple[str, int]]:
    """Yields owner and type of each note; stops at what is none."""
    at = 0
    for _ in range(_MOST_NOTES):
        if at + 12 > len(data):
            return
        name_size, size, kind = struct.unpack_from(f"{order}III", data, at)
        name = data[at + 12 : at + 12 + min(name_size, _OWNER)]
        at += 12 + -(-name_size // 4) * 4 + -(-size // 4) * 4
        if not name_size or at > len(data) + 3:
            return
        yield name.rstrip(b"\0").decode("ascii", "replace"), kind


def machine_state(
    notes: bytes, class_: int, order: str, machine: int | None
) -> tuple[tuple[str, ...], dict[str, bytes]]:
    """Returns losses, and the notes as state if a core of 64-bit little-endian processors can have them."""
    count = sum(1 for _ in notes_in(notes, order))
    if count and class_ == 2 and order == "<" and machine is not None:
        return (), {"ELF notes": struct.pack("<H", machine) + notes}
    lost = f"{counted(count, 'ELF note')} of a {kind_of(class_, order)} core, such as registers"
    return (lost,) if count else (), {}


def kind_of(class_: int, order: str) -> str:
    return f"{32 * class_}-bit {'little' if order == '<' else 'big'}-endian"


def _details(core: Core, notes: list[tuple[str, int]]) -> Mapping[str, Any]:
    owners = sorted({name for name, _ in notes})
    cpus = sum(name == "CORE" and kind == structs.NT_PRSTATUS for name, kind in notes)
    cpus = cpus or sum(name == "VBCPU" for name, _ in notes)
    data = {
        "class": kind_of(core.class_, core.order),
        "machine": structs.MACHINES.get(core.machine, str(core.machine)),
        "ranges": len(core.loads),
        "notes": ", ".join([*owners[:_OWNERS], *(["..."] if len(owners) > _OWNERS else [])]) or "none",
        "processors-with-registers": cpus,
        "machine-state": "registers of processors" if cpus else "none",
    }
    return {"format-specific": {"type": "elfcore", "data": data}}
