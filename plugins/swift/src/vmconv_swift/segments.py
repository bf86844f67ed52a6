"""The segments of an object that is being made: collected in any order, packed, and laid end to end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmconv.plugin import BackendError
from vmconv_swift.payload import SMALLEST

if TYPE_CHECKING:
    from vmconv_swift.manifest import Segment

SMALL_GAP = 4 << 10
"""Bytes of zeros that are sent among metadata rather than referred to."""
_MOST = 64 << 20
"""Bytes of an object of packed metadata."""


class Rows:
    """Segments with their offsets in the object; thread-safe."""

    def __init__(self) -> None:
        self.found: list[tuple[int, Segment]] = []

    def add(self, offset: int, segment: Segment) -> None:
        # Appending to a list is atomic.
        self.found.append((offset, segment))


class Packer:
    """Packs small pieces of bytes into objects of at least 1 MiB, which `keep` makes; thread-safe."""

    def __init__(self, keep: Callable[[bytes], Segment], rows: Rows) -> None:
        self._keep, self._rows = keep, rows
        self._data = bytearray()
        self._parts: list[tuple[int, int, int]] = []
        self._lock = threading.Lock()

    def add(self, offset: int, data: bytes) -> None:
        with self._lock:
            self._parts.append((offset, len(self._data), len(data)))
            self._data += data
            if len(self._data) >= _MOST:
                self._flush()

    def flush(self) -> None:
        """Makes an object of what is left."""
        with self._lock:
            if self._parts:
                self._flush()

    def _flush(self) -> None:
        body = bytes(self._data).ljust(SMALLEST, b"\0")
        segment = self._keep(body)
        for offset, at, length in self._parts:
            self._rows.add(offset, segment._replace(offset=at, length=length))
        self._data.clear()
        self._parts.clear()


def placed(rows: Rows, size: int) -> list[Segment]:
    """Returns the segments of all `size` bytes in order, neighbours joined. Raises `BackendError` for a gap."""
    found: list[Segment] = []
    at = 0
    for offset, segment in sorted(rows.found, key=lambda row: row[0]):
        if offset != at:
            raise BackendError(f"segments are for {offset:#x} where {at:#x} is next")
        at += segment.length
        last = found[-1] if found else None
        if last and last.where == segment.where and last.offset + last.length == segment.offset:
            found[-1] = last._replace(length=last.length + segment.length)
        else:
            found.append(segment)
    if at != size:
        raise BackendError(f"segments have {at} bytes, the object {size}")
    return found
