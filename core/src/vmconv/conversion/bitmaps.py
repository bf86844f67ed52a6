"""Persistent bitmaps: changed where they lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from vmconv.conversion import editing
from vmconv.errors import UsageError
from vmconv.interface.arguments import Bitmapping
from vmconv.interface.format import BitmapChange, BitmapVerb
from vmconv.model.image import Image


def change_bitmaps(asked: Bitmapping) -> editing.Edited:
    """Changes a bitmap; all changes or none. Raises `PlanError` if the format has none, or the image has no room."""
    changes = list(_changes(asked))
    # Repeating an interrupted edit would add or remove twice.
    with editing.opened(asked.editing, repeatable=False) as (image, one, opener):
        editing.refuse_corrupt(image, one.check(image))
        if asked.merge_from is not None:
            changes = _with_source(changes, opener.image(asked.merge_from, asked.merge_format), image)
        draft, table = one.change_bitmaps(image, asked.name, changes), image.guest
        names = _names(image) - {asked.name}
        if changes[-1].verb != "remove":
            names |= {asked.name}

        def agrees(made: Image) -> str | None:
            if _names(made) != names:
                return f"there are {len(_names(made))} bitmaps, not {len(names)}"
            if not editing.same_table(table, made.guest):
                return "the guest has another table"
            return editing.damage(one, made)

        return editing.carry_out(image, draft, opener, asked.editing, keeps_content=True, agrees=agrees)


def _with_source(changes: Sequence[BitmapChange], source: Image, image: Image) -> list[BitmapChange]:
    """Returns the changes, merges with the image whose bitmaps they take."""
    if source.format_name != image.format_name:
        raise UsageError(f"{source.file.name}: is {source.format_name}, and {image.file.name} is {image.format_name}")
    return [one._replace(source_image=source) if one.verb == "merge" else one for one in changes]


def _changes(asked: Bitmapping) -> Iterator[BitmapChange]:
    if not asked.changes:
        raise UsageError("no change of the bitmap was asked for", hint="such as --add, --clear or --remove")
    verbs = get_args(BitmapVerb)
    if asked.merge_format is not None and asked.merge_from is None:
        raise UsageError("a format of another image was given, and no image", hint="name it with -b")
    if asked.merge_from is not None and not any(text.startswith("merge:") for text in asked.changes):
        raise UsageError("an image to merge from was given, and nothing is merged", hint="name its bitmap with --merge")
    for text in asked.changes:
        verb: Any
        verb, colon, source = text.partition(":")
        if verb not in verbs or (verb == "merge") != bool(colon):
            raise UsageError(f"{text!r} is not {', '.join(verbs[:-1])} or merge:SOURCE")
        if asked.granularity and "add" not in asked.changes:
            raise UsageError("a granularity is for a bitmap that is added")
        yield BitmapChange(verb, asked.granularity, source=source)


def _names(image: Image) -> set[str]:
    found = image.details.get("format-specific", {}).get("data", {}).get("bitmaps", ())
    return {one["name"] for one in found}
