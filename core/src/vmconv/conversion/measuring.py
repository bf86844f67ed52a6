"""The size that an image will have, from the layout of its writer; nothing is made."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from vmconv.conversion.blank import blank_image
from vmconv.conversion.refusals import refuse_other_kind
from vmconv.conversion.request import Request
from vmconv.conversion.views import refuse_references, refuse_source_kept
from vmconv.errors import PlanError, UsageError
from vmconv.inplace.settling import settle
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.model.extents import Extents
from vmconv.model.image import Image
from vmconv.model.layout import Placement
from vmconv.model.options import parse_options
from vmconv.model.sources import Source
from vmconv.model.view import ALIGNMENT

if TYPE_CHECKING:
    from vmconv.interface.arguments import Measuring
    from vmconv.interface.format import Format


class Measure(NamedTuple):
    """Bytes of all files of an image, holes included: `required` for the disk as it is, and `fully_allocated`.

    `bitmaps` is what copies of the source's bitmaps would take besides, None if one of the formats has none.
    """

    required: int
    fully_allocated: int
    bitmaps: int | None = None

    def as_json(self) -> dict[str, int]:
        """Returns the sizes with qemu-img's keys, in its order."""
        found = {} if self.bitmaps is None else {"bitmaps": self.bitmaps}
        return {**found, "required": self.required, "fully-allocated": self.fully_allocated}


def measure(asked: Measuring) -> Measure:
    """Returns the size of an image of a disk that is copied or shared, whichever is larger.

    Raises `PlanError` for an image whose size depends on the content of the disk, or that is not by itself.
    """
    if (asked.source is None) == (asked.size is None):
        raise UsageError("a disk to measure is an image, or has a size", hint="give one of them: FILE, or --size")
    registry = installed()
    target = registry.writer(asked.target_format)
    options = parse_options(target.options(), asked.options, target.name)
    _refuse_unknown_size(target, options)
    with Opener(
        registry,
        allow_external=asked.allow_external,
        force_share=asked.force_share,
        backing_format=asked.source_backing_format,
        settle=settle,
        secrets=asked.secrets,
        parents=asked.parents,
        remote=True,
    ) as opener:
        image = _image(asked, opener)
        opener.given.refuse_unused()
        refuse_other_kind(image.file.name, image.kind, target, registry)
        full = Image(image.format_name, image.file, image.size, lambda: Extents.whole(_Payload(image.size)))
        return Measure(
            _bytes(image, target, options), _bytes(full, target, options), target.bitmaps_size(image, options)
        )


def _refuse_unknown_size(target: Format, options: Any) -> None:
    refuse_source_kept(target, options)
    subformat = getattr(options, "subformat", None)
    if subformat in target.not_mountable:
        raise PlanError(
            f"{target.name} with subformat={subformat} has a size that depends on the disk's content",
            hint="vmconv plan tells it for one image",
        )


def _image(asked: Measuring, opener: Opener) -> Image:
    if asked.source is not None:
        return opener.image(asked.source, asked.source_format, snapshot=asked.snapshot)
    for given, name in ((asked.source_format, "-f"), (asked.snapshot, "-l")):
        if given is not None:
            raise UsageError(f"{name} is for an image, and --size names none")
    return blank_image(Request("-", "-", blank=asked.size), opener)


class _Payload(Source):
    """Bytes of a disk that is full."""

    def __init__(self, size: int) -> None:
        self.name = "payload"
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        return bytes(length)


def _bytes(image: Image, target: Format, options: Any) -> int:
    """Returns the bytes of all files, for a target that copies payload and for one that shares it."""
    return max(_laid_out(image, target, options, modulus) for modulus in (1, ALIGNMENT))


def _laid_out(image: Image, target: Format, options: Any, modulus: int) -> int:
    layout = target.write(image, options, Placement(modulus, os.path.basename(image.file.name)))
    refuse_references(target, layout)
    return sum(out.table.size for out in layout.files)
