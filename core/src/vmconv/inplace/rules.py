"""Preconditions of a change in place, checked before any write."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vmconv.errors import AccessError, PlanError
from vmconv.inplace.codec import MAX_BODY, Ranges
from vmconv.inplace.names import JOURNAL, UNDO, WORKING, beside
from vmconv.io.directory import Directory
from vmconv.io.registry import Registry
from vmconv.model.image import Image
from vmconv.model.sources import File
from vmconv.system import linux

# Filesystems that keep synced data and names after a power failure, and that no other machine writes to. Neither can be
# tested at run time.
DURABLE = ("ext4", "xfs", "btrfs", "f2fs", "bcachefs")


class Own(NamedTuple):
    """A file of the image to change, and its name in the common directory."""

    file: File
    name: str


def own_name(file: File) -> str:
    """Returns the name of an open file, links followed; `refuse_places` checks that it still is."""
    return os.path.basename(os.path.realpath(file.path))


def refuse_links(source: str) -> None:
    """Raises `PlanError` if the source path is a symbolic link."""
    if os.path.islink(source):
        raise PlanError(
            f"{source}: is a symbolic link; in place, the file itself is renamed",
            hint=f"name {os.path.realpath(source)}",
        )


def refuse_places(own: Iterable[Own], directory: Directory) -> None:
    """Raises `PlanError` unless all are regular files of this directory with one link each."""
    for file, name in own:
        status = os.fstat(file.descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise PlanError(
                f"{file.path}: is not a regular file; in place, it would have to be renamed",
                hint="convert to another file",
            )
        if not directory.holds(name, file.descriptor):
            raise PlanError(
                f"{file.path}: lies in another directory than the target, {directory.path}",
                hint="in place, the target is in the directory of the source",
            )
        if status.st_nlink > 1:
            raise PlanError(
                f"{file.path}: has {status.st_nlink} names (hard links), all of them would change",
                hint="remove them, or convert to another file",
            )
    _refuse_filesystem(directory.path)


def _refuse_filesystem(directory: str) -> None:
    kind = linux.mount_of(directory).type
    if kind not in DURABLE:
        raise PlanError(
            f"{directory}: is on {kind}, which is not known to survive power failures as in place needs it",
            hint=f"these are: {', '.join(DURABLE)}; convert to another file",
        )


def refuse_other_owners(directory: Directory, named: str, names: Iterable[str], option: str) -> None:
    """Raises `PlanError` if a file and the file `named` by the user have different owners.

    An image names its own files, so its author could direct vmconv at files of others. `option` allows that.
    """
    status = directory.status(named)
    owner = status.st_uid if status else -1
    for name in names:
        found = directory.status(name)
        if found is not None and found.st_uid != owner:
            raise PlanError(
                f"{directory.join(name)}: belongs to user {found.st_uid}, {named} to user {owner}",
                hint=f"{option} allows it; or convert to another file",
            )


def refuse_exchanged(directory: Directory, own: Own, descriptor: int) -> None:
    """Raises `AccessError` if a descriptor, opened by name, is not the file that was read."""
    if not os.path.samestat(os.fstat(descriptor), os.fstat(own.file.descriptor)):
        raise AccessError(
            f"{directory.join(own.name)}: was replaced while it was being examined",
            hint="find the program that replaces it",
        )


def refuse_leftovers(directory: Directory, own: Iterable[Own]) -> None:
    """Raises `PlanError` if a journal or a working name exists, of any user."""
    for _, name in own:
        for other in (beside(name, JOURNAL), beside(name, WORKING)):
            if directory.has(other):
                raise PlanError(
                    f"{directory.join(other)}: is in the way of a change in place",
                    hint=f"if one was interrupted: vmconv recover {directory.join(name)}; else move it away",
                )


def refuse_undo_file(file: File) -> None:
    """Raises `PlanError` if a file has an undo file, which only fits it as it is."""
    undo = beside(os.path.realpath(file.path), UNDO)
    if os.path.lexists(undo):
        raise PlanError(
            f"{undo}: would no longer undo the last change",
            hint=f"vmconv undo {file.name}, or remove the file if it is not needed",
        )


def refuse_too_much(name: str, saved: Ranges) -> None:
    """Raises `PlanError` if the ranges to overwrite exceed a journal, before reading them into memory."""
    total = int(saved[:, 1].sum())
    if total > MAX_BODY:
        raise PlanError(f"{name}: {total} bytes would be overwritten, {MAX_BODY} at most in place")


def refuse_foreign(layers: Sequence[Image], files: Sequence[File], registry: Registry) -> None:
    """Raises `PlanError` if payload is in another disk image, to which a layer only refers."""
    own = [layer.file for layer in layers]
    recorded = {os.path.basename(each.name) for layer in layers for each in layer.dependencies if each.fingerprint}
    for file in files:
        if file not in own and (file.name in recorded or registry.probe(file) is not None):
            raise PlanError(
                f"{own[0].name}: refers to {file.name}, which is a disk of its own",
                hint=f"convert {file.name} in place, or {own[0].name} to another file",
            )


def refuse_losses(source: str, losses: Sequence[str], *, keep_undo: bool) -> None:
    """Raises `PlanError` if properties of the source would be lost without an undo file."""
    if losses and not keep_undo:
        raise PlanError(
            f"{source}: in place, these properties would be lost: {'; '.join(losses)}",
            hint="--keep-undo allows it, because vmconv undo brings them back; or convert to another file",
        )
