"""Persistent bitmaps: changed where they lie."""

from __future__ import annotations

from collections.abc import Iterator
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


def _changes(asked: Bitmapping) -> Iterator[BitmapChange]:
    if not asked.changes:
        raise UsageError("no change of the bitmap was asked for", hint="such as --add, --clear or --remove")
    verbs = get_args(BitmapVerb)
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
