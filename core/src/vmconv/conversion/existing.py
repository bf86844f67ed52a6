"""A target that exists and whose format, options and size stay: `convert -n` into a file."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

from vmconv.backends.targets import locate
from vmconv.errors import PlanError, UsageError
from vmconv.inplace import neighbours
from vmconv.inplace.rules import Own
from vmconv.io.opener import Opener

if TYPE_CHECKING:
    from vmconv.conversion.request import Request
    from vmconv.io.registry import Registry
    from vmconv.model.image import Image


def as_it_is(request: Request, registry: Registry) -> Request:
    """Returns a request that replaces the existing file `target` by an image with the same format, options and size.

    Returns the same request for any other target. Raises `PlanError` if the target would lose more than its content.
    """
    if not os.path.isfile(request.target):
        return request
    _refuse_options(request)
    # Its content is replaced, so it may be in use by no one else; that is checked when it is claimed.
    with Opener(
        registry, allow_external=request.allow_external, force_share=True, format_option="-O", confined=request.confined
    ) as opener:
        image = opener.image(request.target, request.target_format)
        found = registry.format(image.format_name)
        options = found.options_of(image)
        image.guest  # noqa: B018 opens the files with payload
        _refuse_losses(request, image, opener)
        _refuse_neighbours(request, image, registry)
        values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
        if "identity" in values and image.facts.identity is not None:
            values["identity"] = image.facts.identity.bytes
        return request._replace(target_format=found.name, options=values, size=image.size, force=True)


def _refuse_options(request: Request) -> None:
    for given, what in (
        (request.chain, "--chain"),
        (request.in_place, "--in-place"),
        (request.backing_file is not None, "a backing file"),
        (request.blank is not None, "a new disk"),
        (request.options, "-o"),
        (request.compress, "-c"),
    ):
        if given:
            raise UsageError(f"-n keeps what {request.target} is: {what} does not apply", hint="--force replaces it")


def _refuse_losses(request: Request, image: Image, opener: Opener) -> None:
    if image.kind != "disk":
        raise PlanError(f"{request.target}: is a memory image, and -n replaces the content of disks")
    if image.parent_reference is not None:
        raise PlanError(
            f"{request.target}: is a layer on top of {image.parent_reference}, and only whole disks are replaced",
            hint="convert to a new file",
        )
    if len({file.stamp[:2] for file in opener.files}) > 1:
        raise PlanError(f"{request.target}: has several files, and -n replaces one", hint="--force replaces them")
    if image.losses and not request.force:
        raise PlanError(
            f"{request.target}: would lose {'; '.join(image.losses)}", hint="remove them, or give them up with --force"
        )
    if os.fstat(image.file.descriptor).st_nlink > 1 and not request.force:
        raise PlanError(
            f"{request.target}: has other names (hard links), which would keep the old disk",
            hint="--force replaces this name only",
        )


def _refuse_neighbours(request: Request, image: Image, registry: Registry) -> None:
    """Raises `PlanError` if another image of the directory is a layer on the target."""
    directory, name = locate(request.target)
    with directory:
        seen = neighbours.look(directory, [Own(image.file, name)], registry)
        neighbours.refuse(seen)
        neighbours.warn(seen)
