"""References ranges of the sources by copy_file_range on JuiceFS, where the call is one transaction of metadata.

The call copies on most other filesystems. So it is used on this one only, and afterwards the mount is asked what it has
sent to its object storage meanwhile. Any range can be referenced, from any byte to any other.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmconv.backends.files import FileOutput, FileTransaction
from vmconv.errors import BackendError, counted, os_errors
from vmconv.interface.backend import DEFAULT_ACCESS, Access, Backend, Capabilities, Survey, Transaction
from vmconv.model.sources import File
from vmconv.system import linux
from vmconv.system.juicefs import TYPE, bytes_sent

if TYPE_CHECKING:
    from vmconv.io.directory import Directory
    from vmconv.model.extents import Column
    from vmconv.model.plan import Action, FilePlan, Plan, ShareSteps

CHUNK = 64 << 20
"""Bytes of a file whose ranges JuiceFS keeps in one list."""
COMPACTED = 5
"""Ranges of a chunk from which on JuiceFS copies it when it is read (pkg/vfs/reader.go)."""


class JuiceFSOutput(FileOutput):
    """A temporary file whose payload is referenced in the sources."""

    def share(self, steps: ShareSteps) -> None:
        before = self._sent()
        descriptors = [source.descriptor if isinstance(source, File) else -1 for source in steps.sources]
        columns = (steps.source, steps.source_offset, steps.offset, steps.length)
        for source, source_offset, offset, length in zip(*(one.tolist() for one in columns), strict=True):
            self._reference(descriptors[source], source_offset, offset, length)
            self.on_shared(length)
        # Uploads bytes that were copied instead.
        os.fsync(self.descriptor)
        wanted = int(steps.length.sum())
        sent = max(now - then for now, then in zip(self._sent(), before, strict=True))
        if wanted and sent >= wanted:
            raise BackendError(
                f"{self.path}: {wanted} bytes should be referenced, and the mount has sent {sent} meanwhile",
                hint="if something else wrote there, try again; --backend copy copies",
            )

    def _reference(self, source: int, source_offset: int, offset: int, length: int) -> None:
        done = 0
        while done < length:
            places = source_offset + done, offset + done
            try:
                # The kernel ends each call at 0xfffff000 bytes.
                step = os.copy_file_range(source, self.descriptor, length - done, *places)
                if not step:
                    raise OSError(errno.EIO, "nothing was referenced")
            except OSError as exc:
                raise BackendError(
                    f"{self.path}: referencing {length - done} bytes from {places[0]:#x} at {places[1]:#x}: "
                    f"{exc.strerror}"
                ) from exc
            done += step

    def finish(self) -> File:
        # Only now, and if need be: JuiceFS notes each change of the size as another range.
        if os.fstat(self.descriptor).st_size != self.size:
            os.ftruncate(self.descriptor, self.size)
        return super().finish()

    def _sent(self) -> tuple[int, ...]:
        with os_errors("cannot be examined", where=self.path):
            found = bytes_sent(linux.mount_of(linux.name_of(self.descriptor)))
        if found is None:
            raise BackendError(f"{self.path}: its mount of JuiceFS no longer tells what it sends")
        return found


class JuiceFSTransaction(FileTransaction):
    output = JuiceFSOutput


class JuiceFSBackend(Backend):
    name = "juicefs"
    title = "references ranges of the source (copy_file_range on JuiceFS)"

    def capabilities(self, directory: str) -> Capabilities:
        with os_errors("cannot be examined", where=directory):
            reason = _refusal(directory)
        return Capabilities(usable=reason is None, shares=reason is None, reason=reason)

    def survey(self, directory: str, sources: Sequence[File]) -> Survey:
        with os_errors("cannot be examined", where=directory):
            refused = _refusal(directory)
            device = os.stat(directory).st_dev
        if refused:
            return Survey(1, {id(source): refused for source in sources})
        reasons = {}
        for source in sources:
            if source.is_device:
                reasons[id(source)] = f"{source.name} is a block device, of which files reference nothing"
            elif source.is_remote or source.stamp.device != device:
                reasons[id(source)] = f"{source.name} is not on the same mount as {directory}"
        return Survey(1, reasons, chunk=CHUNK)

    def notes(self, plan: Plan) -> tuple[str, ...]:
        chunks = copied_later(plan)
        if not chunks:
            return ()
        return (
            f"JuiceFS copies at least {counted(chunks, 'chunk')} of 64 MiB when a mount that may write reads them: "
            f"such a chunk is in {COMPACTED} ranges or more",
        )

    def begin(
        self, directory: Directory, *, force: bool = False, durable: bool = True, access: Access = DEFAULT_ACCESS
    ) -> Transaction:
        return JuiceFSTransaction(directory, force=force, durable=durable, access=access)


def _refusal(directory: str) -> str | None:
    """Returns the reason against references in a directory, as the end of "copied because ..."."""
    mount = linux.mount_of(directory)
    if mount.type != TYPE:
        return f"{mount.type} at {mount.point} is not JuiceFS"
    if bytes_sent(mount) is None:
        return f"JuiceFS at {mount.point} does not tell there what it sends (.stats)"
    return None


def copied_later(plan: Plan) -> int:
    """Returns how many chunks of the plan's files JuiceFS will copy when they are read, with payload in them."""
    from vmconv.model.plan import Action

    return sum(
        int(((_steps(file, *Action) >= COMPACTED) & (_steps(file, Action.SHARE) > 0)).sum()) for file in plan.files
    )


def _steps(file: FilePlan, *actions: Action) -> Column:
    """Returns for each chunk of a file how many steps with these actions lie in it."""
    import numpy as np

    steps = file.steps.take(np.isin(file.steps.action, actions))
    change = np.zeros(-(-file.size // CHUNK) + 1, dtype=np.int64)
    np.add.at(change, steps.offset // CHUNK, 1)
    np.subtract.at(change, (steps.offset + steps.length - 1) // CHUNK + 1, 1)
    return np.cumsum(change)
