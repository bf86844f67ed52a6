"""Shares blocks between files by FICLONERANGE: XFS, Btrfs and any other filesystem that supports it.

The request shares or fails, on every filesystem (man 2 ioctl_ficlonerange). copy_file_range, which may copy instead,
is never made here.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from vmconv.backends.files import FileOutput, FileTransaction
from vmconv.errors import BackendError, os_errors
from vmconv.interface.backend import CANNOT_SHARE, DEFAULT_ACCESS, Access, Backend, Capabilities, Survey, Transaction
from vmconv.model.sources import File
from vmconv.system import linux

if TYPE_CHECKING:
    from vmconv.io.directory import Directory
    from vmconv.model.plan import ShareSteps

# A call cannot be interrupted and reports no progress. More, shorter calls cost nothing.
_LONGEST_CALL = 1 << 30

_TOLD = 4096
"""Calls between two reports of progress."""

_PATIENCE = 60.0
"""Seconds in which a source that was written to can be shared: ZFS writes its transactions every five or so."""


class ReflinkOutput(FileOutput):
    """A temporary file whose payload is shared with the sources."""

    def share(self, steps: ShareSteps) -> None:
        steps = steps.split(_LONGEST_CALL)
        unit = os.fstatvfs(self.descriptor).f_bsize
        kind = linux.mount_of(linux.name_of(self.descriptor)).type
        on_btrfs = kind == "btrfs"
        if on_btrfs and len(steps):
            source = steps.sources[int(steps.source[0])]
            if isinstance(source, File):
                _match_nocow(source, self.descriptor, unit)
        # The kernel shares a partial last block only at the end of the target, so this comes before ftruncate.
        tails = steps.length % unit != 0
        self._clone(steps.take(tails))
        if kind != "zfs":
            os.ftruncate(self.descriptor, self.size)
        # The fastest order: Btrfs by target, XFS by source (docs/decisions/0013).
        self._clone(steps.take(~tails).ordered(by_target=on_btrfs))
        if kind == "zfs":
            # A file of ZFS gets records of the size of the first that it shares, unless it has a size already.
            os.ftruncate(self.descriptor, self.size)

    def _clone(self, steps: ShareSteps) -> None:
        from fcntl import ioctl

        descriptor, request, size = self.descriptor, linux.FICLONERANGE, linux.CLONE.size
        packed = steps.pack()
        told = _TOLD * size
        try:
            for first in range(0, len(packed), told):
                for at in range(first, min(first + told, len(packed)), size):
                    try:
                        ioctl(descriptor, request, packed[at : at + size])
                    except BlockingIOError:
                        self._clone_later(packed[at : at + size])
                self.on_shared(int(steps.length[first // size : first // size + _TOLD].sum()))
        except OSError as exc:
            _, source_offset, length, offset = linux.CLONE.unpack(packed[at : at + size])
            raise BackendError(
                f"{self.path}: sharing {length} bytes from {source_offset:#x} at {offset:#x}: {exc.strerror}"
            ) from exc

    def _clone_later(self, packed: bytes) -> None:
        """Shares a range of a file that was written to a moment ago; raises `OSError` after `_PATIENCE`."""
        from fcntl import ioctl

        os.fsync(linux.CLONE.unpack(packed)[0])
        end, pause = time.monotonic() + _PATIENCE, 0.01
        while True:
            try:
                ioctl(self.descriptor, linux.FICLONERANGE, packed)
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise
            else:
                return
            time.sleep(pause)
            pause = min(2 * pause, 1.0)


class ReflinkTransaction(FileTransaction):
    output = ReflinkOutput


class ReflinkBackend(Backend):
    name = "reflink"
    title = "shares blocks with the source (FICLONERANGE)"

    def capabilities(self, directory: str) -> Capabilities:
        with os_errors("cannot hold files", where=directory), _scratch(directory) as scratch:
            unit = os.fstatvfs(scratch).f_bsize
            os.pwrite(scratch, bytes(2 * unit), 0)
            try:
                linux.clone_range(scratch, scratch, 0, unit, unit)
            except BlockingIOError:
                # The block was written just now, and can be shared later.
                pass
            except OSError as exc:
                return Capabilities(usable=False, shares=False, reason=_refusal(exc, directory))
        return Capabilities(usable=True, shares=True, unit=unit)

    def survey(self, directory: str, sources: Sequence[File]) -> Survey:
        with os_errors("cannot hold files", where=directory), _scratch(directory) as scratch:
            unit = os.fstatvfs(scratch).f_bsize
            apart: dict[int, str] = {}
            if linux.mount_of(directory).type == "zfs":
                unit, apart = _records(sources, unit)
            alike = [source for source in sources if id(source) not in apart]
            refused = _clone_errors(alike, scratch, unit)
            if any(_is_nocow_mismatch(exc) for exc in refused.values()):
                refused = _fewest_errors(alike, scratch, unit, refused)
            by_id = {id(source): source for source in sources}
            reasons = {key: _refusal(exc, directory, by_id[key], scratch) for key, exc in refused.items()}
        return Survey(unit, reasons | apart)

    def begin(
        self, directory: Directory, *, force: bool = False, durable: bool = True, access: Access = DEFAULT_ACCESS
    ) -> Transaction:
        return ReflinkTransaction(directory, force=force, durable=durable, access=access)


@contextmanager
def _scratch(directory: str) -> Iterator[int]:
    """Yields an empty file on the filesystem of `directory`, without a name if O_TMPFILE works there."""
    try:
        descriptor = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        if exc.errno not in linux.NOT_SUPPORTED | {errno.EISDIR, errno.ENOENT} or not os.path.isdir(directory):
            raise
        from tempfile import mkstemp

        descriptor, path = mkstemp(prefix=".vmconv-", dir=directory)
        os.unlink(path)
    try:
        yield descriptor
    finally:
        # Linux closes it even on errors, and its content is not needed.
        with suppress(OSError):
            os.close(descriptor)


def _clone_errors(sources: Sequence[File], scratch: int, unit: int) -> dict[int, OSError]:
    """Returns the errors of sources that cannot share with the empty file `scratch`, by the source's id."""
    tried = {id(source): _clone_error(source, scratch, unit) for source in sources}
    return {key: exc for key, exc in tried.items() if exc}


def _clone_error(source: File, scratch: int, unit: int) -> OSError | None:
    """Returns the error of sharing a block of `source` with the empty file `scratch`, None on success."""
    if source.is_device:
        return OSError(errno.ENOTBLK, os.strerror(errno.ENOTBLK))
    if source.is_remote:
        return OSError(errno.EREMOTE, os.strerror(errno.EREMOTE))
    # Any block will do, the last one too: only the pair of files matters. Sharing nothing would prove nothing.
    try:
        linux.clone_range(source.descriptor, scratch, 0, min(unit, source.size), 0)
    except BlockingIOError:
        # It was written to a moment ago, and can be shared later.
        return None
    except OSError as exc:
        return exc
    finally:
        os.ftruncate(scratch, 0)
    return None


# -- ZFS shares whole records. Their size is that of the file, which keeps what its filesystem had (recordsize) when it
# grew, and a file has one size. A file smaller than a record has one of its own (zfs_clone_range).


def _records(sources: Sequence[File], unit: int) -> tuple[int, dict[int, str]]:
    """Returns the size of the records of most bytes, and the reasons against the sources with others.

    `unit` is the size if no source has whole records.
    """
    files = [source for source in sources if not (source.is_device or source.is_remote)]
    sizes = {id(source): os.fstat(source.descriptor).st_blksize for source in files}
    # Writers place payload by powers of two.
    whole = {size for size in sizes.values() if size & (size - 1) == 0}
    totals = {size: sum(one.size for one in sources if sizes.get(id(one)) == size) for size in whole}
    chosen = max(totals, key=lambda size: (totals[size], size), default=unit)
    reason = "has records of {} bytes and most payload has {}, and ZFS does not mix the two in one file"
    return chosen, {
        id(source): f"{source.name} {reason.format(size, chosen)}"
        for source in sources
        if (size := sizes.get(id(source), chosen)) != chosen
    }


# -- Btrfs shares only between two files with copy-on-write and checksums, or two without. A new file inherits
# this from its directory and the mount (chattr +C; nodatacow, nodatasum), and can be changed while it is empty.


def _is_nocow_mismatch(exc: OSError) -> bool:
    return exc.errno == errno.EINVAL


def _fewest_errors(sources: Sequence[File], scratch: int, unit: int, refused: dict[int, OSError]) -> dict[int, OSError]:
    """Returns the errors of the sources with the NOCOW flag that refuses fewest bytes; leaves `scratch` with it."""
    sizes = {id(source): source.size for source in sources}
    best, chosen = refused, linux.is_nocow(scratch)
    for nocow in (False, True):
        if _set_nocow(scratch, nocow):
            tried = _clone_errors(sources, scratch, unit)
            if sum(sizes[key] for key in tried) < sum(sizes[key] for key in best):
                best, chosen = tried, nocow
    _set_nocow(scratch, chosen)
    return best


def _match_nocow(source: File, descriptor: int, unit: int) -> None:
    """Sets the NOCOW flag of an empty file so that it can share with `source`, if possible."""
    for nocow in (None, False, True):
        if nocow is None or _set_nocow(descriptor, nocow):
            exc = _clone_error(source, descriptor, unit)
            if exc is None or not _is_nocow_mismatch(exc):
                return


def _set_nocow(descriptor: int, nocow: bool) -> bool:
    """Sets or clears the NOCOW flag of an empty file; returns False if the filesystem refuses."""
    try:
        linux.set_nocow(descriptor, nocow)
    except OSError as exc:
        if exc.errno not in linux.NOT_SUPPORTED | {errno.EINVAL, errno.EPERM, errno.EACCES}:
            raise
        return False
    return True


def _is_mounted_twice(source: File, scratch: int) -> bool:
    """True if both files are on one filesystem: only the mounts differ, such as bind mounts."""
    with suppress(OSError):
        return linux.filesystem_id(source.descriptor) == linux.filesystem_id(scratch)
    return False


def _refusal(exc: OSError, directory: str, source: File | None = None, scratch: int = -1) -> str:
    """Returns the reason against sharing, as the end of "copied because ..."."""
    name = source.name if source else "a file"
    if exc.errno == errno.ENOTBLK:
        return f"{name} is a block device, which shares nothing with files"
    if exc.errno == errno.EREMOTE:
        return f"{name} comes over the network"
    if exc.errno == errno.EXDEV and source and _is_mounted_twice(source, scratch):
        return f"{name} is on another mount of {directory}'s filesystem, and Linux before 5.18 shares within one mount"
    if exc.errno == errno.EXDEV:
        return f"{name} is on another filesystem than {directory}"
    mount = linux.mount_of(directory)
    if exc.errno in linux.NOT_SUPPORTED:
        return f"{mount.type} at {mount.point} {CANNOT_SHARE}"
    if exc.errno == errno.ETXTBSY:
        return f"{name} is in use as swap"
    if _is_nocow_mismatch(exc) and source and mount.type == "btrfs":
        nocow = linux.is_nocow(source.descriptor)
        if nocow != linux.is_nocow(scratch):
            kinds = ("copied on write", "not copied on write (chattr +C)")
            return (
                f"{name} is {kinds[nocow]} and most payload is {kinds[not nocow]}, and Btrfs does not mix the "
                "two in one file"
            )
    return f"{mount.type} at {mount.point} refuses to share with {name}: {exc.strerror}"
