"""The end of a migration stream, which shows that nothing behind the RAM was cut off.

    0x7E, section id    footer of the last section
    0                   EOF
    6, length           description of the devices: JSON up to the end of the file

QEMU leaves the description out on request (`suppress-vmdesc`). Machines that write no footers write no configuration,
either, and are not read (QEMU, migration/savevm.c).
"""

from __future__ import annotations

import re

from vmconv.plugin import File

_EOF = re.compile(rb"\x7e.{4}\0", re.DOTALL)
_DESCRIPTION = re.compile(rb"\x7e.{4}\0\x06(.{4})\{", re.DOTALL)
_MOST = 16 << 20
"""Bytes from the end on that are searched. Descriptions have some 100 KiB."""


def ending(file: File, at: int) -> list[str]:
    """Returns a warning unless the stream, whose RAM ends at an offset of the file, is complete and ends the file."""
    begin = max(at, file.size - _MOST)
    tail = file.read(begin, max(0, file.size - begin))
    where = f"{file.name}: the stream ends at {file.size:#x}"
    # The last one: JSON has no such bytes, the state of a device may have them.
    for found in reversed(list(_DESCRIPTION.finditer(tail))):
        end = found.start(1) + 4 + int.from_bytes(found[1], "big")
        if end <= len(tail) and tail[end - 1 : end] == b"}":
            left = len(tail) - end
            return [f"{file.name}: {left} bytes at {begin + end:#x} are behind the end of the stream"] if left else []
        if end > len(tail):
            return [f"{where}, within the description of the devices, which is cut off"]
    if _EOF.fullmatch(tail[-6:]):
        return [f"{where}, behind the EOF section: the description of the devices is missing"]
    return [f"{where}, without an EOF section: state of devices and processors is cut off"]
