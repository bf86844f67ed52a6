"""Where bytes come from: a file on storage (can be referenced), bytes we made, or a decoded view (copied by nature)."""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from vmconv.errors import ImageError, ReadError

if TYPE_CHECKING:
    from vmconv.model.extents import Extents


# Filesystems without SEEK_DATA say EINVAL, network and user-space ones EOPNOTSUPP or ENOSYS. ENXIO alone, which means
# that there is no data up to the end (man 2 lseek), is an answer.
_CANNOT_TELL = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})


# man 2 fsync: EROFS and EINVAL, which squashfs and ISO 9660 answer, say that nothing can have been written; some
# network filesystems sync no file that is only open for reading, and answer EBADF.
_NOTHING_TO_SYNC = frozenset({errno.EROFS, errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP})


class Source(ABC):
    """`size` bytes that can be read at any offset; compared by identity."""

    name: str
    size: int

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """Returns exactly `length` bytes; raises `ImageError` when they are not there, `ReadError` if storage fails."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills the buffer with the bytes from `offset` on, as `read` returns them."""
        buffer[:] = self.read(offset, len(buffer))


class Stamp(NamedTuple):
    """What must not change while a file is a source: device, inode, size in bytes, mtime and ctime in ns."""

    device: int
    inode: int
    size: int
    mtime: int
    ctime: int


class File(Source):
    """A file on storage, opened read-only by the `Opener`: the only kind of source that can be referenced.

    Owns its descriptor: whoever made it closes it.
    """

    on_storage: Extents | None = None
    """What `vmconv.model.extents.on_storage` found, once it was asked."""

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self.name = os.path.basename(path) or path
        self.descriptor = descriptor
        self.settled = False
        """True for a file of our own, which was synced, or which nobody shall wait for."""
        status = self._status()
        self.is_device = stat.S_ISBLK(status.st_mode)
        self.stamp = stamp_of(status)
        self.size = self._end() if self.is_device else status.st_size

    def _status(self) -> os.stat_result:
        try:
            return os.fstat(self.descriptor)
        except OSError as exc:
            raise ReadError(f"{self.name}: cannot be looked at: {exc.strerror}") from exc

    def real_path(self) -> str:
        """Returns the path that the open file has now, symbolic links resolved."""
        return os.path.realpath(f"/proc/self/fd/{self.descriptor}")

    def _end(self) -> int:
        """Returns where seeking ends: a block device has no size in its inode."""
        try:
            return os.lseek(self.descriptor, 0, os.SEEK_END)
        except OSError as exc:
            raise ReadError(f"{self.name}: does not tell its size: {exc.strerror}") from exc

    def read(self, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self.descriptor, length, offset)
            if len(data) == length:
                return data
            parts, have = [data], len(data)
            while data and have < length:
                data = os.pread(self.descriptor, length - have, offset + have)
                parts.append(data)
                have += len(data)
        except OSError as exc:
            raise ReadError(f"{self.name}: cannot be read at {offset:#x}: {exc.strerror}") from exc
        if have < length:
            raise ImageError(
                f"{self.name}: ends at {offset + have:#x} where {length} bytes from {offset:#x} were expected"
            )
        return b"".join(parts)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        done = 0
        if self.descriptor >= 0:
            try:
                done = os.preadv(self.descriptor, [buffer], offset)
            except OSError as exc:
                raise ReadError(f"{self.name}: cannot be read at {offset:#x}: {exc.strerror}") from exc
        if done < len(buffer):
            super().read_into(offset + done, buffer[done:])

    def sync(self) -> None:
        """Makes the filesystem decide where every byte lies; without it a map of the file may be out of date."""
        if self.is_device or self.settled:
            return
        try:
            os.fsync(self.descriptor)
        except OSError as exc:
            if exc.errno not in _NOTHING_TO_SYNC:
                raise ReadError(f"{self.name}: cannot be synced to storage: {exc.strerror}") from exc

    def data_ranges(self, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
        """Returns the `(start, end)` ranges that may hold data, in order; the rest are holes or unwritten."""
        limit = self.size if end is None else min(end, self.size)
        if self.is_device:
            return [(start, limit)] if start < limit else []
        ranges = []
        at = start
        while at < limit:
            begin = self._seek(at, os.SEEK_DATA)
            if begin is None:
                ranges.append((at, limit))
                break
            if begin >= limit:
                break
            hole = self._seek(begin, os.SEEK_HOLE)
            at = limit if hole is None else min(hole, limit)
            ranges.append((begin, at))
        return ranges

    def _seek(self, at: int, whence: int) -> int | None:
        """Returns where data or a hole begins, from `at` on; None where the filesystem cannot tell."""
        try:
            found = os.lseek(self.descriptor, at, whence)
        except OSError as exc:
            if whence == os.SEEK_DATA and exc.errno == errno.ENXIO:
                return self.size
            if exc.errno in _CANNOT_TELL:
                return None
            raise ReadError(f"{self.name}: cannot be searched for holes at {at:#x}: {exc.strerror}") from exc
        if found < at or (found == at and whence == os.SEEK_HOLE):
            raise ReadError(f"{self.name}: the filesystem finds a hole's edge at {found:#x}, searched from {at:#x} on")
        return found

    def changed(self) -> bool:
        """True when the file is not the one that was opened any more: replaced, resized or written."""
        return stamp_of(self._status()) != self.stamp

    def close(self) -> None:
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            # It is closed whatever is said, and of what was only read nothing can be lost.
            with suppress(OSError):
                os.close(descriptor)


def stamp_of(status: os.stat_result) -> Stamp:
    """Returns the stamp of a file or block device."""
    if stat.S_ISBLK(status.st_mode):
        # Reading and udev touch the times of a device node; what it is made of is its device number.
        return Stamp(status.st_rdev, 0, 0, 0, 0)
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class Blob(Source):
    """Bytes we made: given, or computed in pieces whenever they are read."""

    def __init__(self, name: str, content: bytes | Callable[[int, int], bytes], size: int | None = None) -> None:
        self.name = name
        if isinstance(content, bytes):
            self.size = len(content)
            self._compute: Callable[[int, int], bytes] = lambda offset, length: content[offset : offset + length]
        else:
            if size is None:
                raise ValueError("a computed blob needs its size")
            self.size = size
            self._compute = content

    def read(self, offset: int, length: int) -> bytes:
        return self._compute(offset, length)


class Decoded(Source):
    """A decoded view of parts of `file`: an address space of units, `decode(first, count)` of which are made at a time.

    `reason` completes the sentence "copied because ...". A subclass may have `units` of its own instead of `decode`.
    """

    step = 512 << 10
    """Bytes to ask for at a time: what is decoded is still in the processor's cache when it is written."""

    def __init__(
        self,
        name: str,
        file: File,
        *,
        unit: int,
        count: int,
        reason: str,
        decode: Callable[[int, int], list[bytes]] | None = None,
    ) -> None:
        self.name = name
        self.file = file
        self.unit = unit
        self.size = unit * count
        self.reason = reason
        self._decode = decode

    def read(self, offset: int, length: int) -> bytes:
        return b"".join(self.units(offset, length))

    def units(self, offset: int, length: int) -> list[bytes]:
        """Returns the bytes of `read` in the pieces in which they were decoded."""
        if not length:
            return []
        if self._decode is None:
            raise NotImplementedError(f"{self.name}: cannot be decoded by units")
        first, end = offset // self.unit, -(-(offset + length) // self.unit)
        units = self._decode(first, end - first)
        units[-1] = units[-1][: offset + length - (end - 1) * self.unit]
        units[0] = units[0][offset - first * self.unit :]
        return units


class Reserved(Source):
    """Space that an image has set aside in `file` without using it: a place, for maps; what is read there is zero.

    `hides` is whether the guest sees zeros there, or else what the parent says.
    """

    def __init__(self, file: File, *, hides: bool) -> None:
        self.name = file.name
        self.file = file
        self.size = 1 << 62
        self.hides = hides

    def read(self, offset: int, length: int) -> bytes:
        return bytes(length)


def inside(path: str, tree: str) -> bool:
    """True when a path is that of the tree, or of something in it; both are real paths, without symbolic links."""
    return path == tree or path.startswith(tree.rstrip("/") + "/")
