"""The bytes of disks inside the child: asked for at the parent, kept in blocks, and given to libraries as files."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache

from vmconv.guest.protocol import LENGTH, MAX_PIECE, READ, REFUSED, REQUEST

_BLOCK = 16 << 10
_BLOCKS = 2048

Read = Callable[[int, int], bytes]
"""Returns bytes from an offset; fewer at the end."""


class TooMuchError(Exception):
    """The child has read all that it may."""


class Parent:
    """The parent at the other end of a socket."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        # The libraries hide the exception in one of their own.
        self.has_refused = False

    def receive(self, length: int) -> bytes:
        found = bytearray()
        while len(found) < length:
            piece = os.read(self._descriptor, min(length - len(found), MAX_PIECE))
            if not piece:
                raise EOFError
            found += piece
        return bytes(found)

    def send(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self._descriptor, left) :]

    def disk_bytes(self, disk: int, offset: int, length: int) -> bytes:
        """Returns bytes of a disk; raises `TooMuchError` if the parent gives no more."""
        self.send(REQUEST.pack(READ, disk, offset, length))
        (given,) = LENGTH.unpack(self.receive(LENGTH.size))
        if given == REFUSED:
            self.has_refused = True
            raise TooMuchError
        return self.receive(given)


def reader(parent: Parent, disk: int, start: int, length: int) -> Read:
    """Returns how to read a part of a disk, with the blocks that were read last in memory."""

    @lru_cache(_BLOCKS)
    def block(number: int) -> bytes:
        at = number * _BLOCK
        return parent.disk_bytes(disk, start + at, min(_BLOCK, length - at))

    def read(offset: int, wanted: int) -> bytes:
        wanted = max(0, min(wanted, length - offset))
        first, last = offset // _BLOCK, (offset + wanted - 1) // _BLOCK
        whole = b"".join(block(number) for number in range(first, last + 1)) if wanted else b""
        return whole[offset - first * _BLOCK :][:wanted]

    return read


class Stream:
    """A part of a disk, or a file of the guest, in the form that the libraries take."""

    def __init__(self, read: Read, size: int) -> None:
        self._read, self._size, self._at = read, size, 0

    def read(self, size: int = -1) -> bytes:
        left = self._size - self._at
        data = self._read(self._at, left if size < 0 else min(size, left)) if left > 0 else b""
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def get_size(self) -> int:
        return self._size
