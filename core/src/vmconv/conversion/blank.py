"""Disks without content: what `create` makes images of."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vmconv.conversion.containers import Kept, keep_source
from vmconv.conversion.refusals import refuse_size
from vmconv.errors import UsageError
from vmconv.io.known import RAW_NAME
from vmconv.model.extents import Extents, Kind
from vmconv.model.image import Image
from vmconv.model.layout import Backing
from vmconv.model.references import plain
from vmconv.model.sources import File

if TYPE_CHECKING:
    from vmconv.conversion.request import Request
    from vmconv.io.opener import Opener
    from vmconv.io.registry import Registry


def blank_image(request: Request, opener: Opener) -> Image:
    """Returns the disk of `request.blank` bytes that is all HOLE, on top of the backing file if the request has one."""
    base = _base(request, opener)
    size = _size(request, base)
    if base is None:
        # The image of a disk without payload needs a file for its name only.
        file = File(os.path.basename(request.target), os.memfd_create("vmconv-blank", os.MFD_CLOEXEC))
        opener.files.append(file)
        return Image(RAW_NAME, file, size, lambda: Extents.filled(size, Kind.HOLE))
    return Image(base.format_name, base.file, size, lambda: Extents.filled(size, Kind.HOLE), load_parent=lambda: base)


def kept_base(request: Request, image: Image, registry: Registry, directory: str) -> Kept:
    """Returns the backing file of a new disk, under the name that the user gave it."""
    assert image.parent is not None and request.backing_file is not None
    kept = keep_source(image.parent, registry, directory)
    return kept._replace(backing=Backing(plain(request.backing_file), image.parent.format_name))


def _base(request: Request, opener: Opener) -> Image | None:
    if request.backing_file is None:
        return None
    path = os.path.join(os.path.dirname(request.target), request.backing_file)
    return opener.image(path, request.backing_format)


def _size(request: Request, base: Image | None) -> int:
    size = request.blank or (base.size if base else 0)
    if not size:
        raise UsageError("a new disk needs a size", hint="give it behind the name, such as 10G")
    refuse_size(size)
    return size
