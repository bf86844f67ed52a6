"""What parent and child say to each other through a socket.

The parent sends one `Task` as JSON, behind its length. The child asks for bytes of disks with `READ` requests, and ends
with one `ANSWER`, whose JSON follows. The parent answers each `READ` with a length and the bytes; `REFUSED` as the
length means that the child has read all that it may.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

REQUEST = struct.Struct("<BIQI")
"""Kind, disk, offset, length."""

LENGTH = struct.Struct("<I")

READ, ANSWER = 1, 2
REFUSED = 0xFFFFFFFF

MAX_PIECE = 1 << 20
"""Bytes of one read."""

MAX_ANSWER = 1 << 20
"""Bytes of the answer."""


class Volume(NamedTuple):
    """A partition, or a whole disk without partitions: `content` is as `content_of` names it."""

    disk: int
    number: int
    start: int
    length: int
    content: str

    @property
    def where(self) -> str:
        return f"disks[{self.disk}] partition {self.number}" if self.number else f"disks[{self.disk}]"


class Task(NamedTuple):
    """What the child has to look at: `drivers` are modules of Linux, `services` drivers of Windows."""

    volumes: tuple[Volume, ...]
    drivers: tuple[str, ...]
    services: tuple[str, ...]
