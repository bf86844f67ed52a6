"""Outputs that are files: written beside the target under a temporary name, made durable, then renamed.

A run that is killed leaves its temporary files behind; they are recognisable by name and by not being locked any more,
and the next run that makes the same target removes them.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmconv import linux, locks
from vmconv.backends.direct import STEP, DirectFile
from vmconv.errors import BackendError, VmconvError, os_errors
from vmconv.sources import Decoded, File, Source
from vmconv.storage import Output, Transaction

if TYPE_CHECKING:
    from vmconv.planner import ShareSteps


def temporary_name(name: str) -> str:
    """Returns a new temporary name for the file `name`."""
    return f".{name}.vmconv-{os.urandom(4).hex()}.tmp"


def remove_stale(directory: str, name: str) -> list[str]:
    """Removes temporary files of `name` whose run is dead (a living one locks its own); returns their names."""
    pattern = re.compile(re.escape(f".{name}.vmconv-") + r"[0-9a-f]{8}\.tmp")
    removed = []
    for entry in sorted(os.listdir(directory)):
        if pattern.fullmatch(entry) and _is_dead(os.path.join(directory, entry)):
            os.unlink(os.path.join(directory, entry))
            removed.append(entry)
    return removed


def _is_dead(path: str) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return not locks.may_be_owned(descriptor)
    finally:
        os.close(descriptor)


def _create_locked(path: str) -> int:
    """Returns a new file that is locked: between the two, another run may take it for a dead one's and remove it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            locks.own(descriptor)
        except VmconvError:
            os.unlink(path)
            os.close(descriptor)
            raise
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)


# Bytes that are read and written at a time through the page cache: they stay in the processor's cache. With pieces of
# 4 MiB, and with copy_file_range too, ext4 took three times the system time.
_STEP = 256 << 10


class FileOutput(Output):
    """A temporary file that will become the target.

    `kernel_copies` leaves copying to copy_file_range, for filesystems whose server can do it. Elsewhere that is slower
    than reading and writing, or shares blocks where copies were asked for. `durable` makes `finish` wait for storage,
    and copies go there at once.
    """

    def __init__(self, path: str, size: int, *, kernel_copies: bool, durable: bool) -> None:
        self.path = path
        self.size = size
        self.kernel_copies = kernel_copies
        self.durable = durable
        self.descriptor = _create_locked(path)
        self.file: File | None = None
        self._direct = DirectFile(path) if durable else None
        self._buffers = threading.local()

    def share(self, steps: ShareSteps) -> None:
        if len(steps):
            raise BackendError(f"{self.path}: this backend cannot share")
        os.ftruncate(self.descriptor, self.size)

    def write(self, offset: int, data: bytes) -> None:
        self._write(offset, [data])

    def _write(self, offset: int, parts: list[bytes] | list[memoryview]) -> None:
        """Writes the parts end to end; the kernel takes less than all of them when storage is nearly full."""
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
        if isinstance(source, File) and self.kernel_copies:
            done = self._copy_in_kernel(source, source_offset, offset, length)
        if done == length:
            return
        direct = self._direct if self._direct and self._direct.prepare(offset + done, length - done) else None
        if isinstance(source, Decoded):
            self._copy_decoded(source, source_offset, offset, length, direct)
        else:
            self._copy_bytes(source, source_offset + done, offset + done, length - done, direct)
        if self.durable and not direct:
            # Begins writing back what nobody will read soon, so that little is left for the final fsync, and so that
            # the kernel need not hold writers back later.
            os.posix_fadvise(self.descriptor, offset, length, os.POSIX_FADV_DONTNEED)

    def _copy_decoded(
        self, source: Decoded, source_offset: int, offset: int, length: int, direct: DirectFile | None
    ) -> None:
        at, end = source_offset, source_offset + length
        step = max(1, source.step // source.unit) * source.unit
        while at < end:
            stop = min(end, at // source.unit * source.unit + step)
            parts = source.units(at, stop - at)
            if direct and stop - at <= STEP:
                self._put(offset + at - source_offset, _gathered(parts, self._buffer()), direct)
            else:
                self._write(offset + at - source_offset, parts)
            at = stop

    def _copy_bytes(
        self, source: Source, source_offset: int, offset: int, length: int, direct: DirectFile | None
    ) -> None:
        step = STEP if direct else _STEP
        for at in range(0, length, step):
            part = self._buffer()[: min(step, length - at)]
            source.read_into(source_offset + at, part)
            self._put(offset + at, part, direct)

    def _put(self, offset: int, part: memoryview, direct: DirectFile | None) -> None:
        """Writes a part that lies in `_buffer`, as far as it can be past the page cache."""
        done = direct.write(offset, part) if direct else 0
        if done < len(part):
            self._write(offset + done, [part[done:]])

    def _buffer(self) -> memoryview:
        """Returns `STEP` bytes of this thread's own, which begin at a page."""
        buffer: memoryview | None = getattr(self._buffers, "own", None)
        if buffer is None:
            import mmap

            buffer = self._buffers.own = memoryview(mmap.mmap(-1, STEP))
        return buffer

    def _copy_in_kernel(self, source: File, source_offset: int, offset: int, length: int) -> int:
        """Returns how many bytes the kernel copied; it may refuse (another filesystem) at any point."""
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

    def finish(self) -> File:
        if self.durable:
            os.fsync(self.descriptor)
        self.file = File(self.path, os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        self.file.settled = True
        return self.file

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self._direct:
            self._direct.close()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _gathered(parts: list[bytes], buffer: memoryview) -> memoryview:
    """Returns the parts end to end, in `buffer`."""
    at = 0
    for part in parts:
        buffer[at : at + len(part)] = part
        at += len(part)
    return buffer[:at]


class FileTransaction(Transaction):
    """Temporary files in one directory that get their names together."""

    output: type[FileOutput] = FileOutput

    def __init__(self, directory: str, *, force: bool, durable: bool, kernel_copies: bool = False) -> None:
        self.directory = directory
        self.force = force
        self.durable = durable
        self.kernel_copies = kernel_copies
        self._outputs: list[tuple[FileOutput, str]] = []
        self._named: list[str] = []

    def create(self, name: str, size: int, sources: Sequence[File]) -> Output:
        with os_errors("cannot be created"):
            remove_stale(self.directory, name)
            path = os.path.join(self.directory, self.temporary_name(name))
            output = self.output(path, size, kernel_copies=self.kernel_copies, durable=self.durable)
            self._outputs.append((output, os.path.join(self.directory, name)))
            # Btrfs shares only between files that are alike in this, and it can be set only while a file is empty.
            if any(linux.is_nocow(source.descriptor) for source in sources):
                self._make_nocow(output)
        return output

    def _make_nocow(self, output: FileOutput) -> None:
        try:
            linux.set_nocow(output.descriptor)
        except OSError as exc:
            # Another filesystem than the sources', with which nothing is shared.
            if exc.errno not in linux.NOT_SUPPORTED | {errno.EINVAL}:
                raise

    def temporary_name(self, name: str) -> str:
        """Returns the name that a file has until it gets its own."""
        return temporary_name(name)

    def commit(self) -> None:
        try:
            with os_errors("cannot be given its name"):
                for output, target in self._outputs:
                    self._name(output.path, target)
                    self._named.append(target)
                if self.durable:
                    _sync_directory(self.directory)
        except BaseException:
            # Files that replaced others cannot be taken back; those that are new can, and leave no half of a set.
            if not self.force:
                for target in self._named:
                    os.unlink(target)
            raise
        finally:
            self._close()
        self._outputs.clear()

    def _name(self, path: str, target: str) -> None:
        if self.force:
            os.replace(path, target)
            return
        try:
            # A link, unlike a rename, never replaces a file that somebody else made in the meantime.
            os.link(path, target)
        except FileExistsError as exc:
            raise BackendError(f"{target}: already exists", hint="--force replaces it") from exc
        except OSError:
            if os.path.lexists(target):
                raise
            os.rename(path, target)
            return
        os.unlink(path)

    def abort(self) -> None:
        self._close()
        for output, _ in self._outputs:
            if os.path.lexists(output.path):
                os.unlink(output.path)
        self._outputs.clear()

    def _close(self) -> None:
        for output, _ in self._outputs:
            output.close()


def _sync_directory(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        # Network and user-space filesystems may have no fsync for directories.
        if exc.errno not in linux.NOT_SUPPORTED | {errno.EINVAL}:
            raise
    finally:
        os.close(descriptor)
