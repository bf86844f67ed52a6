"""Resizing: a conversion in place into the same format, with the image's own options and another size.

A file that is the disk itself only gets another end: its holes, and its space without payload, stay as they are.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vmconv.conversion import editing, pipeline
from vmconv.conversion.refusals import refuse_size
from vmconv.conversion.request import Request, Result
from vmconv.conversion.verify import planned_image
from vmconv.errors import AccessError, PlanError, UsageError, os_errors
from vmconv.inplace.rules import refuse_undo_file
from vmconv.inplace.settling import refuse_interrupted, settle
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.model.draft import Draft
from vmconv.model.extents import on_storage
from vmconv.model.sources import stamp_of
from vmconv.system import linux

if TYPE_CHECKING:
    from vmconv.conversion.pipeline import Prepared
    from vmconv.interface.arguments import Resizing
    from vmconv.model.image import Image
    from vmconv.model.plan import Plan

_STEP = 1 << 20
"""Bytes of zeros that are written at once."""


def resize(asked: Resizing, announce: Callable[[Plan], None] | None = None) -> Result:
    """Gives a disk another size. Payload stays where it lies; `announce` gets the plan, with what must be copied.

    Raises `UsageError` for a size that no disk has. Raises `PlanError` if the disk would become smaller without
    `shrink`, or the image would lose something without an undo file, or has no space to allocate.
    """
    began = time.perf_counter()
    with Opener(
        installed(),
        allow_external=asked.allow_external,
        backing_format=asked.source_backing_format,
        # Completing an interrupted resize and resizing again would change the size twice.
        settle=refuse_interrupted if asked.relative else settle,
    ) as opener:
        image = opener.image(asked.path, asked.source_format)
        # A parent that is missing is an error of its own, with its hint.
        for _ in image.chain():
            pass
        size = image.size + asked.size if asked.relative else asked.size
        _refuse(image, size, shrink=asked.shrink)
        refuse_undo_file(image.file)
        # An undo file has the content behind a new end, which only a conversion saves.
        if _is_disk_itself(image) and not asked.keep_undo:
            return _with_another_end(asked, image, size, opener, announce, began)
        if asked.preallocation != "off":
            raise PlanError(
                f"{asked.path}: space is allocated only for a raw file of whole sectors, without --keep-undo",
                hint="convert -o preallocation=falloc makes a new image with all of its space",
            )
        request = _request(asked, image, size)

    def examine(ready: Prepared) -> None:
        _refuse_rounding(ready, asked.path, size)

    def planned(plan: Plan) -> None:
        if plan.losses and not asked.keep_undo:
            raise PlanError(f"{asked.path}: resizing would drop {plan.losses[0]}", hint="--keep-undo allows that")
        if announce:
            announce(plan)

    return pipeline.run(request, announce=planned, examine=examine)[0]


def _is_disk_itself(image: Image) -> bool:
    """True if the file is the disk byte for byte, so that its end is all that changes."""
    file = image.file
    return image.size == file.size and not file.is_device and image.guest == on_storage(file).without_holes()


def _with_another_end(
    asked: Resizing,
    image: Image,
    size: int,
    opener: Opener,
    announce: Callable[[Plan], None] | None,
    began: float,
) -> Result:
    """Gives a file that is the disk itself another size."""
    plans: list[Plan] = []

    def planned(plan: Plan) -> None:
        plans.append(plan)
        if announce:
            announce(plan)

    draft = Draft(image.file)
    draft.truncate(size)
    with _reserved(asked, image, size):
        editing.carry_out(
            image,
            draft,
            opener,
            asked.editing,
            keeps_content=False,
            agrees=lambda made: None if made.size == size else f"the disk has {made.size} bytes",
            announce=planned,
        )
    (plan,) = plans
    name, seconds = image.format_name, time.perf_counter() - began
    return Result(asked.path, asked.path, name, name, plan.backend, plan.totals, (), (), image.warnings, seconds)


@contextmanager
def _reserved(asked: Resizing, image: Image, size: int) -> Iterator[None]:
    """Allocates the space that a disk grows by, before it grows, and frees it again if it does not."""
    old, length, written = image.size, size - image.size, image.file.stamp.mtime
    if asked.preallocation == "off" or not length:
        yield
        return
    if length < 0:
        raise UsageError(f"{asked.path}: becomes smaller, and needs no preallocation={asked.preallocation}")
    try:
        with _writable(asked.path, image) as descriptor, os_errors("no space can be allocated", where=asked.path):
            linux.allocate(descriptor, old, length)
        yield
    except BaseException:
        with _writable(asked.path, image) as descriptor:
            status = os.fstat(descriptor)
            # ext4 punches no holes behind the end. Cutting a file off where it ends frees what lies there.
            if status.st_size == old:
                os.ftruncate(descriptor, old)
                os.utime(descriptor, ns=(status.st_atime_ns, written))
        raise
    if asked.preallocation == "full":
        with _writable(asked.path, image) as descriptor, os_errors("zeros cannot be written", where=asked.path):
            for at in range(old, size, _STEP):
                os.pwrite(descriptor, bytes(min(_STEP, size - at)), at)
            os.fsync(descriptor)


@contextmanager
def _writable(path: str, image: Image) -> Iterator[int]:
    """Yields a descriptor of the image's file for changes that are none of its content.

    It is closed before the file is claimed, which nobody else may have open then.
    """
    with os_errors("cannot be opened for writing", AccessError, where=path):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if stamp_of(os.fstat(descriptor))[:2] != image.file.stamp[:2]:
            raise AccessError(f"{path}: became another file", hint="try again")
        yield descriptor
        image.file.stamp = stamp_of(os.fstat(descriptor))
    finally:
        os.close(descriptor)


def _request(asked: Resizing, image: Image, size: int) -> Request:
    one = installed().format(image.format_name)
    options = one.options_of(image)
    return Request(
        asked.path,
        asked.path,
        source_format=one.name,
        target_format=one.name,
        options={field.name: getattr(options, field.name) for field in dataclasses.fields(options)},
        backing_file=image.parent_reference,
        in_place=True,
        keep_undo=asked.keep_undo,
        any_owner=asked.any_owner,
        allow_external=asked.allow_external,
        source_backing_format=asked.source_backing_format,
        size=size,
        bitmaps=one.keeps_bitmaps,
        skip_broken_bitmaps=one.keeps_bitmaps and asked.keep_undo,
    )


def _refuse(image: Image, size: int, *, shrink: bool) -> None:
    name = image.file.name
    if image.kind != "disk":
        raise PlanError(f"{name}: a memory image has the size of its machine's memory")
    refuse_size(size)
    if size < image.size and not shrink:
        raise PlanError(
            f"{name}: has {image.size} bytes, and what lies behind {size} would be lost",
            hint="shrink the partitions and filesystems in it first; --shrink then cuts off the rest",
        )


def _refuse_rounding(ready: Prepared, path: str, size: int) -> None:
    """Raises `PlanError` if the format would round the size."""
    made = planned_image(ready.containers, ready.opener.registry)
    if made.size != size:
        raise PlanError(f"{path}: cannot have {size} bytes", hint=f"the next possible size is {made.size}")
