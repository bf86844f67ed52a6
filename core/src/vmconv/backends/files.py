"""Outputs that are files: written without names or under temporary ones, synced, then named together."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from vmconv.backends.direct import STEP, DirectFile
from vmconv.backends.temporary import Temporary, already_exists
from vmconv.errors import AccessError, BackendError, os_errors, warn
from vmconv.interface.backend import DEFAULT_ACCESS, Access, Output, Transaction
from vmconv.io import attributes
from vmconv.io.directory import Directory
from vmconv.model.sources import Decoded, File, Source

if TYPE_CHECKING:
    from vmconv.model.plan import Plan, ShareSteps

# Bytes of one read and write through the page cache; they fit into the processor's cache. Pieces of 4 MiB, and
# copy_file_range, took three times the system time on ext4.
_STEP = 256 << 10


class FileOutput(Output):
    """A future target file before it is named.

    `kernel_copies` uses copy_file_range, for filesystems with copies on the server. Elsewhere that is slower than
    reading and writing, or shares blocks although copies were requested. With `durable`, `finish` syncs and copies
    start writeback at once.
    """

    def __init__(self, temporary: Temporary, size: int, *, kernel_copies: bool, durable: bool) -> None:
        self.temporary = temporary
        self.path = temporary.directory.join(temporary.target)
        """The path of the target, for messages."""
        self.size = size
        self.kernel_copies = kernel_copies
        self.durable = durable
        self.descriptor = temporary.descriptor
        self.file: File | None = None
        self._direct = DirectFile(self.descriptor) if durable else None
        self._buffers = threading.local()

    def share(self, steps: ShareSteps) -> None:
        if len(steps):
            raise BackendError(f"{self.path}: this backend cannot share")
        os.ftruncate(self.descriptor, self.size)

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
        step = STEP if direct else _STEP
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

    def finish(self) -> File:
        if self.durable:
            os.fsync(self.descriptor)
        else:
            # Network filesystems report failed writes when a descriptor is closed (man 2 close).
            os.close(os.dup(self.descriptor))
        self.file = File(self.path, os.dup(self.descriptor))
        self.file.settled = True
        return self.file

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self._direct:
            self._direct.close()
        self.temporary.close()
        self.descriptor = -1


def _gather(parts: list[bytes], buffer: memoryview) -> memoryview:
    """Returns the concatenated parts, in `buffer`."""
    at = 0
    for part in parts:
        buffer[at : at + len(part)] = part
        at += len(part)
    return buffer[:at]


def refuse_reader(target: str, old: int, sources: Sequence[File], hint: str) -> None:
    """Raises `AccessError` if the owner of the replaced file `old` may not read one of the sources."""
    status = os.fstat(old)
    for file in sources:
        if not attributes.lets_read(file.descriptor, status):
            raise AccessError(
                f"{target}: belongs to user {status.st_uid}, who may not read {file.path}, a part of the new content",
                hint=hint,
            )


def unnamed_sources(access: Access) -> list[File]:
    """Returns other users' sources that an image or another user's link named, and not the user.

    The author of such a name must not gain read access to a file by it.
    """
    if not access.sources:
        return []
    top, *rest = access.sources
    if not _is_named(top):
        return list(access.sources)
    owner = os.fstat(top.descriptor).st_uid
    return [file for file in rest if os.fstat(file.descriptor).st_uid != owner]


def _is_named(file: File) -> bool:
    """True if the path leads to the file without a symbolic link of another user."""
    from vmconv.backends.targets import locate

    try:
        directory, name = locate(file.path)
    except (OSError, AccessError):
        return False
    with directory:
        return directory.holds(name, file.descriptor)


class FileTransaction(Transaction):
    """Files of one directory that are named together."""

    output: type[FileOutput] = FileOutput

    def __init__(
        self,
        directory: Directory,
        *,
        force: bool,
        durable: bool,
        access: Access = DEFAULT_ACCESS,
        kernel_copies: bool = False,
    ) -> None:
        self.directory = directory
        self.force = force
        self.durable = durable
        self.access = access
        self.kernel_copies = kernel_copies
        self._outputs: list[FileOutput] = []

    def prepare(self, plan: Plan) -> None:
        from vmconv.backends.targets import clean

        with os_errors("cannot be cleaned", where=self.directory.path):
            clean(self.directory, [file.name for file in plan.files])

    def create(self, name: str, size: int, sources: Sequence[File]) -> Output:
        with os_errors("cannot be created", where=self.directory.join(name)):
            temporary = Temporary(self.directory, name, self.temporary_name(name))
            self._outputs.append(self.output(temporary, size, kernel_copies=self.kernel_copies, durable=self.durable))
            self._give_access(temporary)
        return self._outputs[-1]

    def temporary_name(self, name: str) -> str | None:
        """Returns a fixed temporary name for a file; None if any will do, or none."""
        return None

    def _give_access(self, temporary: Temporary) -> None:
        """Gives the new file the access rights of the replaced one, or else those that all sources allow."""
        old = self._replaced(temporary.target)
        if old >= 0:
            try:
                kept = unnamed_sources(self.access) if self.access.mode is None else []
                refuse_reader(
                    self.directory.join(temporary.target),
                    old,
                    kept,
                    "remove it first, or set the new file's permissions with --mode",
                )
                missing = attributes.carry(old, temporary.descriptor, [file.descriptor for file in kept])
                if missing:
                    warn(f"{self.directory.join(temporary.target)}: cannot keep {', '.join(missing)}")
            finally:
                os.close(old)
        elif self.access.mode is None:
            sources = [file.descriptor for file in self.access.sources]
            attributes.confine(self.directory.descriptor, sources, temporary.descriptor)
        if self.access.mode is not None:
            os.fchmod(temporary.descriptor, self.access.mode & 0o777)

    def _replaced(self, name: str) -> int:
        """Returns a descriptor of the file to replace, -1 if there is none."""
        if not self.force or not self.directory.has(name):
            return -1
        return self.directory.open(name)

    def commit(self) -> None:
        temporaries = [output.temporary for output in self._outputs]
        try:
            with os_errors("cannot be renamed to its final name", where=self.directory.path):
                if len(temporaries) > 1:
                    from vmconv.backends import naming

                    naming.commit(self.directory, temporaries, replace=self.force, durable=self.durable)
                elif temporaries:
                    self._commit_one(temporaries[0])
        finally:
            self._close()
        self._outputs.clear()

    def _commit_one(self, file: Temporary) -> None:
        try:
            file.appear(replace=self.force)
        except FileExistsError as exc:
            raise already_exists(self.directory, file.target) from exc
        try:
            if self.durable:
                self.directory.sync()
        except OSError:
            if not self.force:
                # Whether the name is durable is unknown: remove it, so that an error means no target.
                self.directory.unlink(file.target)
            raise

    def abort(self) -> None:
        try:
            for output in self._outputs:
                output.temporary.remove()
        finally:
            self._close()
            self._outputs.clear()

    def _close(self) -> None:
        for output in self._outputs:
            output.close()
