"""A conversion whose target is a stream: what does not apply, and its target."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vmconv.conversion.containers import Target, new_name
from vmconv.conversion.request import Request, options_of
from vmconv.errors import UsageError

if TYPE_CHECKING:
    from vmconv.io.registry import Registry


def refuse_with_stream(request: Request) -> None:
    if request.target_format is None:
        raise UsageError("a stream has no suffix that names a format", hint="name the format with -O")
    for given, what in (
        (request.chain, "a chain"),
        (request.no_create, "-n"),
        (request.in_place or request.keep_undo, "in place"),
        (request.backing_file is not None or request.backing_format is not None, "a backing file"),
        (request.backend != "auto", f"the backend {request.backend}"),
    ):
        if given:
            raise UsageError(f"a stream is a single image: {what} does not apply")


def stream_target(request: Request, registry: Registry) -> Target:
    """Returns the target of a stream. Its name is a guess, for formats that store their own file name."""
    wanted = registry.writer(request.target_format or "")
    options = options_of(request, wanted, registry)
    return Target.of(wanted, options, "", new_name(os.path.basename(request.source.rstrip("/")), wanted, registry))
