"""The files of a disk in another format, without converting it: the content of mounts and exports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vmconv.conversion.refusals import refuse_other_kind
from vmconv.errors import PlanError
from vmconv.interface.format import Format
from vmconv.io.registry import installed
from vmconv.model.identity import of_disk
from vmconv.model.image import Image
from vmconv.model.layout import Layout, Placement
from vmconv.model.options import parse_options
from vmconv.model.view import ALIGNMENT, View


def views(image: Image, target: Format, options: Mapping[str, Any], name: str) -> dict[str, View]:
    """Returns the files of `image` in another format by name, `name` last.

    Except for ids, the bytes equal the output of `convert` on a filesystem with blocks of `ALIGNMENT` bytes.
    """
    parsed = parse_options(target.options(), options, target.name)
    refuse_other_kind(image.file.name, image.kind, target, installed())
    refuse_source_kept(target, parsed)
    placement = Placement(ALIGNMENT, name)
    if hasattr(parsed, "identity"):
        placement = placement._replace(identity=parsed.identity or _identity(image, target, options))
    layout = target.write(image, parsed, placement)
    refuse_references(target, layout)
    return {out.name or name: View(out.table) for out in layout.files}


def _identity(image: Image, target: Format, options: Mapping[str, Any]) -> bytes:
    """Returns the identity of a view: unique per variant, stable until a file of the source changes."""
    variant = " ".join([target.name, *(f"{name}={value}" for name, value in sorted(options.items()))])
    layers = [layer.file for layer in image.chain()]
    return of_disk(image.flat, [*layers, *image.payload_files()], variant)


def refuse_source_kept(target: Format, options: Any) -> None:
    """Raises `PlanError` if the view would have the source as its backing file."""
    if target.keeps_source(options):
        raise _not_by_itself(target)


def refuse_references(target: Format, layout: Layout) -> None:
    """Raises `PlanError` if the view would name files of the source: it has no directory for relative names."""
    if layout.references:
        raise _not_by_itself(target)


def _not_by_itself(target: Format) -> PlanError:
    return PlanError(
        f"{target.name} would refer to the source's files, and what is only read has no place to name them from",
        hint="choose another -o subformat, or convert to a file",
    )
