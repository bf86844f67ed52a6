"""A conversion whose target is no file, but a stream or an object: what does not apply, and its target."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vmconv.conversion.containers import Target, new_name
from vmconv.conversion.request import Request, options_of
from vmconv.errors import UsageError
from vmconv.interface.scheme import parse_url

if TYPE_CHECKING:
    from vmconv.io.registry import Registry


def refuse_elsewhere(request: Request) -> None:
    if request.descriptor is not None and request.target_format is None:
        raise UsageError("a stream has no suffix that names a format", hint="name the format with -O")
    what_it_is = "a stream is" if request.storage is None else "an object of a store is"
    for given, what in (
        (request.chain, "a chain"),
        (request.no_create, "-n"),
        (request.in_place or request.keep_undo, "in place"),
        (request.backing_file is not None or request.backing_format is not None, "a backing file"),
        (request.backend != "auto", f"the backend {request.backend}"),
    ):
        if given:
            raise UsageError(f"{what_it_is} a single image: {what} does not apply")


def target_elsewhere(request: Request, registry: Registry) -> Target:
    """Returns the target of a stream, or an object. The name of a stream is a guess, for formats that store it."""
    if request.storage is not None:
        return _object_target(request, registry)
    wanted = registry.writer(request.target_format or "")
    options = options_of(request, wanted, registry)
    return Target.of(wanted, options, "", new_name(os.path.basename(request.source.rstrip("/")), wanted, registry))


def _object_target(request: Request, registry: Registry) -> Target:
    name = request.target_format or registry.format_by_suffix(request.target)
    if name is None:
        raise UsageError(f"{request.target}: its name has no format's suffix", hint="name the format with -O")
    wanted = registry.writer(name)
    return Target.of(wanted, options_of(request, wanted, registry), "", parse_url(request.target).name)
