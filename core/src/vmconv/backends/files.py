"""Outputs that are files: written beside the target under a temporary name, made durable, then renamed.

A run that is killed leaves its temporary files behind; they are recognisable by name and by not being locked any more,
and the next run that makes the same target removes them.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmconv import linux
from vmconv.errors import BackendError, os_errors
from vmconv.sources import File, Source
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
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _create_locked(path: str) -> int:
    """Returns a new file that is locked: between the two, another run may take it for a dead one's and remove it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)


_DIRECT_FROM = 1 << 20
_DIRECT_UNIT = 4096


class _DirectWriter:
    """Large writes past the page cache: they cost half the processor time and leave nothing for the final sync.

    Not every filesystem takes them; then, and for what is not whole blocks, `write` leaves the rest to the caller.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor = -1
        self._refused = False
        self._lock = threading.Lock()
        self._buffers = threading.local()

    def write(self, offset: int, view: memoryview) -> int:
        """Returns how many bytes of the beginning were written."""
        length = self._length(offset, len(view))
        if length:
            self._buffer(length)[:length] = view[:length]
        return self._put(offset, length)

    def copy(self, source: File, source_offset: int, offset: int, length: int) -> int:
        """Returns how many bytes of the beginning were copied; they are read to where they are written from."""
        length = self._length(offset, length)
        if length:
            with memoryview(self._buffer(length)) as whole, whole[:length] as part:
                length = os.preadv(source.descriptor, [part], source_offset)
        return self._put(offset, length // _DIRECT_UNIT * _DIRECT_UNIT)

    def _length(self, offset: int, length: int) -> int:
        whole = length // _DIRECT_UNIT * _DIRECT_UNIT
        return 0 if self._refused or offset % _DIRECT_UNIT or whole < _DIRECT_FROM else whole

    def _put(self, offset: int, length: int) -> int:
        if not length:
            return 0
        try:
            with memoryview(self._buffer(length)) as whole, whole[:length] as part:
                return os.pwrite(self._opened(), part, offset)
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            self._refused = True
            return 0

    def _buffer(self, length: int) -> mmap.mmap:
        """Returns memory that begins at a page, as the kernel wants it and a mapping does; one for each thread."""
        buffer: mmap.mmap | None = getattr(self._buffers, "own", None)
        if buffer is None or len(buffer) < length:
            buffer = self._buffers.own = mmap.mmap(-1, length)
        return buffer

    def _opened(self) -> int:
        with self._lock:
            if self._descriptor < 0:
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
            return self._descriptor

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class FileOutput(Output):
    """A temporary file that will become the target.

    `kernel_copies` leaves copying to copy_file_range, for filesystems whose server can do it. Elsewhere that is slower
    than reading and writing, or shares blocks where copies were asked for.
    """

    def __init__(self, path: str, size: int, *, kernel_copies: bool) -> None:
        self.path = path
        self.size = size
        self.kernel_copies = kernel_copies
        self.descriptor = _create_locked(path)
        self.file: File | None = None
        self._direct = _DirectWriter(path)

    def share(self, steps: ShareSteps) -> None:
        if len(steps):
            raise BackendError(f"{self.path}: this backend cannot share")
        os.ftruncate(self.descriptor, self.size)

    def write(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self.descriptor, view, offset)
            view, offset = view[done:], offset + done

    def write_payload(self, offset: int, data: bytes) -> None:
        done = self._direct.write(offset, memoryview(data))
        self.write(offset + done, data[done:] if done else data)

    def copy(self, source: Source, source_offset: int, offset: int, length: int) -> None:
        done = 0
        if isinstance(source, File) and self.kernel_copies:
            done = self._copy_in_kernel(source, source_offset, offset, length)
        elif isinstance(source, File) and source.descriptor >= 0:
            done = self._direct.copy(source, source_offset, offset, length)
        if done < length:
            super().copy(source, source_offset + done, offset + done, length - done)

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
        os.fsync(self.descriptor)
        self.file = File(self.path, os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        return self.file

    def close(self) -> None:
        self._direct.close()
        if self.file is not None:
            self.file.close()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class FileTransaction(Transaction):
    """Temporary files in one directory that get their names together."""

    output: type[FileOutput] = FileOutput

    def __init__(self, directory: str, *, force: bool, kernel_copies: bool) -> None:
        self.directory = directory
        self.force = force
        self.kernel_copies = kernel_copies
        self._outputs: list[tuple[FileOutput, str]] = []
        self._named: list[str] = []

    def create(self, name: str, size: int, sources: Sequence[File]) -> Output:
        with os_errors("cannot be created"):
            remove_stale(self.directory, name)
            path = os.path.join(self.directory, temporary_name(name))
            output = self.output(path, size, kernel_copies=self.kernel_copies)
            self._outputs.append((output, os.path.join(self.directory, name)))
            # Btrfs shares only between files that are alike in this, and it can be set only while a file is empty.
            if any(linux.is_nocow(source.descriptor) for source in sources):
                linux.set_nocow(output.descriptor)
        return output

    def commit(self) -> None:
        try:
            with os_errors("cannot be given its name"):
                for output, target in self._outputs:
                    self._name(output.path, target)
                    self._named.append(target)
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
    finally:
        os.close(descriptor)
