"""The end of a migration stream, which shows that nothing behind the RAM was cut off.

    0x7E, section id    footer of the last section
    0                   EOF
    6, length           description of the devices: JSON up to the end of the file

QEMU leaves the description out on request (`suppress-vmdesc`). Machines that write no footers write no configuration,
either, and are not read (QEMU, migration/savevm.c).
"""

from __future__ import annotations

from collections.abc import Iterator

from vmconv.plugin import File

_FOOTER = 0x7E
_MOST = 16 << 20
"""Bytes from the end on that are searched. Descriptions have some 100 KiB."""


def ending(file: File, at: int) -> list[str]:
    """Returns a warning unless the stream, whose RAM ends at an offset of the file, is complete and ends the file."""
    begin = max(at, file.size - _MOST)
    tail = file.read(begin, max(0, file.size - begin))
    where = f"{file.name}: the stream ends at {file.size:#x}"
    for end in _ends(tail):
        if end > len(tail):
            return [f"{where}, within the description of the devices, which is cut off"]
        left = len(tail) - end
        return [f"{file.name}: {left} bytes at {begin + end:#x} are behind the end of the stream"] if left else []
    if len(tail) > 5 and tail[-6] == _FOOTER and not tail[-1]:
        return [f"{where}, behind the EOF section: the description of the devices is missing"]
    return [f"{where}, without an EOF section: state of devices and processors is cut off"]


def _ends(tail: bytes) -> Iterator[int]:
    """Yields where possible descriptions end, the last one first: only the state of a device has such bytes before."""
    at = len(tail)
    while (at := tail.rfind(b"\0\6", 0, at + 1)) >= 5:
        if tail[at - 5] == _FOOTER and tail[at + 6 : at + 7] == b"{":
            end = at + 6 + int.from_bytes(tail[at + 2 : at + 6], "big")
            if end > len(tail) or tail[end - 1] == ord("}"):
                yield end
