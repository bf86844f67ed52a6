"""The structures of memory images, as formats of `struct` and as numpy's types.

ELF: System V ABI, chapters 4 and 5. LiME: the format of its version 1; AVML has the same header. All their numbers are
little-endian.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

# -- ELF

ELF_MAGIC = b"\x7fELF"
ET_CORE = 4
PT_LOAD, PT_NOTE = 1, 4
PN_XNUM = 0xFFFF
"""e_phnum if there are more program headers: then sh_info of the first section header has their number."""
NT_PRSTATUS = 1
MACHINES = {3: "i386", 21: "ppc64", 22: "s390x", 62: "x86_64", 183: "aarch64", 243: "riscv64", 258: "loongarch64"}

NUMBERS = {name: number for number, name in MACHINES.items()}


class ElfHeader(NamedTuple):
    """The header behind e_ident, and where the structures lie."""

    type: int
    machine: int
    version: int
    entry: int
    phoff: int
    shoff: int
    flags: int
    ehsize: int
    phentsize: int
    phnum: int
    shentsize: int
    shnum: int
    shstrndx: int


IDENT = 16
HEADER = {1: "HHIIIIIHHHHHH", 2: "HHIQQQIHHHHHH"}
"""By class: 1 has 32-bit addresses, 2 has 64-bit ones."""
FIELD = {"phoff": {1: 28, 2: 32}, "phentsize": {1: 42, 2: 54}, "phnum": {1: 44, 2: 56}, "shoff": {1: 32, 2: 40}}
"""Offsets of fields in the file, by class."""
SH_INFO = {1: 28, 2: 44}
"""Offset of sh_info in a section header."""
PROGRAM = {
    1: (4, ("type", "offset", "vaddr", "paddr", "filesz", "memsz", "flags", "align")),
    2: (8, ("type", "flags", "offset", "vaddr", "paddr", "filesz", "memsz", "align")),
}
"""By class: bytes of a number, and the fields of a program header; `type` and `flags` have 4 bytes in both."""


def program_headers(class_: int, order: str) -> np.dtype[np.void]:
    """Returns the type of a program header; `order` is < or >."""
    width, names = PROGRAM[class_]
    return np.dtype([(name, f"{order}u{4 if name in ('type', 'flags') else width}") for name in names])


# -- LiME

LIME = struct.Struct("<IIQQQ")
"""Magic number, version, first and last address, reserved."""
LIME_MAGIC = 0x4C694D45
LIME_VERSION = 1
AVML_MAGIC, AVML_VERSION = 0x4C4D5641, 2
LIME_TYPE = np.dtype([("magic", "<u4"), ("version", "<u4"), ("first", "<u8"), ("last", "<u8"), ("reserved", "<u8")])
