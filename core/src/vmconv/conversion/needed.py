"""Whether a target exists and is what a conversion would make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmconv.conversion.request import Request
from vmconv.errors import ExistsError, ImageError, PlanError, UsageError
from vmconv.inspect.comparison import compare_images
from vmconv.inspect.images import opened
from vmconv.interface.arguments import Reading
from vmconv.interface.scheme import STANDARD_INPUT
from vmconv.io.registry import installed
from vmconv.model.image import Image
from vmconv.model.options import parse_options

if TYPE_CHECKING:
    from vmconv.interface.format import Format


def refuse_unanswerable(request: Request) -> None:
    """Raises `UsageError` for conversions whose target alone does not show that they are done."""
    for given, name in (
        (request.in_place, "--in-place"),
        (request.chain, "--chain"),
        (request.descriptor is not None, "standard output"),
        (request.source == STANDARD_INPUT, "standard input"),
        (request.snapshot is not None, "--snapshot"),
        (request.decompress, "--decompress"),
        (request.no_create, "-n"),
        (request.target_secret is not None, "--target-secret"),
        (request.compress, "-c"),
        (request.bitmaps, "--bitmaps"),
        (request.more_sources, "several sources"),
        (request.offset or request.length is not None, "--offset, --length"),
    ):
        if given:
            raise UsageError(f"{name}: whether a conversion is done already cannot be told")


def is_done(request: Request) -> bool:
    """True if the target has the wanted format, options and backing file, and a guest sees the source's disk in it.

    Reads payload that the two do not share. If the target is another image, returns False with `force`, and raises
    `ExistsError` without it.
    """
    refuse_unanswerable(request)
    registry = installed()
    wanted = registry.writer(request.target_format or registry.format_by_suffix(request.target) or "")
    access: dict[str, Any] = {"allow_external": request.allow_external, "force_share": request.force_share}
    access["secrets"] = request.secrets
    asked = Reading(request.source, request.source_format, request.source_backing_format, **access)
    with opened(asked._replace(parents=request.parents)) as (source, _):
        try:
            with opened(Reading(request.target, wanted.name, **access)) as (target, _):
                why = _difference(request, wanted, source, target)
        except ImageError as exc:
            why = f"and cannot be read as {wanted.name}: {exc}"
    if why and not request.force:
        raise ExistsError(f"{request.target}: already exists, {why}", hint="--force replaces it")
    return not why


def _difference(request: Request, wanted: Format, source: Image, target: Image) -> str:
    """Returns what distinguishes a target from the wanted one, in words; empty if nothing does."""
    options = parse_options(wanted.options(), request.options, wanted.name)
    if not wanted.keeps_source(options) and target.parent_reference != request.backing_file:
        return f"on the backing file {target.parent_reference}" if target.parent_reference else "without a backing file"
    if option := _other_option(request, wanted, options, target):
        return f"with another {option}"
    found = compare_images(source, target, strict=True)
    if found:
        return ""
    if found.sizes[0] != found.sizes[1]:
        return f"and has {found.sizes[1]} bytes instead of {found.sizes[0]}"
    return f"and differs from the source at {found.first_difference}"


def _other_option(request: Request, wanted: Format, options: Any, target: Image) -> str | None:
    """Returns the name of a given option that the target was not made with."""
    if not request.options:
        return None
    try:
        there = wanted.options_of(target)
    except PlanError:
        return next(iter(request.options))
    return next((name for name in request.options if getattr(there, name) != getattr(options, name)), None)
