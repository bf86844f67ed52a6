"""The layer of the source that stays as the parent of new images: `-B`, and formats that refer to the source."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vmconv.conversion.containers import Kept, Target, keep_source
from vmconv.errors import AccessError, PlanError, UsageError, os_errors
from vmconv.model import references
from vmconv.model.layout import Backing

if TYPE_CHECKING:
    from vmconv.conversion.request import Request
    from vmconv.io.opener import Opener
    from vmconv.io.registry import Registry
    from vmconv.model.image import Image


def kept_layer(request: Request, target: Target, image: Image, opener: Opener) -> Kept | None:
    """Returns the layer of the source that stays as the parent of the new images, if any.

    Raises `PlanError` if one of the layers that stay is not read without the user's help, or without a search.
    """
    kept = _kept(request, target, image, opener.registry)
    # All are opened first: a layer is displaced once its parent was found.
    for layer in list(kept.image.chain()) if kept else ():
        if opener.is_displaced(layer.file):
            raise PlanError(
                f"{layer.file.name}: stays below the target, and its own parent is not where it says",
                hint="vmconv rebase -u stores where it is; without a backing file all layers become one image",
            )
    return kept


def _kept(request: Request, target: Target, image: Image, registry: Registry) -> Kept | None:
    if target.format.keeps_source(target.options):
        for asked, what in (
            (request.backing_file, "-B"),
            (request.snapshot, "--snapshot"),
            (request.chain, "--chain"),
            (request.is_part, "--offset and --length"),
        ):
            if asked:
                raise UsageError(
                    f"{what}: the target's backing file would be the unchanged source, and the target is an empty layer"
                )
        return keep_source(image, registry, target.directory)
    if request.backing_file is None:
        if request.backing_format is not None:
            raise UsageError(
                "a backing format needs a backing file", hint="name it with -B; --backing-format is for SOURCE's"
            )
        return None
    if not target.format.supports_backing:
        raise UsageError(f"{target.format.name} cannot have a backing file")
    if request.blank is not None:
        from vmconv.conversion.blank import kept_base

        return kept_base(request, image, registry, target.directory)
    path = os.path.join(os.path.dirname(request.target), request.backing_file)
    with os_errors("cannot be used as backing file", AccessError):
        wanted = os.stat(path)
    for layer in image.chain():
        if layer is not image and (layer.file.stamp.device, layer.file.stamp.inode) == (wanted.st_dev, wanted.st_ino):
            _refuse_other_format(request.backing_format, layer, registry)
            return Kept(layer, Backing(references.plain(request.backing_file), layer.format_name))
    raise PlanError(
        f"{path}: is not a backing file of {image.file.name}",
        hint="-B keeps a part of the source's own chain; its path is relative to the target's directory",
    )


def _refuse_other_format(stated: str | None, layer: Image, registry: Registry) -> None:
    """Raises `UsageError` if the backing format differs from the format in which the layer was read."""
    if stated is not None and registry.format(stated).name != layer.format_name:
        raise UsageError(
            f"{layer.file.name}: is read as {layer.format_name} in this chain, and cannot be declared as {stated}",
            hint=f"omit the backing format, or give {layer.format_name}",
        )
