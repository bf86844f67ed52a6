"""Checks before anything is written, and before the results are named."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from vmconv.backends import targets
from vmconv.errors import AccessError, ExistsError, PlanError, UsageError, ZeroCopyError
from vmconv.interface.backend import CANNOT_SHARE
from vmconv.io.directory import Directory
from vmconv.model.extents import MAX_SIZE
from vmconv.model.plan import Plan
from vmconv.model.sources import File

if TYPE_CHECKING:
    from vmconv.conversion.containers import Container
    from vmconv.conversion.request import Request
    from vmconv.interface.format import Format
    from vmconv.io.registry import Registry
    from vmconv.machine.request import MachinePlan
    from vmconv.model.image import Image


_SECTOR = 512
_WORDS = {"disk": "a disk", "memory": "a memory image"}


def refuse_other_kind(name: str, kind: str, target: Format, registry: Registry) -> None:
    """Raises `UsageError` unless `target` holds images of this kind; `name` is that of the source's file."""
    if target.kind != kind:
        there = sorted(key for key, one in registry.all_formats.items() if one.kind == kind and one.can_write)
        raise UsageError(
            f"{name}: is {_WORDS[kind]}, and {target.name} holds {_WORDS[target.kind]}",
            hint=f"formats of {_WORDS[kind]}: {', '.join(there) or 'none is installed'}",
        )


def refuse_bitmaps(image: Image, target: Format) -> None:
    """Raises `UsageError` if an image has bitmaps to carry over that `target` cannot hold."""
    if image.bitmaps and not target.keeps_bitmaps:
        raise UsageError(f"--bitmaps: {target.name} has no bitmaps", hint="omit --bitmaps, or convert to qcow2")


def refuse_copies(target: str, zero_copy: str, plan: Plan | MachinePlan) -> None:
    """Raises `ZeroCopyError` if `zero_copy` is "require" and the plan copies payload."""
    if zero_copy == "require" and plan.copies:
        why = "; ".join(f"{copy.bytes} bytes would have to be copied because {copy.reason}" for copy in plan.copies)
        raise ZeroCopyError(f"{target}: {why}")


def refuse_other_states(containers: Iterable[Container], directory: Directory) -> None:
    """Raises `PlanError` if a file beside a memory image of several files would take one of them for a part of it.

    Such files find each other by name: `web.vmsn` would be read with a new `web.vmem`, the memory of another time.
    """
    for made in containers:
        names = {out.name or made.name for out in made.layout.files}
        if made.format.kind != "memory" or len(names) < 2:
            continue
        stem = os.path.splitext(made.name)[0]
        spelled = (f"{stem}{suffix}" for each in made.format.suffixes for suffix in (each, each.upper()))
        for name in spelled:
            if name not in names and directory.has(name):
                said = f"would be read as a part of {directory.join(made.name)}, which is of another machine or time"
                raise PlanError(f"{directory.join(name)}: {said}", hint="choose another name, or move that file away")


@contextmanager
def no_collisions(
    plan: Plan,
    directory: Directory,
    sources: Sequence[File],
    *,
    force: bool,
    but: Collection[str] = frozenset(),
    spared: Collection[tuple[int, int]] = frozenset(),
    hint: str = "--force replaces it",
) -> Iterator[None]:
    """Raises `PlanError` if a target file is part of the source, exists, or is planned twice.

    `but` are names of source files that the target may reuse. `spared` are device and inode of files that other
    conversions read. `hint` is that of a file that exists. With `force`,
    existing files are replaced: the block holds their locks, and raises `AccessError` if another process uses one.
    """
    made: set[str] = set()
    with ExitStack() as claims:
        for file in plan.files:
            path = directory.join(file.name)
            if file.name in made:
                raise PlanError(f"{path}: would be made twice", hint="choose another name for the target")
            made.add(file.name)
            there = directory.status(file.name)
            if file.name in but or there is None:
                continue
            _refuse_existing(path, there, sources, force=force, hint=hint)
            if (there.st_dev, there.st_ino) in spared:
                raise PlanError(
                    f"{path}: is part of another source of this run",
                    hint="choose another directory for the targets, or convert one after the other",
                )
            claims.enter_context(targets.claim_for_replacement(directory, file.name))
        yield


def refuse_existing(directory: Directory, name: str, sources: Sequence[File], *, force: bool) -> None:
    """Raises the errors of `no_collisions` for one name, before a plan that takes long to make."""
    there = directory.status(name)
    if there is not None:
        _refuse_existing(directory.join(name), there, sources, force=force, hint="--force replaces it")


def _refuse_existing(path: str, there: os.stat_result, sources: Sequence[File], *, force: bool, hint: str) -> None:
    if _is_one_of(there, sources):
        raise PlanError(f"{path}: is part of the source", hint="choose another name or directory for the target")
    if not force:
        raise ExistsError(f"{path}: already exists", hint=hint)


def _is_one_of(there: os.stat_result, files: Sequence[File]) -> bool:
    return any((file.stamp.device, file.stamp.inode) == (there.st_dev, there.st_ino) for file in files)


def refuse_too_large(plan: Plan, request: Request | None = None) -> None:
    """Raises `PlanError` if the filesystem has too little space, instead of failing after hours of copying.

    `request` is that of a conversion, for a hint of a way without copies.
    """
    need = plan.totals.copied + plan.totals.written + sum(file.filled for file in plan.files)
    if plan.destination == "device" or not os.path.isdir(plan.directory):
        return
    space = os.statvfs(plan.directory)
    free = space.f_bavail * space.f_frsize
    # Some FUSE filesystems return zeros.
    if space.f_blocks and need > free:
        raise PlanError(
            f"{plan.directory}: {need} bytes would have to be written, {free} are free",
            hint="--in-place needs space for metadata only; -o subformat=reference of qcow2 and vmdk refers to SOURCE"
            if request and request.can_leave_payload and _copies_for_want_of_sharing(plan)
            else None,
        )


def _copies_for_want_of_sharing(plan: Plan) -> bool:
    return any(copy.reason.endswith(CANNOT_SHARE) for copy in plan.copies)


def without_copies(request: Request, plan: Plan) -> str | None:
    """Returns the hint how to convert without the copies of a plan; None if there is no such way."""
    if not (request.can_leave_payload and _copies_for_want_of_sharing(plan)):
        return None
    return (
        "nothing is copied with --in-place, which turns SOURCE's own file into TARGET, and with -o subformat=reference "
        "of qcow2 and vmdk, which leave payload in SOURCE"
    )


def refuse_changed(files: Sequence[File]) -> None:
    """Raises `AccessError` if a source changed since it was read."""
    for file in files:
        if file.changed():
            raise AccessError(
                f"{file.name}: changed while it was being converted",
                hint="nothing was created; stop who writes to it and try again",
            )


def refuse_size(size: int) -> None:
    """Raises `UsageError` for a size in bytes that no disk has."""
    if size <= 0 or size % _SECTOR:
        next_one = max(_SECTOR, size + -size % _SECTOR)
        raise UsageError(f"size {size} is not a positive multiple of {_SECTOR}", hint=f"the next one is {next_one}")
    if size > MAX_SIZE:
        raise UsageError(f"size {size} is more than {MAX_SIZE}, the largest disk")
