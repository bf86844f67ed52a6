"""Outputs that are files: written without names or under temporary ones, synced, then named together."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmconv.backends.direct import DirectFile
from vmconv.backends.temporary import Temporary, already_exists
from vmconv.backends.writing import DescriptorOutput
from vmconv.errors import AccessError, BackendError, os_errors, warn
from vmconv.interface.backend import DEFAULT_ACCESS, Access, Output, Transaction
from vmconv.io import attributes
from vmconv.io.directory import Directory
from vmconv.model.sources import File
from vmconv.system import linux

if TYPE_CHECKING:
    from vmconv.model.plan import Plan, ShareSteps


class FileOutput(DescriptorOutput):
    """A future target file before it is named."""

    def __init__(self, temporary: Temporary, size: int, *, kernel_copies: bool, durable: bool) -> None:
        # The path of the target, for messages.
        path = temporary.directory.join(temporary.target)
        super().__init__(path, temporary.descriptor, size, durable=durable, kernel_copies=kernel_copies)
        self.temporary = temporary
        self._direct = DirectFile(self.descriptor) if durable else None

    def share(self, steps: ShareSteps) -> None:
        super().share(steps)
        os.ftruncate(self.descriptor, self.size)

    def allocate(self, offset: int, length: int) -> None:
        try:
            linux.allocate(self.descriptor, offset, length)
        except OSError as exc:
            if exc.errno not in linux.NOT_SUPPORTED | {errno.EINVAL}:
                raise
            raise BackendError(
                f"{self.path}: its filesystem cannot allocate space: {exc.strerror}",
                hint="use preallocation=full, which writes zeros",
            ) from exc

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
        super().close()
        self.temporary.close()
        self.descriptor = -1


def refuse_reader(target: str, old: int, sources: Sequence[File], hint: str) -> None:
    """Raises `AccessError` if the owner of the replaced file `old` may not read one of the sources."""
    status = os.fstat(old)
    for file in sources:
        if not attributes.lets_read(file.descriptor, status):
            raise AccessError(
                f"{target}: belongs to user {status.st_uid}, who may not read {file.path}, a part of the new content",
                hint=hint,
            )


def unnamed_sources(sources: Sequence[File]) -> list[File]:
    """Returns other users' sources that an image or another user's link named, and not the user.

    The author of such a name must not gain read access to a file by it.
    """
    if not sources:
        return []
    top, *rest = sources
    if not _is_named(top):
        return list(sources)
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
                kept = unnamed_sources(self._sources) if self.access.mode is None else []
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
            sources = [file.descriptor for file in self._sources]
            attributes.confine(self.directory.descriptor, sources, temporary.descriptor)
        if self.access.mode is not None:
            os.fchmod(temporary.descriptor, self.access.mode & 0o777)

    @property
    def _sources(self) -> list[File]:
        """The local files of the source. Whoever can name a URL can read it, as far as this machine can tell."""
        return [file for file in self.access.sources if not file.is_remote]

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
