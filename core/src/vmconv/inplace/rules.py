"""What may be changed in place: refusals before anything is touched."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress

from vmconv import linux
from vmconv.errors import PlanError, VmconvError
from vmconv.image import Image
from vmconv.opener import Opener
from vmconv.registry import Registry
from vmconv.sources import File

# What has to be promised cannot be tried out: that what was synced survives a power cut, names included, and that other
# machines do not write. These filesystems are made for it.
DURABLE = ("ext4", "xfs", "btrfs", "f2fs", "bcachefs")

MAX_NEIGHBOURS = 4096
"""Files of the directory that are looked at for references to the source."""


def refuse_places(source: str, files: Sequence[File], directory: str) -> None:
    """Raises unless all files of the source are ordinary files of this directory, each with one name."""
    if os.path.islink(source):
        raise PlanError(
            f"{source}: is a symbolic link; in place, the file itself is renamed",
            hint=f"name {os.path.realpath(source)}",
        )
    for file in files:
        status = os.fstat(file.descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise PlanError(
                f"{file.path}: is not a regular file; in place, it would have to be renamed",
                hint="convert to another file",
            )
        if os.path.dirname(os.path.realpath(file.path)) != directory:
            raise PlanError(
                f"{file.path}: lies in another directory than the target, {directory}",
                hint="in place, the target lies where the source does",
            )
        if status.st_nlink > 1:
            raise PlanError(
                f"{file.path}: has {status.st_nlink} names (hard links), the others would be changed too",
                hint="remove them, or convert to another file",
            )
    _refuse_filesystem(directory)


def _refuse_filesystem(directory: str) -> None:
    kind = linux.mount_of(directory).type
    if kind not in DURABLE:
        raise PlanError(
            f"{directory}: is on {kind}, which is not known to keep what in place promises about power cuts",
            hint=f"these are: {', '.join(DURABLE)}; convert to another file",
        )


def refuse_foreign(layers: Sequence[Image], files: Sequence[File], registry: Registry) -> None:
    """Raises when payload lies in a file that is a disk of its own, to which a layer only refers."""
    own = [layer.file for layer in layers]
    recorded = {os.path.basename(each.name) for layer in layers for each in layer.dependencies if each.fingerprint}
    for file in files:
        if file not in own and (file.name in recorded or registry.probe(file) is not None):
            raise PlanError(
                f"{own[0].name}: refers to {file.name}, which is a disk of its own",
                hint=f"convert {file.name} in place, or {own[0].name} to another file",
            )


def refuse_dependents(files: Iterable[File], opener: Opener, directory: str, but: Sequence[str] = ()) -> None:
    """Raises when another image of the directory refers to one of these files: as its parent, or for its payload.

    `but` are files that may, as they go with them.
    """
    own = {_identity(file) for file in files}
    known = {_identity(file) for file in opener.files}
    with os.scandir(directory) as entries:
        for _, entry in zip(range(MAX_NEIGHBOURS), entries, strict=False):
            if not entry.is_file(follow_symlinks=False) or entry.name in but:
                continue
            if (os.stat(directory).st_dev, entry.inode()) in known:
                continue
            found = own & _referred(entry.path, opener)
            if found:
                name = next(file.name for file in opener.files if _identity(file) in found)
                raise PlanError(
                    f"{entry.name}: refers to {name}, which would be another disk image then",
                    hint=f"convert {entry.name} first, flattening it, or rebase it",
                )


def _referred(path: str, opener: Opener) -> set[tuple[int, int]]:
    """Returns the files that an image refers to, as far as they can be opened; nothing when it is no image."""
    with Opener(opener.registry, allow_external=["/"], force_share=True) as look:
        # What cannot be read refers to nothing that could be found out; what it had opened counts.
        with suppress(VmconvError):
            image = look.image(path, content_decides=True)
            for dependency in image.dependencies:
                with suppress(VmconvError):
                    look.related(image.file, dependency.name, dependency.role)
            image.parent  # noqa: B018 opens it
        return {_identity(file) for file in look.files}


def _identity(file: File) -> tuple[int, int]:
    return file.stamp.device, file.stamp.inode


def refuse_losses(losses: Sequence[str], *, keep_undo: bool) -> None:
    """Raises when something that the source holds would be destroyed, with no way back."""
    if losses and not keep_undo:
        raise PlanError(
            f"in place, this would be destroyed: {'; '.join(losses)}",
            hint="--keep-undo keeps it, or convert to another file",
        )
