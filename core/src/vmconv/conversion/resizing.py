"""Resizing: a conversion in place into the same format, with the image's own options and another size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmconv.conversion import pipeline
from vmconv.conversion.refusals import refuse_size
from vmconv.conversion.request import Request, Result
from vmconv.conversion.verify import planned_image
from vmconv.errors import PlanError
from vmconv.inplace.rules import refuse_undo_file
from vmconv.inplace.settling import refuse_interrupted, settle
from vmconv.io.opener import Opener
from vmconv.io.registry import installed

if TYPE_CHECKING:
    from vmconv.conversion.pipeline import Prepared
    from vmconv.interface.arguments import Resizing
    from vmconv.model.image import Image
    from vmconv.model.plan import Plan


def resize(asked: Resizing, announce: Callable[[Plan], None] | None = None) -> Result:
    """Gives a disk another size. Payload stays where it lies; `announce` gets the plan, with what must be copied.

    Raises `UsageError` for a size that no disk has. Raises `PlanError` if the disk would become smaller without
    `shrink`, or the image would lose something without an undo file.
    """
    with Opener(
        installed(),
        allow_external=asked.allow_external,
        backing_format=asked.source_backing_format,
        # Completing an interrupted resize and resizing again would change the size twice.
        settle=refuse_interrupted if asked.relative else settle,
    ) as opener:
        image = opener.image(asked.path, asked.source_format)
        size = image.size + asked.size if asked.relative else asked.size
        _refuse(image, size, shrink=asked.shrink)
        refuse_undo_file(image.file)
        request = _request(asked, image, size)

    def examine(ready: Prepared) -> None:
        _refuse_rounding(ready, asked.path, size)

    def planned(plan: Plan) -> None:
        if plan.losses and not asked.keep_undo:
            raise PlanError(f"{asked.path}: resizing would drop {plan.losses[0]}", hint="--keep-undo allows that")
        if announce:
            announce(plan)

    return pipeline.run(request, announce=planned, examine=examine)[0]


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
