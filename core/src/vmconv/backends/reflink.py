"""Sharing blocks between files by FICLONERANGE: XFS, Btrfs and whatever else answers it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vmconv import linux
from vmconv.backends.files import FileOutput, FileTransaction
from vmconv.errors import BackendError, os_errors
from vmconv.sources import File
from vmconv.storage import Ability, Backend, Survey, Transaction

if TYPE_CHECKING:
    from vmconv.planner import ShareSteps

# One call is not interrupted by ^C and reports no progress; more, shorter calls cost nothing.
_LONGEST_CALL = 1 << 30


class ReflinkOutput(FileOutput):
    """A temporary file whose payload is shared with the sources."""

    def share(self, steps: ShareSteps) -> None:
        steps = steps.split(_LONGEST_CALL)
        unit = os.fstatvfs(self.descriptor).f_bsize
        # A source's last, partial block can only be shared while nothing lies behind it in the target.
        tails = steps.length % unit != 0
        self._clone(steps.take(tails))
        os.ftruncate(self.descriptor, self.size)
        by_target = linux.mount_of(os.path.dirname(self.path)).type == "btrfs"
        self._clone(steps.take(~tails).ordered(by_target=by_target))

    def _clone(self, steps: ShareSteps) -> None:
        from fcntl import ioctl

        descriptor, request, size = self.descriptor, linux.FICLONERANGE, linux.CLONE.size
        packed = steps.pack()
        try:
            for at in range(0, len(packed), size):
                ioctl(descriptor, request, packed[at : at + size])
        except OSError as exc:
            _, source_offset, length, offset = linux.CLONE.unpack(packed[at : at + size])
            raise BackendError(
                f"{self.path}: sharing {length} bytes from {source_offset:#x} at {offset:#x}: {exc.strerror}"
            ) from exc


class ReflinkTransaction(FileTransaction):
    output = ReflinkOutput


class ReflinkBackend(Backend):
    name = "reflink"
    title = "shares blocks with the source (FICLONERANGE)"

    def ability(self, directory: str) -> Ability:
        with os_errors("cannot hold files"), _scratch(directory) as scratch:
            unit = os.fstatvfs(scratch).f_bsize
            os.pwrite(scratch, bytes(2 * unit), 0)
            try:
                linux.clone_range(scratch, scratch, 0, unit, unit)
            except OSError as exc:
                return Ability(usable=False, shares=False, reason=_refusal(exc, directory))
        return Ability(usable=True, shares=True, unit=unit)

    def survey(self, directory: str, sources: Sequence[File]) -> Survey:
        refusals = {}
        with os_errors("cannot hold files"), _scratch(directory) as scratch:
            unit = os.fstatvfs(scratch).f_bsize
            nocow = any(linux.is_nocow(source.descriptor) for source in sources)
            if nocow:
                with os_errors("cannot be made NOCOW like the source"):
                    linux.set_nocow(scratch)
            for source in sources:
                reason = _why_not(source, scratch, unit, directory)
                if reason:
                    refusals[id(source)] = reason
        return Survey(unit, refusals)

    def begin(self, directory: str, *, force: bool = False, durable: bool = True) -> Transaction:
        return ReflinkTransaction(directory, force=force, durable=durable)


@contextmanager
def _scratch(directory: str) -> Iterator[int]:
    """Yields an empty file of the filesystem that holds `directory`, without a name wherever it can be had so."""
    try:
        descriptor = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT) or not os.path.isdir(directory):
            raise
        from tempfile import mkstemp

        descriptor, path = mkstemp(prefix=".vmconv-", dir=directory)
        os.unlink(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _why_not(source: File, scratch: int, unit: int, directory: str) -> str | None:
    """Returns why no block of `source` can be shared with `scratch`, None when one was."""
    if source.is_device:
        return f"{source.name} is a block device, which shares nothing with files"
    # Any block will do, the last one too: what is asked is whether these two files can share at all.
    length = unit if source.size >= unit else 0
    try:
        linux.clone_range(source.descriptor, scratch, 0, length, 0)
    except OSError as exc:
        return _refusal(exc, directory, source)
    finally:
        os.ftruncate(scratch, 0)
    return None


def _refusal(exc: OSError, directory: str, source: File | None = None) -> str:
    mount = linux.mount_of(directory)
    name = source.name if source else "a file"
    if exc.errno == errno.EXDEV:
        return f"{name} is on another filesystem than {directory}"
    if exc.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS):
        return f"{mount.type} at {mount.point} cannot share blocks between files"
    if exc.errno == errno.ETXTBSY:
        return f"{name} is in use as swap"
    if exc.errno == errno.EINVAL and source and linux.is_nocow(source.descriptor) is False and mount.type == "btrfs":
        return f"{name} is copy-on-write while another source is not (chattr +C), which Btrfs does not mix"
    return f"{mount.type} at {mount.point} refuses to share with {name}: {exc.strerror}"
