"""Outputs that are written through one open descriptor: pieces, whole blocks around the page cache, and copies."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from vmconv.backends.direct import STEP, DirectFile
from vmconv.errors import BackendError
from vmconv.interface.backend import Output
from vmconv.model.sources import Decoded, File, Source

if TYPE_CHECKING:
    from vmconv.model.plan import ShareSteps

# Bytes of one read and write through the page cache; they fit into the processor's cache. Pieces of 4 MiB, and
# copy_file_range, took three times the system time on ext4.
_STEP = 256 << 10


class DescriptorOutput(Output):
    """An output of `size` bytes, written through `descriptor`; `path` is for messages.

    `kernel_copies` uses copy_file_range, for filesystems with copies on the server. Elsewhere that is slower than
    reading and writing, or shares blocks although copies were requested. With `durable`, `finish` syncs and copies
    start writeback at once.
    """

    _direct: DirectFile | None = None

    def __init__(
        self, path: str, descriptor: int, size: int, *, durable: bool = True, kernel_copies: bool = False
    ) -> None:
        self.path = path
        self.size = size
        self.kernel_copies = kernel_copies
        self.durable = durable
        self.descriptor = descriptor
        self.file: File | None = None
        self._buffers = threading.local()

    def share(self, steps: ShareSteps) -> None:
        if len(steps):
            raise BackendError(f"{self.path}: this backend cannot share")

    def write(self, offset: int, data: bytes) -> None:
        self._write(offset, [data])

    def _write(self, offset: int, parts: list[bytes] | list[memoryview]) -> None:
        """Writes the concatenated parts. pwritev may write less when storage is nearly full."""
        done = os.pwritev(self.descriptor, parts, offset)
        for part in parts:
            view = memoryview(part)[done:]
            done = max(0, done - len(part))
            offset += len(part) - len(view)
            while view:
                step = os.pwrite(self.descriptor, view, offset)
                if not step:
                    raise OSError(errno.EIO, "nothing was written", self.path)
                view, offset = view[step:], offset + step

    def copy(self, source: Source, source_offset: int, offset: int, length: int) -> None:
        done = 0
        if isinstance(source, File) and self.kernel_copies and not source.is_remote:
            done = self._copy_in_kernel(source, source_offset, offset, length)
        if done == length:
            return
        direct = self._direct if self._direct and self._direct.prepare(offset + done, length - done) else None
        if isinstance(source, Decoded):
            self._copy_decoded(source, source_offset, offset, length, direct)
        else:
            self._copy_bytes(source, source_offset + done, offset + done, length - done, direct)
        if self.durable and not direct:
            # Starts writeback of pages that are not read soon. This shortens the final fsync, and avoids the kernel's
            # throttling of writers.
            with suppress(OSError):
                os.posix_fadvise(self.descriptor, offset, length, os.POSIX_FADV_DONTNEED)

    def _copy_decoded(
        self, source: Decoded, source_offset: int, offset: int, length: int, direct: DirectFile | None
    ) -> None:
        at, end = source_offset, source_offset + length
        step = max(1, source.step // source.unit) * source.unit
        while at < end:
            # Whole units, so that none is decoded twice.
            stop = min(end, at // source.unit * source.unit + step)
            parts = source.units(at, stop - at)
            if direct and stop - at <= STEP:
                self._put(offset + at - source_offset, _gather(parts, self._buffer()), direct)
            else:
                self._write(offset + at - source_offset, parts)
            at = stop

    def _copy_bytes(
        self, source: Source, source_offset: int, offset: int, length: int, direct: DirectFile | None
    ) -> None:
        step = STEP if direct or (isinstance(source, File) and source.is_remote) else _STEP
        for at in range(0, length, step):
            part = self._buffer()[: min(step, length - at)]
            source.read_into(source_offset + at, part)
            self._put(offset + at, part, direct)

    def _put(self, offset: int, part: memoryview, direct: DirectFile | None) -> None:
        """Writes a part of `_buffer`, directly as far as possible."""
        done = direct.write(offset, part) if direct else 0
        if done < len(part):
            self._write(offset + done, [part[done:]])

    def _buffer(self) -> memoryview:
        """Returns this thread's buffer of `STEP` bytes, page-aligned for O_DIRECT."""
        buffer: memoryview | None = getattr(self._buffers, "own", None)
        if buffer is None:
            import mmap

            buffer = self._buffers.own = memoryview(mmap.mmap(-1, STEP))
        return buffer

    def _copy_in_kernel(self, source: File, source_offset: int, offset: int, length: int) -> int:
        """Returns the number of bytes copied by the kernel, which may refuse at any point (EXDEV)."""
        done = 0
        while done < length:
            places = source_offset + done, offset + done
            try:
                step = os.copy_file_range(source.descriptor, self.descriptor, length - done, *places)
            except OSError as exc:
                if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
                    raise
                break
            if not step:
                break
            done += step
        return done

    def close(self) -> None:
        """Closes the descriptors that this output opened; `descriptor` is the caller's."""
        if self.file is not None:
            self.file.close()
        if self._direct:
            self._direct.close()


def _gather(parts: list[bytes], buffer: memoryview) -> memoryview:
    """Returns the concatenated parts, in `buffer`."""
    at = 0
    for part in parts:
        buffer[at : at + len(part)] = part
        at += len(part)
    return buffer[:at]
