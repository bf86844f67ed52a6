"""Files at URLs: what a scheme reads by ranges, as a source for every reader, with a bounded cache.

Readers of formats read metadata in small pieces at many places. So short reads go through blocks, and a run of reads in
order fetches more at once. Long reads, of payload, go straight into the caller's buffer, in as many requests at once as
there are threads that copy.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from hashlib import blake2b
from typing import TYPE_CHECKING

from vmconv.errors import ImageError, VmconvError
from vmconv.model.sources import File, Stamp

if TYPE_CHECKING:
    from vmconv.interface.scheme import Remote, Url

BLOCK = 256 << 10
"""Bytes of a cached block."""

_KEPT = 128
"""Blocks of the cache: 32 MiB."""
_AHEAD = 16
"""Blocks that are fetched at once for reads in order, at most."""
_LONG = 1 << 20
"""Longer reads are not cached, bytes."""
_STEP = 8 << 20
"""Bytes of one request for a long read, at most."""


class RemoteFile(File):
    """The object at a URL, read-only. It has no descriptor, so nothing of it can be shared."""

    is_remote = True

    def __init__(self, url: Url, remote: Remote) -> None:
        self.url = url
        self.path = url.shown.removesuffix("?...")
        self.name = url.name
        self.descriptor = -1
        self.size = remote.size
        self.is_device = False
        self.settled = True
        # Files are compared by device and inode, for loops in chains.
        self.stamp = Stamp(0, _number(self.path), remote.size, _number(remote.version), 0)
        self.remote = remote
        self.failed = False
        """True once a read has failed: the object may be another by now, or the connection may be broken."""
        self._blocks = _Blocks(remote)

    def real_path(self) -> str:
        return self.path

    def read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        length = len(buffer)
        if offset < 0 or offset + length > self.size:
            raise ImageError(f"{self.name}: ends at {self.size:#x} where {length} bytes from {offset:#x} were expected")
        try:
            if length < _LONG:
                self._blocks.read_into(offset, buffer)
                return
            for at in range(0, length, _STEP):
                self.remote.read_into(offset + at, buffer[at : at + _STEP])
        except VmconvError:
            self.failed = True
            raise

    def sync(self) -> None:
        pass

    def data_ranges(self, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
        return self.remote.data_ranges(start, self.size if end is None else min(end, self.size))

    def stored(self) -> int:
        return sum(end - start for start, end in self.data_ranges())

    def changed(self) -> bool:
        # Each read has checked that it was of the version that was opened.
        return False

    def close(self) -> None:
        self.remote.close()


def _number(text: str) -> int:
    """Returns a number of 63 bits that is the same for the same text in each process."""
    return int.from_bytes(blake2b(os.fsencode(text), digest_size=8).digest()) >> 1


class _Blocks:
    """The cache of one remote object. Thread-safe; a block is fetched by one thread at a time."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._flying: set[int] = set()
        self._changed = threading.Condition()
        self._next, self._window = 0, 1
        for number in range(len(remote.head) // BLOCK if len(remote.head) < remote.size else 1):
            self._kept[number] = remote.head[number * BLOCK : (number + 1) * BLOCK]
            self._next = number + 1

    def read_into(self, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            number, skip = divmod(offset + done, BLOCK)
            wanted = -(-(offset + len(buffer)) // BLOCK) - number
            data = self._block(number, wanted)
            step = min(len(data) - skip, len(buffer) - done)
            buffer[done : done + step] = data[skip : skip + step]
            done += step

    def _block(self, number: int, wanted: int) -> bytes:
        """Returns one block; fetches it with the missing ones of the `wanted` blocks from it on, and ahead of them."""
        with self._changed:
            while number not in self._kept:
                if number not in self._flying:
                    break
                self._changed.wait()
            else:
                self._kept.move_to_end(number)
                return self._kept[number]
            count = self._count(number, wanted)
            self._flying.update(range(number, number + count))
        try:
            begin = number * BLOCK
            data = bytearray(min(count * BLOCK, self._remote.size - begin))
            self._remote.read_into(begin, memoryview(data))
            blocks = [bytes(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)]
        except BaseException:
            self._land(number, count, [])
            raise
        self._land(number, count, blocks)
        return blocks[0]

    def _count(self, number: int, wanted: int) -> int:
        """Returns how many blocks to fetch: none that is there, or that another thread fetches."""
        self._window = min(2 * self._window, _AHEAD) if number == self._next else 1
        last = -(-self._remote.size // BLOCK)
        count = 1
        while count < max(wanted, self._window) and number + count < last:
            if number + count in self._kept or number + count in self._flying:
                break
            count += 1
        self._next = number + count
        return count

    def _land(self, number: int, count: int, blocks: list[bytes]) -> None:
        with self._changed:
            self._flying.difference_update(range(number, number + count))
            for each, data in enumerate(blocks, start=number):
                self._kept[each] = data
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            self._changed.notify_all()
